"""Facts from SPIRE: the SPIFFE IDs that a process on this node is entitled to, as its agent says now.

It looks at the process anew at each request (the agent's workload attestors read /proc), so a deleted registration
entry, another user or another executable shows at the next one. Between requests `watch` asks again.
"""

import asyncio
import random
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from attestors.contract import (
    AttestationFailed,
    AttestationRequest,
    AttestationUnavailable,
    FactKey,
    Facts,
    Process,
)

POLL_S = 1.0
"""Between two looks at a watched process; longer when looking at all of them takes longer."""
AT_ONCE = 8
"""Questions to the agent at one time; it answers about a thousand a second, and requests come first."""
WATCHED = 4096
"""Processes watched at most. The one asked about longest ago makes room, and is told as changed."""
WATCH_S = 310.0
"""How long after its last request a process is watched: no credential lives longer (300 s and leeway)."""


class Entitlement(Protocol):
    """One ID that a process may have. str(spiffe_id) is its URI."""

    @property
    def spiffe_id(self) -> object:
        """The SPIFFE ID."""

    @property
    def expires_at(self) -> datetime:
        """Until when SPIRE vouches for it without being asked again."""


class Entitlements(Protocol):
    """Asks the agent on this node."""

    async def fetch(self, pid: int) -> Sequence[Entitlement]:
        """What the process with this PID is entitled to now.

        Raises: AttestationFailed when that is nothing; AttestationUnavailable when the agent could not be asked.
        """


@dataclass(slots=True)
class _Watched:
    """pid: of the process. ids: what it was told to have. until: monotonic seconds."""

    pid: int
    ids: tuple[str, ...]
    until: float


