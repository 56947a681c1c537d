"""Whether an approval would help: asked only of refusals, and true only where approvals are all that is lacking."""

from datetime import timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.releases import AGENT, NOW, PERMIT, PROVENANCE, approved, facts, policy, signing

from broker.decision.decide import decide
from broker.decision.findings import PolicyError
from broker.decision.lacking import lacks_approval
from broker.errors import Reason, Refused

BOSS, CHIEF = "spiffe://acme.test/boss", "spiffe://acme.test/chief"
TWO = "context has approval && context.approval.count >= 2"
NEEDS_TWO = f"{PERMIT} when {{ {TWO} }};"
OPEN = f"{PERMIT};"
FORBID = PERMIT.replace("permit", "forbid")
PRODUCTION = 'context.parameters.environment == "production"'
STAGING = 'context.parameters.environment == "staging"'
PROCESS = {"uid": 1600, "gid": 1600, "exe": "/a", "exe_sha256": "", "cgroup": "/"}


def lacks(*texts, action=None, seen=None):
    """Of a request that is refused."""
    action, seen, texts = action or signing(), approved(BOSS) if seen is None else seen, policy(*texts)
    with pytest.raises(Refused) as caught:
        decide(texts, AGENT, action, seen, NOW, not_after=NOW + timedelta(hours=1))
    assert caught.value.reason in {Reason.DENIED, Reason.PROVENANCE_MISSING, Reason.UNKNOWN_ACTION}
    return lacks_approval(texts, AGENT, action, seen)


class TestApprovalsAreAllThatIsLacking:
    @pytest.mark.parametrize(
        "text",
        [
            NEEDS_TWO,
            f'{PERMIT} when {{ context has approval && context.approval.by.contains("{CHIEF}") }};',
            f"{PERMIT} when {{ context has approval && context.approval.people > 0 }};",
            f"{PERMIT} when {{ {PRODUCTION} && {TWO} }};",
            f"{PERMIT} when {{ {PRODUCTION} }} when {{ {TWO} }};",
            f"{PERMIT} when {{ {STAGING} || ({PRODUCTION} && {TWO}) }};",
            f"{PERMIT} when {{ ({STAGING} || {TWO}) && ({PRODUCTION} || {STAGING}) }};",
            f"{PERMIT} unless {{ context has approval && context.approval.count < 2 }};",
            f"{PERMIT} when {{ !(!({TWO}) || {STAGING}) }};",
            f"{PERMIT} when {{ if {PRODUCTION} then {TWO} else {STAGING} }};",
            f"{PERMIT} when {{ if {TWO} then {PRODUCTION} else {STAGING} }};",
            f"{PERMIT} when {{ ({TWO}) == true }};",
            f"{OPEN} {FORBID} unless {{ {TWO} }};",
            f"{OPEN} {FORBID} when {{ {PRODUCTION} }} unless {{ {TWO} }};",
            f"{OPEN} {FORBID} unless {{ {STAGING} || ({PRODUCTION} && {TWO}) }};",
            f"{NEEDS_TWO} {FORBID} unless {{ {TWO} }};",
            f"{NEEDS_TWO} {FORBID} when {{ {STAGING} }};",
            f"{NEEDS_TWO} {PERMIT} when {{ {STAGING} }};",
        ],
    )
    def test_it_is_told_and_with_enough_of_them_it_is_allowed(self, text):
        assert lacks(text)
        people = {"count": 2, "by": [BOSS, CHIEF], "people": 1, "workloads": 1}
        enough = facts(provenance=PROVENANCE, approval=people)
        assert decide(policy(text), AGENT, signing(), enough, NOW, not_after=NOW + timedelta(hours=1))

    def test_also_where_none_was_looked_for(self):
        assert lacks(NEEDS_TWO, seen=facts(provenance=PROVENANCE))

    def test_also_where_the_schema_requires_the_evidence(self):
        schema = policy(NEEDS_TWO.replace("context has approval && ", ""), schema=REQUIRED)
        assert lacks_approval(schema, AGENT, signing(), approved(BOSS))
        assert not lacks_approval(schema, AGENT, signing(), facts(provenance=PROVENANCE))


REQUIRED = """action "release.sign" appliesTo { principal: [Workload], resource: [Resource],
  context: { provenance: Provenance, approval: Approval, parameters: { environment: String, signing: Signing } } };"""


