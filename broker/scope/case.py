"""What rests on one thing that changed: looked at, decided, and settled one by one. See deciding.py."""

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Final, Protocol, TypeVar

import structlog

from attestors.contract import FactKey, Facts, Process
from broker.errors import BrokerError, Reason, Refused, Unavailable
from broker.scope.live import Live
from broker.scope.refusing import AGAIN_S
from broker.scope.suspending import Suspending
from broker.scope.suspension import Common, Suspension

AT_ONCE: Final = 64
"""More than so many are suspended before the first of them is decided: deciding one takes up to half a millisecond."""
APART: Final = 64
"""Credentials of one case that are decided side by side, once one of them had to wait."""
RELEASE_EACH: Final = 256
RELEASES: Final = 8
"""So many decided ones are told together: that many, or so large a part of all, whichever is more."""
RELEASE_S: Final = 0.5
"""But none of them waits longer for others."""
_OF_OURS: Final = frozenset({"action", "bundle", "standing"})  # no facts: only decided anew
_ANYBODYS: Final = frozenset({"ticket"})  # facts that are the same whoever asks: one look for all

_T = TypeVar("_T")
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """In seconds.

    blind_s: what cannot be looked at for so long is refused. again_s: between two tries to look at it, and how long
    others wait for it. patience_s: what is not decided by then is suspended.
    """

    blind_s: float = 5.0
    again_s: float = AGAIN_S
    patience_s: float = 0.01


BOUNDS: Final = Bounds()


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """What changed. name: for the ledger. key: its fact; None for all actions whose policies changed at once.

    at_once: nothing is known of what rests on it, so all of that is suspended before anything is looked at.
    """

    name: str
    key: FactKey | None = None
    common: Common | None = None
    actions: frozenset[str] = field(default_factory=frozenset)
    at_once: bool = False

    def with_those_of(self, before: "Cause | None") -> "Cause":
        """The same, with the actions of one that has not been looked at yet."""
        return self if before is None else replace(self, actions=self.actions | before.actions)


class Decides(Protocol):
    """`Deciding`, as far as one case needs it."""

    bounds: Bounds
    suspending: Suspending

    async def turn(self) -> None:
        """Waits until a decision may begin."""

    async def look(self, name: str, live: Live) -> Facts | None:
        """What this attestor says of its caller now. Raises: BrokerError."""

    def is_at_hand(self, live: Live) -> bool:
        """Whether deciding it on what it rests on waits for nobody."""

    def keep_following(self, process: Process) -> None:
        """Watches the process on. Raises: Refused, Unavailable."""

    async def decide(self, live: Live, known: Mapping[str, Facts]) -> Mapping[str, Facts] | None:
        """Decides one; None where it was decided on others meanwhile. Raises: BrokerError."""

    async def refuse(self, lives: Iterable[Live], reason: Reason, cause: str, *, detail: str = "") -> int:
        """Refuses them for good."""


