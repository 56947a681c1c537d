"""A revocation against what happens in the same moment: mints, operators who go away, a store that takes nothing."""

import asyncio
import shutil
from collections.abc import Awaitable
from pathlib import Path

import pytest
from structlog.testing import capture_logs
from support.exchanging import CORRELATION, OWN_PID, act, steps
from support.operating import FAR, OTHER, Operating, is_denial, operating, why
from support.processes import until
from support.whole_broker import AGENT, ORDERS

from broker.errors import Reason
from broker.exchange import Issued
from broker.ledger.records import Intent, Outcome, ScopeRefused, Suspended, SuspensionEnded
from broker.ledger.scope_records import StandingDenial
from broker.ledger.verify import verify
from broker.operator_revocation import Revoked
from broker.recheck import Recheck
from broker.scope.live import Live

# -- races -------------------------------------------------------------------------------------------------------------


async def mint_and_revoke(found: Operating, first: str, count: int, *, standing: bool) -> tuple[Issued | None, Revoked]:
    """Both at once, one of them `count` turns of the event loop after the other: the token, if there is one."""
    if first == "mint":
        minting = asyncio.create_task(found.token())
        await steps(count)
        revoking = asyncio.create_task(found.revoke(principal=AGENT, standing=standing))
    else:
        revoking = asyncio.create_task(found.revoke(principal=AGENT, standing=standing))
        await steps(count)
        minting = asyncio.create_task(found.token())
    done = await revoking
    reason = await why(minting)
    assert reason in ({"", Reason.REVOKED} if standing else {""})
    return (None if reason else minting.result()), done


@pytest.mark.parametrize("first", ["mint", "revoke"])
@pytest.mark.parametrize("kind", ["standing", "once"])
async def test_of_a_mint_and_a_revocation_one_comes_first_whatever_they_do_in_between(
    tmp_path: Path, first: str, kind: str
) -> None:
    """A mint that is under way loses, or its credential is among those that are refused: at every step of it."""
    standing = kind == "standing"
    async with operating(tmp_path) as found:
        entering: list[Live] = []
        supersede = found.scope.supersede

        def watched(lives: list[Live]) -> None:
            entering.extend(lives)
            supersede(lives)

        found.scope.supersede = watched  # type: ignore[method-assign] - to know that the narrowest was among them
        for count in range(80):
            token, done = await mint_and_revoke(found, first, count, standing=standing)
            if token is not None:
                assert found.dead(token) or not standing, f"after {count} turns a mint survived its denial"
                assert found.scope.live.get(token.claims.jti) is not None
            if standing:
                await found.lift(done.standing_id)
        await found.settled()
        if first == "revoke":
            assert entering, "no mint was being recorded when the revocation came"
            assert all(live.changed for live in entering)
        assert not [live for live in found.scope.live if not live.seq], "nothing is left half way"
        records = await found.parts.records()
    intents = {seq: one for seq, one in enumerate(records, 1) if isinstance(one, Intent)}
    issued = {intents[one.intent].jti for one in records if isinstance(one, Outcome) and one.result == "issued"}
    assert issued.isdisjoint(live.jti for live in entering)
    if standing:
        assert issued == {jti for one in records if isinstance(one, ScopeRefused) for jti in one.jtis}


@pytest.mark.parametrize("count", range(0, 24, 2))
async def test_an_operator_who_goes_away_has_revoked_all_the_same_or_not_at_all(tmp_path: Path, count: int) -> None:
    async with operating(tmp_path) as found:
        tokens = [await found.token() for _ in range(3)]
        revoking = asyncio.create_task(found.revoke(principal=AGENT, standing=True))
        await steps(count)
        revoking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await revoking
        await found.revocations.close()
        dead = [found.dead(token) for token in tokens]
        standing = await found.standing()
        assert dead == [bool(standing)] * 3
        assert await found.reason() == ("revoked" if standing else "")
        records = await found.parts.records()
    assert len([one for one in records if isinstance(one, StandingDenial)]) == len(standing)
    assert sum(len(one.jtis) for one in records if isinstance(one, ScopeRefused)) == sum(dead)


