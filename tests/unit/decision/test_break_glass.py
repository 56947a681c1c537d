"""A permit for an emergency stands in for a policy that permits, and for nothing else."""

import dataclasses
from datetime import UTC, datetime, timedelta

import pytest

from broker.action import Action
from broker.decision.decide import Permit, decide
from broker.errors import Invalid, Reason, Refused

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)  # the world's
SIGNED = """
action "orders.stamp" appliesTo {
  principal: [Workload], resource: [Resource], context: { parameters: { signing: Signing } }
};
"""
PERMIT = Permit(id="17", until=NOW + timedelta(hours=1))


def by_permit(world, *texts, permit=PERMIT, action=None, facts=None, not_after=None, schema=None):
    policy = world.policy(*texts, schema=schema or world.schema)
    return decide(
        policy,
        world.agent,
        action or world.refund,
        world.spire if facts is None else facts,
        NOW,
        not_after=not_after or world.not_after,
        permit=permit,
    )


def refused_for(call):
    with pytest.raises(Refused) as caught:
        call()
    return caught.value


def test_where_no_policy_speaks_a_permit_grants_and_says_so(world):
    grant = by_permit(world, "")
    assert (grant.policies, grant.permit) == (("break-glass:17",), "17")
    assert grant.expires_at == NOW + timedelta(seconds=60)
    assert grant.use == "once"
    assert refused_for(lambda: world.decide("")).reason is Reason.DENIED, "the control"


def test_where_a_policy_permits_the_permit_changes_nothing(world):
    grant, plain = by_permit(world, world.allow), world.decide(world.allow)
    assert (grant.policies, grant.permit, grant.expires_at) == (plain.policies, "", plain.expires_at)


@pytest.mark.parametrize("allow", [True, False], ids=["permitted", "not-permitted"])
@pytest.mark.parametrize(
    "forbid",
    [
        '@id("no") forbid (principal, action == Action::"orders.refund", resource);',
        '@id("no") forbid (principal, action in Action::"money", resource);',
        '@id("no") forbid (principal == Workload::"spiffe://acme.test/support/agent", action, resource);',
        '@id("no") forbid (principal, action == Action::"orders.refund", resource) unless { context has process };',
    ],
)
def test_a_forbid_outweighs_it(world, forbid, allow):
    error = refused_for(lambda: by_permit(world, forbid, world.allow if allow else ""))
    assert (error.reason, "forbidden by p.cedar#no" in error.detail) == (Reason.DENIED, True)


def test_a_forbid_that_does_not_apply_is_no_hindrance(world):
    forbid = '@id("no") forbid (principal, action == Action::"orders.read", resource);'
    assert by_permit(world, forbid).permit == "17"


def test_a_policy_that_errs_refuses_it(world):
    errs = """@id("errs") forbid (principal, action == Action::"orders.refund", resource)
        when { context.parameters.amount * 9007199254740991 > 9000000000000000000 };"""
    big = dataclasses.replace(world.refund, parameters={"amount": 2**53 - 1})
    assert by_permit(world, errs.replace("context.parameters", "context has parameters && context.parameters"))
    error = refused_for(
        lambda: by_permit(
            world, errs.replace("context.parameters", "context has parameters && context.parameters"), action=big
        )
    )
    assert "not decided without error" in error.detail


def test_a_question_that_does_not_fit_the_schema_is_refused(world):
    wrong = dataclasses.replace(world.refund, parameters={"amount": "30"})
    assert refused_for(lambda: by_permit(world, "", action=wrong)).reason is Reason.DENIED
    forged = dataclasses.replace(world.refund, parameters={"amount": {"__extn": {"fn": "ip", "arg": "::1"}}})
    with pytest.raises(Invalid):
        by_permit(world, "", action=forged)


def test_an_action_that_nobody_declared_is_unknown_all_the_same(world):
    unknown = dataclasses.replace(world.refund, name="orders.destroy")
    assert refused_for(lambda: by_permit(world, "", action=unknown)).reason is Reason.UNKNOWN_ACTION


def test_evidence_that_the_schema_requires_is_required_all_the_same(world):
    error = refused_for(lambda: by_permit(world, "", facts={}))
    assert (error.reason, "missing: spire" in error.detail) == (Reason.DENIED, True)


def test_facts_and_identities_that_ended_refuse_all_the_same(world):
    over = world.facts(spire={"ids": [str(world.agent)]}, expires_at=NOW)
    assert refused_for(lambda: by_permit(world, "", facts=over)).reason is Reason.EXPIRED
    assert refused_for(lambda: by_permit(world, "", not_after=NOW)).reason is Reason.EXPIRED


def test_it_gives_no_signature(world):
    """What a key signs is given by permits that name the key alone."""
    asked = {"artifacts": [{"sha256": "00" * 32}], "purpose": "release", "signer": "keyless"}
    stamp = Action("orders.stamp", "https://orders.acme.test/orders/17", "https://broker.acme.test", {"signing": asked})
    allow = '@id("stamps") permit (principal, action == Action::"orders.stamp", resource);'
    assert by_permit(world, allow, action=stamp, facts={}, schema=SIGNED).permit == "", "the control"
    assert refused_for(lambda: by_permit(world, "", action=stamp, facts={}, schema=SIGNED)).reason is Reason.DENIED


def test_nothing_that_it_gives_outlives_it(world):
    brief = Permit(id="17", until=NOW + timedelta(seconds=7))
    assert by_permit(world, "", permit=brief).expires_at == brief.until
    for seconds in (0, -1):
        over = Permit(id="17", until=NOW + timedelta(seconds=seconds))
        assert refused_for(lambda over=over: by_permit(world, "", permit=over)).reason is Reason.DENIED
