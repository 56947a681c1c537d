"""Action Broker: a credential for every act, and no longer than its reasons last.

How a request walks through the rooms (broker/exchange.py is the same as code):

    identify ──► attest ──► decide ──► record intent ──► mint ──► record outcome
     identity/   decision/  decision/  ledger/           credentials/  ledger/

- identity/     who asks: an SVID checked against its own trust domain's bundle, or the process behind a Unix socket
- decision/     may it: facts from attestors/, then Cedar, deny by default; only `decide` makes a Grant
- ledger/       what happened: the intent is durable before a key is used
- credentials/  what it gets: one token for one action, bound to one key
- edges/        gRPC, HTTP and Unix socket, with one table from reason to status
- guard/        what receiving services import          - client/  what callers import
- dev/          an embedded trust domain                - cli/     wiring and commands
"""
