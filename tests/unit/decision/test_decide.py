"""The decision: deny by default (invariant 6), bounded in time (invariant 3), and the only maker of Grants."""

import copy
import dataclasses
import hashlib
import pickle
import threading
from datetime import timedelta

import pytest
import rfc8785
from cedarpy import Entities

from broker.action import Action
from broker.decision.decide import Grant, decide
from broker.errors import Invalid, Reason, Refused
from broker.identity.spiffe_id import SpiffeId


def refused(reason):
    class Check(pytest.RaisesExc):
        pass

    return Check(Refused, check=lambda error: error.reason is reason)


def test_what_a_policy_permits_is_granted(world):
    grant = world.decide(world.allow)
    assert (grant.principal, grant.action, grant.policies) == (world.agent, world.refund, ("p.cedar#allow",))
    assert grant.policy_revision == world.policy(world.allow).revision
    assert grant.facts == world.spire


def test_deciding_twice_gives_two_grants_and_changes_nothing(world):
    policy = world.policy(world.allow)
    first, second = (
        decide(policy, world.agent, world.refund, world.spire, world.now, not_after=world.not_after) for _ in range(2)
    )
    first.spend()
    second.spend()
    assert first == second


class TestDenyByDefault:
    """Invariant 6: empty policy, missing fact or error refuse."""

    def test_invariant_6_an_empty_policy_refuses_everything(self, world):
        with refused(Reason.DENIED):
            world.decide("")

    def test_invariant_6_an_action_without_a_policy_is_refused(self, world):
        with refused(Reason.DENIED):
            world.decide(world.allow.replace(', Action::"orders.read"', ""), action=world.read)

    def test_invariant_6_an_action_that_nobody_declared_is_refused(self, world):
        with refused(Reason.UNKNOWN_ACTION):
            world.decide(world.allow, action=dataclasses.replace(world.refund, name="orders.destroy"))

    def test_invariant_6_a_forbid_that_errs_refuses(self, world):
        forbid = """@id("overflows") forbid (principal, action == Action::"orders.refund", resource)
            when { context has parameters && context.parameters.amount * 9007199254740991 > 9000000000000000000 };"""
        assert world.decide(world.allow, forbid).policies == ("p.cedar#allow",)
        big = dataclasses.replace(world.refund, parameters={"amount": 2**53 - 1})
        with pytest.raises(Refused) as caught:
            world.decide(world.allow, forbid, action=big)
        assert caught.value.reason is Reason.DENIED
        assert "p.cedar#overflows" in caught.value.detail

    def test_invariant_6_a_question_that_does_not_fit_the_schema_refuses(self, world):
        wrong = dataclasses.replace(world.refund, parameters={"amount": "30"})
        with pytest.raises(Refused) as caught:
            world.decide(world.allow, action=wrong)
        assert caught.value.reason is Reason.DENIED
        assert "not decided without error" in caught.value.detail

    def test_invariant_6_evidence_that_the_schema_requires_refuses_where_it_is_missing(self, world):
        with pytest.raises(Refused) as caught:
            world.decide(world.allow, facts={})
        assert caught.value.reason is Reason.DENIED
        assert caught.value.detail == "orders.refund requires evidence that is missing: spire"

    def test_invariant_6_required_evidence_that_no_policy_names_is_needed_all_the_same(self, world):
        part = world.policy(world.allow).slice("orders.refund")
        assert part.attestors == {"spire"}

    def test_a_forbid_outweighs_every_permit(self, world):
        forbid = '@id("no") forbid (principal == Workload::"spiffe://acme.test/support/agent", action, resource);'
        with pytest.raises(Refused) as caught:
            world.decide(world.allow, forbid)
        assert caught.value.detail == "forbidden by p.cedar#no"
        other = SpiffeId.parse("spiffe://acme.test/support/other")
        assert world.decide(world.allow, forbid, principal=other)

    def test_a_forbid_for_a_group_applies_to_the_actions_in_it(self, world):
        forbid = '@id("frozen") forbid (principal, action in Action::"money", resource);'
        with refused(Reason.DENIED):
            world.decide(world.allow, forbid)
        assert world.decide(world.allow, forbid, action=world.read)

    def test_the_trap_entities_parsed_without_the_schema_would_let_that_forbid_lapse(self, world):
        # Shows that the test above can fail: it is our parsing with the schema that makes the forbid apply.
        part = world.policy(world.allow, 'forbid (principal, action in Action::"money", resource);').slice(
            "orders.refund"
        )
        without = dataclasses.replace(part, entities=Entities.from_json_str("[]"))
        policy = dataclasses.replace(world.policy(world.allow), slices={"orders.refund": without})
        assert decide(policy, world.agent, world.refund, world.spire, world.now, not_after=world.not_after)

    def test_a_refusal_tells_the_caller_no_policy(self, world):
        with pytest.raises(Refused) as caught:
            world.decide("")
        assert str(caught.value.reason) == "denied"


