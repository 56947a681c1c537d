"""Follows the broker's scope feed, for as long as a guard runs: comes back by itself, and misses nothing.

    async with ScopeFeed(broker, audiences=["spiffe://acme.test/service/orders"]) as scope:
        guard = Guard(issuer="https://broker.acme.test", audience="spiffe://acme.test/service/orders", scope=scope)

The issuer's keys ride along, so a guard with a feed needs no key set from elsewhere. While nothing proven was heard for
`max_silence` (5 s), everything is refused as `scope_stale`.
"""

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Any, Final, Protocol, Self

from cryptography.hazmat.primitives.asymmetric import ec

from broker._proto.actionbroker.v1 import scope_pb2
from broker.action import check_uri
from broker.credentials.action_token import VerifiedClaims
from broker.errors import BrokerError, Unavailable
from broker.guard.keys import boot_seconds
from broker.guard.scope_state import MAX_SILENCE, FeedBroken, ScopeState

FIRST_PAUSE: Final = 0.05
LONGEST_PAUSE: Final = 1.0
KEY_PATIENCE: Final = 2.0
"""How long an unknown key may wait for a feed that has just broken off: a broker that starts signs with new keys."""
_LOOK: Final = 0.25

_log = logging.getLogger("broker.guard")


class ScopeSource(Protocol):
    """Where the feed comes from: `broker.client.Client` is one."""

    def watch_scope(
        self, audiences: Sequence[str], *, feed: str = "", after: int = 0
    ) -> AsyncIterator[scope_pb2.WatchResponse]:
        """One stream, until it breaks off. Raises: BrokerError."""


class ScopeFeed:
    """What the broker says about credentials for these audiences. Belongs to one event loop; enter it once.

    clock: aware UTC. seconds: a clock that never goes back, and counts time in which the machine slept.
    """

    def __init__(
        self,
        source: ScopeSource,
        *,
        audiences: Sequence[str],
        max_silence: timedelta = MAX_SILENCE,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        seconds: Callable[[], float] = boot_seconds,
    ) -> None:
        self.audiences: Final = tuple(check_uri(audience, "an audience") for audience in audiences)
        self._source, self._clock, self._seconds = source, clock, seconds
        self._state = ScopeState(seconds, max_silence)
        self._waiting: set[asyncio.Event] = set()
        self._tasks: list[asyncio.Task[None]] = []
        self._connected = False
        self._ready = asyncio.Event()
        self.last_error: str | None = None

    async def __aenter__(self) -> Self:
        if self._tasks:
            raise RuntimeError("this feed is followed already: share it, or make another")
        self._tasks = [
            asyncio.create_task(self._follow(), name="scope feed"),
            asyncio.create_task(self._look(), name="scope feed age"),
        ]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        self._state.forget_all()
        self._wake()

    async def ready(self) -> None:
        """Returns once it is whole and fresh: bound it with asyncio.timeout."""
        while not self.is_fresh:
            self._ready.clear()
            await self._ready.wait()

    @property
    def is_fresh(self) -> bool:
        """Whether what it knows can be believed now."""
        try:
            self._state.require_fresh(self._clock())
        except Unavailable:
            return False
        return True

    # -- what guards ask ---------------------------------------------------------------------------------------------

    def require(self, claims: VerifiedClaims, now: datetime) -> None:
        """Raises: Refused where the credential is refused; Unavailable with SUSPENDED, or SCOPE_STALE."""
        self._state.require(claims, now)

    def key(self, kid: str) -> ec.EllipticCurvePublicKey:
        """The issuer's key. Raises: StaleKeys, UnknownKey."""
        return self._state.key(kid)

    def refresh_if_due(self) -> None:
        """Nothing: keys are told."""

    async def refetch(self) -> bool:
        """Whether a key that is not known may be now: waits for the feed where it is being opened again."""
        if self._connected and self.is_fresh:
            return False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(KEY_PATIENCE):
                while not (self._connected and self.is_fresh):  # what was heard before it broke off is no newer
                    self._ready.clear()
                    await self._ready.wait()
                return True
        return False

    @contextlib.contextmanager
    def changes(self) -> Iterator[asyncio.Event]:
        """Set whenever something is refused that was not, also because nothing is heard any more."""
        event = asyncio.Event()
        self._waiting.add(event)
        try:
            yield event
        finally:
            self._waiting.discard(event)

    # -- following ---------------------------------------------------------------------------------------------------

    async def _follow(self) -> None:
        pause = FIRST_PAUSE
        while True:
            try:
                await self._hear()
                self.last_error = "the broker ended the feed"
            except FeedBroken as error:
                self.last_error = str(error)
            except BrokerError as error:
                self.last_error = f"{error.reason}: {error.detail}"
                if not isinstance(error, Unavailable) and not self._connected:
                    pause = LONGEST_PAUSE  # it said no: asking at once changes nothing
            except Exception as error:  # noqa: BLE001 - a source is the user's code; whatever it raises, there is no feed
                self.last_error = f"{type(error).__name__}: {error}"
                _log.debug("feed", exc_info=error)
            if self._connected:
                pause = FIRST_PAUSE
            self._connected = False
            _log.info("the scope feed broke off: %s", self.last_error)
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311 - spreads load, hides nothing
            pause = min(2 * pause, LONGEST_PAUSE)

    async def _hear(self) -> None:
        state = self._state
        source: Any = self._source.watch_scope(self.audiences, feed=state.feed, after=state.position)
        async with aclosing(source) as messages:
            async for message in messages:
                changed = state.take(message)
                self._connected = True
                if state.is_whole:
                    self._ready.set()
                if changed:
                    self._wake()

    async def _look(self) -> None:
        """Tells who waits when what is known has grown too old, and forgets what has expired."""
        while True:
            await asyncio.sleep(_LOOK)
            self._state.forget(self._clock())
            if not self.is_fresh:  # whether or not it was since the last look
                self._wake()

    def _wake(self) -> None:
        for one in self._waiting:
            one.set()
