"""A signature is granted only by a permit that gives its signer, on the provenance that it was decided on."""

import dataclasses
import hashlib
from datetime import timedelta

import pytest
import rfc8785
from support.releases import ALICE, NOW, PERMIT, PROVENANCE, approved, facts, grant, policy, signing

from broker.action import Action
from broker.decision.decide import decide
from broker.errors import Reason, Refused
from broker.identity.person import PersonId
from broker.identity.spiffe_id import SpiffeId

KEYLESS = f'@id("keyless") @max_ttl("90s") {PERMIT};'
RELEASE = f'@id("release") @key("release") @max_ttl("30s") @single_use {PERMIT};'
AGENT_KEY = f'@id("own") @agent_key @max_ttl("20s") {PERMIT};'


def refusal(*texts, action):
    with pytest.raises(Refused) as caught:
        grant(*texts, action=action)
    return caught.value


@pytest.mark.parametrize(
    ("text", "gives"),
    [
        (KEYLESS, {"keyless"}),
        (RELEASE, {"key:release"}),
        (AGENT_KEY, {"keyless", "agent-key"}),
        (f'@key("release nightly") @agent_key {PERMIT};', {"keyless", "agent-key", "key:release", "key:nightly"}),
    ],
)
def test_a_permit_gives_exactly_the_signers_that_it_says(text, gives):
    for signer in ("keyless", "agent-key", "key:release", "key:nightly", "key:other", "release", "", "key:"):
        if signer in gives:
            assert grant(text, action=signing(signer)).policies
        else:
            refused = refusal(text, action=signing(signer))
            assert refused.reason is Reason.DENIED
            assert repr(signer) in refused.detail


def test_one_permit_that_gives_the_signer_is_enough_and_it_alone_bounds_the_grant():
    found = grant(KEYLESS, RELEASE, action=signing("key:release"))
    assert (found.policies, found.use, found.expires_at) == (
        ("p.cedar#release",),
        "single",
        NOW + timedelta(seconds=30),
    )
    found = grant(KEYLESS, RELEASE)
    assert (found.policies, found.use) == (("p.cedar#keyless",), "once")
    assert found.expires_at == NOW + timedelta(seconds=90)


def test_of_several_permits_that_give_the_signer_the_narrowest_bounds_count():
    found = grant(KEYLESS, RELEASE, AGENT_KEY)
    assert found.policies == ("p.cedar#keyless", "p.cedar#own")
    assert found.expires_at == NOW + timedelta(seconds=20)


def test_a_permit_that_does_not_hold_gives_no_signer():
    closed = RELEASE.replace(";", ' when { context.parameters.environment == "staging" };')
    assert refusal(KEYLESS, closed, action=signing("key:release")).reason is Reason.DENIED
    assert grant(KEYLESS, closed, action=signing("key:release", "staging")).policies == ("p.cedar#release",)


def test_a_forbid_outweighs_every_signer_that_is_given():
    forbid = 'forbid (principal, action == Action::"release.sign", resource);'
    assert refusal(RELEASE, forbid, action=signing("key:release")).detail.startswith("forbidden by")


@pytest.mark.parametrize("signer", ["key:release\n", "KEY:release", "key:release ", "key:RELEASE", " keyless"])
def test_a_signer_is_compared_whole(signer):
    assert refusal(KEYLESS, RELEASE, action=signing(signer)).reason is Reason.DENIED


def test_what_asks_for_no_signature_needs_no_signer_and_a_bent_one_gives_nothing():
    schema = """action "note.write" appliesTo { principal: [Workload], resource: [Resource],
      context: { parameters?: { signing?: Signing } } };"""
    notes = policy('permit (principal, action == Action::"note.write", resource);', schema=schema)
    write = Action("note.write", "https://notes.acme.test/1", "spiffe://acme.test/notes")

    def ask(parameters):
        action = dataclasses.replace(write, parameters=parameters)
        return decide(
            notes, SpiffeId.parse("spiffe://acme.test/a"), action, {}, NOW, not_after=NOW + timedelta(hours=1)
        )

    assert ask({}).policies
    asked = {"artifacts": [{"sha256": "ab"}], "purpose": "x", "signer": "keyless"}
    assert ask({"signing": asked}).policies
    for bent in ([], "keyless", {}, {"signer": "keyless"}, {**asked, "signer": ["keyless"]}):
        with pytest.raises(Refused) as caught:
            ask({"signing": bent})
        assert caught.value.reason is Reason.DENIED