class TestLifetime:
    """Invariant 3: a credential outlives neither its TTL, its caller's SVID, its parent, nor the facts under it."""

    def test_invariant_3_the_default_life_is_60_seconds(self, world):
        assert world.decide(world.allow).expires_at == world.now + timedelta(seconds=60)

    def test_invariant_3_the_longest_life_is_300_seconds(self, world):
        allow = f'@max_ttl("5m") {world.allow}'
        assert world.decide(allow).expires_at == world.now + timedelta(seconds=300)

    def test_invariant_3_no_grant_outlives_the_callers_identity(self, world):
        end = world.now + timedelta(seconds=7)
        assert world.decide(world.allow, not_after=end).expires_at == end

    def test_invariant_3_no_grant_outlives_any_fact(self, world):
        end = world.now + timedelta(seconds=3)
        facts = world.spire | world.facts(process=world.process_values, expires_at=end)
        assert world.decide(world.allow, facts=facts).expires_at == end

    def test_invariant_3_the_shortest_of_all_determining_permits_counts(self, world):
        short = '@max_ttl("9s") permit (principal, action == Action::"orders.refund", resource);'
        assert world.decide(f'@max_ttl("5m") {world.allow}', short).expires_at == world.now + timedelta(seconds=9)

    def test_invariant_3_a_permit_that_says_nothing_still_means_60_seconds_beside_a_longer_one(self, world):
        plain = 'permit (principal, action == Action::"orders.refund", resource);'
        assert world.decide(f'@max_ttl("5m") {world.allow}', plain).expires_at == world.now + timedelta(seconds=60)

    @pytest.mark.parametrize("late", [timedelta(0), timedelta(microseconds=1), timedelta(days=1)])
    def test_an_expired_identity_is_refused(self, world, late):
        with refused(Reason.EXPIRED):
            world.decide(world.allow, not_after=world.now - late)

    @pytest.mark.parametrize("late", [timedelta(0), timedelta(microseconds=1), timedelta(days=1)])
    def test_expired_facts_are_refused(self, world, late):
        with refused(Reason.EXPIRED):
            world.decide(world.allow, facts=world.facts(spire={"ids": []}, expires_at=world.now - late))

    def test_the_last_microsecond_is_still_good(self, world):
        assert world.decide(world.allow, not_after=world.now + timedelta(microseconds=1))


class TestUse:
    def test_a_credential_counts_once_unless_a_policy_says_otherwise(self, world):
        assert world.decide(world.allow).use == "once"

    def test_single_use_wins_if_one_permit_wants_it(self, world):
        reuse = f'@reuse("ttl") {world.allow}'
        single = '@single_use permit (principal, action == Action::"orders.refund", resource);'
        assert world.decide(reuse, single).use == "single"

    def test_reuse_needs_every_determining_permit(self, world):
        reuse = f'@reuse("ttl") {world.allow}'
        plain = 'permit (principal, action == Action::"orders.refund", resource);'
        assert world.decide(reuse).use == "ttl"
        assert world.decide(reuse, plain).use == "once"