class TestSomethingElseIsLackingToo:
    @pytest.mark.parametrize(
        "text",
        [
            "",
            f"{PERMIT} when {{ {STAGING} }};",
            f"{PERMIT} when {{ {STAGING} && {TWO} }};",
            f"{PERMIT} when {{ {TWO} }} when {{ {STAGING} }};",
            f"{PERMIT} when {{ {TWO} }} unless {{ {PRODUCTION} }};",
            f"{PERMIT} when {{ {STAGING} || ({STAGING} && {TWO}) }};",
            f"{PERMIT} when {{ {TWO} && context.provenance.finished_at * 9007199254740991 > 0 }};",
            f"{NEEDS_TWO} {FORBID} when {{ {PRODUCTION} }} unless {{ {STAGING} && {TWO} }};",
            f"{PERMIT} when {{ !({PRODUCTION} || {TWO}) }};",
            f"{PERMIT} when {{ if {PRODUCTION} then {STAGING} else {TWO} }};",
            f"{PERMIT} when {{ if {TWO} then {STAGING} else {STAGING} }};",
            NEEDS_TWO.replace("principal,", 'principal == Workload::"spiffe://acme.test/other",'),
            NEEDS_TWO.replace("resource)", 'resource == Resource::"https://releases.acme.test/other")'),
            f"{NEEDS_TWO} {FORBID};",
            f"{NEEDS_TWO} {FORBID} when {{ {PRODUCTION} }};",
            f"{NEEDS_TWO} {FORBID} unless {{ {STAGING} }} unless {{ {STAGING} && {TWO} }};",
            f"{OPEN} {FORBID} unless {{ {TWO} }}; {FORBID} when {{ {PRODUCTION} }};",
            f"{FORBID} unless {{ {TWO} }};",
            f"{PERMIT} when {{ context has process && {TWO} }};",
            f"{PERMIT} when {{ context has approval && context has process && context.process.uid == 1 }};",
        ],
    )
    def test_it_is_not_told(self, text):
        assert not lacks(text)

    def test_missing_provenance_is_not_mended_by_approvals(self):
        assert not lacks(NEEDS_TWO, seen={})

    def test_evidence_that_is_there_and_wrong_is_not_mended_either(self):
        rule = f"{PERMIT} when {{ context has process && context.process.uid == 1600 && {TWO} }};"
        assert lacks(rule, seen=approved(BOSS) | facts(process=PROCESS))
        assert not lacks(rule, seen=approved(BOSS) | facts(process={**PROCESS, "uid": 0}))

    @pytest.mark.parametrize(("signer", "told"), [("keyless", True), ("key:release", False), ("agent-key", False)])
    def test_only_a_permit_that_gives_the_signer_is_worth_an_approval(self, signer, told):
        assert lacks(NEEDS_TWO, action=signing(signer)) is told

    def test_a_permit_that_holds_for_another_signer_does_not_hide_the_one_that_waits(self):
        named = f'@key("release") {NEEDS_TWO}'
        assert lacks(OPEN, named, action=signing("key:release"))
        assert not lacks(OPEN, named, action=signing("key:nightly"))
        assert not lacks(OPEN, named.replace("when {", f"when {{ {STAGING} &&"), action=signing("key:release"))

    def test_a_policy_that_cannot_be_evaluated_refuses_whatever_is_approved(self):
        overflows = f"{PERMIT} when {{ context.provenance.finished_at * 9007199254740991 > 0 }};"
        assert not lacks(NEEDS_TWO, overflows)

    def test_a_question_that_does_not_fit_the_schema_is_not_mended(self):
        assert not lacks(NEEDS_TWO, action=signing(note="please"))

    def test_nor_is_an_action_that_nobody_declared(self):
        declared = policy(NEEDS_TWO.replace("release.sign", "other"), schema=REQUIRED.replace("release.sign", "other"))
        assert not lacks_approval(declared, AGENT, signing(), approved())


def test_what_is_allowed_lacks_nothing():
    assert not lacks_approval(policy(NEEDS_TWO), AGENT, signing(), approved(BOSS, CHIEF))
    assert not lacks_approval(policy(OPEN), AGENT, signing(), approved())


def test_the_world_of_actions_without_approvals_lacks_none(world):
    refused = world.policy(world.allow.replace(";", " when { context has spire && context.spire.ids.isEmpty() };"))
    assert not lacks_approval(refused, world.agent, world.read, world.spire)


ATOMS = st.sampled_from(
    [
        PRODUCTION,
        STAGING,
        "context.approval.count >= 1",
        "context.approval.count >= 2",
        f'context.approval.by.contains("{CHIEF}")',
        f'!context.approval.by.contains("{BOSS}")',
    ]
)
CONDITIONS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.builds("({} && {})".format, inner, inner),
        st.builds("({} || {})".format, inner, inner),
        st.builds("!({})".format, inner),
        st.builds("(if {} then {} else {})".format, inner, inner, inner),
    ),
    max_leaves=5,
)
EFFECTS, KINDS = st.sampled_from([PERMIT, FORBID]), st.sampled_from(["when", "unless"])
RULES = st.builds("{} {} {{ {} }};".format, EFFECTS, KINDS, CONDITIONS)


@settings(max_examples=150, deadline=None)
@given(rules=st.lists(RULES, min_size=1, max_size=3))
def test_wherever_some_approvals_would_allow_it_the_approver_is_asked(rules):
    """No request waits unseen: if any set of approvals allows what is refused now, that is told."""
    try:
        compiled = policy(*rules, schema=REQUIRED)
    except PolicyError:
        return  # Cedar proved that a condition is never true

    def allowed(*by):
        try:
            return decide(compiled, AGENT, signing(), approved(*by), NOW, not_after=NOW + timedelta(hours=1))
        except Refused:
            return None

    others = "spiffe://acme.test/other", "spiffe://acme.test/third"
    sets = [(), (BOSS,), (CHIEF,), (BOSS, CHIEF), others, (BOSS, *others), (CHIEF, *others)]
    if allowed(BOSS):
        assert not lacks_approval(compiled, AGENT, signing(), approved(BOSS))
    elif any(allowed(*by) for by in sets):
        assert lacks_approval(compiled, AGENT, signing(), approved(BOSS))
