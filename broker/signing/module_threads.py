"""Threads for calls that may never return: a bounded number of them, a bounded wait, and nothing that hangs with them.

A call into a PKCS#11 module cannot be stopped from outside. So the caller stops waiting after `timeout_s`, and the
thread is counted as hung and replaced, up to as many again as there were. When all of these hang too, every call is
refused at once, until one comes back: hung threads return to work by themselves. They are daemons, so the process can
end in any case.
"""

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable
from typing import Any, Final, Generic, TypeVar, cast

from broker.errors import Reason, Unavailable

MOST_WAITING: Final = 512  # calls in the queue; beyond it the answer is no, at once
RETRY_AFTER_MS: Final = 1000

_Result = TypeVar("_Result")


class _Job(Generic[_Result]):
    """One call. `settle` is called once, in the thread that made it; what comes too late is dropped by its caller."""

    __slots__ = ("expired", "settle", "started", "work")

    def __init__(self, work: Callable[[], _Result], settle: Callable[[_Result | None, Exception | None], None]) -> None:
        self.work = work
        self.settle = settle
        self.started = False
        self.expired = False


class ModuleThreads:
    """Runs calls in `size` threads. `leave` is run by each thread as it ends, to give back what it holds."""

    def __init__(self, name: str, size: int, timeout_s: float, leave: Callable[[], None]) -> None:
        self._name = name
        self._size = size
        self._timeout_s = timeout_s
        self._leave = leave
        self._jobs: queue.SimpleQueue[_Job[Any] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._threads: set[threading.Thread] = set()
        self._hung = 0
        self._closed = False
        for _ in range(size):
            self._start()

    @property
    def hung(self) -> int:
        """Calls that were given up and have not come back."""
        return self._hung

    async def run(self, work: Callable[[], _Result]) -> _Result:
        """Its result. Raises: what it raises; Unavailable after the timeout, or when there is no thread to run it."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[_Result] = loop.create_future()

        def settle(result: _Result | None, error: Exception | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits
                loop.call_soon_threadsafe(arrived, result, error)

        def arrived(result: _Result | None, error: Exception | None) -> None:
            timer.cancel()
            if answer.done():
                return
            if error is not None:
                answer.set_exception(error)
            else:
                answer.set_result(cast("_Result", result))

        job = _Job(work, settle)
        self._submit(job)

        def expire() -> None:
            self._expire(job)
            if not answer.done():
                answer.set_exception(self._late())

        # A caller that is cancelled leaves the timer: its call may hang all the same, and has to be counted.
        timer = loop.call_later(self._timeout_s, expire)
        try:
            return await answer
        except asyncio.CancelledError:
            with self._lock:
                job.expired = job.expired or not job.started
            raise

    def run_blocking(self, work: Callable[[], _Result]) -> _Result:
        """The same for start-up, where no loop runs yet."""
        arrived = threading.Event()
        outcome: list[tuple[_Result | None, Exception | None]] = []

        def settle(result: _Result | None, error: Exception | None) -> None:
            outcome.append((result, error))
            arrived.set()

        job = _Job(work, settle)
        self._submit(job)
        if not arrived.wait(self._timeout_s):
            self._expire(job)
            raise self._late()
        result, error = outcome[0]
        if error is not None:
            raise error
        return cast("_Result", result)

    def close(self) -> None:
        """No calls are taken any more; threads that do not hang have ended when this returns."""
        with self._lock:
            self._closed = True
            threads = list(self._threads)
        for _ in threads:
            self._jobs.put(None)
        for thread in threads:
            thread.join(0 if self._hung else self._timeout_s)

    def _submit(self, job: _Job[Any]) -> None:
        if self._closed:
            raise Unavailable(Reason.SIGNER_UNAVAILABLE, f"{self._name} is closed")
        if self._hung >= len(self._threads):
            detail = f"{self._hung} calls of {self._name} hang: look at the HSM; if they stay, restart the broker"
            raise Unavailable(Reason.SIGNER_UNAVAILABLE, detail, retry_after_ms=RETRY_AFTER_MS)
        if self._jobs.qsize() >= MOST_WAITING:
            detail = f"{MOST_WAITING} calls wait for {self._name} already"
            raise Unavailable(Reason.SIGNER_UNAVAILABLE, detail, retry_after_ms=RETRY_AFTER_MS)
        self._jobs.put(job)

    def _late(self) -> Unavailable:
        detail = f"{self._name} did not answer in {self._timeout_s:g} s ({self._hung} calls hang)"
        return Unavailable(Reason.SIGNER_UNAVAILABLE, detail, retry_after_ms=RETRY_AFTER_MS)

    def _expire(self, job: _Job[Any]) -> None:
        """Gives a call up: one that waits is never begun, and the thread of one that runs is replaced."""
        with self._lock:
            job.expired = True
            if not job.started:
                return
            self._hung += 1
            replace = len(self._threads) < 2 * self._size and not self._closed
        if replace:
            self._start()

    def _start(self) -> None:
        thread = threading.Thread(target=self._work, name=self._name, daemon=True)
        with self._lock:
            self._threads.add(thread)
        thread.start()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            with self._lock:
                if job.expired:
                    continue
                job.started = True
            result, error = None, None
            try:
                result = job.work()
            except Exception as caught:  # noqa: BLE001 - whatever it is belongs to who called
                error = caught
            with self._lock:
                # Settling counts as started no longer: the timer may still fire, but this thread is free again.
                job.started = False
                hung_before = job.expired
                if hung_before:
                    self._hung -= 1
                superfluous = hung_before and len(self._threads) - self._hung > self._size
            if not hung_before:
                job.settle(result, error)
            job = result = error = None  # nothing is kept while the next one is awaited
            if superfluous:
                break
        self._leave()
        with self._lock:
            self._threads.discard(threading.current_thread())
