"""A request that goes on: told once its credential is dead, and by nothing else."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from support.issuer import REFUND, Issuer, by_certificate, guard_for

from broker.errors import Invalid, Reason, Unavailable
from broker.guard import Allowed, Guard
from broker.guard.going_on import CutOff, GoingOn, while_good

Block = Callable[[GoingOn], Awaitable[None]]


class Clock:
    def __init__(self) -> None:
        self.ahead = timedelta()

    def __call__(self) -> datetime:
        return datetime.now(UTC) + self.ahead


async def admitted(clock: Clock, *, left: float = 60) -> tuple[Guard, Allowed]:
    """A guard and what it admitted, for `left` seconds more, or almost one second longer."""
    checker = await guard_for(Issuer(), clock=clock)
    issued = clock() - timedelta(seconds=64 - left)
    return checker, await checker.admit(by_certificate(Issuer().token(now=issued)), REFUND)


async def test_what_never_begins_to_go_on_is_not_looked_at() -> None:
    clock = Clock()
    async with while_good(*await admitted(clock)) as going:
        clock.ahead = timedelta(minutes=10)
        assert (going.begun, going.cut_off) == (False, None)


async def go_on(checker: Guard, allowed: Allowed, block: Block) -> None:
    async with while_good(checker, allowed) as going:
        await block(going)


async def wait(going: GoingOn) -> None:
    going.begin()
    going.begin()
    await asyncio.Event().wait()


async def test_what_begins_after_its_credential_died_is_told_at_once() -> None:
    clock = Clock()
    checker, allowed = await admitted(clock)
    clock.ahead = timedelta(minutes=10)
    with pytest.raises(CutOff) as caught:
        await go_on(checker, allowed, wait)
    assert caught.value.error.reason is Reason.EXPIRED


async def test_what_goes_on_is_cancelled_when_its_credential_dies() -> None:
    ended = []

    async def block(going: GoingOn) -> None:
        try:
            await wait(going)
        except asyncio.CancelledError:
            ended.append(going.cut_off)
            raise

    with pytest.raises(CutOff) as caught:
        await go_on(*await admitted(Clock(), left=1), block)
    assert ended == [caught.value.error]
    assert caught.value.error.reason is Reason.EXPIRED


@pytest.mark.parametrize("instead", [None, Invalid("of its own"), TimeoutError("of its own")])
async def test_what_hears_of_it_and_does_not_end_is_cut_off_all_the_same(instead: Exception | None) -> None:
    async def block(going: GoingOn) -> None:
        try:
            await wait(going)
        except asyncio.CancelledError:
            if instead is not None:
                raise instead from None

    with pytest.raises(CutOff):
        await go_on(*await admitted(Clock(), left=1), block)


async def test_what_swallows_the_word_is_told_again() -> None:
    """Refused is final: a clock that is set back revives nothing."""
    clock = Clock()

    async def block(going: GoingOn) -> None:
        clock.ahead = timedelta(minutes=10)
        with pytest.raises(CutOff):
            going.check()
        clock.ahead = timedelta()
        with pytest.raises(CutOff):
            going.check()

    with pytest.raises(CutOff):
        await go_on(*await admitted(clock), block)


@pytest.mark.parametrize("own", [Invalid("of its own"), TimeoutError("of its own"), KeyError("of its own")])
async def test_what_is_raised_while_the_credential_lives_stays_what_it_is(own: Exception) -> None:
    async def block(going: GoingOn) -> None:
        going.begin()
        raise own

    with pytest.raises(type(own), match="of its own"):
        await go_on(*await admitted(Clock()), block)


async def test_who_is_cancelled_from_outside_is_cancelled() -> None:
    begun = asyncio.Event()

    async def block(going: GoingOn) -> None:
        going.begin()
        begun.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(go_on(*await admitted(Clock()), block))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert asyncio.all_tasks() == {asyncio.current_task()}, "nobody watches any more"


async def test_invariant_6_a_watch_that_fails_ends_what_it_watches() -> None:
    """Invariant 6: whatever goes wrong in looking is a no."""

    class Failing(Guard):
        async def until_dead(self, allowed: Allowed) -> Any:
            raise OSError(allowed.principal)

    clock = Clock()
    checker, allowed = await admitted(clock)
    failing = Failing(issuer=checker.issuer, audience=checker.audience, keys=checker._keys, clock=clock)
    with pytest.raises(CutOff) as caught:
        await go_on(failing, allowed, wait)
    assert isinstance(caught.value.error, Unavailable)
    assert caught.value.error.reason is Reason.SCOPE_STALE
