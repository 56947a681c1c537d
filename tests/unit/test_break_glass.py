"""Break-glass: what opens it, what it gives and does not give, and what ends it."""

import asyncio
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from structlog.testing import capture_logs
from support.exchanging import CORRELATION, OWN_PID, act, steps
from support.operating import (
    ANN,
    BOB,
    CAROL,
    CLOSED,
    OTHER,
    REQUEST_ID,
    SECOND_OPERATOR,
    STRANGER,
    WHY,
    operating,
    why,
)
from support.processes import until
from support.whole_broker import AGENT, OPERATOR, RESOURCE

from attestors.contract import FactKey
from broker.errors import ApprovalRequired, Invalid, Reason, Refused
from broker.ledger.records import Intent, Refusal
from broker.ledger.scope_records import BreakGlass, StandingLifted
from broker.ledger.verify import verify
from broker.operator_orders import LONGEST_PERMIT


async def test_what_no_policy_permits_is_given_once_two_others_approved_it_and_it_is_loud(tmp_path: Path) -> None:
    async with operating(tmp_path) as found:
        wanted = found.emergency()
        assert await found.reason(CLOSED) == Reason.DENIED
        lacking = await found.lay_down(wanted)
        for said in (
            OPERATOR,
            "broker.breakglass",
            RESOURCE,
            AGENT,
            CLOSED,
            WHY,
            f"{wanted().until:%Y-%m-%dT%H:%M:%SZ}",
        ):
            assert said in lacking.text
        await found.approve(lacking.request_digest, ANN)
        assert await why(found.ask(wanted)) == Reason.APPROVAL_REQUIRED
        assert await found.reason(CLOSED) == Reason.DENIED
        await found.approve(lacking.request_digest, BOB)
        with capture_logs() as logs:
            permit = await found.ask(wanted)
        (told,) = [one for one in logs if one["event"] == "break_glass"]
        assert (told["log_level"], told["id"], told["by"], told["approvers"]) == (
            "warning",
            permit.id,
            OPERATOR,
            (ANN, BOB),
        )
        token = await found.token(CLOSED)
        assert [one.id for one in await found.standing()] == [permit.id]
        assert found.scope.standing.permits() == 1
        records = await found.parts.records()
    (kept,) = [one for one in records if isinstance(one, BreakGlass)]
    assert (kept.principal, kept.action, kept.resource, kept.detail) == (AGENT, CLOSED, RESOURCE, WHY)
    assert (kept.by, kept.approvers, kept.policies) == (OPERATOR, (ANN, BOB), ("emergency.cedar#may-break-glass",))
    assert (kept.approval, kept.correlation_id) == (lacking.request_digest, CORRELATION)
    (intent,) = [one for one in records if isinstance(one, Intent)]
    assert (intent.jti, intent.policies) == (token.claims.jti, (f"break-glass:{permit.id}",))
    assert verify(tmp_path / "ledger.db").good


async def test_it_permits_exactly_that(tmp_path: Path) -> None:
    async with operating(tmp_path) as found:
        await found.permitted()
        caller = found.parts.caller()
        assert await found.reason(CLOSED) == ""
        assert await found.reason(CLOSED, OTHER) == Reason.DENIED
        assert await found.reason("orders.sealed") == Reason.DENIED
        elsewhere = act(CLOSED)
        for resource in ("https://orders.acme.test/orders/18", "https://orders.acme.test/orders", f"{RESOURCE}/lines"):
            another = type(elsewhere)(CLOSED, resource, elsewhere.audience, {})
            assert await why(found.parts.token(another, caller)) == Reason.DENIED
        assert await found.reason("orders.read") == "", "what policy permits is policy's"


# -- who may, and whose approval counts --------------------------------------------------------------------------------


async def test_a_policy_has_to_permit_it_to_who_asks_and_two_approvals_are_needed_whatever_it_says(
    tmp_path: Path,
) -> None:
    async with operating(tmp_path) as found:
        wanted = found.emergency()
        assert await why(found.ask(wanted, STRANGER)) == Reason.DENIED
        lacking = await found.lay_down(wanted, SECOND_OPERATOR)  # whom policy permits it without any
        await found.approve(lacking.request_digest, ANN)
        assert await why(found.ask(wanted, SECOND_OPERATOR)) == Reason.APPROVAL_REQUIRED
        assert await found.reason(CLOSED) == Reason.DENIED
        await found.approve(lacking.request_digest, BOB)
        assert (await found.ask(wanted, SECOND_OPERATOR)).approvers == (ANN, BOB)
        assert await found.reason(CLOSED) == ""
        refusals = [one for one in await found.parts.records() if isinstance(one, Refusal)]
    stages = {(one.principal, one.reason, one.action) for one in refusals if one.stage == "break_glass"}
    assert (STRANGER, Reason.DENIED, "broker.breakglass") in stages
    assert (SECOND_OPERATOR, Reason.APPROVAL_REQUIRED, "broker.breakglass") in stages


