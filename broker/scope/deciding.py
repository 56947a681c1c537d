"""Decides again what rests on a fact that changed, or may have, and refuses what no longer passes.

    a change ──► what rests on it ──► look again, once for each fact ──► decide ──► it stays, or is refused for good
                      │ more than is decided in a moment, or the look takes longer
                      └──► suspended, by name, until each is decided

A change that comes while its fact is looked at has it looked at again. What cannot be looked at is suspended, tried
again, and refused after `Bounds.blind_s`. One source that is slow holds up none of the others.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Protocol

from attestors.contract import FactKey, Facts, Process
from broker.errors import Reason, Unavailable
from broker.in_time import InTime
from broker.scope.case import BOUNDS, Bounds, Case, Cause
from broker.scope.feed import Feed
from broker.scope.live import Live
from broker.scope.refusing import Keeper, Refusing
from broker.scope.scope import Scope
from broker.scope.suspending import Noter, Suspending

SHARE_S: Final = 0.0005
"""Of a turn of the event loop, for deciding; a decision that has begun is made."""
LOOKS: Final = 8
"""Facts of one source that are looked at side by side."""
TRIES: Final = 8
"""Of one decision whose facts change while it is made; then they are taken as facts that cannot be seen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Redecided:
    """It would be minted again. facts: all that this rests on. permit: as in Grant."""

    facts: Mapping[str, Facts]
    permit: str


class Again(Protocol):
    """The decision that gave a credential, on facts of now."""

    async def decide(self, live: Live, known: Mapping[str, Facts], now: datetime) -> Redecided:
        """Whether it would be minted again. known: facts that hold now; others are looked at. Raises: BrokerError."""

    def is_at_hand(self, live: Live, known: Mapping[str, Facts]) -> bool:
        """Whether deciding on these facts waits for nobody."""

    async def look(self, name: str, live: Live, now: datetime) -> Facts | None:
        """What this attestor says of its caller now. Raises: BrokerError."""


class Recorder(Keeper, Noter, Protocol):
    """The ledger, as far as this needs it."""


class Deciding:
    """One for each broker process. `run` it as a task; `note` may be called from then on."""

    def __init__(
        self,
        scope: Scope,
        recorder: Recorder,
        feed: Feed,
        again: Again,
        clock: Callable[[], datetime],
        bounds: Bounds = BOUNDS,
    ) -> None:
        self._scope, self._again, self._clock, self.bounds = scope, again, clock, bounds
        self.refusing = Refusing(scope, recorder, feed, clock)
        self.refuse = self.refusing.refuse
        self.suspending = Suspending(scope, recorder, feed, self.refusing, clock)
        self._changed: dict[str, Cause] = {}
        self._some = asyncio.Event()
        self._begun: list[Case] = []
        self._working: set[str] = set()
        self._looks: dict[str, asyncio.Semaphore] = {}
        self._ending: dict[FactKey, datetime] = {}
        self._turn, self._turned = asyncio.Lock(), time.monotonic()
        self.decided = 0

    def note(self, cause: Cause) -> None:
        """What rests on it is decided again, soon; with `at_once`, it is suspended when this returns."""
        if cause.at_once:
            self._begun.append(Case(self, cause, self._durable(cause)))
        else:
            self._changed[cause.name] = cause.with_those_of(self._changed.get(cause.name))
        self._some.set()

    @property
    def idle(self) -> bool:
        """Whether nothing waits and nothing is being decided."""
        return not self._changed and not self._working and not self._begun

    async def run(self) -> None:
        """Works until it is cancelled."""
        async with asyncio.TaskGroup() as group:
            while True:
                await self._some.wait()
                self._some.clear()
                begun, self._begun = self._begun, []
                for case in begun:
                    self._working.add(case.cause.name)
                    group.create_task(self._settle(case))
                for name in [name for name in self._changed if name not in self._working]:
                    cause = self._changed.pop(name)
                    self._working.add(name)
                    group.create_task(self._settle(Case(self, cause, self._durable(cause))))

    def _durable(self, cause: Cause) -> list[Live]:
        return [one for one in self._resting_on(cause) if one.seq and not self._scope.is_refused(one.jti)]

    async def _settle(self, case: Case) -> None:
        try:
            await case.run()
        finally:
            self._working.discard(case.cause.name)
            if self._changed:
                self._some.set()

    def _resting_on(self, cause: Cause) -> list[Live]:
        if cause.key is not None:
            return self._scope.live.dependents(cause.key)
        keys = [FactKey(f"action:{action}") for action in sorted(cause.actions)]
        return list({live.jti: live for key in keys for live in self._scope.live.dependents(key)}.values())

    # -- deciding ----------------------------------------------------------------------------------------------------

    async def look(self, name: str, live: Live) -> Facts | None:
        """See Again."""
        async with self._looks.setdefault(name, asyncio.Semaphore(LOOKS)), InTime():
            return await self._again.look(name, live, self._clock())

    def is_at_hand(self, live: Live) -> bool:
        """Whether deciding it on what it rests on waits for nobody."""
        return self._again.is_at_hand(live, live.facts)

    def keep_following(self, process: Process) -> None:
        """A watch that told of it may have let it go. Raises: Refused, Unavailable."""
        self._scope.keep_following(process)

    async def turn(self) -> None:
        """Waits until a decision may begin: requests have their turn in between."""
        if time.monotonic() - self._turned > SHARE_S:
            async with self._turn:  # one case a turn, however many there are
                await asyncio.sleep(0)
                self._turned = time.monotonic()

    async def decide(self, live: Live, known: Mapping[str, Facts]) -> Mapping[str, Facts] | None:
        """Decides one, and takes the facts it now rests on, which it returns.

        None where it was decided on others meanwhile: these may be older. Raises: BrokerError.
        """
        before = live.facts
        for _ in range(TRIES):
            heard = self._scope.heard
            found = await self._again.decide(live, known, self._clock())
            if heard == self._scope.heard:
                break
            keys = {*live.keys, *(one.key for one in found.facts.values())}
            if not self._scope.changed_since(heard, keys):
                break
            known = {name: one for name, one in known.items() if not self._scope.changed_since(heard, (one.key,))}
        else:
            raise Unavailable(Reason.ATTESTATION_UNAVAILABLE, "what it rests on changes faster than it is decided")
        if live.facts is not before:
            return None
        if live.process is not None:
            self._scope.keep_following(live.process)
        self._scope.live.put(live, found.facts, found.permit)
        for one in found.facts.values():
            if one.expires_at is not None and one.expires_at < live.ends:  # it was minted on others, which end later
                self._tell_at_its_end(one.key, one.expires_at)
        self.decided += 1
        return found.facts

    def _tell_at_its_end(self, key: FactKey, ends: datetime) -> None:
        """Has what rests on the fact decided again when its time is over: no credential outlives it (invariant 3)."""
        if self._ending.get(key) == ends:
            return

        def over() -> None:
            if self._ending.get(key) == ends:
                del self._ending[key]
            self._scope.tell(key)

        self._ending[key] = ends
        asyncio.get_running_loop().call_later((ends - self._clock()).total_seconds(), over)
