"""Questions in turns: who asks while a question is being answered shares the next one.

As the ledger commits in groups. Nobody hears the answer to a question that was put before he asked, so to each it is as
fresh as an answer of his own, and however many ask, the one who answers hears one question at a time about each thing.
"""

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

_K = TypeVar("_K", bound=Hashable)
_T = TypeVar("_T")


class Turns(Generic[_K, _T]):
    """Puts questions with `put`, for each key one at a time.

    put: has a bound of its own. What it raises, all who share the question get: the same object, so return errors.

    Holds: a task for each question, until it is answered or `close`.
    """

    def __init__(self, put: Callable[[_K], Awaitable[_T]]) -> None:
        self._put = put
        self._current: dict[_K, asyncio.Task[_T]] = {}
        self._next: dict[_K, asyncio.Task[_T]] = {}

    async def ask(self, key: _K) -> _T:
        """The answer to a question that is put from now on, at most one question's time from now.

        Cancelling who asks does not cancel the question: others may share it.
        """
        turn = self._next.get(key)
        if turn is None:
            turn = self._next[key] = asyncio.create_task(self._turn(key, self._current.get(key)))
        return await asyncio.shield(turn)

    async def _turn(self, key: _K, before: asyncio.Task[_T] | None) -> _T:
        if before is not None:
            await asyncio.wait((before,))
        self._current[key] = self._next.pop(key)  # whoever asks from here on waits for the next one
        try:
            return await self._put(key)
        finally:
            del self._current[key]

    async def close(self) -> None:
        """Cancels what is not answered yet."""
        turns = {*self._current.values(), *self._next.values()}
        for turn in turns:
            turn.cancel()
        if turns:
            await asyncio.wait(turns)
        self._next.clear()
