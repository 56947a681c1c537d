"""Action Broker: a credential for every act, and no longer than its reasons last.

How a request walks through the rooms (broker/exchange.py is the same as code):

    identify ──► attest ──► decide ──► record intent ──► mint ──► record outcome
     identity/   decision/  decision/  ledger/           credentials/  ledger/

A signature takes two walks (sign.py): one for the grant, and one when it is spent (redemption.py), on fresh facts:

    identify ──► verify grant ──► attest ──► decide ──► spend it and record intent ──► act ──► store answer ──► answer
                                  again; a no spends it      ledger/            acts.py, signing/     ledger/

Where approvals are all that a request lacks it is laid down (approvals.py); others approve it by the same walk.

- exchange.py   the flow; intents.py what it records; in_time.py how long it may take
- artifacts.py  which artifacts, for what, by which signer: part of the action, so of its digest
- provenance.py each envelope of evidence decided on for itself
- approvals.py  the desk; approval_records.py what the ledger has of it; approval_text.py what approvers read
- recheck.py, operate.py   Check and Redeem; Explain

- identity/     who asks: an SVID checked against its own domain's bundle, the process behind a Unix socket, a person
- decision/     may it: facts from attestors/, then Cedar, deny by default; only `decide` makes a Grant
- ledger/       what happened: the intent is durable before a key is used
- credentials/  what it gets: one token or signing grant for one action, bound to one key
- signing/      what a signature takes: keys, tokens, certificates, timestamps, bundles, and what verifies them
- edges/        gRPC, HTTP and Unix socket, with one table from reason to status
- guard/        what receiving services import          - client/  what callers import
- dev/          an embedded trust domain                - cli/     wiring and commands
"""
