"""Places for what stays open: who waits longest gives way, a known caller has its share, nobody's are lost."""

import asyncio

import pytest

from broker.edges.places import Held, StreamPlace, Waiting
from broker.errors import Invalid, Reason, Refused


class Waiter:
    """One who waits in a task of its own."""

    def __init__(self, waiting: Waiting, peer: object = None) -> None:
        self._waiting, self._peer = waiting, peer
        self.task = asyncio.create_task(self._wait())

    async def _wait(self) -> str:
        place = self._waiting.enter(self._peer)
        try:
            async with place:
                await asyncio.Event().wait()
        except TimeoutError:
            return "gave way"
        finally:
            self._waiting.leave(place)


async def begun(*waiters: Waiter) -> list[bool]:
    """Whether each has ended, after some turns."""
    for _ in range(5):
        await asyncio.sleep(0.001)
    return [one.task.done() for one in waiters]


async def test_over_the_most_the_oldest_gives_way_to_the_newest() -> None:
    waiting = Waiting(2)
    waiters = [Waiter(waiting) for _ in range(3)]
    assert await begun(*waiters) == [True, False, False]
    assert len(waiting) == 2
    for one in waiters[1:]:
        one.task.cancel()
    await asyncio.wait([one.task for one in waiters])
    assert len(waiting) == 0


async def test_over_one_peers_share_its_own_oldest_gives_way() -> None:
    waiting = Waiting(10, 2)
    other = Waiter(waiting, "other")
    await begun(other)
    waiters = [Waiter(waiting, "one") for _ in range(4)]
    assert await begun(other, *waiters) == [False, True, True, False, False]
    for one in (other, *waiters):
        one.task.cancel()
    await asyncio.wait([one.task for one in (other, *waiters)])


async def test_patience_ends() -> None:
    waiter = Waiter(Waiting(10, patience_s=0.01))
    assert await waiter.task == "gave way"


async def test_a_stream_of_a_caller_that_became_known_lasts_and_another_does_not() -> None:
    waiting, held = Waiting(10, patience_s=0.01), Held()
    async with StreamPlace(waiting, held, "peer") as place:
        place.known("spiffe://acme.test/a")
        await asyncio.sleep(0.03)
    with pytest.raises(Refused) as refused:
        async with StreamPlace(waiting, held, "peer"):
            await asyncio.Event().wait()
    assert refused.value.reason is Reason.UNAUTHENTICATED
    assert len(waiting) == 0


async def test_a_caller_has_its_share_of_streams_and_gets_a_place_back() -> None:
    waiting, held = Waiting(10), Held(most=3, of_one=2)
    for caller, taken in (("a", None), ("a", None), ("a", Reason.QUOTA), ("b", None), ("c", Reason.QUOTA)):
        if taken is None:
            held.take(caller)
            continue
        with pytest.raises(Refused) as refused:
            async with StreamPlace(waiting, held, "peer") as place:
                place.known(caller)
        assert refused.value.reason is taken
        with pytest.raises(Refused):
            StreamPlace(waiting, held, None, caller)
    held.give_back("a")
    async with StreamPlace(waiting, held, None, "a"):
        pass
    held.take("a")


async def test_a_stream_is_ended_with_the_reason_that_is_given() -> None:
    async def ended() -> None:
        async with StreamPlace(Waiting(1), Held(), None, "a") as place:
            place.end(Invalid("unreadable"))
            await asyncio.Event().wait()

    with pytest.raises(Invalid, match="unreadable"):
        await ended()