async def test_the_workload_that_it_is_for_does_not_count_among_those_who_approve(tmp_path: Path) -> None:
    async with operating(tmp_path) as found:
        wanted = found.emergency()
        lacking = await found.lay_down(wanted)
        await found.approve(lacking.request_digest, AGENT, ANN)
        assert await why(found.ask(wanted)) == Reason.APPROVAL_REQUIRED, "by policy they are two"
        assert await found.reason(CLOSED) == Reason.DENIED
        await found.approve(lacking.request_digest, OTHER)
        assert (await found.ask(wanted)).approvers == (ANN, OTHER)


async def test_who_asks_approves_nothing(tmp_path: Path) -> None:
    more = """@id("operators-approve") permit (
      principal == Workload::"spiffe://acme.test/operator", action == Action::"broker.approve", resource
    );"""
    async with operating(tmp_path, more) as found:
        wanted = found.emergency()
        lacking = await found.lay_down(wanted)
        assert await why(found.approve(lacking.request_digest, OPERATOR)) == Reason.DENIED
        await found.approve(lacking.request_digest, ANN)
        assert await why(found.ask(wanted)) == Reason.APPROVAL_REQUIRED


async def test_approvals_are_for_this_very_emergency_and_are_used_up_with_it(tmp_path: Path) -> None:
    async with operating(tmp_path) as found:
        wanted = found.emergency()
        lacking = await found.lay_down(wanted)
        await found.approve(lacking.request_digest, ANN, BOB)
        longer = wanted().until + timedelta(seconds=1)
        for change in ({"principal": OTHER}, {"until": longer}, {"reason": "another"}, {"action": "orders.sealed"}):
            assert await why(found.ask(found.emergency(**{"until": wanted().until, **change}))) == "approval_required"
        assert await why(found.ask(wanted, request_id="another-request-id")) == Reason.APPROVAL_REQUIRED
        permit = await found.ask(wanted)
        assert await why(found.ask(wanted)) == Reason.ALREADY_USED, "they gave one permit"
        assert [one.id for one in await found.standing()] == [permit.id]
        shown = await found.desk._records.find(lacking.request_digest, found.now())
        assert shown is not None
        assert shown.state == "used"


async def test_of_two_who_ask_with_the_same_approvals_at_once_one_gets_the_permit(tmp_path: Path) -> None:
    async with operating(tmp_path) as found:
        wanted = found.emergency()
        lacking = await found.lay_down(wanted)
        await found.approve(lacking.request_digest, ANN, BOB)
        reasons = await asyncio.gather(*(why(found.ask(wanted)) for _ in range(5)))
        assert reasons.count("") == 1
        assert set(reasons) <= {"", "approval_required", "already_used"}
        assert len(await found.standing()) == 1
        records = await found.parts.records()
    assert len([one for one in records if isinstance(one, BreakGlass)]) == 1


async def test_whoever_waits_for_approval_is_told_that_it_is_used(tmp_path: Path) -> None:
    async with operating(tmp_path) as found:
        wanted = found.emergency()
        lacking = await found.lay_down(wanted)
        operator = found.parts.caller(OPERATOR).identity
        states = found.desk.wait(operator, lacking.request_digest, found.now, CORRELATION)
        assert (await anext(states)).state == "waiting"
        await found.approve(lacking.request_digest, ANN, BOB)
        assert len((await anext(states)).approvals) == 2
        await found.ask(wanted)
        assert (await anext(states)).state == "used"


# -- what it does not outweigh -----------------------------------------------------------------------------------------


async def test_it_never_outweighs_a_forbid_nor_makes_up_for_evidence_or_a_policy_that_errs(tmp_path: Path) -> None:
    async with operating(tmp_path) as found:
        for action in ("orders.sealed", "orders.refund", "orders.attested", "orders.weighed"):
            await found.permitted(found.emergency(action=action), request_id=f"{REQUEST_ID}-{action.partition('.')[2]}")
        assert await found.reason("orders.sealed") == Reason.DENIED
        for action, parameters in (("orders.refund", {"amount": 5000}), ("orders.attested", {})):
            # Both require what SPIRE says, and of who comes over mutual TLS it says nothing.
            assert await found.reason(action, **parameters) == Reason.ATTESTATION_UNAVAILABLE
        assert await found.reason("orders.weighed", amount=2**53 - 1) == Reason.DENIED, "a policy errs"
        assert await found.reason("orders.weighed", amount=1) == "", "the control"
        assert await found.reason("orders.unheard-of") == Reason.UNKNOWN_ACTION


