"""A child process that works a ledger as hard as it can until it is killed.

usage: python -m support.crash_ledger FOLDER. Each line on standard output is something that was acknowledged, written
after the acknowledgement, so that whoever reads it may hold the ledger to it:

    ready
    intent JTI SEQ
    redeemed JTI IDEMPOTENCY-ID MICROSECONDS
    twice JTI                                  a second redemption was taken: never to be seen
"""

import asyncio
import os
import secrets
import sys
from datetime import UTC, datetime
from pathlib import Path

from support.ledger_records import intent, open_ledger, outcome

from broker.errors import Refused
from broker.ledger.store import Ledger
from broker.ledger.transaction import microseconds

WORKERS = 16
CALLER = "spiffe://acme.test/orders"
CONTENT = b"c" * 32


def utc_now() -> datetime:
    """The clock."""
    return datetime.now(UTC)


def tell(*words: object) -> None:
    """One line, in one write: a kill never tears it."""
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


async def redeem(ledger: Ledger, jti: str) -> None:
    """Once, then again under another id, which must be refused."""
    idempotency_id = secrets.token_urlsafe(16)
    found = await ledger.redeem(jti, idempotency_id, CALLER, CONTENT, now=utc_now(), correlation_id="")
    tell("redeemed", jti, idempotency_id, microseconds(found.redeemed_at))
    try:
        await ledger.redeem(jti, "another" + idempotency_id, CALLER, CONTENT, now=utc_now(), correlation_id="")
    except Refused:
        return
    tell("twice", jti)


async def work(ledger: Ledger) -> None:
    """Intents without end; most get an outcome, some are redeemed."""
    while True:
        jti = secrets.token_hex(16)
        seq = await ledger.record_intent(intent(jti, epoch=ledger.epoch, now=utc_now(), ttl_s=300))
        tell("intent", jti, seq)
        chance = secrets.randbelow(10)
        if chance:
            ledger.append_later(outcome(seq, utc_now()))
        if chance > 7:
            await redeem(ledger, jti)


async def main(folder: Path) -> None:
    """See the module."""
    ledger = await open_ledger(folder, utc_now)
    tell("ready")
    await asyncio.gather(*[work(ledger) for _ in range(WORKERS)])


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
