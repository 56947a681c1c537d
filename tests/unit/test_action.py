"""What an action is: one spelling of each URI, one digest of each act, and nothing covered but that act."""

import dataclasses
import hashlib
import json
import math
from typing import Any

import pytest
import rfc8785
from hypothesis import given
from hypothesis import strategies as st

from broker.action import (
    MAX_DEPTH,
    MAX_INTEGER,
    MAX_PARAMETERS,
    MAX_URI,
    Action,
    ancestors,
    canonical_json,
    check_random_id,
    check_uri,
    parse_parameters,
)
from broker.errors import Invalid

RESOURCE, AUDIENCE = "https://orders.acme.test/v1/orders/17", "spiffe://acme.test/service/orders"
REFUND = Action("orders.refund", RESOURCE, AUDIENCE, {"amount": 30})

safe_text = st.text(st.characters(codec="utf-8"), max_size=12)
scalars = (
    st.booleans()
    | st.integers(-MAX_INTEGER, MAX_INTEGER)
    | st.floats(allow_nan=False, allow_infinity=False, width=64)
    | safe_text
)
ascii_text = st.text(st.characters(max_codepoint=127), max_size=12)
plain_scalars = st.booleans() | st.integers(-MAX_INTEGER, MAX_INTEGER) | ascii_text


def nested(leaves: Any, names: Any) -> Any:
    values = st.recursive(
        leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3), max_leaves=8
    )
    return st.dictionaries(names, values, max_size=4)


parameters = nested(scalars, safe_text)
plain_parameters = nested(plain_scalars, ascii_text)


@given(plain_parameters)
def test_the_fast_encoder_writes_what_rfc_8785_says(value: dict[str, Any]) -> None:
    assert canonical_json(value, plain=True) == rfc8785.dumps(value)


@given(parameters)
def test_a_digest_is_sha_256_over_rfc_8785_json_of_the_four_parts(value: dict[str, Any]) -> None:
    action = Action("a.b", RESOURCE, AUDIENCE, value)
    parts = {"action": "a.b", "resource": RESOURCE, "audience": AUDIENCE, "parameters": value}
    assert action.canonical == rfc8785.dumps(parts)
    assert action.digest == hashlib.sha256(rfc8785.dumps(parts)).digest()


@given(parameters)
def test_json_text_in_any_layout_and_order_means_the_same_act(value: dict[str, Any]) -> None:
    backwards = dict(reversed(value.items()))
    one = Action.parse("a.b", RESOURCE, AUDIENCE, json.dumps(value, indent=2))
    other = Action.parse("a.b", RESOURCE, AUDIENCE, json.dumps(backwards, ensure_ascii=False).encode())
    assert one.digest == other.digest == Action("a.b", RESOURCE, AUDIENCE, value).digest
    assert one.covers(other)


@given(parameters, parameters)
def test_an_act_covers_another_exactly_when_its_canonical_json_is_the_same(
    one: dict[str, Any], two: dict[str, Any]
) -> None:
    first, second = (Action("a.b", RESOURCE, AUDIENCE, value) for value in (one, two))
    assert first.covers(second) == second.covers(first) == (first.canonical == second.canonical)
    assert first.covers(dataclasses.replace(first))


@pytest.mark.parametrize(
    "change",
    [
        {"name": "orders.refunds"},
        {"name": "orders"},
        {"resource": f"{RESOURCE}/lines"},
        {"resource": "https://orders.acme.test/v1/orders"},
        {"audience": f"{AUDIENCE}/eu"},
        {"parameters": {}},
        {"parameters": {"amount": 30, "x": 1}},
        {"parameters": {"amount": "30"}},
        {"parameters": {"amount": True}},
        {"parameters": {"amount": [30]}},
        {"parameters": {"Amount": 30}},
    ],
)
def test_an_act_covers_neither_what_is_above_nor_below_nor_beside_it(change: dict[str, Any]) -> None:
    other = dataclasses.replace(REFUND, **change)
    assert not REFUND.covers(other)
    assert not other.covers(REFUND)
    assert REFUND.covers(Action("orders.refund", RESOURCE, AUDIENCE, {"amount": 30.0}))  # one number in JSON


def test_moving_text_between_the_parts_makes_another_act() -> None:
    one = Action("a", "https://x.test/b", "https://y.test/c", {})
    assert not one.covers(Action("a", "https://y.test/c", "https://x.test/b", {}))
    assert one.covers(Action("a", "https://x.test/b", "https://y.test/c", {}))


@pytest.mark.parametrize("name", ["a", "orders.refund", "a-b_c.D9", "a" * 128])
def test_an_action_has_a_dotted_name(name: str) -> None:
    assert Action(name, RESOURCE, AUDIENCE).name == name