async def test_what_is_revoked_while_check_looks_at_it_is_not_called_good(tmp_path: Path) -> None:
    async with operating(tmp_path) as found:
        token = await found.parts.token(act(), found.parts.caller(pid=OWN_PID))
        recheck = Recheck(found.exchange, found.opened.again, found.opened.deciding, {})
        asker = found.parts.caller(ORDERS)

        def check() -> Awaitable[None]:
            return recheck.check(asker, token.token, act, found.now(), CORRELATION)

        assert await why(check()) == "", "the control"
        live = found.scope.live.get(token.claims.jti)
        assert live is not None
        found.parts.asked.append(lambda: found.scope.refuse([live], Reason.REVOKED))  # while SPIRE is asked about it
        assert await why(check()) == Reason.REVOKED


# -- many, and a store that does not take it --------------------------------------------------------------------------


async def test_many_are_suspended_by_name_before_the_store_has_them_and_refused_after(tmp_path: Path) -> None:
    async with operating(tmp_path) as found:
        tokens = [await found.token() for _ in range(100)]
        spared = await found.token("orders.long", who=FAR)
        revoking = asyncio.create_task(found.revoke(principal="spiffe://acme.test/build/", standing=True))
        await until(lambda: found.scope.suspensions, "they are suspended")
        (suspension,) = found.scope.suspensions.values()
        assert len(suspension.waiting) == 100
        assert (await revoking).hits == 100
        assert not found.scope.suspensions
        assert all(map(found.dead, tokens))
        assert not found.dead(spared)
        records = await found.parts.records()
    assert [one.count for one in records if isinstance(one, Suspended)] == [100]
    assert [one.refused for one in records if isinstance(one, SuspensionEnded)] == [100]


async def test_a_denial_that_the_store_does_not_take_counts_and_is_kept_once_it_does(tmp_path: Path) -> None:
    """To deny is safe: also while no outside checkpoint can be written."""
    async with operating(tmp_path) as found:
        dead = await found.token()
        checkpoint, aside = tmp_path / "checkpoint", tmp_path / "aside"
        checkpoint.rename(aside)
        checkpoint.mkdir()
        with capture_logs() as logs:
            revoking = asyncio.create_task(found.revoke(principal=AGENT, standing=True))
            await until(lambda: "not_recorded_yet" in [one["event"] for one in logs], "the store does not take it")
        assert not revoking.done()
        assert found.dead(dead)
        assert await found.reason() == Reason.REVOKED
        checkpoint.rmdir()
        aside.rename(checkpoint)
        done = await revoking
        assert [one.id for one in await found.standing()] == [done.standing_id]
    async with operating(tmp_path) as found:
        assert [one.id for one in await found.standing()] == [done.standing_id]
        assert await found.reason() == Reason.REVOKED


async def test_a_restart_keeps_denials_and_what_they_refused(tmp_path: Path) -> None:
    async with operating(tmp_path) as found:
        dead = await found.token("orders.long")
        kept = (await found.revoke(principal=AGENT, standing=True, reason="why")).standing_id
        gone = (await found.revoke(principal=OTHER, standing=True)).standing_id
        await found.lift(gone)
    async with operating(tmp_path) as found:
        (denial,) = await found.standing()
        assert (denial.id, denial.detail, is_denial(denial)) == (kept, "why", True)
        assert await found.reason() == Reason.REVOKED
        assert await found.reason(who=OTHER) == ""
        assert found.dead(dead)
        await found.lift(kept)
    async with operating(tmp_path) as found:
        assert await found.standing() == []
        assert await found.reason() == ""
        assert found.dead(dead)
    assert verify(tmp_path / "ledger.db").good


async def test_a_crash_right_after_the_answer_keeps_it(tmp_path: Path) -> None:
    """What was answered is durable: the files as they are at that moment, and no good order."""
    live, copy = tmp_path / "live", tmp_path / "copy"
    live.mkdir()
    async with operating(live) as found:
        dead = await found.token("orders.long")
        done = await found.revoke(principal=AGENT, standing=True)
        shutil.copytree(live, copy)
    async with operating(copy) as found:
        assert [one.id for one in await found.standing()] == [done.standing_id]
        assert found.dead(dead)
        assert await found.reason() == Reason.REVOKED
