"""A request that goes on after it was admitted: it ends when its credential dies."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from broker.errors import BrokerError, Reason, Unavailable
from broker.guard.verify import Allowed, Guard


class CutOff(Exception):
    """The credential died while the request went on. error: of what."""

    def __init__(self, error: BrokerError) -> None:
        super().__init__(str(error))
        self.error = error


class GoingOn:
    """One admitted request. Nothing is watched before `begin`: an answer that comes in one piece is never cut."""

    def __init__(self, guard: Guard, allowed: Allowed, scope: asyncio.Timeout) -> None:
        self._guard, self._allowed, self._scope = guard, allowed, scope
        self._watch: asyncio.Task[None] | None = None
        self._dead: BrokerError | None = None
        self._told = False

    @property
    def begun(self) -> bool:
        """Whether it ends with its credential."""
        return self._watch is not None

    @property
    def cut_off(self) -> BrokerError | None:
        """Why, once the block was told."""
        return self._dead if self._told or self._scope.expired() else None

    def begin(self) -> None:
        """From now on it ends with its credential, also while nothing moves. Raises: CutOff where that died already."""
        if self._watch is None:
            self.check()
            self._watch = asyncio.create_task(self._end_when_dead(), name="guard: request that goes on")

    def check(self) -> None:
        """Before more is told. Raises: CutOff."""
        if self._dead is None:
            try:
                self._guard.still_good(self._allowed)
            except BrokerError as error:
                self._dead = error
        if self._dead is not None:
            self._told = True
            raise CutOff(self._dead)

    async def _end_when_dead(self) -> None:
        try:
            self._dead = await self._guard.until_dead(self._allowed)
        except Exception as error:  # noqa: BLE001 - deny by default: what is not known to be good is not
            self._dead = Unavailable(Reason.SCOPE_STALE, f"watching the credential: {type(error).__name__}")
        self._scope.reschedule(asyncio.get_running_loop().time())

    async def stop(self) -> None:
        """Watches no more."""
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.wait([self._watch])


@asynccontextmanager
async def while_good(guard: Guard, allowed: Allowed) -> AsyncIterator[GoingOn]:
    """While an admitted request is being served. Once `begin` was called the block is cancelled when `allowed` dies.

    Raises: CutOff, also in place of whatever the block raises once it was cut off.
    """
    going: GoingOn | None = None
    try:
        async with asyncio.timeout(None) as scope:
            going = GoingOn(guard, allowed, scope)
            try:
                yield going
            finally:
                await going.stop()
    except CutOff:
        raise
    except Exception as error:
        if going is None or (why := going.cut_off) is None:
            raise
        raise CutOff(why) from error
    if (why := going.cut_off) is not None:  # the block went on all the same
        raise CutOff(why)
