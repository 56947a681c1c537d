"""What the flow asks of scope at each step, and what time, whatever it is set to, does not take away."""

from datetime import datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.lives import NOW, PROCESS, facts, live
from support.redeciding import redeciding

from attestors.contract import AttestationFailed, AttestationUnavailable, FactKey, Process
from broker.errors import BrokerError, Reason, Refused
from broker.ledger.records import StandingDenial
from broker.scope.scope import GRACE_S, LONGEST_S, Scope
from broker.scope.steady import Steady
from broker.scope.suspension import Suspension

TICKET = FactKey("ticket:T-1")


def why(call: object, *arguments: object) -> str:
    try:
        call(*arguments)
    except BrokerError as error:
        return error.reason
    return ""


async def test_what_changed_since_it_was_looked_at_does_not_enter() -> None:
    scope = Scope()
    heard = scope.heard
    scope.tell(FactKey("ticket:T-2"))
    assert why(scope.enter, live("other", facts("ticket:T-1"), seq=0), heard, NOW) == ""
    scope.tell(TICKET)
    assert why(scope.enter, live("one", facts("ticket:T-1"), seq=0), heard, NOW) == Reason.SUPERSEDED
    assert why(scope.enter, live("two", facts("ticket:T-1"), seq=0), scope.heard, NOW) == ""


async def test_what_changes_between_entering_and_the_ledger_ends_it_and_leaves_nothing() -> None:
    scope = Scope()
    one, other = live("one", facts("ticket:T-1"), seq=0), live("other", seq=0)
    scope.enter(one, scope.heard, NOW)
    scope.enter(other, scope.heard, NOW)
    assert one.is_current()
    scope.tell(TICKET)
    assert not one.is_current(), "as the ledger's thread sees it"
    assert why(scope.confirm, one, 7) == Reason.SUPERSEDED
    assert scope.live.get("one") is None
    assert why(scope.confirm, other, 8) == ""
    assert other.seq == 8


async def test_what_is_durable_is_told_and_not_superseded() -> None:
    scope = Scope()
    told: list[FactKey] = []
    scope.told = told.append
    one = live("one", facts("ticket:T-1"), seq=0)
    scope.enter(one, scope.heard, NOW)
    scope.confirm(one, 7)
    scope.tell(TICKET)
    assert (one.changed, told) == (False, [TICKET])


@pytest.mark.parametrize(
    ("error", "reason"),
    [(AttestationFailed("gone"), "not_attested"), (AttestationUnavailable("away"), "attestation_unavailable")],
)
async def test_a_process_that_nobody_can_follow_gets_nothing(error: Exception, reason: str) -> None:
    """Else nobody would hear of its end."""
    scope = Scope()
    followed: list[Process] = []
    scope.follow = followed.append
    assert why(scope.enter, live("one", process=PROCESS, seq=0), 0, NOW) == ""
    assert followed == [PROCESS]

    def follow(_: Process) -> None:
        raise error

    scope.follow = follow
    assert why(scope.enter, live("two", process=PROCESS, seq=0), 0, NOW) == reason
    assert scope.live.get("two") is None
    assert why(scope.enter, live("three", seq=0), 0, NOW) == ""


async def test_a_child_of_what_is_refused_or_suspended_does_not_enter() -> None:
    """Invariant 4."""
    scope = Scope()
    parent, held = live("parent"), live("held")
    assert why(scope.enter, live("child", parent="parent", seq=0), 0, NOW) == ""
    scope.refuse([parent], Reason.SESSION_RISK)
    assert why(scope.enter, live("child-2", parent="parent", seq=0), 0, NOW) == Reason.SESSION_RISK
    scope.suspensions[1] = Suspension.of(1, "cause", [held], None)
    assert why(scope.enter, live("child-3", parent="held", seq=0), 0, NOW) == Reason.SUSPENDED
    assert why(scope.enter, live("child-4", parent="another", seq=0), 0, NOW) == ""


