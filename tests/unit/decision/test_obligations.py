"""What annotations oblige to, and that no other spelling obliges to nothing."""

from datetime import timedelta

import pytest

from broker.decision.obligations import Obligations, combine, parse_ttl, read_obligations, unknown_annotations


@pytest.mark.parametrize(("text", "seconds"), [("1s", 1), ("90s", 90), ("300s", 300), ("1m", 60), ("5m", 300)])
def test_times_within_the_limit_are_read(text, seconds):
    assert parse_ttl(text) == timedelta(seconds=seconds)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0s",
        "301s",
        "6m",
        "60",
        "s",
        "1h",
        "-1s",
        "+1s",
        " 1s",
        "1s ",
        "1s\n",
        "01s",
        "1S",
        "1.5s",
        "\u0661s",
        "1s|",
        "99999s",
        None,
    ],
)
def test_times_outside_it_or_written_otherwise_are_not(text):
    assert parse_ttl(text) is None


def test_annotations_are_read_as_obligations():
    found, wrong = read_obligations("permit", {"max_ttl": "9s", "single_use": None, "id": "x"})
    assert (found, wrong) == (Obligations(max_ttl=timedelta(seconds=9), use="single"), [])
    assert read_obligations("permit", {"reuse": "ttl"})[0].use == "ttl"
    assert read_obligations("permit", {"single_use": ""})[0].use == "single"
    assert read_obligations("forbid", {"id": "x"}) == (Obligations(), [])


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("maxttl", "@max_ttl"), ("max_TTL", "@max_ttl"), ("maxTtl", "@max_ttl"), ("singleuse", "@single_use"),
        ("single_used", "@single_use"), ("re_use", "@reuse"), ("Id", "@id"), ("docs", "@doc"),
    ],
)  # fmt: skip
def test_a_misspelt_annotation_is_refused_with_the_right_spelling(name, hint):
    ((_, fix),) = unknown_annotations({name: None})
    assert fix == f"Did you mean {hint}?"


def test_any_other_annotation_is_refused_with_the_list_of_known_ones():
    ((problem, fix),) = unknown_annotations({"zzz": None, "doc": "x", "owner": "me", "description": "", "id": "a"})
    assert "@zzz" in problem
    assert "@max_ttl" in fix


def test_nothing_combines_to_the_defaults():
    assert combine([]) == Obligations()
