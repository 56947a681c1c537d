"""What rests on a fact that changed is decided again, as at minting; what no longer passes is refused for good."""

import asyncio
from pathlib import Path

import pytest
from support.processes import until
from support.redeciding import ASKS_FOR_PODS, POLICIES, POLICY, Source, redeciding
from support.whole_broker import OPERATOR

from broker.errors import Reason
from broker.scope.case import Bounds


async def test_a_closed_ticket_ends_what_rests_on_it_and_nothing_else(tmp_path: Path) -> None:
    """The second half of the flow (DESIGN section 2)."""
    desk = Source()
    async with redeciding(tmp_path, desk) as found:
        hit = await found.token("orders.ticketed", ticket="T-1")
        spared = await found.token("orders.ticketed", ticket="T-2")
        plain = await found.token()
        desk.closes("T-1")
        await found.becomes(hit, "ticket_closed")
        await found.settled()
        assert [found.says(one) for one in (spared, plain)] == ["", ""]
        (record,) = await found.refusals()
    assert (record.jtis, record.reason, record.cause) == ((hit.jti,), Reason.TICKET_CLOSED, "ticket:T-1")


async def test_refused_is_final_also_when_the_reasons_come_back(tmp_path: Path) -> None:
    desk = Source()
    async with redeciding(tmp_path, desk) as found:
        one = await found.token("orders.ticketed", ticket="T-1")
        desk.closes("T-1")
        await found.becomes(one, "ticket_closed")
        desk.said.clear()
        desk.tell("T-1")
        await found.settled()
        await found.policy(f"{POLICY}\n// the same again\n")
        await found.settled()
        assert found.says(one) == "ticket_closed"
        again = await found.token("orders.ticketed", ticket="T-1")
        assert found.says(again) == "", "a new one is minted"
        assert len(await found.refusals()) == 1


async def test_what_only_may_have_changed_stays_and_costs_one_look(tmp_path: Path) -> None:
    """One look for each fact and caller, however many credentials rest on it: 100 of one ticket."""
    desk = Source()
    async with redeciding(tmp_path, desk) as found:
        lives = [await found.token("orders.ticketed", ticket="T-1") for _ in range(100)]
        decided, looks = found.scope.deciding.decided, desk.looks["T-1"]
        desk.tell("T-1")
        await until(lambda: desk.looks["T-1"] > looks, "it is looked at")
        await found.settled()
        assert {found.says(one) for one in lives} == {""}
        assert desk.looks["T-1"] == looks + 1
        assert found.scope.deciding.decided == decided, "what is as it was is not decided again"


async def test_a_ticket_is_looked_at_once_whoever_named_it(tmp_path: Path) -> None:
    """It is the same for all: who waits in a queue of looks at one ticket shall not be refused for that."""
    desk = Source()
    async with redeciding(tmp_path, desk) as found:
        first = await found.token("orders.ticketed", ticket="T-1", key="first")
        other = await found.token("orders.ticketed", ticket="T-1", key="other")
        else_ = await found.token("orders.ticketed", ticket="T-1", caller=found.caller(spiffe_id=OPERATOR))
        looks = desk.looks["T-1"]
        desk.tell("T-1")
        await until(lambda: desk.looks["T-1"] == looks + 1, "it is looked at")
        await found.settled()
        assert desk.looks["T-1"] == looks + 1
        desk.closes("T-1")
        for one in (first, other, else_):
            await found.becomes(one, "ticket_closed")


async def test_a_fact_that_is_other_than_before_is_decided_on_again(tmp_path: Path) -> None:
    desk = Source()
    async with redeciding(tmp_path, desk) as found:
        strict = await found.token("orders.ticketed", ticket="T-1")
        lax = await found.token("orders.also", ticket="T-1")
        desk.said["T-1"] = {"state": "waiting"}
        desk.tell("T-1")
        await found.becomes(strict, "denied")
        await found.settled()
        assert found.says(lax) == ""
        assert lax.facts["ticket"].values["state"] == "waiting", "it rests on what is true now"


async def test_a_policy_that_changes_decides_on_the_facts_that_are_known(tmp_path: Path) -> None:
    desk = Source()
    async with redeciding(tmp_path, desk) as found:
        hit, spared = await found.token("orders.ticketed", ticket="T-1"), await found.token()
        looks = desk.looks["T-1"]
        await found.policy(POLICY.replace('context.ticket.state == "open"', 'context.ticket.state == "urgent"'))
        await found.becomes(hit, "denied")
        assert found.says(spared) == ""
        assert desk.looks["T-1"] == looks, "the ticket has not changed"
        (record,) = await found.refusals()
    assert record.cause.startswith("policy:sha256:")