async def test_what_a_denial_stands_against_does_not_enter_although_it_was_decided_before() -> None:
    scope = Scope()
    one, other = live("one", seq=0), live("other", action="orders.once", seq=0)
    scope.standing.add(
        StandingDenial(at=NOW, id="denial", action="orders.read", by="op", policies=("p",), policy_revision="r")
    )
    assert why(scope.enter, one, 0, NOW) == Reason.REVOKED
    assert why(scope.enter, other, 0, NOW) == ""


async def test_refused_is_said_once_and_stays_with_its_first_reason() -> None:
    scope = Scope()
    one, two = live("one"), live("two")
    assert scope.refuse([one], Reason.DENIED) == [one]
    assert scope.refuse([one, two], Reason.REVOKED) == [two]
    assert [why(scope.require, jti) for jti in ("one", "two", "three")] == ["denied", "revoked", ""]
    with pytest.raises(Refused):
        scope.require("one")


async def test_a_credential_that_is_refused_on_its_way_to_the_ledger_is_never_given() -> None:
    scope = Scope()
    one = live("one", seq=0)
    scope.enter(one, 0, NOW)
    scope.refuse([one], Reason.REVOKED)
    assert why(scope.confirm, one, 7) == Reason.SUPERSEDED


# -- time --------------------------------------------------------------------------------------------------------------


async def test_a_clock_that_goes_ahead_and_back_makes_nothing_forgotten_that_still_counts() -> None:
    """Neither what is live, which nobody would refuse any more, nor what was refused, nor what stands."""
    scope = Scope()
    one, dead = live("one"), live("dead")
    for each in (one, dead):
        scope.live.add(each)
    scope.refuse([dead], Reason.DENIED)
    until = NOW + timedelta(minutes=10)
    scope.standing.add(
        StandingDenial(
            at=NOW,
            id="denial",
            action="orders.once",
            until=until,
            by="o",
            policies=("p",),
            policy_revision="r",
        )
    )
    scope.forget(NOW)
    for wrong in (timedelta(hours=1), timedelta(days=365), timedelta(hours=-1)):
        scope.forget(NOW + wrong)
        assert scope.live.get("one") is one
        assert scope.is_refused("dead")
        assert scope.standing.get("denial") is not None


@given(
    st.lists(st.tuples(st.floats(0.1, 30), st.one_of(st.just(0.0), st.floats(-7200, 7200))), min_size=1, max_size=40)
)
def test_the_time_to_forget_by_is_never_ahead_of_both_clocks(steps: list[tuple[float, float]]) -> None:
    """However the clock is set: no faster than time passes, until it has stayed ahead for long enough to be right."""
    steady, monotonic, ahead_since = Steady(LONGEST_S), 1000.0, None
    true = NOW
    before: datetime | None = None
    for seconds, off in steps:
        monotonic += seconds
        true += timedelta(seconds=seconds)
        found = steady.at(true + timedelta(seconds=off), monotonic)
        assert found <= true + timedelta(seconds=off)
        if before is not None and found - before > timedelta(seconds=seconds + 1e-6):
            assert ahead_since is not None
            assert monotonic - ahead_since > LONGEST_S
        if true + timedelta(seconds=off) - found < timedelta(seconds=1):
            ahead_since = None
        elif ahead_since is None:
            ahead_since = monotonic
        before = found


async def test_a_clock_that_was_wrong_and_is_set_right_is_believed_after_a_while() -> None:
    steady = Steady(LONGEST_S)
    right = NOW + timedelta(hours=1)
    assert steady.at(NOW, 0) == NOW
    assert steady.at(right, 1) == NOW + timedelta(seconds=1)
    assert steady.at(right, LONGEST_S) < right
    assert steady.at(right + timedelta(seconds=400), LONGEST_S + 2) == right + timedelta(seconds=400)


async def test_refusals_are_kept_as_long_as_anything_given_before_them_can_live(tmp_path: Path) -> None:
    assert LONGEST_S >= 300 + GRACE_S
    async with redeciding(tmp_path) as found:
        one = await found.token()
        await found.scope.deciding.refuse([one], Reason.DENIED, "test")
        found.parts.ahead = timedelta(days=1)
        found.parts.exchange.scope.forget(found.parts.now())
        found.parts.ahead = timedelta()
        assert found.says(one) == "denied"