class Case:
    """What rests on one thing that changed."""

    def __init__(self, deciding: Decides, cause: Cause, lives: Sequence[Live]) -> None:
        self._deciding, self.cause = deciding, cause
        self._fresh: dict[tuple[FactKey, str, str], Facts] = {}  # looked at for one of them, good for all of one caller
        self._waiting = {one.jti: one for one in lives}
        self._suspension: Suspension | None = None
        self._settled: list[Live] = []
        self._flushing: asyncio.TimerHandle | None = None
        self._release_each = max(RELEASE_EACH, len(lives) // RELEASES)
        if cause.at_once:
            self._suspend()

    async def run(self) -> None:
        """Decides each of them."""
        if not self._waiting:
            return
        work = asyncio.ensure_future(self._work())
        try:
            if self._suspension is None and len(self._waiting) > AT_ONCE:
                self._suspend()
            if self._suspension is None:
                await asyncio.wait((work,), timeout=self._deciding.bounds.patience_s)
                if not work.done():
                    self._suspend()
            await work
        except Exception:  # noqa: BLE001 -- the edge to whatever deciding meets: what it could not decide is refused
            _log.exception("not_decided_again", cause=self.cause.name)
            await self._refuse(list(self._waiting.values()), Reason.ATTESTATION_UNAVAILABLE)
        except asyncio.CancelledError:  # what is suspended stays so
            work.cancel()
            await asyncio.wait((work,))
            raise
        if self._suspension is not None:
            self._flush()
            self._deciding.suspending.end(self._suspension)

    @property
    def _source(self) -> str:
        return "action" if self.cause.key is None else self.cause.key.partition(":")[0]

    def _suspend(self) -> None:
        if self._waiting:
            suspending, lives = self._deciding.suspending, list(self._waiting.values())
            self._suspension = suspending.begin(self.cause.name, lives, self.cause.common)
            self._flush()

    async def _work(self) -> None:
        if self._source == "parent":
            await self._refuse(list(self._waiting.values()), Reason.PARENT_REFUSED)
            return
        if self._source in _OF_OURS:
            await self._decide([(live, None) for live in list(self._waiting.values())])
            return
        if self._source in _ANYBODYS:
            await self._by_facts(list(self._waiting.values()))
            return
        lives = sorted(self._waiting.values(), key=lambda live: (live.principal, live.confirmation))
        async with asyncio.TaskGroup() as tasks:
            for _, group in itertools.groupby(lives, key=lambda live: (live.principal, live.confirmation)):
                tasks.create_task(self._by_facts(list(group)))

    async def _by_facts(self, lives: list[Live]) -> None:
        """Looks once for all of them: they are of one caller."""
        try:
            facts = await self._until_seen(lambda: self._deciding.look(self._source, lives[0]))
            if self._source == "process" and lives[0].process is not None:
                self._deciding.keep_following(lives[0].process)
        except BrokerError as error:
            await self._refuse(lives, error.reason, error.detail)
            return
        others = []
        for live in lives:
            if _says_the_same(live.facts.get(self._source), facts, live.ends):
                self._settle(live)  # it only may have changed
            else:
                others.append((live, facts))
        await self._decide(others)

    async def _until_seen(self, look: Callable[[], Awaitable[_T]]) -> _T:
        """Raises: Refused; Unavailable, `Bounds.blind_s` after the first that failed. Waiting for a turn is none."""
        loop, bounds = asyncio.get_running_loop(), self._deciding.bounds
        until: float | None = None
        while True:
            try:
                return await look()
            except Unavailable:
                until = until or loop.time() + bounds.blind_s
                if loop.time() >= until:
                    raise
            await asyncio.sleep(bounds.again_s)
            await self._deciding.turn()

    async def _decide(self, lives: Sequence[tuple[Live, Facts | None]]) -> None:
        refused: dict[tuple[Reason, str], list[Live]] = {}
        apart = None
        async with asyncio.TaskGroup() as group:
            for live, facts in lives:
                if apart is not None:
                    await apart.acquire()
                    group.create_task(self._decide_apart(live, facts, apart))
                    continue
                await self._deciding.turn()
                try:
                    if self._source in _OF_OURS and self._deciding.is_at_hand(live):
                        await self._decide_one(live, facts)
                    else:
                        async with asyncio.timeout(self._deciding.bounds.again_s):
                            await self._decide_one(live, facts)
                except Refused as error:
                    refused.setdefault((error.reason, error.detail), []).append(live)
                except (Unavailable, TimeoutError):  # others may have to wait as well, but none of them for another
                    apart = asyncio.Semaphore(APART - 1)
                    group.create_task(self._decide_apart(live, facts, apart))
                    await self._refuse_each(refused)
                    refused.clear()
                else:
                    self._settle(live)
            await self._refuse_each(refused)

    async def _decide_apart(self, live: Live, facts: Facts | None, apart: asyncio.Semaphore) -> None:
        """Holds one of the places of `apart` until it was decided, or had to wait: then the next one may try."""
        await self._deciding.turn()
        loop, held = asyncio.get_running_loop(), True

        def give_back() -> None:
            nonlocal held
            if held:
                held = False
                apart.release()

        place = loop.call_later(self._deciding.bounds.again_s, give_back)
        try:
            await self._until_seen(lambda: self._decide_one(live, facts))
        except BrokerError as error:
            await self._refuse([live], error.reason, error.detail)
        else:
            self._settle(live)
        finally:
            place.cancel()
            give_back()

    async def _decide_one(self, live: Live, facts: Facts | None) -> None:
        found = None
        while found is None:
            known = {name: one for name, one in live.facts.items() if name != self._source}
            for key in live.keys if self._fresh else ():
                fresh = self._fresh.get((key, live.principal, live.confirmation))
                if fresh is not None:
                    known.setdefault(fresh.attestor, fresh)
            if facts is not None:
                known[facts.attestor] = facts
            found = await self._deciding.decide(live, known)
        for name, one in found.items():
            if name not in known:  # looked at just now, and for all of this caller
                self._fresh[one.key, live.principal, live.confirmation] = one

    async def _refuse_each(self, found: Mapping[tuple[Reason, str], Sequence[Live]]) -> None:
        for (reason, detail), lives in found.items():
            await self._refuse(lives, reason, detail)

    async def _refuse(self, lives: Sequence[Live], reason: Reason, detail: str = "") -> None:
        await self._deciding.refuse(lives, reason, self.cause.name, detail=detail)
        for live in lives:
            self._settle(live)

    def _settle(self, live: Live) -> None:
        self._waiting.pop(live.jti, None)
        self._settled.append(live)
        if len(self._settled) >= self._release_each:
            self._flush()
        elif self._flushing is None and self._suspension is not None:
            self._flushing = asyncio.get_running_loop().call_later(RELEASE_S, self._flush)

    def _flush(self) -> None:
        if self._flushing is not None:
            self._flushing.cancel()
            self._flushing = None
        settled, self._settled = self._settled, []
        if self._suspension is not None:
            self._deciding.suspending.release(self._suspension, settled)


def _says_the_same(before: Facts | None, facts: Facts | None, until: datetime) -> bool:
    """Whether nothing has to be decided again before then."""
    if before is None or facts is None:
        return before is facts
    return before.values == facts.values and (facts.expires_at is None or facts.expires_at >= until)
