"""Waiting for approvals: told at once, to the request's own caller alone, and no longer than there is a reason to."""

import asyncio
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from support.approving import WORKLOADS, approving, digest_of
from support.exchanging import CORRELATION

from broker.approval_records import Shown
from broker.errors import ApprovalRequired, Invalid, Reason, Refused
from broker.ledger.records import Refusal


async def waited(states: object) -> Shown:
    async with asyncio.timeout(10):
        return await anext(states)


async def test_who_waits_is_told_each_change_and_the_end_without_asking_again(tmp_path: Path) -> None:
    async with approving(tmp_path) as found:
        with pytest.raises(ApprovalRequired):
            await found.ask()
        states = found.desk.wait(found.who("agent"), found.digest, found.now, CORRELATION)
        assert (await waited(states)).approvals == ()
        for count, change in enumerate(("ann", "bob"), 1):
            following = asyncio.create_task(waited(states))
            await found.approve(change)
            assert len((await following).approvals) == count
        await found.withdraw("ann")
        assert [one.approver for one in (await waited(states)).approvals] == [WORKLOADS["bob"]]
        await found.approve("carol")
        assert len((await waited(states)).approvals) == 2
        await found.ask()
        assert (await waited(states)).state == "used"
        with pytest.raises(StopAsyncIteration):
            await waited(states)


async def test_what_changes_while_a_waiter_is_slow_is_told_once(tmp_path: Path) -> None:
    async with approving(tmp_path) as found:
        with pytest.raises(ApprovalRequired):
            await found.ask()
        states = found.desk.wait(found.who("agent"), found.digest, found.now, CORRELATION)
        await waited(states)
        for name in ("ann", "bob", "carol", "dora", "emil"):
            await found.approve(name)
        assert len((await waited(states)).approvals) == 5
        following = asyncio.create_task(waited(states))
        await found.withdraw("emil")
        assert len((await following).approvals) == 4, "and nothing in between was kept for it"
        await states.aclose()
        assert not found.parts.exchange.ledger._subscribers, "who goes leaves nothing behind"


async def test_only_the_requests_own_caller_waits(tmp_path: Path) -> None:
    async with approving(tmp_path) as found:
        with pytest.raises(ApprovalRequired):
            await found.ask()
        never = digest_of(request_id="never-asked-so-far")
        for name, digest in (("ann", found.digest), ("other", found.digest), ("dora", found.digest), ("agent", never)):
            with pytest.raises(Refused) as refused:
                await waited(found.desk.wait(found.who(name), digest, found.now, CORRELATION))
            assert refused.value.reason is Reason.DENIED
        with pytest.raises(Invalid):
            await waited(found.desk.wait(found.who("agent"), "", found.now, CORRELATION))
        assert await waited(found.desk.wait(found.who("agent"), found.digest, found.now, CORRELATION))
        stages = [one.stage for one in await found.parts.records() if isinstance(one, Refusal)]
    assert stages == ["request", *(["wait"] * 5)]


async def test_who_waits_is_told_that_an_approval_ended_by_itself(tmp_path: Path) -> None:
    async with approving(tmp_path) as found:
        with pytest.raises(ApprovalRequired):
            await found.ask()
        states = found.desk.wait(found.who("agent"), found.digest, found.now, CORRELATION)
        assert not (await waited(states)).approvals
        following = asyncio.create_task(waited(states))
        await found.approve("ann", valid_for_s=1)
        assert (await following).approvals
        assert not (await waited(states)).approvals


async def test_a_wait_ends_with_its_callers_identity_and_with_its_request(tmp_path: Path) -> None:
    async with approving(tmp_path) as found:
        with pytest.raises(ApprovalRequired):
            await found.ask()
        brief = replace(found.who("agent"), expires_at=found.now() + timedelta(milliseconds=50))
        states = [one async for one in found.desk.wait(brief, found.digest, found.now, CORRELATION)]
        assert [one.state for one in states] == ["waiting"], "no refusal: it may come and wait again"
        found.parts.ahead += timedelta(seconds=3599.5)
        forgotten = found.desk.wait(found.who("agent"), found.digest, found.now, CORRELATION)
        with pytest.raises(Refused) as ended:
            [one async for one in forgotten]
        assert ended.value.reason is Reason.EXPIRED
