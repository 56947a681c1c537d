"""What happened: append-only, hash-chained, durable before anything is minted.

records · chain · note · checkpoint   values and bytes, no store
schema · transaction · operations     the SQLite file and each step that may be done in it, also in
spending · approvals                  … what counts once, and who said yes to what
recovery · writer · group · store     opening, committing, gathering; `Ledger` is what the broker uses
reading · consistency · verify        for auditors: read-only, from the file alone
"""
