"""What annotations oblige to, and that no other spelling obliges to nothing."""

from datetime import timedelta

import pytest

from broker.decision.obligations import (
    KEYLESS_ALONE,
    Obligations,
    combine,
    parse_ttl,
    read_obligations,
    unknown_annotations,
)


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
        ("agentkey", "@agent_key"), ("agent-key", "@agent_key"), ("keys", "@key"), ("Key", "@key"),
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


@pytest.mark.parametrize(
    ("annotations", "signers"),
    [
        ({}, {"keyless"}),
        ({"max_ttl": "9s"}, {"keyless"}),
        ({"key": "release"}, {"key:release"}),
        ({"key": "release night.ly_1-a"}, {"key:release", "key:night.ly_1-a"}),
        ({"agent_key": None}, {"keyless", "agent-key"}),
        ({"agent_key": "", "key": "release"}, {"keyless", "agent-key", "key:release"}),
    ],
)
def test_a_permit_gives_the_signers_that_it_names_and_keyless_where_it_names_none(annotations, signers):
    found, wrong = read_obligations("permit", annotations)
    assert (found.signers, wrong) == (signers, [])
    assert all(found.gives(signer) for signer in [None, *signers])
    assert not any(found.gives(signer) for signer in ["", "key:other", "key:", "release"])


@pytest.mark.parametrize(
    "names",
    [
        None, "", " ", "release ", " release", "release\n", "release  nightly", "release,nightly", "release release",
        "Release", "key:release", "-release", "a" * 65, "r\u00e9lease", "release\tnightly", "*",
    ],
)  # fmt: skip
def test_names_that_are_no_keys_give_nothing(names):
    found, wrong = read_obligations("permit", {"key": names})
    assert found == Obligations()
    assert [problem for problem, _ in wrong] == ["@key does not name keys, each once, with one space between"]
    assert not read_obligations("permit", {"key": "a" * 64})[1]


def test_signers_are_given_by_permits_alone():
    for annotations in ({"key": "release"}, {"agent_key": None}):
        ((problem, _),) = read_obligations("forbid", annotations)[1]
        assert "on a forbid obliges nobody" in problem


def test_what_one_permit_gives_is_given_and_nothing_else():
    key, agent = Obligations(signers=frozenset({"key:a"})), Obligations(signers=frozenset({"agent-key", "keyless"}))
    assert combine([key]).signers == {"key:a"}
    assert combine([key, agent]).signers == {"key:a", "agent-key", "keyless"}
    assert combine([]).signers == KEYLESS_ALONE
