"""Sessions, scores and security events to fill a ledger with."""

import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from pathlib import Path

import apsw
import msgspec
from support.ledger_records import NOW, PRINCIPAL, open_ledger

from broker.ledger.group import Limits
from broker.ledger.scope_records import SecurityEvent, SessionBound, SessionScored
from broker.ledger.session_store import Sessions
from broker.ledger.sessions import Taken
from broker.ledger.store import Ledger

GUARDRAIL = "spiffe://acme.test/guardrail"
TRANSMITTER = "https://caep.acme.test"
KEY, OTHER_KEY = "key-of-the-agent", "key-of-somebody"
OTHER = "spiffe://acme.test/build/other"
REVOKED = "https://schemas.openid.net/secevent/caep/event-type/session-revoked"
RISK = "https://schemas.openid.net/secevent/caep/event-type/risk-level-change"


def scored(level: str = "LOW", session: str = "s-1", *, now: datetime = NOW, **changes: object) -> SessionScored:
    """The guardrail's word."""
    made = SessionScored(at=now, session=session, principal=PRINCIPAL, level=level, by=GUARDRAIL, policies=("scores",))
    return msgspec.structs.replace(made, **changes)


def said(level: str = "HIGH", session: str = "s-1", *, after_s: float = 0, **changes: object) -> SessionScored:
    """The same as an event says it: after_s seconds after NOW, when it also arrives."""
    at = NOW + timedelta(seconds=after_s)
    told: dict[str, object] = {"by": TRANSMITTER, "policies": (), "said_at": at}
    return scored(level, session, now=at, **(told | changes))


def event(jti: str = "e-1", *, now: datetime = NOW, kind: str = RISK) -> SecurityEvent:
    digest = hashlib.sha256(f"{TRANSMITTER} {jti}".encode()).hexdigest()
    return SecurityEvent(at=now, issuer=TRANSMITTER, event=digest, type=kind, effect="none", token_sha256="77" * 32)


def bound(session: str = "s-1", key: str = KEY, *, now: datetime = NOW, principal: str = PRINCIPAL) -> SessionBound:
    return SessionBound(at=now, session=session, principal=principal, key=key)


class Desk:
    """Sessions of a ledger, with short names for what tests do."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger, self.sessions = ledger, Sessions(ledger.submit)
        self.told: list[str] = []
        self.sessions.subscribe(self.told.append)

    async def score(self, level: str = "LOW", session: str = "s-1", *, lowers: bool = True, **changes: object) -> str:
        row = await self.sessions.score(scored(level, session, **changes), lowers=lowers)
        return row.level

    async def take(
        self, level: str = "HIGH", session: str = "s-1", *, jti: str = "", after_s: float = 0, **changes: object
    ) -> Taken:
        """An event that says this. changes: `issued_after_s`, `lowers`; others of what it says."""
        lowers, issued_s = changes.pop("lowers", True), float(changes.pop("issued_after_s", after_s))
        what = said(level, session, after_s=after_s, **changes)
        record = event(jti or f"{level} {session} {after_s}", now=what.at)
        what = msgspec.structs.replace(what, event=record.event)
        return await self.sessions.take(record, NOW + timedelta(seconds=issued_s), what, lowers=lowers)

    async def bind(self, key: str = KEY, session: str = "s-1", **changes: object) -> str | None:
        """Whose key the session has then; None where it is unknown."""
        row = await self.sessions.bind(bound(session, key, **changes))
        return row and row.key

    async def level(self, session: str = "s-1", after_s: float = 0) -> str | None:
        row = await self.sessions.find(session, NOW + timedelta(seconds=after_s))
        return row and row.level

    async def key(self, session: str = "s-1", after_s: float = 0) -> str | None:
        row = await self.sessions.find(session, NOW + timedelta(seconds=after_s))
        return row and row.key


@asynccontextmanager
async def desk(
    folder: Path, clock: Callable[[], datetime] | None = None, limits: Limits | None = None
) -> AsyncIterator[Desk]:
    async with await open_ledger(folder, clock, limits) as ledger:
        yield Desk(ledger)


def sql(folder: Path, text: str, *values: int | str) -> list[tuple[object, ...]]:
    """What somebody with the file does to it."""
    connection = apsw.Connection(str(folder / "ledger.db"))
    connection.set_busy_timeout(5_000)
    try:
        return connection.execute(text, values or None).fetchall()
    finally:
        connection.close()