async def test_evidence_that_says_no_outweighs_it(tmp_path: Path) -> None:
    async with operating(tmp_path) as found:
        await found.permitted(found.emergency(action="orders.refund"))
        process = found.parts.caller(pid=OWN_PID)
        spire = await found.parts.entitlements(process.identity.process, found.now())
        known = replace(process, identity=replace(process.identity, known={"spire": spire}))
        assert await why(found.parts.token(act("orders.refund", amount=5000), known)) == "", "the control"
        assert await why(found.parts.token(act("orders.refund", amount=5000), process)) != ""


async def test_it_gives_no_signature(tmp_path: Path) -> None:
    async with operating(tmp_path) as found:
        await found.permitted(found.emergency(action="orders.stamped"))
        signing = {"artifacts": [{"sha256": "00" * 32}], "purpose": "release", "signer": "keyless"}
        assert await found.reason("orders.stamped", signing=signing) == Reason.DENIED


async def test_it_never_outweighs_a_standing_denial(tmp_path: Path) -> None:
    async with operating(tmp_path) as found:
        await found.permitted()
        token = await found.token(CLOSED)
        denial = await found.revoke(principal=AGENT, standing=True)
        assert found.dead(token)
        assert await found.reason(CLOSED) == Reason.REVOKED
        assert await why(found.ask(found.emergency(), request_id="asked-while-denied")) == Reason.REVOKED
        await found.lift(denial.standing_id)
        assert await found.reason(CLOSED) == ""


async def test_identity_is_looked_at_all_the_same(tmp_path: Path) -> None:
    """A process that SPIRE no longer gives the name loses what the permit gave it."""
    async with operating(tmp_path) as found:
        await found.permitted()
        process = found.parts.caller(pid=OWN_PID)
        token = await found.parts.token(act(CLOSED), process)
        assert process.identity.process is not None
        key = FactKey(f"spire:{OWN_PID}:{process.identity.process.start_time}")
        found.scope.tell(key)
        await found.settled()
        assert not found.dead(token), "the control: SPIRE says what it said"
        found.parts.ids = [OTHER]
        found.scope.tell(key)
        await found.settled()
        assert found.dead(token)


async def test_without_the_ledger_nothing_is_permitted_or_given(tmp_path: Path) -> None:
    async with operating(tmp_path) as found:
        wanted = found.emergency()
        lacking = await found.lay_down(wanted)
        await found.approve(lacking.request_digest, ANN, BOB)
        await found.exchange.ledger.close()
        assert await why(found.ask(wanted)) in {Reason.LEDGER_UNAVAILABLE, Reason.ATTESTATION_UNAVAILABLE}
        assert found.scope.standing.permits() == 0


async def test_what_the_store_may_have_taken_without_saying_so_is_taken_back(tmp_path: Path) -> None:
    """Who heard that it failed does not find it open after the next start."""
    async with operating(tmp_path) as found:
        wanted = found.emergency()
        lacking = await found.lay_down(wanted)
        await found.approve(lacking.request_digest, ANN, BOB)
        checkpoint, aside = tmp_path / "checkpoint", tmp_path / "aside"
        checkpoint.rename(aside)
        checkpoint.mkdir()
        with capture_logs() as logs:
            asking = asyncio.create_task(found.ask(wanted))
            await until(lambda: "not_recorded_yet" in [one["event"] for one in logs], "no checkpoint can be written")
        assert found.scope.standing.permits() == 0
        checkpoint.rmdir()
        aside.rename(checkpoint)
        assert await why(asking) == Reason.LEDGER_UNAVAILABLE
        assert await found.reason(CLOSED) == Reason.DENIED
    async with operating(tmp_path) as found:
        assert found.scope.standing.permits() == 0
        assert await found.reason(CLOSED) == Reason.DENIED
        records = await found.parts.records()
    assert [type(one) for one in records if isinstance(one, BreakGlass | StandingLifted)][:1] == [BreakGlass]
    assert [one for one in records if isinstance(one, StandingLifted)]


# -- how it ends -------------------------------------------------------------------------------------------------------


async def test_its_end_bounds_what_it_gave_and_then_it_gives_nothing(tmp_path: Path) -> None:
    async with operating(tmp_path) as found:
        ends = (found.now() + timedelta(seconds=30)).replace(microsecond=0)
        await found.permitted(found.emergency(until=ends))
        token = await found.token(CLOSED)
        assert token.claims.expires_at <= ends
        found.parts.ahead = timedelta(seconds=31)
        assert await found.reason(CLOSED) == Reason.DENIED


