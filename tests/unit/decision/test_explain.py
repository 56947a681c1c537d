"""Explain: the same answer as the decision, and which part of each policy did not hold."""

import dataclasses
from datetime import timedelta

import pytest
from support.releases import AGENT, NOW, PERMIT, approved, policy, signing

from broker.decision.decide import decide
from broker.decision.explain import explain
from broker.errors import Invalid, Reason, Refused
from broker.identity.spiffe_id import SpiffeId

RULE = """@id("rule") permit (
    principal in Path::"spiffe://acme.test/support",
    action in [Action::"money"],
    resource in Resource::"https://orders.acme.test/orders"
) when {
    context has process && context.process.uid == 1600 && context.spire.ids.contains("spiffe://acme.test/support/agent")
} unless { context.process.gid == 0 || context.process.cgroup == "/sh" };"""


AUDIENCE = "spiffe://acme.test/service/orders"


@pytest.fixture
def ask(world):
    def ask(*texts, principal=world.agent, action=world.refund, facts=None):
        facts = world.spire | world.process if facts is None else facts
        return explain(world.policy(*texts), principal, action, facts)

    return ask


def only(explanation):
    (policy,) = explanation.policies
    return policy


def test_what_is_allowed_has_no_failed_parts(ask):
    told = ask(RULE)
    assert told.allowed
    assert told.reason is None
    assert only(told).satisfied
    assert only(told).failed == ()
    assert told.attestors == ("process", "spire")
    assert told.missing == told.errors == ()


def test_each_scope_line_that_does_not_hold_is_told(ask, world):
    stranger = SpiffeId.parse("spiffe://acme.test/build/agent")
    elsewhere = dataclasses.replace(world.refund, resource="https://orders.acme.test/carts/1")
    told = ask(RULE, principal=stranger, action=elsewhere)
    assert (told.allowed, told.reason) == (False, Reason.DENIED)
    assert only(told).failed == (
        'principal in Path::"spiffe://acme.test/support"',
        'resource in Resource::"https://orders.acme.test/orders"',
    )


def test_each_condition_that_does_not_hold_is_told_by_itself(ask, world):
    facts = world.facts(spire={"ids": []}, process={**world.process_values, "uid": 7, "gid": 0, "cgroup": "/sh"})
    failed = only(ask(RULE, facts=facts)).failed
    assert len(failed) == 4
    assert "uid) == 1600" in failed[0]
    assert failed[0].startswith("when {")
    assert "ids).contains" in failed[1]
    assert "gid) == 0" in failed[2]
    assert failed[2].startswith("unless {")
    assert '"/sh"' in failed[3]


def test_what_only_fails_for_want_of_evidence_is_told_once(ask, world):
    rule = RULE.partition(" unless")[0] + ";"
    told = ask(rule, facts=world.spire)
    assert told.missing == ("process",)
    assert only(told).failed == ("when { context has process }",)


def test_a_forbid_that_applies_is_satisfied_and_refuses(ask, world):
    forbid = '@id("no") forbid (principal, action in Action::"money", resource);'
    told = ask(world.allow, forbid)
    assert not told.allowed
    assert [(policy.id, policy.effect, policy.satisfied) for policy in told.policies] == [
        ("p.cedar#allow", "permit", True),
        ("p.cedar#no", "forbid", True),
    ]


def test_a_policy_that_errs_is_told_as_an_error(ask, world):
    rule = """@id("big") permit (principal, action == Action::"orders.refund", resource)
        when { context has parameters && context.parameters.amount * 9007199254740991 > 0 };"""
    told = ask(world.allow, rule, action=dataclasses.replace(world.refund, parameters={"amount": 2**53 - 1}))
    assert not told.allowed
    assert "p.cedar#big" in told.errors[0]


def test_a_question_that_does_not_fit_the_schema_is_told_and_the_policies_beside_it(ask, world):
    told = ask(RULE, facts=world.process)
    assert not told.allowed
    assert told.missing == ("spire",)
    assert told.errors
    assert any("ids" in text for text in only(told).failed)


def test_an_unknown_action_is_told(ask, world):
    told = ask(world.allow, action=dataclasses.replace(world.refund, name="orders.destroy"))
    assert (told.allowed, told.reason) == (False, Reason.UNKNOWN_ACTION)