class SpireAttestor:
    """Fills `context.spire` with `{"ids": [SPIFFE IDs, sorted]}`. Only for callers that are processes on this node."""

    name = "spire"

    def __init__(self, entitlements: Entitlements) -> None:
        self._entitlements = entitlements
        self._watched: OrderedDict[FactKey, _Watched] = OrderedDict()
        self._away_since: float | None = None
        self._unasked: frozenset[FactKey] = frozenset()  # in the last round
        self._untold: deque[FactKey] = deque(maxlen=WATCHED)  # changes seen beside the watch, for it to tell

    async def attest(self, request: AttestationRequest, now: datetime) -> Facts | None:
        """Looks now, unless identification just did for this very request. None: the caller is no process here.

        Raises: AttestationFailed when SPIRE knows nothing of the process, or the principal is none of its IDs;
        AttestationUnavailable.
        """
        if request.process is None:
            return None
        facts = request.known.get(self.name) or await self.look(request.process, now)
        ids = facts.values["ids"]
        if not isinstance(ids, list) or request.principal not in ids:
            raise AttestationFailed(f"process {request.process.pid} is not entitled to the principal's SPIFFE ID")
        return facts

    async def look(self, process: Process, now: datetime) -> Facts:
        """The facts on a process, whoever it claims to be; from now on it is watched.

        Raises: AttestationFailed, AttestationUnavailable. Not checked: that the PID still is this process; whoever
        holds its pidfd looks at that after this returns.
        """
        found = await self._entitlements.fetch(process.pid)
        if not found:
            raise AttestationFailed(f"process {process.pid} has no SPIFFE ID")
        ids = _ids_in(found)
        key = FactKey(f"{self.name}:{process.pid}:{process.start_time}")
        self._remember(key, process.pid, ids)
        return Facts(
            attestor=self.name,
            key=key,
            values={"ids": list(ids)},
            attested_at=now,
            expires_at=min(entitlement.expires_at for entitlement in found),
        )

    async def watch(self) -> AsyncIterator[FactKey]:
        """Yields the key of each process asked about lately whose IDs differ from what was told, or which has none.

        For one reader. While the agent cannot be asked nothing is known to have changed, so nothing is yielded: what
        that does to credentials is not an attestor's to say. A PID that passed to another process with the same IDs
        looks the same from here; the `process` attestor sees the exit.
        """
        loop = asyncio.get_running_loop()
        while True:
            started = loop.time()
            for key in await self._changed(started):
                yield key
            rest = POLL_S - (loop.time() - started)
            # Jitter downwards, so that the bound holds and a fleet of brokers does not ask in step.
            await asyncio.sleep(max(rest, 0) * random.uniform(0.8, 1.0))  # noqa: S311 - spreads load, hides nothing

    def blind(self) -> Mapping[str, float]:
        """See attestors.contract.Attestor: since the first question of a round that the agent did not answer."""
        return {} if self._away_since is None else {f"{self.name}:": self._away_since}

    def _remember(self, key: FactKey, pid: int, ids: tuple[str, ...]) -> None:
        until = asyncio.get_running_loop().time() + WATCH_S
        before = self._watched.pop(key, None)
        if before is not None and before.ids != ids:
            self._untold.append(key)  # older credentials rest on what it was
        self._watched[key] = _Watched(pid, ids, until)
        if len(self._watched) > WATCHED:
            self._untold.append(self._watched.popitem(last=False)[0])

    async def _changed(self, monotonic: float) -> list[FactKey]:
        """One look at all that are watched."""
        for key in [key for key, watched in self._watched.items() if watched.until <= monotonic]:
            del self._watched[key]
        found = _Round(self._entitlements)
        pids = [(key, watched.pid) for key, watched in self._watched.items()]
        left = iter(sorted(pids, key=lambda one: one[0] not in self._unasked))
        async with asyncio.TaskGroup() as group:
            for _ in range(min(AT_ONCE, len(pids))):
                group.create_task(found.work(left))
        self._unasked = frozenset(key for key, _ in left)
        is_away = await found.is_away()
        if not is_away:
            self._away_since = None
        elif self._away_since is None:
            self._away_since = monotonic
        changed = [*self._untold]
        self._untold.clear()
        for key, ids in found.answers.items():
            watched = self._watched.get(key)
            if watched is None or ids == watched.ids:
                continue
            changed.append(key)
            if ids:
                watched.ids = ids
            else:
                del self._watched[key]
        if not is_away:
            changed += [key for key in found.unanswered if self._watched.pop(key, None) is not None]
        return changed


class _Round:
    """The questions of one round, some at a time.

    answers: what each process has now; nothing when attestation fails. unanswered: those that could not be asked about.
    """

    def __init__(self, entitlements: Entitlements) -> None:
        self._entitlements = entitlements
        self.answers: dict[FactKey, tuple[str, ...]] = {}
        self.unanswered: list[FactKey] = []
        self._in_a_row = 0
        self._answered = 0  # the PID of the last one

    async def work(self, left: Iterator[tuple[FactKey, int]]) -> None:
        """Asks about one after the other of those left. Some run side by side, until too many are not answered."""
        while self._in_a_row < AT_ONCE and (one := next(left, None)) is not None:
            key, pid = one
            try:
                self.answers[key] = await self._ask(pid)
            except AttestationUnavailable:
                self.unanswered.append(key)
                self._in_a_row += 1
            else:
                self._answered, self._in_a_row = pid, 0

    async def is_away(self) -> bool:
        """Whether the agent cannot be asked at all, and not only about some processes.

        What it says of a process takes it as long as the process makes it take: by a huge executable, for example.
        """
        if not self.unanswered or not self._answered:
            return bool(self.unanswered)
        try:
            await self._ask(self._answered)
        except AttestationUnavailable:
            return True
        return False

    async def _ask(self, pid: int) -> tuple[str, ...]:
        try:
            return _ids_in(await self._entitlements.fetch(pid))
        except AttestationFailed:
            return ()


def _ids_in(found: Sequence[Entitlement]) -> tuple[str, ...]:
    return tuple(sorted({str(entitlement.spiffe_id) for entitlement in found}))
