"""An embedded trust domain for a first run and for tests. Never for production: its keys live in one process's memory.

It speaks SPIRE's protocols over the same kinds of sockets, so what talks to it talks to SPIRE.

    server.py         DevTrustDomain: the sockets         domain.py   who may have what, and the bundles
    workload_api.py   SPIFFE Workload API                 entries.py  registration entries and selectors
    broker_api.py     SPIFFE Broker API                   authority.py  keys, SVIDs
    registration.py   DevEntries, in place of SPIRE's     run_as.py   registers this process, then runs a command
"""