class TestProvenance:
    def test_required_provenance_that_is_missing_has_a_reason_of_its_own(self):
        with pytest.raises(Refused) as caught:
            grant(KEYLESS, seen=facts(approval={"count": 0, "by": [], "people": 0, "workloads": 0}))
        assert caught.value.reason is Reason.PROVENANCE_MISSING
        assert grant(KEYLESS)

    def test_the_digest_is_over_canonical_json_of_what_was_seen(self):
        found = grant(KEYLESS)
        assert found.provenance_digest == hashlib.sha256(rfc8785.dumps(PROVENANCE)).digest()

    @pytest.mark.parametrize("change", ["builder", "source_digest", "finished_at", "dependencies"])
    def test_other_provenance_has_another_digest(self, change):
        other = {**PROVENANCE, change: 7 if change == "finished_at" else [] if change == "dependencies" else "other"}
        assert grant(KEYLESS, seen=facts(provenance=other)).provenance_digest != grant(KEYLESS).provenance_digest

    def test_without_provenance_there_is_no_digest(self, world):
        assert world.decide(world.allow).provenance_digest is None

    def test_approvals_are_no_part_of_the_digests(self):
        one, other = grant(KEYLESS), grant(KEYLESS, seen=approved("spiffe://acme.test/boss"))
        assert one.provenance_digest == other.provenance_digest
        assert one.environment_digest == other.environment_digest

    def test_invariant_3_no_grant_outlives_the_approvals_under_it(self):
        end = NOW + timedelta(seconds=5)
        approval = facts(approval={"count": 0, "by": [], "people": 0, "workloads": 0}, expires_at=end)
        assert grant(KEYLESS, seen=approved() | approval).expires_at == end


class TestPeople:
    APPROVE = """@id("managers") permit (principal in Issuer::"https://login.acme.test",
      action == Action::"broker.approve", resource)
      when { context has person && context.person.groups.contains("managers") };"""
    ASKED = Action(
        "broker.approve",
        "https://releases.acme.test/app/1",
        "https://broker.acme.test",
        {"action": "release.sign", "principal": "spiffe://acme.test/build/agent"},
    )
    MANAGER = facts(person={"groups": ["managers"], "email": "alice@acme.test"})

    def ask(self, principal, *texts, seen=MANAGER, action=ASKED):
        return decide(policy(*texts), principal, action, seen, NOW, not_after=NOW + timedelta(minutes=5))

    def test_a_person_is_decided_on_under_its_own_name_and_its_issuer(self):
        assert self.ask(ALICE, self.APPROVE).principal == ALICE
        by_name = self.APPROVE.replace('in Issuer::"https://login.acme.test"', f'== Person::"{ALICE}"')
        assert self.ask(ALICE, by_name).policies == ("p.cedar#managers",)
        with pytest.raises(Refused):
            self.ask(PersonId(issuer=ALICE.issuer, subject="bob"), by_name)

    @pytest.mark.parametrize(
        "issuer", ["https://login.acme.test/", "https://login.acme.test/x", "https://login.evil.test"]
    )
    def test_a_person_of_another_issuer_is_another(self, issuer):
        with pytest.raises(Refused) as caught:
            self.ask(PersonId(issuer=issuer, subject=ALICE.subject), self.APPROVE)
        assert caught.value.reason is Reason.DENIED

    def test_a_workload_is_no_person_whatever_facts_it_comes_with(self):
        with pytest.raises(Refused):
            self.ask(SpiffeId.parse("spiffe://acme.test/boss"), self.APPROVE)
        with pytest.raises(Refused):
            self.ask(ALICE, self.APPROVE, seen={})

    def test_no_person_does_what_is_for_workloads(self):
        anyone = f"{PERMIT};"
        with pytest.raises(Refused) as caught:
            self.ask(ALICE, anyone, seen=approved(), action=signing())
        assert "not decided without error" in caught.value.detail
        assert self.ask(SpiffeId.parse("spiffe://acme.test/a"), anyone, seen=approved(), action=signing())

    def test_what_a_person_approves_is_seen_by_policy(self):
        narrow = self.APPROVE.replace("};", '&& context.parameters.principal == "spiffe://acme.test/build/agent" };')
        assert self.ask(ALICE, narrow)
        other = dataclasses.replace(
            self.ASKED, parameters={**self.ASKED.parameters, "principal": "spiffe://acme.test/x"}
        )
        with pytest.raises(Refused):
            self.ask(ALICE, narrow, action=other)
