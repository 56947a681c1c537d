"""Gathers what the event loop asks for into groups, and has a thread commit them one after another.

A group is handed over at most `wait_s` after its first operation and holds at most `group` of them, and earlier as soon
as the event loop has nothing else to do: then nobody else is on the way. So one caller alone does not wait, and a busy
broker spends one commit on the requests that it is working on anyway. While a commit runs, the next group gathers.
"""

import asyncio
import queue
import sys
import threading
from collections import deque
from dataclasses import dataclass
from typing import Any

import structlog

from broker.errors import BrokerError, Unavailable
from broker.ledger.operations import AppendAhead, Operation
from broker.ledger.schema import unavailable
from broker.ledger.writer import Writer

_log = structlog.get_logger(__name__)
_IDLE_TURN_S = 50e-6
"""A turn of the event loop shorter than this did nothing: polling alone takes a tenth of it, any request more."""
_SWITCH_S = 50e-6
"""How long a busy event loop may keep the ledger's thread waiting for the interpreter. Python's own 5 ms never come:
the loop gives the interpreter up in each of its turns, for too short to be taken, and the wait begins anew."""
_IDLE_TURNS = 2
"""In a row. After one, gRPC's own thread may still be handing a request over."""

Item = tuple[Operation, asyncio.Future[Any] | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds of the ledger.

    group: operations in one commit. wait_s: how long the first of a group may wait for others.
    queue: operations that may wait, awaited or not; one more is refused at once.
    later_s: how long an operation that nobody awaits may stay in memory while nothing else is asked.
    maintain_s: how often to clean up, and to write the outside checkpoint if there is something new.
    counts_s: how often counted refusals are written down; so much of them a crash loses.
    """

    group: int = 128
    wait_s: float = 0.002
    queue: int = 10_000
    later_s: float = 0.01
    maintain_s: float = 1.0
    counts_s: float = 10.0


class GroupCommit:
    """Owns the thread that owns the writer. Belongs to the running event loop.

    Holds: a thread until `close`.
    """

    def __init__(self, writer: Writer, limits: Limits) -> None:
        self._writer, self._limits = writer, limits
        self._loop = asyncio.get_running_loop()
        self._awaited: deque[Item] = deque()
        self._later: deque[Operation] = deque()
        self._groups: queue.SimpleQueue[list[Item] | None] = queue.SimpleQueue()
        self._busy = False
        self._scheduled: asyncio.Handle | None = None
        self._later_timer: asyncio.TimerHandle | None = None
        self._until = 0.0
        self._turned = 0.0
        self._idle_turns = 0
        self._seen = 0
        self._closed = False
        sys.setswitchinterval(min(sys.getswitchinterval(), _SWITCH_S))
        self._thread = threading.Thread(target=self._run, name="ledger", daemon=True)
        self._thread.start()

    def submit(self, operation: Operation) -> asyncio.Future[Any]:
        """The operation's answer, once it is durable. Raises: Unavailable at once when too much waits already."""
        if self._closed:
            raise unavailable("the ledger is closed")
        if len(self._awaited) + len(self._later) >= self._limits.queue:
            raise unavailable(f"{self._limits.queue} operations wait for the ledger: ask again later")
        future: asyncio.Future[Any] = self._loop.create_future()
        self._awaited.append((operation, future))
        if self._scheduled is None:
            self._schedule()
        elif len(self._awaited) >= self._limits.group:
            self._scheduled.cancel()
            self._hand_over()
        return future

    def submit_later(self, operation: Operation) -> bool:
        """Puts it into a group that comes anyway, or into its own after `later_s`. False: too much waits, it is lost.

        While the store cannot be written it is kept and tried again. Nothing that is submitted after an `AppendAhead`
        comes before it in the ledger: it stands in the row of what is awaited, also when it is tried again.
        """
        if isinstance(operation, AppendAhead) and not self._closed:
            self._awaited.append((operation, None))
            if self._scheduled is None:
                self._schedule()
            return True
        if self._closed or len(self._awaited) + len(self._later) >= self._limits.queue:
            return False
        self._later.append(operation)
        if self._later_timer is None:
            self._later_timer = self._loop.call_later(self._limits.later_s, self._later_is_due)
        return True

    def _later_is_due(self) -> None:
        self._later_timer = None
        if self._later and self._scheduled is None:
            self._schedule()

    def _schedule(self) -> None:
        if not self._busy:
            self._turned = self._loop.time()
            self._until = self._turned + self._limits.wait_s
            self._idle_turns = self._seen = 0
            self._scheduled = self._loop.call_soon(self._gather)

    def _gather(self) -> None:
        """Runs once in each turn of the loop, until it pays no more."""
        now = self._loop.time()
        grown, self._seen = len(self._awaited) > self._seen, len(self._awaited)
        idle = now - self._turned < _IDLE_TURN_S and not grown
        self._idle_turns, self._turned = self._idle_turns + 1 if idle else 0, now
        if self._idle_turns >= _IDLE_TURNS or now >= self._until or len(self._awaited) >= self._limits.group:
            self._hand_over()
        else:
            self._scheduled = self._loop.call_soon(self._gather)

    def _hand_over(self) -> None:
        self._scheduled = None
        limit = self._limits.group
        # What nobody awaits gets at most half of a group: a pile of it, kept from a full disk, holds nobody up.
        group: list[Item] = [
            (self._later.popleft(), None)
            for _ in range(min(len(self._later), max(limit // 2, limit - len(self._awaited))))
        ]
        group += [self._awaited.popleft() for _ in range(min(len(self._awaited), limit - len(group)))]
        if group:
            self._busy = True
            self._groups.put(group)

    def _run(self) -> None:
        while (group := self._groups.get()) is not None:
            try:
                answers = self._writer.commit([operation for operation, _ in group])
            except Exception as error:  # noqa: BLE001 - the thread's edge: whoever awaits must hear of it
                _log.exception("ledger_group_failed")
                group = [
                    item for item in group if item[1]
                ]  # what nobody awaits is not tried again: it may be the cause
                answers = [unavailable(f"the ledger failed: {type(error).__name__}") for _ in group]
            try:
                self._loop.call_soon_threadsafe(self._settle, group, answers)
            except RuntimeError:  # the loop has ended without close: nobody awaits any more
                return
            self._writer.checkpoint_if_due()

    def _settle(self, group: list[Item], answers: list[object]) -> None:
        self._busy = False
        failed = [
            operation
            for (operation, future), answer in zip(group, answers, strict=True)
            if future is None and isinstance(answer, Unavailable)
        ]
        for (_, future), answer in zip(group, answers, strict=True):
            if future is None or future.done():  # done: who awaited it was cancelled
                continue
            if isinstance(answer, BrokerError):
                future.set_exception(answer)
            else:
                future.set_result(answer)
        waiting = bool(self._awaited)
        self._awaited.extendleft((one, None) for one in reversed(failed) if isinstance(one, AppendAhead))
        self._later.extendleft(one for one in reversed(failed) if not isinstance(one, AppendAhead))
        if waiting or (self._later and not failed):  # failed ones wait for the next attempt, not for this turn
            self._schedule()

    async def close(self) -> None:
        """Commits what waits, if the store lets it, and ends the thread."""
        later, self._later = self._later, deque()
        rest = [self.submit(operation) for operation in later]
        self._closed = True
        await asyncio.gather(*rest, *(future for _, future in self._awaited if future), return_exceptions=True)
        if self._later_timer is not None:
            self._later_timer.cancel()
        self._groups.put(None)
        await asyncio.to_thread(self._thread.join)
