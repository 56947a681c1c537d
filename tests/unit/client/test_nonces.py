"""A nonce is used once, while it is young, and on the connection it came from."""

import asyncio

from support.processes import until

from broker.client.nonces import MAX_HELD, USABLE_S, Nonce, NoncePool


async def test_each_nonce_is_given_out_once_and_the_newest_first():
    pool = NoncePool()
    for value in ("a", "b", "c"):
        pool.put(value)
    assert [pool.take().value for _ in range(3)] == ["c", "b", "a"]
    assert pool.take() is None


async def test_a_nonce_that_may_be_too_old_is_not_used():
    now, pool = asyncio.get_running_loop().time(), NoncePool()
    pool._held.extend([Nonce(value="ancient", received=now - 99), Nonce(value="old", received=now - USABLE_S - 1)])
    assert pool.take() is None
    assert len(pool) == 0
    pool._held.append(Nonce(value="young", received=now - USABLE_S + 5))
    assert pool.take().value == "young"


async def test_a_refused_nonce_takes_the_older_ones_along_and_leaves_newer_ones():
    pool = NoncePool()
    for value in ("of the old connection", "of the old connection too"):
        pool.put(value)
    taken = pool.take()
    await until(lambda: asyncio.get_running_loop().time() > taken.received, "later")
    pool.put("of the new connection")
    pool.refused(taken)
    assert [pool.take().value, pool.take()] == ["of the new connection", None]


async def test_a_refusal_without_a_nonce_forgets_nothing():
    pool = NoncePool()
    pool.put("a")
    pool.refused(None)
    assert len(pool) == 1


async def test_the_pool_is_bounded_and_keeps_the_newest():
    pool = NoncePool()
    for number in range(MAX_HELD + 10):
        pool.put(str(number))
    assert len(pool) == MAX_HELD
    assert pool.take().value == str(MAX_HELD + 9)