@pytest.mark.parametrize(
    "name", ["", ".", "a.", ".a", "a..b", "9a", "a b", "a\n", "a\0", "a|b", 'a"', "ä", "a/b", "a::b", "a" * 129]
)
def test_another_name_is_refused(name: str) -> None:
    assert Action("orders.refund", RESOURCE, AUDIENCE)
    with pytest.raises(Invalid):
        Action(name, RESOURCE, AUDIENCE)


@pytest.mark.parametrize(
    "uri",
    [
        "https://orders.acme.test",
        "https://orders.acme.test/",
        "https://orders.acme.test:8443/v1/orders/17?x=1&y=%20",
        "https://orders.acme.test/a%20b/%C3%A4",
        "spiffe://acme.test/service/orders",
        "urn:acme:artifact:sha256:00ff",
        "https://[2001:db8::1]:8443/x",
        "https://orders.acme.test/~user/a.b-c_d!$&'()*+,;=:@",
        "oci://registry.acme.test/app@sha256:00ff",
        "https://h/" + "a" * (MAX_URI - 10),
    ],
)
def test_a_uri_in_normal_form_is_taken_as_it_is(uri: str) -> None:
    assert check_uri(uri, "it") == uri
    assert Action("a", uri, uri).resource == uri


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "orders",
        "/v1/orders",
        "//orders.acme.test/v1",
        "https:",
        "https://",
        "https:///v1",
        "https:/v1",
        "HTTPS://orders.acme.test",
        "https://Orders.acme.test",
        "https://user@orders.acme.test",
        "https://user:secret@orders.acme.test",
        "https://orders.acme.test:443/v1",
        "http://orders.acme.test:80",
        "https://orders.acme.test:/v1",
        "https://orders.acme.test:0443",
        "https://orders.acme.test:0",
        "https://orders.acme.test:65536",
        "https://orders.acme.test/v1/../admin",
        "https://orders.acme.test/v1/.",
        "https://orders.acme.test/..",
        "https://orders.acme.test//v1",
        "https://orders.acme.test/v1//x",
        "https://orders.acme.test/v1/",
        "https://orders.acme.test/v1#part",
        "https://orders.acme.test/v1#",
        "https://orders.acme.test/v1?",
        "https://orders.acme.test/a%2Fb",
        "https://orders.acme.test/a%5Cb",
        "https://orders.acme.test/%2E%2E/x",
        "https://orders.acme.test/a%2e",
        "https://orders.acme.test/%c3%a4",
        "https://orders.acme.test/%41",
        "https://orders.acme.test/%7E",
        "https://orders.acme.test/%30",
        "https://orders.acme.test/a%00",
        "https://orders.acme.test/a%0A",
        "https://orders.acme.test/a%7F",
        "https://orders.acme.test/a%",
        "https://orders.acme.test/a%2",
        "https://orders.acme.test/a%GG",
        "https://orders.acme.test/a b",
        "https://orders.acme.test/a\\b",
        "https://orders.acme.test/a\n",
        "https://orders.acme.test/ä",
        "https://orders.acme.test/a|b",
        "https://orders.acme.test/{id}",
        'https://orders.acme.test/"',
        "https://orders.acme.test\n",
        "https://orders.acme.test\\@evil.test/",
        "https://h/" + "a" * (MAX_URI - 9),
    ],
)
def test_a_uri_that_two_readers_could_read_in_two_ways_is_refused(uri: str) -> None:
    assert Action("a", RESOURCE, AUDIENCE)
    for place in ((uri, AUDIENCE), (RESOURCE, uri)):
        with pytest.raises(Invalid):
            Action("a", *place)


@given(st.integers(0, 255), st.sampled_from(["https://a.test/x{}y", "https://a{}b.test/x", "https://a.test/x{}"]))
def test_of_all_256_bytes_few_stand_in_a_uri(byte: int, around: str) -> None:
    uri = around.format(chr(byte))
    try:
        check_uri(uri, "it")
    except Invalid:
        return
    assert uri.isascii()
    assert uri.isprintable()
    assert not set(uri) & set(' "<>\\^`{|}#')


segments = st.text("abcXYZ019-._~", min_size=1, max_size=6).filter(lambda text: text not in {".", ".."})


@given(st.lists(segments, max_size=6))
def test_the_ancestors_of_a_uri_are_uris_and_lie_above_it(parts: list[str]) -> None:
    uri = "/".join(["https://a.test", *parts])
    above = ancestors(uri)
    assert len(above) == len(parts)
    for one, next_one in zip((uri, *above), above, strict=False):
        assert check_uri(next_one, "an ancestor") == next_one
        assert one.startswith(f"{next_one}/")


