"""What is read of AuthZEN requests, whatever was sent."""

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.edges.authzen import BadRequest, Item, Semantic, parse_many, parse_one
from broker.errors import Invalid
from broker.evaluation import Question, subject_of

ASKER = "spiffe://acme.test/service/orders"
ASKED = {
    "subject": {"type": "workload", "id": "spiffe://acme.test/build/agent"},
    "action": {"name": "orders.read", "properties": {"a": 1}},
    "resource": {"type": "order", "id": "https://orders.acme.test/1"},
}
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
KEYS = st.sampled_from(
    ["subject", "action", "resource", "context", "evaluations", "options", "type", "id", "name", "properties"]
)


def held_to(item: Item) -> None:
    """It is a question that makes sense, or refused as malformed."""
    with suppress(Invalid):
        assert isinstance(item.question(ASKER), Question)


def read(body: bytes) -> None:
    with suppress(BadRequest):
        held_to(parse_one(body))
    with suppress(BadRequest):
        many = parse_many(body)
        assert bool(many.items) is (many.one is None)
        for item in (*many.items, *([many.one] if many.one else [])):
            held_to(item)


@given(st.binary(max_size=200))
def test_no_bytes_are_anything_but_a_question_or_refused(body: bytes) -> None:
    read(body)


@given(st.dictionaries(KEYS, VALUES, max_size=4), KEYS, VALUES)
def test_nothing_in_the_place_of_a_member_is_anything_but_a_question_or_refused(
    changes: dict[str, Any], key: str, value: Any
) -> None:
    read(json.dumps(ASKED | changes).encode())
    for name in ("subject", "action", "resource"):
        read(json.dumps(ASKED | {name: ASKED[name] | {key: value}}).encode())
    read(json.dumps(ASKED | {"evaluations": [value, changes, {}]}).encode())
    read(json.dumps(ASKED | {"context": {"audience": value, "access_token": value}}).encode())


def test_what_is_asked_is_what_is_read() -> None:
    context = {"audience": "https://orders.acme.test", "access_token": "t", "idempotency_id": "i"}
    question = parse_one(json.dumps(ASKED | {"context": context}).encode()).question(ASKER)
    action = question.action
    assert (action.name, action.resource, action.audience, action.parameters) == (
        "orders.read",
        "https://orders.acme.test/1",
        "https://orders.acme.test",
        {"a": 1},
    )
    assert (str(question.subject), question.token, question.idempotency_id) == (ASKED["subject"]["id"], "t", "i")
    assert parse_one(json.dumps(ASKED).encode()).question(ASKER).action.audience == ASKER
    assert "'t'" not in repr(question)


def test_when_a_semantic_ends() -> None:
    ends = {one: (one.ends_with(decision=False), one.ends_with(decision=True)) for one in Semantic}
    assert ends == {
        Semantic.EXECUTE_ALL: (False, False),
        Semantic.DENY_ON_FIRST_DENY: (True, False),
        Semantic.PERMIT_ON_FIRST_PERMIT: (False, True),
    }


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("workload", "https://login.acme.test/subject/YWxpY2U"),
        ("person", "spiffe://acme.test/build/agent"),
        ("user", "spiffe://acme.test/build/agent"),
        ("", "spiffe://acme.test/build/agent"),
        ("Workload", "spiffe://acme.test/build/agent"),
        ("workload", "spiffe://acme.test"),
        ("workload", "alice"),
        ("person", "https://login.acme.test/subject/YWxpY2U="),
    ],
)
def test_a_subject_has_the_type_of_its_name(kind: str, name: str) -> None:
    with pytest.raises(Invalid):
        subject_of(kind, name)
    assert str(subject_of("workload", "spiffe://acme.test/build/agent")) == "spiffe://acme.test/build/agent"
    person = "https://login.acme.test/subject/YWxpY2U"
    assert str(subject_of("person", person)) == person
