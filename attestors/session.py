"""Facts on the session that an agent acts in: how risky others than the agent say it is.

A session exists once somebody else scored it. It belongs to one principal and to the first key that names it, so an
agent that was led astray gets no better session by naming another one. One whose risk is HIGH is no fact but a refusal,
whatever policy says. Levels: OpenID CAEP 1.0 section 3.8, https://openid.net/specs/openid-caep-1_0-final.html
"""

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Literal, Protocol

from attestors.contract import AttestationFailed, AttestationRequest, FactKey, Facts

Level = Literal["LOW", "MEDIUM", "HIGH"]
LEVELS: Final[tuple[Level, ...]] = ("LOW", "MEDIUM", "HIGH")
HIGH: Final = LEVELS[-1]
_ID: Final = re.compile(r"[A-Za-z0-9._~-]{1,128}")  # RFC 3986 section 2.3, unreserved: it is a part of a URI as it is


def is_session_id(text: str) -> bool:
    """Whether a session can have this name."""
    return _ID.fullmatch(text) is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionSeen:
    """A session that somebody scored. key: its thumbprint, "" until one named the session.

    ends_at: when it is forgotten unless it is scored again.
    """

    principal: str
    level: Level
    key: str
    scored_at: datetime
    ends_at: datetime


class SessionSource(Protocol):
    """Where sessions are written down."""

    async def current(self, session: str, now: datetime) -> SessionSeen | None:
        """The session as it is now; None where nobody scored it, or it is forgotten.

        Raises: AttestationUnavailable when it cannot be read.
        """

    async def bind(self, session: str, principal: str, key: str, now: datetime) -> SessionSeen | None:
        """Binds the session to the key if it has none: the session as it is then, whoever's key it has.

        Of two keys that come at once one is first, for good. Raises: AttestationUnavailable when it cannot be written.
        """

    def subscribe(self, changed: Callable[[str], None]) -> Callable[[], None]:
        """Calls `changed` with the id of each session that was scored, in the event loop. Returns what ends it."""


class SessionAttestor:
    """Fills `context.session`: `{"id": …, "level": "LOW" or "MEDIUM", "scored_at": seconds since 1970}`."""

    name = "session"

    def __init__(self, source: SessionSource) -> None:
        self._source = source

    async def attest(self, request: AttestationRequest, now: datetime) -> Facts | None:
        """Looks now, and binds the session to the caller's key if it is the first that names it. None: it names none.

        What is decided again names a session that is bound already: it binds nothing.

        Raises: AttestationFailed for a session that nobody scored, is HIGH, or belongs to another principal or key;
        AttestationUnavailable. Not checked: that who scored it may; that was decided and recorded when they did.
        """
        session, key = request.session, request.confirmation
        if not session:
            return None
        if not is_session_id(session):
            raise AttestationFailed("no session can have this name: 1 to 128 of A-Z a-z 0-9 . _ ~ -")
        if not key:
            raise AttestationFailed("a session belongs to a key, and the caller proved none")
        seen = _required(await self._source.current(session, now), request)
        if not seen.key and not request.credential:
            seen = _required(await self._source.bind(session, request.principal, key, now), request)
        if seen.key != key:
            raise AttestationFailed(f"session {session} belongs to another key")
        return Facts(
            attestor=self.name,
            key=_key(session),
            values={"id": session, "level": seen.level, "scored_at": int(seen.scored_at.timestamp())},
            attested_at=now,
            expires_at=seen.ends_at,
        )

    async def watch(self) -> AsyncIterator[FactKey]:
        """Yields the key of each session that was scored, also where its level is what it was.

        That it is forgotten is not told: facts say when they end. What is scored twice before it is taken is told once.
        """
        changed: dict[str, None] = {}  # sessions, in order
        some = asyncio.Event()

        def note(session: str) -> None:
            changed[session] = None
            some.set()

        end = self._source.subscribe(note)
        try:
            while True:
                await some.wait()
                some.clear()
                told = [*changed]
                changed.clear()
                for session in told:
                    yield _key(session)
        finally:
            end()

    def blind(self) -> Mapping[str, float]:
        """Nothing is missed: who writes a score down tells it."""
        return {}


def _required(seen: SessionSeen | None, request: AttestationRequest) -> SessionSeen:
    """Raises: AttestationFailed where the caller may not act in it, whoever's key it has."""
    session = request.session
    if seen is None:
        raise AttestationFailed(f"nobody scored session {session} within the last day")
    if seen.principal != request.principal:
        raise AttestationFailed(f"session {session} belongs to another principal")
    if seen.level == HIGH:
        raise AttestationFailed(f"the risk of session {session} is {HIGH}")
    return seen


def _key(session: str) -> FactKey:
    return FactKey(f"{SessionAttestor.name}:{session}")