async def test_a_policy_that_asks_for_more_has_it_looked_at(tmp_path: Path) -> None:
    cluster = Source("kubernetes")
    for state, expected in (("open", ""), ("lost", "denied"), ("closed", "not_attested")):
        (folder := tmp_path / state).mkdir()
        async with redeciding(folder, cluster) as found:
            one = await found.token("orders.also")
            assert cluster.looks["job"] == 0
            cluster.said["job"] = {"state": state}
            await found.policy(POLICY + ASKS_FOR_PODS)
            await until(lambda: cluster.looks["job"], "it is looked at")
            await found.settled()
            assert found.says(one) == expected
            cluster.looks.clear()


async def test_a_fact_that_changes_between_its_look_and_the_decision_is_not_missed(tmp_path: Path) -> None:
    """Two facts are newly asked for. While one is waited for the other changes: nobody rests on it yet."""
    cluster, ci = Source("kubernetes"), Source("ci")
    asks_for_both = ASKS_FOR_PODS + ASKS_FOR_PODS.replace("pods", "jobs").replace("kubernetes", "ci")
    async with redeciding(tmp_path, cluster, ci, bounds=Bounds(again_s=5)) as found:
        one, bystander = await found.token("orders.also"), await found.token()
        held = ci.holds["job"] = asyncio.Event()
        await found.policy(POLICY + asks_for_both)
        await until(lambda: ci.looks["job"] and cluster.looks["job"], "both are looked at")
        await cluster.closes_heard(found, "job")
        held.set()
        await found.becomes(one, "not_attested")
        await found.settled()
        assert found.says(bystander) == ""


async def test_a_decision_on_older_facts_does_not_undo_one_on_newer_ones(tmp_path: Path) -> None:
    """The ticket changed before the policy did, but is looked at while the policy's decision waits for something."""
    desk, ci = Source(), Source("ci")
    asks_for_jobs = POLICY + ASKS_FOR_PODS.replace("kubernetes", "ci")
    forbids_waiting = asks_for_jobs + ASKS_FOR_PODS.replace("pods", "open").replace("kubernetes", "ticket")
    async with redeciding(tmp_path, desk, ci, bounds=Bounds(blind_s=20, again_s=10)) as found:
        one = await found.token("orders.also", ticket="T-1")
        ticket, job = desk.holds["T-1"], ci.holds["job"] = asyncio.Event(), asyncio.Event()
        desk.said["T-1"] = {"state": "waiting"}
        desk.tell("T-1")
        await until(lambda: desk.looks["T-1"] == 2, "it is looked at")
        await found.policy(asks_for_jobs)
        await until(lambda: ci.looks["job"] == 1, "the policy's decision waits")
        del ci.holds["job"]  # for whoever asks from now on
        ticket.set()
        await until(lambda: one.facts["ticket"].values["state"] == "waiting", "the newer fact is decided on")
        job.set()
        await found.settled()
        assert found.says(one) == ""
        assert one.facts["ticket"].values["state"] == "waiting"
        await found.policy(forbids_waiting)
        await found.becomes(one, "denied")


async def test_what_a_policy_no_longer_asks_for_ends_nothing_any_more(tmp_path: Path) -> None:
    """Minting it again would succeed, so it counts."""
    cluster = Source("kubernetes")
    policies = POLICIES | {"pods.cedar": ASKS_FOR_PODS}
    async with redeciding(tmp_path, cluster, policies=policies) as found:
        one = await found.token("orders.also")
        assert "kubernetes" in one.facts
        (tmp_path / "policy" / "pods.cedar").unlink()
        await found.policy(POLICY)
        await found.settled()
        cluster.closes("job")
        await found.settled()
        assert (found.says(one), found.parts.exchange.scope.live.keys("kubernetes:")) == ("", [])


@pytest.mark.parametrize("still_holds", [True, False])
async def test_no_credential_outlives_the_facts_that_it_has_come_to_rest_on(
    tmp_path: Path, *, still_holds: bool
) -> None:
    """Invariant 3. It was minted without them, so they may end before it does; nobody tells that time has passed."""
    cluster = Source("kubernetes")
    cluster.lives_s["job"] = 0.5
    async with redeciding(tmp_path, cluster) as found:
        one, bystander = await found.token("orders.also"), await found.token()
        await found.policy(POLICY + ASKS_FOR_PODS)
        await until(lambda: "kubernetes" in one.facts, "it rests on them")
        looks = cluster.looks["job"]
        cluster.said["job"] = {"state": "open" if still_holds else "closed"}
        await until(lambda: cluster.looks["job"] > looks, "they are looked at again when their time is over")
        await found.settled()
        assert found.says(one) == ("" if still_holds else "not_attested")
        assert found.says(bystander) == ""
