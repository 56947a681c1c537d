"""The ledger as the source of the `session` attestor."""

from collections.abc import Callable
from datetime import datetime

from attestors.contract import AttestationUnavailable
from attestors.session import SessionSeen
from broker.errors import BrokerError
from broker.ledger.scope_records import SessionBound
from broker.ledger.session_store import Sessions
from broker.ledger.sessions import SessionRow


class RecordedSessions:
    """See attestors.session.SessionSource. Each binding is recorded."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions

    async def current(self, session: str, now: datetime) -> SessionSeen | None:
        """See attestors.session.SessionSource."""
        try:
            return _seen(await self._sessions.find(session, now))
        except BrokerError as error:
            raise AttestationUnavailable("how risky the session is cannot be read") from error

    async def bind(self, session: str, principal: str, key: str, now: datetime) -> SessionSeen | None:
        """See attestors.session.SessionSource."""
        bound = SessionBound(at=now, session=session, principal=principal, key=key)
        try:
            return _seen(await self._sessions.bind(bound))
        except BrokerError as error:
            raise AttestationUnavailable("whose key the session is bound to cannot be written") from error

    def subscribe(self, changed: Callable[[str], None]) -> Callable[[], None]:
        """See attestors.session.SessionSource."""
        return self._sessions.subscribe(changed)


def _seen(row: SessionRow | None) -> SessionSeen | None:
    if row is None:
        return None
    return SessionSeen(
        principal=row.principal, level=row.level, key=row.key, scored_at=row.scored_at, ends_at=row.ends_at
    )