async def test_it_is_forgotten_when_its_time_has_passed(tmp_path: Path) -> None:
    async with operating(tmp_path) as found:
        await found.permitted(found.emergency(until=(found.now() + timedelta(seconds=3)).replace(microsecond=0)))
        await until(lambda: found.scope.standing.permits() == 0, "it is forgotten")
        assert await found.reason(CLOSED) == Reason.DENIED


async def test_lifted_it_takes_what_it_gave_with_it(tmp_path: Path) -> None:
    async with operating(tmp_path) as found:
        permit = await found.permitted()
        dead, spared = await found.token(CLOSED), await found.token()
        await found.lift(permit.id)
        await found.settled()
        assert (found.dead(dead), found.dead(spared)) == (True, False)
        assert await found.reason(CLOSED) == Reason.DENIED
    async with operating(tmp_path) as found:
        assert found.scope.standing.permits() == 0
        assert found.dead(dead)


@pytest.mark.parametrize("count", range(0, 40, 4))
async def test_of_a_mint_by_a_permit_and_its_lifting_one_comes_first(tmp_path: Path, count: int) -> None:
    async with operating(tmp_path) as found:
        permit = await found.permitted()
        lifting = asyncio.create_task(found.lift(permit.id))
        await steps(count)
        minting = asyncio.create_task(found.token(CLOSED))
        await lifting
        if not await why(minting):
            await found.settled()
            assert found.dead(minting.result())


async def test_an_approver_who_takes_his_approval_back_ends_it(tmp_path: Path) -> None:
    async with operating(tmp_path) as found:
        wanted = found.emergency()
        lacking = await found.lay_down(wanted)
        await found.approve(lacking.request_digest, ANN, BOB)
        permit = await found.ask(wanted)
        token = await found.token(CLOSED)
        assert await why(found.withdraw(lacking.request_digest, CAROL)) == Reason.DENIED, "it was not hers"
        assert await found.reason(CLOSED) == ""
        await found.withdraw(lacking.request_digest, BOB)
        await found.settled()
        assert found.dead(token)
        assert await found.reason(CLOSED) == Reason.DENIED
    async with operating(tmp_path) as found:
        assert found.scope.standing.permits() == 0
        records = await found.parts.records()
    (lifted,) = [one for one in records if isinstance(one, StandingLifted)]
    assert (lifted.id, lifted.by, lifted.policies) == (permit.id, BOB, ())
    assert verify(tmp_path / "ledger.db").good


async def test_an_open_permit_is_told_again_at_each_start(tmp_path: Path) -> None:
    async with operating(tmp_path) as found:
        permit = await found.permitted()
    with capture_logs() as logs:
        async with operating(tmp_path) as found:
            assert await found.reason(CLOSED) == ""
    assert [one["id"] for one in logs if one["event"] == "break_glass"] == [permit.id]


# -- what makes no sense -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ahead", "sense"),
    [
        (timedelta(0), False),
        (timedelta(seconds=-1), False),
        (LONGEST_PERMIT + timedelta(seconds=2), False),
        (timedelta(days=300), False),
        (timedelta(seconds=2), True),
        (LONGEST_PERMIT - timedelta(seconds=2), True),
    ],
    ids=str,
)
async def test_it_ends_within_a_day(tmp_path: Path, ahead: timedelta, sense: bool) -> None:  # noqa: FBT001 - a table
    async with operating(tmp_path) as found:
        ends = (found.now() + ahead).replace(microsecond=0)
        reason = await why(found.ask(found.emergency(until=ends)))
        assert reason == (Reason.APPROVAL_REQUIRED if sense else Reason.MALFORMED)


async def test_a_time_that_is_not_utc_or_not_a_whole_second_is_none(tmp_path: Path) -> None:
    async with operating(tmp_path) as found:
        whole = (found.now() + timedelta(hours=1)).replace(microsecond=0)
        for wrong in (whole.replace(tzinfo=None), whole.replace(microsecond=1)):
            with pytest.raises(Invalid):
                found.emergency(until=wrong)()


@pytest.mark.parametrize("request_id", ["", "short", "with space in it!", "x" * 65])
async def test_without_a_request_id_nobody_can_have_approved_it(tmp_path: Path, request_id: str) -> None:
    async with operating(tmp_path) as found:
        assert await why(found.ask(found.emergency(), request_id=request_id)) == Reason.MALFORMED


async def test_without_a_desk_it_is_refused_like_anything_that_lacks_approvals(tmp_path: Path) -> None:
    async with operating(tmp_path) as found:
        found.exchange.desk = None
        with pytest.raises(Refused) as caught:
            await found.ask(found.emergency())
        assert caught.value.reason is Reason.APPROVAL_REQUIRED
        assert not isinstance(caught.value, ApprovalRequired)
