"""Work that takes long, in threads beside the event loop: so much at once, so many that wait, and no more.

The loop's own threads have a queue without end, and what stands in it is done even where nobody waits for it any more.
"""

import asyncio
from collections.abc import Callable
from typing import TypeVar

_T = TypeVar("_T")


class Busy(Exception):
    """As many wait as may. The message says so."""


class InThreads:
    """Does pieces of work for one event loop. at_once: in threads. waiting: beyond those; who comes then is refused.

    Who stops waiting before a thread is free has cost nothing. What a thread has begun it ends, and until then it
    keeps its place, whether or not anybody waits for the answer.
    """

    def __init__(self, *, at_once: int, waiting: int) -> None:
        self._places = asyncio.Semaphore(at_once)
        self._most, self._waiting = waiting, 0

    async def run(self, work: Callable[[], _T]) -> _T:
        """What `work` returns or raises. Raises: Busy."""
        if self._places.locked():
            if self._waiting >= self._most:
                raise Busy(f"{self._most} wait for the same already: ask again")
            self._waiting += 1
            try:
                await self._places.acquire()
            finally:
                self._waiting -= 1
        else:
            await self._places.acquire()  # at once
        running = asyncio.get_running_loop().run_in_executor(None, work)
        running.add_done_callback(self._ended)
        return await asyncio.shield(running)

    def _ended(self, running: "asyncio.Future[_T]") -> None:
        self._places.release()
        if not running.cancelled():
            running.exception()  # seen: where nobody waits any more, nobody else asks for it