def test_parameters_that_the_action_does_not_take_are_told(ask, world):
    told = ask(world.allow, action=dataclasses.replace(world.read, parameters={"amount": 1}))
    assert (told.allowed, told.reason) == (False, Reason.DENIED)
    assert told.errors == ("the schema declares no parameters for orders.read",)


def test_an_audience_that_does_not_hold_is_told_and_is_no_evidence(world):
    schema = world.schema.replace("spire?: Spire", "audience: String")
    policy = world.policy(
        f'permit (principal, action == Action::"orders.read", resource) when {{ context.audience == "{AUDIENCE}" }};',
        schema=schema,
    )
    assert explain(policy, world.agent, dataclasses.replace(world.read, audience=AUDIENCE), {}).allowed
    told = explain(policy, world.agent, world.read, {})
    assert (told.allowed, told.attestors, told.missing) == (False, (), ())
    assert "(context.audience) ==" in only(told).failed[0].replace("(context).audience", "(context.audience)")


def test_forged_values_are_malformed_here_too(ask, world):
    with pytest.raises(Invalid):
        ask(world.allow, action=dataclasses.replace(world.refund, parameters={"amount": {"__extn": {}}}))


@pytest.mark.parametrize("uid", [1600, 7])
@pytest.mark.parametrize("gid", [1600, 0])
@pytest.mark.parametrize("amount", [30, "30"])
def test_explain_and_decide_never_disagree(world, uid, gid, amount):
    action = dataclasses.replace(world.refund, parameters={"amount": amount})
    facts = world.spire | world.facts(process={**world.process_values, "uid": uid, "gid": gid})
    told = explain(world.policy(RULE), world.agent, action, facts)
    if told.allowed:
        assert world.decide(RULE, action=action, facts=facts)
    else:
        with pytest.raises(Refused) as caught:
            world.decide(RULE, action=action, facts=facts)
        assert told.reason is caught.value.reason


class TestSignatures:
    KEYLESS = f'@id("keyless") {PERMIT};'
    NAMED = f"""@id("named") @key("release nightly") {PERMIT}
      when {{ context has approval && context.approval.count > 1 }};"""

    def told(self, action, *, seen=None, texts=(KEYLESS, NAMED)):
        return explain(policy(*texts), AGENT, action, approved() if seen is None else seen)

    def test_a_permit_that_holds_and_does_not_give_the_signer_says_what_it_gives(self):
        found = self.told(signing("agent-key"), seen=approved("spiffe://acme.test/a", "spiffe://acme.test/b"))
        assert (found.allowed, found.reason) == (False, Reason.DENIED)
        assert [(one.satisfied, one.failed) for one in found.policies] == [
            (False, ("it gives the signer keyless, not agent-key",)),
            (False, ("it gives the signer key:nightly or key:release, not agent-key",)),
        ]

    def test_conditions_that_do_not_hold_are_told_beside_it(self):
        named = self.told(signing("agent-key")).policies[1]
        assert "count" in named.failed[0]
        assert named.failed[-1].startswith("it gives the signer")
        named = self.told(signing("key:release")).policies[1]
        assert (named.satisfied, len(named.failed)) == (False, 1)

    def test_the_permit_that_gives_the_signer_allows(self):
        found = self.told(signing("keyless"))
        assert (found.allowed, found.policies[0].failed) == (True, ())

    def test_missing_provenance_has_its_reason_here_too(self):
        found = self.told(signing(), seen={})
        assert (found.allowed, found.reason) == (False, Reason.PROVENANCE_MISSING)
        assert found.missing == ("approval", "provenance")

    @pytest.mark.parametrize("signer", ["keyless", "agent-key", "key:release", "key:other", "", 7, ["keyless"]])
    @pytest.mark.parametrize("count", [0, 2])
    @pytest.mark.parametrize("without", [(), ("provenance",), ("approval",)])
    def test_explain_and_decide_never_disagree_on_signatures(self, signer, count, without):
        seen = approved(*(f"spiffe://acme.test/{n}" for n in range(count)))
        seen = {name: one for name, one in seen.items() if name not in without}
        action, texts = signing(signer), policy(self.KEYLESS, self.NAMED)
        told = explain(texts, AGENT, action, seen)
        if told.allowed:
            assert decide(texts, AGENT, action, seen, NOW, not_after=NOW + timedelta(hours=1))
            return
        with pytest.raises(Refused) as caught:
            decide(texts, AGENT, action, seen, NOW, not_after=NOW + timedelta(hours=1))
        assert told.reason is caught.value.reason
