"""Which facts changed lately: what is about to be recorded is never compared with too little."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attestors.contract import FactKey
from broker.scope.changes import KEPT_S, Changes

A, B, C = FactKey("ticket:A"), FactKey("ticket:B"), FactKey("ticket:C")


def test_a_change_since_is_seen_and_one_before_or_of_another_fact_is_none() -> None:
    found = Changes()
    before = found.heard
    found.note(A, 0)
    assert found.any_since(before, [B, A])
    assert not found.any_since(before, [B])
    assert not found.any_since(found.heard, [A])
    found.note(A, 1)
    assert found.any_since(before + 1, [A]), "it changed again"
    assert not found.any_since(found.heard, [A, B])


def test_what_is_too_long_ago_to_know_counts_as_changed() -> None:
    found = Changes()
    before = found.heard
    found.note(A, 0)
    found.note(B, KEPT_S + 1)  # A is forgotten now
    assert found.any_since(before, [C]), "what came after it is not all known any more"
    assert found.any_since(before + 1, [B])
    assert not found.any_since(before + 1, [A, C]), "but this is"


def test_no_more_keys_are_kept_than_there_may_be_and_the_oldest_goes_first() -> None:
    found = Changes(max_kept=3)
    for number in range(4):
        found.note(FactKey(f"ticket:{number}"), 0)
    assert found.any_since(0, [C])
    assert not found.any_since(1, [C])
    assert found.any_since(1, [FactKey("ticket:1")])
    for _ in range(100):
        found.note(A, 0)  # one key that changes all the time displaces none
    assert found.any_since(1, [FactKey("ticket:2")])


@given(st.lists(st.tuples(st.sampled_from([A, B, C]), st.integers(0, 40)), max_size=30), st.integers(1, 3), st.data())
def test_no_change_since_is_ever_missed(notes: list[tuple[FactKey, int]], kept: int, data: st.DataObject) -> None:
    found, number = Changes(max_kept=kept), 0
    told: list[FactKey] = []
    monotonic = 0.0
    for key, later in notes:
        monotonic += later
        found.note(key, monotonic)
        told.append(key)
        number += 1
    heard = data.draw(st.integers(0, number))
    for key in (A, B, C):
        if key in told[heard:]:
            assert found.any_since(heard, [key])
    assert found.heard == number


@pytest.mark.parametrize("heard", [0, 1, 2])
def test_nothing_has_changed_since_now(heard: int) -> None:
    found = Changes()
    for _ in range(heard):
        found.note(A, 0)
    assert not found.any_since(found.heard, [A, B])
