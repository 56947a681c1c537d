"""A child process that works a ledger as hard as it can until it is killed.

usage: python -m support.crash_ledger FOLDER. Each line on standard output is something that was acknowledged, written
after the acknowledgement, so that whoever reads it may hold the ledger to it:

    ready
    intent JTI SEQ
    redeemed JTI IDEMPOTENCY-ID MICROSECONDS
    spent GRANT IDEMPOTENCY-ID SEQ             a signing grant, on the signature with this intent
    answered GRANT                             its answer, `answer_to(GRANT)`, is stored; some never are
    used DIGEST JTI                            the approvals of this request gave this credential
    twice WHAT                                 it was used a second time: never to be seen
"""

import asyncio
import os
import secrets
import sys
from datetime import UTC, datetime
from pathlib import Path

from support.ledger_records import approved, asked, intent, open_ledger, outcome, request_digest, signature

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


def answer_to(grant: str) -> bytes:
    """What the grant's caller was sent."""
    return f"signature under {grant}".encode()


async def sign(ledger: Ledger) -> None:
    """An approved grant, spent on a signature; in half of all cases its answer is never stored."""
    request_id, grant, idempotency_id = (secrets.token_hex(16) for _ in range(3))
    digest, now = request_digest(request_id), utc_now()
    await ledger.ask_approval(asked(request_id, now=now, principal=f"spiffe://acme.test/{request_id}"))
    await ledger.approve(approved(request_id, now=now))
    made = {"epoch": ledger.epoch, "now": now, "ttl_s": 120, "credential": "signing_grant", "approval": digest}
    await ledger.record_intent(intent(grant, **made))  # type: ignore[arg-type] - what intent takes
    tell("used", digest, grant)
    try:
        await ledger.record_intent(intent(**made))  # type: ignore[arg-type] - what intent takes
        tell("twice", digest)
    except Refused:
        pass
    intended = signature(grant, epoch=ledger.epoch, now=now)
    spent = await ledger.spend(grant, idempotency_id, CALLER, CONTENT, intent=intended, now=now, correlation_id="")
    tell("spent", grant, idempotency_id, spent.intent_seq)
    if secrets.randbelow(2) and spent.intent_seq is not None:
        await ledger.store_answer(grant, answer_to(grant), outcome(spent.intent_seq, now))
        tell("answered", grant)


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
        if chance == 7:
            await sign(ledger)


async def main(folder: Path) -> None:
    """See the module."""
    ledger = await open_ledger(folder, utc_now)
    tell("ready")
    await asyncio.gather(*[work(ledger) for _ in range(WORKERS)])


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