@pytest.mark.parametrize(
    ("uri", "above"),
    [
        ("https://a.test", ()),
        ("https://a.test/", ("https://a.test",)),
        ("https://a.test/v1?x=1", ("https://a.test/v1", "https://a.test")),
        ("https://a.test:8443/v1/x", ("https://a.test:8443/v1", "https://a.test:8443")),
        ("spiffe://acme.test/build/agent", ("spiffe://acme.test/build", "spiffe://acme.test")),
        ("urn:a:b", ()),
        ("urn:a:b?x", ("urn:a:b",)),
        ("https://a.test/x?y=/z", ("https://a.test/x", "https://a.test")),
    ],
)
def test_ancestors_end_at_the_authority(uri: str, above: tuple[str, ...]) -> None:
    assert ancestors(uri) == above


def test_what_is_beside_a_resource_is_no_ancestor() -> None:
    """A permit for …/orders must not reach …/orders-admin."""
    assert "https://a.test/orders" not in ancestors("https://a.test/orders-admin/1")
    assert "https://a.test/orders" in ancestors("https://a.test/orders/1")
    assert "https://a.test" not in ancestors("https://a.test.evil.test/orders")


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1, "a": 2}',
        '{"x": {"a": 1, "a": 1}}',
        '{"x": [{"a": 1, "\\u0061": 2}]}',
        "[]",
        "1",
        '"text"',
        "null",
        "{",
        "{} {}",
        "{'a': 1}",
        '{"a": NaN}',
        '{"a": Infinity}',
        '{"a": -Infinity}',
        '{"a": 01}',
        "\ufeff{}",
        '{"a": ' + "9" * 5000 + "}",
        '{"a": ' + "[" * 2000 + "]" * 2000 + "}",
        '{"a": "' + "x" * MAX_PARAMETERS + '"}',
        b"\xff{}",
        '{"a": 1}'.encode("utf-16"),
    ],
)
def test_text_that_two_parsers_could_read_in_two_ways_is_no_parameters(text: str | bytes) -> None:
    assert parse_parameters('{"a": 1}') == {"a": 1}
    assert parse_parameters("") == parse_parameters(b"") == {}
    with pytest.raises(Invalid):
        parse_parameters(text)


def deep(levels: int) -> dict[str, Any]:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return {"a": value}


@pytest.mark.parametrize(
    "value",
    [
        {"a": MAX_INTEGER + 1},
        {"a": -MAX_INTEGER - 1},
        {"a": 10**400},
        {"a": math.nan},
        {"a": math.inf},
        {"a": "\ud800"},
        {"\ud800": 1},
        {"a": None},
        {"a": b"bytes"},
        {"a": {1, 2}},
        {"a": object()},
        {1: "a"},
        {"a": {2: "b"}},
        deep(MAX_DEPTH),
        {"a": "x" * 22_000},
        [],
        ["a"],
        (),
        None,
        "text",
        0,
    ],
)
def test_a_value_that_i_json_does_not_have_is_no_parameter(value: Any) -> None:
    assert Action("a", RESOURCE, AUDIENCE, {"a": [MAX_INTEGER, -MAX_INTEGER, True, 1.5, "ä", {"b": []}]} | deep(7))
    with pytest.raises(Invalid):
        Action("a", RESOURCE, AUDIENCE, value)


@pytest.mark.parametrize("text", ['{"a": "\\ud800"}', '{"a": 9007199254740993}', '{"a": 1e400}', '{"a": null}'])
def test_what_passes_as_json_and_is_not_i_json_is_refused_as_an_act(text: str) -> None:
    assert Action.parse("a", RESOURCE, AUDIENCE, '{"a": 9007199254740991}')
    with pytest.raises(Invalid):
        Action.parse("a", RESOURCE, AUDIENCE, text)


def test_an_action_cannot_be_changed_after_it_was_checked() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        REFUND.name = "orders.read"
    assert REFUND.digest.hex() not in repr(Action("a", RESOURCE, AUDIENCE))


@pytest.mark.parametrize("text", ["a" * 16, "a" * 64, "AZaz09-_" * 2])
def test_a_callers_own_id_is_one_word_that_others_would_not_meet_by_chance(text: str) -> None:
    assert check_random_id(text, "it") == text
    for wrong in (
        "",
        text[:15],
        "a" * 65,
        f"{text[:15]}\n",
        f"{text[:15]}\n\n",
        f"{text[:14]}é",
        f"{text[:15]}|{text}",
    ):
        with pytest.raises(Invalid, match="16 to 64"):
            check_random_id(wrong, "it")


def test_no_other_byte_is_in_a_callers_own_id() -> None:
    taken = {chr(byte) for byte in range(256) if _is_taken("a" * 15 + chr(byte))}
    assert taken == set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_")


def _is_taken(text: str) -> bool:
    try:
        return bool(check_random_id(text, "it"))
    except Invalid:
        return False