class TestInjection:
    """What a caller writes is a value, never a part of the question."""

    @pytest.mark.parametrize(
        "resource",
        [
            'https://orders.acme.test/"::orders',
            "https://orders.acme.test/orders\n/17",
            'https://orders.acme.test/orders"},"parents":[{"type":"Resource","id":"https://safe.acme.test',
            "https://orders.acme.test/orders\\",
            "https://orders.acme.test/orders\x00",
        ],
    )
    def test_a_resource_with_quotes_or_line_ends_is_malformed_before_it_is_asked(self, resource):
        with pytest.raises(Invalid):
            Action("orders.refund", resource, "spiffe://acme.test/orders")

    @pytest.mark.parametrize("tail", ["'or'1'='1", "a,b;c=d", "Resource::x", "%22%7D", "(a)", "$&!*"])
    def test_odd_but_legal_resources_stay_what_they_are(self, world, tail):
        uri = f"https://orders.acme.test/orders/{tail}"
        exact = f'permit (principal, action == Action::"orders.refund", resource == Resource::"{uri}");'
        action = dataclasses.replace(world.refund, resource=uri)
        assert world.decide(exact, action=action)
        with refused(Reason.DENIED):
            world.decide(exact, action=world.refund)

    @pytest.mark.parametrize(
        "text", ['"', "\\", '", "amount": 1, "x": "', "\n", "\x00", "\u2028", "🜚", '{"__extn": 1}']
    )
    def test_text_parameters_arrive_in_cedar_as_they_are(self, world, text):
        schema = world.schema.replace("amount: Long", "note: String")
        exact = """permit (principal, action == Action::"orders.refund", resource)
            when { context has parameters && context.parameters.note == "good" };"""
        good = dataclasses.replace(world.refund, parameters={"note": "good"})
        assert world.decide(exact, action=good, schema=schema)
        with refused(Reason.DENIED):
            world.decide(exact, action=dataclasses.replace(good, parameters={"note": text}), schema=schema)

    @pytest.mark.parametrize("name", ["__entity", "__extn", "__expr"])
    def test_reserved_names_are_malformed_at_any_depth(self, world, name):
        schema = world.schema.replace("amount: Long", "note?: String, list?: Set<String>, within?: { deep?: String }")
        value = {name: {"type": "Workload", "id": "spiffe://acme.test/boss"}}
        for parameters in ({"note": value}, {"list": [value]}, {"within": {"deep": value}}, value):
            with pytest.raises(Invalid):
                world.decide(
                    world.allow, action=dataclasses.replace(world.refund, parameters=parameters), schema=schema
                )
        harmless = dataclasses.replace(world.refund, parameters={"note": name, "list": [name]})
        assert world.decide(world.allow, action=harmless, schema=schema)

    def test_reserved_names_in_evidence_are_refused_too(self, world):
        with pytest.raises(Invalid):
            world.decide(world.allow, facts=world.facts(spire={"ids": [{"__extn": {"fn": "ip", "arg": "10.0.0.1"}}]}))

    def test_parameters_cannot_stand_in_for_evidence(self, world):
        needs = 'permit (principal, action == Action::"orders.refund", resource) when { context has process };'
        forged = dataclasses.replace(world.refund, parameters={"amount": 1, "process": world.process_values})
        with refused(Reason.DENIED):
            world.decide(needs, action=forged)
        assert world.decide(needs, facts=world.spire | world.process)


class TestGrant:
    def test_nobody_else_can_make_a_grant(self, world):
        grant = world.decide(world.allow)
        fields = {field.name: getattr(grant, field.name) for field in dataclasses.fields(grant) if field.init}
        for seal in (None, object(), True):
            with pytest.raises(TypeError, match="only decide"):
                Grant(**fields, seal=seal)
        with pytest.raises(TypeError):
            Grant(**fields)
        with pytest.raises((TypeError, ValueError)):
            dataclasses.replace(grant, expires_at=world.now + timedelta(days=1))

    def test_a_grant_is_spent_once(self, world):
        grant = world.decide(world.allow)
        grant.spend()
        with refused(Reason.ALREADY_USED):
            grant.spend()

    def test_of_many_threads_one_spends_it(self, world):
        grant, spent, start = world.decide(world.allow), [], threading.Barrier(8)

        def spend():
            start.wait()
            try:
                grant.spend()
            except Refused:
                return
            spent.append(1)

        threads = [threading.Thread(target=spend) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(spent) == 1

    @pytest.mark.parametrize("double", [copy.copy, copy.deepcopy, pickle.dumps])
    def test_a_grant_cannot_be_doubled(self, world, double):
        with pytest.raises(TypeError, match="cannot be copied"):
            double(world.decide(world.allow))

    def test_a_grant_cannot_be_changed(self, world):
        grant = world.decide(world.allow)
        with pytest.raises(dataclasses.FrozenInstanceError):
            grant.expires_at = world.now + timedelta(days=1)
        with pytest.raises(TypeError):
            grant.facts["spire"] = None

    def test_facts_given_later_do_not_reach_into_a_grant(self, world):
        facts = dict(world.spire)
        grant = world.decide(world.allow, facts=facts)
        facts.clear()
        assert "spire" in grant.facts

    @pytest.mark.parametrize("exe", ["/usr/bin/agent", "/opt/ägent", "/tmp/a\x1f\x7fb", '/a"\\b', "/\U0001f71a"])
    def test_the_environment_digest_is_over_canonical_json_of_what_was_seen(self, world, exe):
        values = {**world.process_values, "exe": exe}
        grant = world.decide(world.allow, facts=world.spire | world.facts(process=values, ticket={"id": 1}))
        expected = rfc8785.dumps({"spire": {"ids": [str(world.agent)]}, "process": values})
        assert grant.environment_digest == hashlib.sha256(expected).digest()

    def test_another_environment_has_another_digest(self, world):
        one = world.decide(world.allow, facts=world.spire | world.process)
        other = world.decide(world.allow)
        assert one.environment_digest != other.environment_digest
