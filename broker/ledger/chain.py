"""The hash chain: each head is the hash of the one before and of the record's bytes.

    genesis = SHA-256("action-broker/ledger/genesis/1" 0x00 || ledger id)
    head    = SHA-256("action-broker/ledger/record/1" 0x00 || head before || seq || length || record)

seq and length are 8 bytes, big-endian. The ledger id is 32 random bytes made with the store, so that no record of one
ledger fits into another. Whoever holds head and seq can prove any change to what came before; whoever can write the
store can chain it anew, which is what checkpoints outside it are for (checkpoint.py).
"""

import hashlib

HASH_BYTES = 32
_GENESIS = b"action-broker/ledger/genesis/1\0"
_RECORD = b"action-broker/ledger/record/1\0"


def genesis(ledger_id: bytes) -> bytes:
    """The head of the empty ledger with this id."""
    return hashlib.sha256(_GENESIS + ledger_id).digest()


def link(previous: bytes, seq: int, body: bytes) -> bytes:
    """The head after record `seq` (the first is 1)."""
    return hashlib.sha256(
        b"%b%b%b%b%b" % (_RECORD, previous, seq.to_bytes(8), len(body).to_bytes(8), body),
    ).digest()
