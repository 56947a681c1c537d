"""What others tell of sessions: a security event is verified, taken once, recorded with what came of it.

`risk-level-change` scores the session that it names; `session-revoked` scores it HIGH. Without a session both are about
all sessions of the workload that they name, and raise them only. Every other event tells nothing that a fact of ours
rests on: it is recorded, and has no effect.
"""

import asyncio
from datetime import datetime

import structlog

from broker.errors import Reason
from broker.exchange import Exchange
from broker.identity.event_refused import Err, EventRefused
from broker.identity.event_subject import EventSubject
from broker.identity.security_event import SecurityEvents, VerifiedEvent
from broker.in_time import InTime
from broker.ledger.scope_records import SecurityEvent, SessionScored
from broker.ledger.session_store import Sessions

_log = structlog.get_logger(__name__)


class EventReceiver:
    """Takes the events of configured transmitters."""

    def __init__(self, exchange: Exchange, sessions: Sessions, events: SecurityEvents) -> None:
        self._exchange, self._sessions, self._events = exchange, sessions, events

    async def take(self, token: str, authorization: str | None, now: datetime, correlation_id: str) -> None:
        """Takes one; durable when it returns. One that was taken before is taken again without any effect.

        authorization: the value of that header. Raises: EventRefused; Refused(QUOTA); Refused(EXPIRED) where it may
        have been taken before the clock was set back; Unavailable.
        """
        exchange = self._exchange
        with exchange.counted():
            event = await self._events.verify(token, authorization, now)
            exchange.quota.take(event.by.issuer, asyncio.get_running_loop().time())
            async with InTime(Reason.LEDGER_UNAVAILABLE):
                subject = await self._allowed(event, now)
                taken = await self._sessions.take(
                    SecurityEvent(
                        at=now,
                        correlation_id=correlation_id,
                        issuer=event.by.issuer,
                        event=event.id,
                        type=event.type,
                        effect="none",
                        token_sha256=event.token_sha256,
                        detail=event.reason,
                    ),
                    event.issued_at,
                    _scored(event, subject, now, correlation_id),
                    lowers=event.by.lowers,
                )
        _log.info(
            "security_event",
            issuer=event.by.issuer,
            type=event.type.value,
            effect="repeated" if taken.repeated else taken.effect,
            correlation_id=correlation_id,
        )

    async def _allowed(self, event: VerifiedEvent, now: datetime) -> EventSubject:
        """Whom it is about, as far as its transmitter may speak of them. Raises: EventRefused(ACCESS_DENIED)."""
        subject, by = event.subject, event.by
        if event.level is None or not by.principals:
            return subject
        principal = subject.principal
        if subject.session and not principal:
            known = await self._sessions.find(subject.session, now)
            principal = "" if known is None else known.principal
        if not principal:
            return EventSubject()
        if not by.may_score(principal):
            raise EventRefused(Err.ACCESS_DENIED, f"{by.issuer} may not score sessions of {principal}")
        return EventSubject(session=subject.session, principal=principal)


def _scored(event: VerifiedEvent, subject: EventSubject, now: datetime, correlation_id: str) -> SessionScored | None:
    """What it says of a session, or of all of its principal's; None where it says nothing of that."""
    if event.level is None:
        return None
    return SessionScored(
        at=now,
        correlation_id=correlation_id,
        session=subject.session,
        principal=subject.principal,
        level=event.level,
        by=event.by.issuer,
        event=event.id,
        said_at=event.said_at,
        detail=event.reason,
    )
