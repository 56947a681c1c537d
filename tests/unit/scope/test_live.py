"""The live set: what rests on what, found by any of it; and it holds nothing but what is unexpired."""

from collections.abc import Iterable
from datetime import datetime, timedelta

import pytest
from support.lives import NOW, OTHERS, PROCESS, facts, live
from support.whole_broker import AGENT, OPERATOR

from attestors.contract import FactKey
from broker.scope.live import Live, LiveSet, is_principal

TICKET = FactKey("ticket:T-1")


def filled(*lives: Live) -> LiveSet:
    found = LiveSet()
    for one in lives:
        found.add(one)
    return found


def after(seconds: float) -> datetime:
    return NOW + timedelta(seconds=seconds)


def jtis(lives: Iterable[Live]) -> list[str]:
    return [one.jti for one in lives]


def test_a_credential_is_found_by_each_thing_that_it_rests_on_and_by_nothing_else() -> None:
    one = live(
        "one",
        facts("weather:berlin"),
        process=PROCESS,
        approval="ab" * 32,
        ticket="T-1",
        session="s-1",
        parent="grant",
        permit="permit",
    )
    found = filled(one, live("bystander", facts("weather:oslo"), action="orders.once"))
    for key in (
        *("weather:berlin", "process:4711:99", "spire:4711:99", "action:orders.read", f"approval:{'ab' * 32}"),
        *("ticket:T-1", "session:s-1", "parent:grant", "standing:permit", "action:broker.approve"),
    ):
        assert jtis(found.dependents(FactKey(key))) == ["one"], key
    assert sorted(jtis(found.dependents(FactKey("bundle:acme.test")))) == ["bystander", "one"]
    for key in ("weather:rome", "process:4711:98", "spire:4712:99", "parent:one", "action:orders", "weather"):
        assert found.dependents(FactKey(key)) == [], key
    assert found.keys("weather:") == ["weather:berlin", "weather:oslo"]


def test_facts_that_many_rest_on_are_kept_once_and_go_with_the_last_of_them() -> None:
    same = [facts("ticket:T-1", state="open") for _ in range(3)]
    lives = [live(f"{number}", one) for number, one in enumerate(same)]
    found = filled(*lives)
    assert len({id(one.facts["ticket"]) for one in lives}) == 1
    other = live("other", facts("ticket:T-1", state="open", authorises=["b"]))
    found.add(other)
    assert other.facts["ticket"] is not lives[0].facts["ticket"], "they say something else"
    for one in (*lives, other):
        found.remove(one.jti)
    assert (found.keys(""), len(found)) == ([], 0)
    fresh = live("fresh", facts("ticket:T-1", state="open"))
    found.add(fresh)
    assert fresh.facts["ticket"] is not same[0], "nothing of them was left behind"


def test_what_was_decided_again_is_found_by_what_it_rests_on_now() -> None:
    one, other = live("one", facts("ticket:T-1")), live("other", facts("ticket:T-1"))
    found = filled(one, other)
    found.put(one, {"weather": facts("weather:berlin")}, "permit")
    assert jtis(found.dependents(TICKET)) == ["other"]
    assert jtis(found.dependents(FactKey("weather:berlin"))) == ["one"]
    assert jtis(found.dependents(FactKey("standing:permit"))) == ["one"]
    found.put(one, {"weather": facts("weather:berlin", warm=True)}, "")
    assert found.dependents(FactKey("standing:permit")) == []
    assert one.facts["weather"].values == {"warm": True}


def test_what_is_forgotten_while_it_is_decided_stays_forgotten() -> None:
    one, other = live("one", facts("ticket:T-1")), live("other")
    found = filled(one, other)
    found.remove("one")
    found.put(one, {"weather": facts("weather:berlin")}, "")
    assert (found.get("one"), found.keys("weather:"), jtis(found)) == (None, [], ["other"])
    found.add(live("one"))
    found.put(one, {"weather": facts("weather:berlin")}, "")
    assert found.keys("weather:") == [], "another credential of its id is not it"
    found.remove("never-there")


def test_only_what_is_unexpired_is_held() -> None:
    found = filled(live("brief", facts("ticket:T-1"), ends_s=10), live("long", ends_s=60))
    assert found.forget(after(9)) == 0
    assert jtis(found) == ["brief", "long"]
    assert found.forget(after(12)) == 1
    assert (jtis(found), found.keys("ticket:")) == (["long"], [])
    assert found.forget(after(62)) == 1
    assert len(found) == 0


def test_a_clock_that_goes_back_brings_none_back_and_ends_none_early() -> None:
    found = filled(live("brief", ends_s=10), live("long", ends_s=60))
    assert found.forget(after(30)) == 1
    found.add(live("late", ends_s=20))  # minted after the clock was set back
    assert found.forget(after(5)) == 0
    assert found.get("brief") is None
    assert {"long", "late"} <= set(jtis(found))
    found.forget(after(62))
    assert len(found) == 0


def test_what_was_left_and_entered_again_costs_nothing_when_its_second_comes() -> None:
    found = filled(live("one"))
    found.remove("one")
    assert found.forget(after(62)) == 0


def test_what_is_chosen_fits_all_that_is_said() -> None:
    lives = [
        live("one"),
        live("two", action="orders.once"),
        live("three", principal=OPERATOR),
        live("four", principal="spiffe://other.test/build/agent", audience=OTHERS),
    ]
    found = filled(*lives)
    assert jtis(found.select()) == ["one", "two", "three", "four"]
    assert jtis(found.select(jti="two")) == ["two"]
    assert jtis(found.select(jti="two", action="orders.read")) == []
    assert jtis(found.select(jti="no-such")) == []
    assert jtis(found.select(principal=AGENT)) == ["one", "two"]
    assert jtis(found.select(principal=AGENT, action="orders.once")) == ["two"]
    assert jtis(found.select(trust_domain="other.test")) == ["four"]
    assert jtis(found.select(principal="spiffe://acme.test/build/")) == ["one", "two"]


@pytest.mark.parametrize(
    ("selected", "hit"),
    [
        ("", True),
        ("spiffe://acme.test/build/agent", True),
        ("spiffe://acme.test/build/", True),
        ("spiffe://acme.test/build", False),
        ("spiffe://acme.test/build/agent/", False),
        ("spiffe://acme.test/build/agent2", False),
        ("spiffe://acme.test/", True),
        ("spiffe://acme.tes", False),
    ],
)
def test_a_path_names_what_lies_below_it_and_never_what_only_begins_alike(selected: str, *, hit: bool) -> None:
    assert is_principal(AGENT, selected) is hit
