"""Which evidence a condition names, where it hides, and what leaving evidence out does to it."""

import itertools
import json

import pytest
from cedarpy import Entities, PolicySet, is_authorized, policies_to_json_str
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.decision.expressions import (
    conjuncts,
    depth,
    evidence_named,
    hides_evidence,
    switched_off_by_absence,
)


def parse(condition):
    form = json.loads(policies_to_json_str(f"permit (principal, action, resource) when {{ {condition} }};"))
    return form["staticPolicies"]["policy0"]["conditions"][0]["body"]


@pytest.mark.parametrize(
    ("condition", "named"),
    [
        ("context.a.b.c == 1", {"a"}),
        ("context has a.b.c", {"a"}),
        ('context["a b"].c && context has "d-e"', {"a b", "d-e"}),
        ("principal.context.a", set()),
        ("{ context: 1 }.context == 1", set()),
        ("ip(context.a).isInRange(ip(context.b))", {"a", "b"}),
        ("[1, context.a].containsAny([context.b])", {"a", "b"}),
        ("if context.a then context.b else context.c", {"a", "b", "c"}),
        ('context.a like "x*" && principal in context.b && resource is R in context.c', {"a", "b", "c"}),
        ("-context.a + 1 * context.b < context.c && !context.d && context.e.isEmpty()", set("abcde")),
    ],
)
def test_evidence_is_found_wherever_it_is_named(condition, named):
    assert evidence_named(parse(condition)) == named
    assert not hides_evidence(parse(condition))


@pytest.mark.parametrize(
    "condition",
    [
        "context == principal",
        "{ a: context }.a.b",
        "[context].isEmpty()",
        "(if true then context else context).a",
        "principal in context",
        'context like "a"',
        "context is Workload",
        "resource is R in context",
        "ip(context).isLoopback()",
        "context.contains(1)",
        "!context",
        "context + 1 == 2",
        "context",
        'context.hasTag("a")',
        'context.getTag("a") == 1',
        "principal.hasTag(context)",
    ],
)
def test_context_used_whole_hides_evidence(condition):
    assert hides_evidence(parse(condition))


@pytest.mark.parametrize(
    ("condition", "off"),
    [
        ("context has a && context.a.b", {"a"}),
        ("!(context has a)", set()),
        ("!(context has a && context.a.b)", set()),
        ("!(!(context has a) || context.a.b)", {"a"}),
        ("context has a || context has b", {"a", "b"}),
        ("if context has a then context.a.b else true", set()),
        ("if context has a then context.a.b else false", {"a"}),
        ("if context has a then false else context.b.c", set()),
        ("if context has a then true else context.b.c", {"a"}),
        ("if principal == resource then context has a else true", {"a"}),
        ("if context has a then context.a.x else context.b.c", {"a"}),
        ("(context has a) == false", {"a"}),
        ("[context has a].contains(true)", {"a"}),
        ("context.a has b", set()),
        ("context.a.b == 1", set()),
    ],
)
def test_what_absence_can_turn_from_true_to_false_is_found(condition, off):
    assert switched_off_by_absence(parse(condition)) == off


def test_negation_turns_the_question_round():
    node = parse("context has a && !(context has b)")
    assert switched_off_by_absence(node) == {"a"}
    assert switched_off_by_absence(node, negated=True) == {"b"}


ATOMS = st.sampled_from(["context has a", "context has b", "context.c.x", "principal == resource", "true", "false"])
CONDITIONS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda two: f"({two[0]} && {two[1]})"),
        st.tuples(inner, inner).map(lambda two: f"({two[0]} || {two[1]})"),
        inner.map(lambda one: f"!({one})"),
        st.tuples(inner, inner, inner).map(lambda three: "(if {} then {} else {})".format(*three)),
    ),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(CONDITIONS)
def test_no_evidence_that_is_left_out_unnoticed_can_switch_a_condition_off(condition):
    """The rule is held against Cedar itself: whatever it does not name changes nothing from true to false."""
    policy = PolicySet.from_str(f"permit (principal, action, resource) when {{ {condition} }};")
    off = switched_off_by_absence(parse(condition))
    none = Entities.from_json_str("[]")

    def holds(present, same, flag):
        request = {
            "principal": {"type": "E", "id": "1"},
            "action": {"type": "Action", "id": "x"},
            "resource": {"type": "E", "id": "1" if same else "2"},
            "context": {**dict.fromkeys(present, 1), "c": {"x": flag}},
        }
        return is_authorized(request, policy, none).allowed

    for name, other, same, flag in itertools.product("ab", (True, False), (True, False), (True, False)):
        rest = ({"a", "b"} - {name}) if other else set()
        if name not in off and holds(rest | {name}, same, flag):
            assert holds(rest, same, flag)


def test_chains_come_apart_from_left_to_right():
    assert conjuncts(parse("true && (1 == 1 && false)")) == (parse("true"), parse("1 == 1"), parse("false"))
    assert conjuncts(parse("true || false"), "||") == (parse("true"), parse("false"))
    assert len(conjuncts(parse("true || false"))) == 1


def test_depth_is_counted_without_recursion():
    chain = " && ".join(["true"] * 300)
    assert depth(parse(chain)) == 300
    assert depth(parse("true")) == 1
