"""Looks at the watched tickets of one system, again and again, and says which changed or may have.

    attested ──► followed for 310 s ──► looked at, each `poll_s` ──► says another thing, or is closed ──► told
                        ▲
                        └── a webhook says that it may have changed: told at once, looked at each second for a while

While the system cannot be asked at all nothing is told: it is `blind`, since then. A ticket that alone cannot be read,
while its system answers about others, is told.
"""

import asyncio
import random
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final, NoReturn

from attestors.contract import AttestationFailed, AttestationUnavailable
from attestors.ticket_mapping import Content, TicketName
from attestors.ticket_reads import Looked, SystemAway

AT_ONCE: Final = 8
"""Looks at one system at one time. Requests do not wait for them."""
WATCHED: Final = 16_384
"""Tickets of one system that are watched. The one attested longest ago makes room, and is told as changed."""
WATCH_S: Final = 310.0
"""How long after it was last attested a ticket is watched: no credential lives longer (300 s and leeway)."""
GAP_S: Final = 0.1
"""Between two times that one ticket is told: a flood of webhooks causes ten looks a second, and none is lost."""
SOON_S: Final = 1.0
"""Between two looks at a ticket that is said to have changed, where `poll_s` is longer."""
RESTLESS_S: Final = 10.0
"""For how long: many systems say so before the change can be read."""
BREATH_S: Final = 0.05
"""Between two rounds, where one takes longer than it should."""


@dataclass(slots=True)
class _Watched:
    """said: what the newest facts have. Times are the event loop's.

    told: whether it was told since those, so that telling it again says nothing. unread: the last look failed.
    """

    said: Content
    until: float
    told: bool = False
    unread: bool = False
    last_told: float = float("-inf")
    restless_until: float = float("-inf")


class TicketPolls:
    """One system. poll_s: between two looks at each ticket. tell: a ticket, and when it may be told at the earliest."""

    def __init__(
        self, poll_s: float, look: Callable[[TicketName], Awaitable[Looked]], tell: Callable[[TicketName, float], None]
    ) -> None:
        self._poll_s, self._look, self._tell = poll_s, look, tell
        self._watched: OrderedDict[TicketName, _Watched] = OrderedDict()
        self._woken = asyncio.Event()
        self._whole = self._soon = float("-inf")  # when all, and when restless ones, are looked at next
        self._blind_since: float | None = None

    @property
    def blind_since(self) -> float | None:
        """Since when the system cannot be asked; None where it can be, or nobody needs to."""
        return self._blind_since if self._watched else None

    def follow(self, name: TicketName, said: Content) -> None:
        """It was just attested so. Where it said another thing before, older credentials rest on that: it is told."""
        now = asyncio.get_running_loop().time()
        watched = self._watched.pop(name, None)
        if watched is None:
            watched = _Watched(said, 0)
        elif watched.said != said:
            self._changed(name, watched)
        if not self._watched:  # it was just looked at
            self._whole = now + self._interval()
            self._woken.set()
        self._watched[name] = watched
        watched.said, watched.until, watched.told, watched.unread = said, now + WATCH_S, False, False
        if len(self._watched) > WATCHED:
            self.lost(next(iter(self._watched)))

    def lost(self, name: TicketName) -> None:
        """It was just seen not to be open, or not to be there. It is watched no longer."""
        watched = self._watched.pop(name, None)
        if watched is not None:
            self._changed(name, watched)

    def hint(self, name: TicketName) -> bool:
        """Somebody says that it may have changed. Whether it is watched; where not, nothing rests on it."""
        watched = self._watched.get(name)
        if watched is None:
            return False
        now = asyncio.get_running_loop().time()
        watched.restless_until = now + RESTLESS_S
        if self._soon <= now:
            self._soon = now + SOON_S
        self._tell(name, watched.last_told + GAP_S)
        self._woken.set()
        return True

    def was_told(self, name: TicketName) -> None:
        """Just now."""
        watched = self._watched.get(name)
        if watched is not None:
            watched.told, watched.last_told = True, asyncio.get_running_loop().time()

    async def run(self) -> NoReturn:
        """Looks at what is watched, while somebody listens."""
        loop = asyncio.get_running_loop()
        while True:
            await self._until_due()
            started = loop.time()
            for name in [name for name, watched in self._watched.items() if watched.until <= started]:
                del self._watched[name]
            whole = started >= self._whole
            names = [name for name, one in self._watched.items() if whole or one.restless_until > started]
            self._soon = started + SOON_S
            if whole:
                self._whole = started + self._interval()
            await self._round(names, started, whole=whole)
            await asyncio.sleep(BREATH_S)

    def _interval(self) -> float:
        """Jitter downwards, so that the bound holds and a fleet of brokers does not ask in step."""
        return self._poll_s * random.uniform(0.8, 1.0)  # noqa: S311 - spreads load, hides nothing

    async def _until_due(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            now, due = loop.time(), None
            if self._watched:
                restless = any(one.restless_until > now for one in self._watched.values())
                due = min(self._whole, self._soon) if restless else self._whole
                if due <= now:
                    return
            self._woken.clear()
            try:
                async with asyncio.timeout_at(due):
                    await self._woken.wait()
            except TimeoutError:
                continue

    async def _round(self, names: Sequence[TicketName], started: float, *, whole: bool) -> None:
        """One look at each of these, in an order of its own, so that none stands before the others each time."""
        found = _Round(self._look, random.sample(names, len(names)))
        async with asyncio.TaskGroup() as group:
            for _ in range(min(AT_ONCE, len(names))):
                group.create_task(found.work(self._seen))
        if found.is_away and not whole:
            self._whole = started  # a few say little: all are looked at
        elif found.is_away:
            self._blind_since = started if self._blind_since is None else self._blind_since
        else:
            for name in found.failed:
                self._unread(name)
            if whole:
                self._blind_since = None

    def _seen(self, name: TicketName, found: Looked) -> None:
        watched = self._watched.get(name)
        if watched is None:
            return
        if isinstance(found, AttestationFailed):
            self.lost(name)
        elif isinstance(found, AttestationUnavailable):
            self._unread(name)
        else:
            watched.unread = False
            if found != watched.said:
                watched.said = found
                self._changed(name, watched)

    def _unread(self, name: TicketName) -> None:
        watched = self._watched.get(name)
        if watched is not None and not watched.unread:
            watched.unread = True
            self._changed(name, watched)

    def _changed(self, name: TicketName, watched: _Watched) -> None:
        if not watched.told:
            self._tell(name, watched.last_told + GAP_S)


class _Round:
    """The looks of one round. Once none gets through the others are not tried."""

    def __init__(self, look: Callable[[TicketName], Awaitable[Looked]], names: Sequence[TicketName]) -> None:
        self._look = look
        self._left = iter(names)
        self._answered, self._in_a_row = False, 0
        self.failed: list[TicketName] = []  # their system did not answer

    async def work(self, seen: Callable[[TicketName, Looked], None]) -> None:
        """Looks at one after the other of those left. Some run side by side. seen: what each look showed."""
        for name in self._left:
            if self._in_a_row >= AT_ONCE:
                return
            found = await self._look(name)
            if isinstance(found, SystemAway):
                self._in_a_row += 1
                self.failed.append(name)
            else:
                self._answered, self._in_a_row = True, 0
                seen(name, found)

    @property
    def is_away(self) -> bool:
        """Whether the system, and not only a ticket, was out of reach."""
        return bool(self.failed) and (not self._answered or self._in_a_row >= AT_ONCE)
