"""Calls that never return cost their callers a bounded wait, and the broker a bounded number of threads."""

import asyncio
import threading
import time

import pytest

from broker.errors import Reason, Unavailable
from broker.signing.module_threads import MOST_WAITING, ModuleThreads

NAME = "token 'threads'"
LONG_S = 30.0  # for tests that wait on conditions, so that nothing in them expires
SHORT_S = 0.05


@pytest.fixture
def left():
    """The threads that have run `leave`."""
    return []


@pytest.fixture
def pool(left):
    """`pool(size, timeout)`; closed after the test, when nothing hangs any more."""
    made = []

    def make(size: int, timeout_s: float) -> ModuleThreads:
        made.append(ModuleThreads(NAME, size, timeout_s, lambda: left.append(threading.current_thread())))
        return made[-1]

    yield make
    for threads in made:
        threads.close()


@pytest.fixture
def gate():
    """What hung calls wait for."""
    gate = threading.Event()
    yield gate
    gate.set()


def running() -> int:
    return sum(thread.name == NAME for thread in threading.enumerate())


async def until(condition) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - another thread's doing, which sets no event
            await asyncio.sleep(0.002)


async def refusal(call) -> Unavailable:
    with pytest.raises(Unavailable) as refused:
        await call
    assert refused.value.reason is Reason.SIGNER_UNAVAILABLE
    return refused.value


async def test_a_result_and_an_error_reach_their_caller(pool):
    threads = pool(2, LONG_S)

    def fail() -> None:
        raise LookupError("ours")

    assert await threads.run(lambda: 7) == 7
    assert threads.run_blocking(lambda: 8) == 8
    assert await threads.run(lambda: None) is None
    with pytest.raises(LookupError, match="ours"):
        await threads.run(fail)
    with pytest.raises(LookupError, match="ours"):
        threads.run_blocking(fail)


async def test_no_more_calls_are_under_way_than_there_are_threads(pool, gate):
    threads, seen = pool(3, LONG_S), []
    calls = [asyncio.ensure_future(threads.run(lambda: (seen.append(1), gate.wait()))) for _ in range(10)]
    await until(lambda: len(seen) == 3)
    assert running() == 3
    gate.set()
    await asyncio.gather(*calls)
    assert len(seen) == 10


async def test_a_hung_call_is_given_up_in_time_and_its_thread_replaced(pool, gate):
    threads = pool(1, SHORT_S)
    begun = time.monotonic()
    assert (await refusal(threads.run(gate.wait))).retry_after_ms
    assert SHORT_S <= time.monotonic() - begun < 5
    assert await threads.run(lambda: 7) == 7
    assert (threads.hung, running()) == (1, 2)
    with pytest.raises(Unavailable):
        threads.run_blocking(gate.wait)
    assert (threads.hung, running()) == (2, 2)


async def test_when_all_hang_the_answer_is_no_at_once_until_one_comes_back(pool, gate):
    threads = pool(2, SHORT_S)
    for _ in range(4):
        await refusal(threads.run(gate.wait))
    begun = time.monotonic()
    for _ in range(50):
        assert "4 calls" in (await refusal(threads.run(gate.wait))).detail
    assert time.monotonic() - begun < 50 * SHORT_S
    assert running() == 4
    gate.set()
    await until(lambda: threads.hung == 0)
    assert await threads.run(lambda: 7) == 7
    await until(lambda: running() == 2)


async def test_a_call_that_was_given_up_before_its_turn_is_never_made(pool, gate):
    threads, made = pool(1, SHORT_S), []
    await refusal(threads.run(gate.wait))  # its thread is replaced; that of the next one is not
    calls = [asyncio.ensure_future(threads.run(work)) for work in (gate.wait, *[lambda: made.append(1)] * 3)]
    for call in calls:
        await refusal(call)
    gate.set()
    await until(lambda: threads.hung == 0)
    await threads.run(lambda: None)
    assert not made


async def test_a_call_whose_caller_has_gone_before_its_turn_is_never_made(pool, gate):
    threads, made = pool(1, LONG_S), []
    calls = [asyncio.ensure_future(threads.run(work)) for work in (gate.wait, *[lambda: made.append(1)] * 3)]
    await asyncio.sleep(0)
    for call in calls[1:]:
        call.cancel()
    await asyncio.wait(calls[1:])
    gate.set()
    await calls[0]
    await threads.run(lambda: None)
    assert not made


async def test_the_queue_is_bounded(pool, gate):
    threads = pool(1, LONG_S)
    inside = threading.Event()
    calls = [asyncio.ensure_future(threads.run(lambda: (inside.set(), gate.wait())))]
    await until(inside.is_set)
    calls += [asyncio.ensure_future(threads.run(lambda: None)) for _ in range(MOST_WAITING)]
    await asyncio.sleep(0)
    assert (await refusal(threads.run(lambda: None))).retry_after_ms
    gate.set()
    await asyncio.gather(*calls)
    await threads.run(lambda: None)


async def test_a_call_hangs_also_when_its_caller_has_gone(pool, gate):
    threads, inside = pool(1, SHORT_S), threading.Event()
    call = asyncio.ensure_future(threads.run(lambda: (inside.set(), gate.wait())))
    await until(inside.is_set)
    call.cancel()
    await until(lambda: threads.hung == 1)
    assert await threads.run(lambda: 7) == 7


async def test_each_thread_leaves_when_it_is_closed_and_nothing_runs_afterwards(pool, left):
    threads = pool(3, LONG_S)
    await threads.run(lambda: None)
    threads.close()
    assert (len(set(left)), running()) == (3, 0)
    assert "closed" in (await refusal(threads.run(lambda: None))).detail


async def test_a_hung_call_does_not_keep_it_from_closing(pool, gate, left):
    threads = pool(1, SHORT_S)
    await refusal(threads.run(gate.wait))
    begun = time.monotonic()
    threads.close()
    assert time.monotonic() - begun < 5
    gate.set()
    await until(lambda: running() == 0)
    assert len(set(left)) == 2
