"""Sessions as the rest of the broker sees them: `Ledger`, in a file of its own."""

import asyncio
from collections.abc import Callable
from datetime import datetime
from typing import Any, cast

from broker.errors import Unavailable
from broker.ledger import sessions
from broker.ledger.operations import Operation
from broker.ledger.scope_records import SecurityEvent, SessionBound, SessionScored
from broker.ledger.sessions import SessionRow, Taken


class Sessions:
    """Scores, bindings and security events of one ledger. submit: `Ledger.submit`.

    Every method that waits raises Unavailable(LEDGER_UNAVAILABLE) as the ledger's do. What changes something is
    durable, and covered by a checkpoint outside, before it returns.
    """

    def __init__(self, submit: Callable[[Operation], asyncio.Future[Any]]) -> None:
        self._submit = submit
        self._loop = asyncio.get_running_loop()
        self._subscribers: dict[Callable[[str], None], None] = {}

    def subscribe(self, callback: Callable[[str], None]) -> Callable[[], None]:
        """Calls back with a session's id after each score of it that is durable, also one that changes no level.

        Also where a score may be durable although it could not be answered. Not told: what is forgotten, and bindings.
        Returns what ends it.
        """
        self._subscribers[callback] = None
        return lambda: self._subscribers.pop(callback, None)

    async def find(self, session: str, now: datetime) -> SessionRow | None:
        """The session with this id; None where it is unknown or forgotten."""
        return cast("SessionRow | None", await self._submit(sessions.FindSession(session=session, now=now)))

    async def score(self, scored: SessionScored, *, lowers: bool) -> SessionRow:
        """Scores a session, and makes it where it is unknown: as it is then. Not checked: who says so.

        lowers: whether this may lower its level. Raises: Refused DENIED where it would and may not, and for a session
        of another principal.
        """
        future = self._submit(sessions.Score(scored=scored, lowers=lowers))
        future.add_done_callback(lambda done: self._tell(done, scored.session, lambda _: (scored.session,)))
        return cast("SessionRow", await asyncio.shield(future))  # who asked may go away; who waits is told all the same

    async def take(
        self,
        event: SecurityEvent,
        issued_at: datetime,
        scored: SessionScored | None,
        *,
        lowers: bool,
    ) -> Taken:
        """Takes a security event token, once, with what comes of it. Not checked: that it is one.

        scored: what it says of a session; without a `session`, of all of its principal's. lowers: as for `score`.
        Raises: Refused EXPIRED where it may have been taken, and that been forgotten.
        """
        future = self._submit(sessions.TakeEvent(event=event, issued_at=issued_at, scored=scored, lowers=lowers))
        session = "" if scored is None else scored.session
        future.add_done_callback(lambda done: self._tell(done, session, lambda taken: taken.sessions))
        return cast("Taken", await asyncio.shield(future))

    async def bind(self, bound: SessionBound) -> SessionRow | None:
        """Binds the session to this key if it has none: the session as it is then, whoever's key it has.

        None where it is unknown. Nothing is bound to one that is HIGH or another principal's.
        """
        return cast("SessionRow | None", await self._submit(sessions.Bind(bound=bound)))

    def _tell(self, done: asyncio.Future[Any], session: str, told: Callable[[Any], tuple[str, ...]]) -> None:
        """session: which it is about where it is not known what came of it, "" for several or none."""
        if done.cancelled():
            return
        if done.exception() is None:
            changed = told(done.result())
        else:
            changed = (session,) if session and isinstance(done.exception(), Unavailable) else ()
        for one in changed:
            for callback in tuple(self._subscribers):
                self._loop.call_soon(callback, one)
