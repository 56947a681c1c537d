"""Rules from a file: each vector means its act or is refused, and each mistake is found before anything starts."""

import json
import string
import tomllib
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from support.issuer import AUDIENCE

from broker.action import Action
from broker.errors import Refused
from broker.guard import Request, Table
from broker.guard.declared import Rules
from broker.guard.http_request import clean_path
from broker.guard.sources import covers, parse_pointer, parse_source, template_parts

VECTORS = Path(__file__).parents[2] / "vectors/declared"
REQUESTS = sorted((VECTORS / "requests").glob("*.toml"))
MISTAKES = sorted((VECTORS / "mistakes").glob("*.toml"))
TABLE = Rules(**tomllib.loads((VECTORS / "rules.toml").read_text())).table()
JSON = [("content-type", "application/json")]


def meant(table: Table, method: str, target: str, headers: Any, body: bytes) -> Action:
    """The act that a request means. Raises: Refused."""
    raw, _, query = target.partition("?")
    path = unquote(raw)
    clean_path(path, raw.encode("ascii"))
    rule, params = table.http(method, path)
    assert rule is not None
    request = Request(
        method=method, path=path, params=params, query_string=query, headers=headers, body=body if rule.body else None
    )
    return rule.rebuild(request, AUDIENCE)


@pytest.mark.parametrize("file", REQUESTS, ids=lambda file: file.stem)
def test_a_request_means_its_act_or_nothing(file: Path) -> None:
    vector = tomllib.loads(file.read_text())
    expected, request = vector["expect"], vector["request"]
    headers = [(name, value) for name, value in request["headers"]]
    arguments = (TABLE, request["method"], request["target"], headers, request["body"].encode())
    if expected.startswith("{"):
        act = json.loads(expected)
        assert meant(*arguments) == Action(act["action"], act["resource"], AUDIENCE, act["parameters"])
        assert file.stem.startswith("sound")
        return
    with pytest.raises(Refused) as caught:
        meant(*arguments)
    assert caught.value.reason == expected
    assert not file.stem.startswith("sound")


@pytest.mark.parametrize("file", MISTAKES, ids=lambda file: file.stem)
def test_a_mistake_is_said_by_its_key(file: Path) -> None:
    text = file.read_text()
    with pytest.raises(ValidationError) as caught:
        Rules(**tomllib.loads(text))
    said = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in caught.value.errors()]
    assert len(said) == 1, said
    assert said[0].startswith(text.splitlines()[0].removeprefix("# expect: ")), said


def test_all_mistakes_come_in_one_report() -> None:
    rules = [
        tomllib.loads(file.read_text())["rules"][0]
        for file in MISTAKES
        if "rules-that" not in file.stem and "no-rule" not in file.stem
    ]
    with pytest.raises(ValidationError) as caught:
        Rules(rules=rules)
    assert len(caught.value.errors()) >= len(rules) - 3  # those whose mistake is in `public`


# -- properties --------------------------------------------------------------------------------------------------------

segments = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)
json_values = st.recursive(
    st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def two_orders() -> Table:
    rule = {
        "method": "POST",
        "path": "/{a}/{b}",
        "action": "orders.move",
        "resource": "https://orders.acme.test/from/{a}/to/{b}",
        "parameters": {"what": "body:/what"},
    }
    return Rules(rules=[rule]).table()


TWO = two_orders()


def moved(a: str, b: str, body: Any) -> Action | None:
    """None where it is refused."""
    target = "/" + "/".join(quote(one, safe="-._~!$&'()*+,;=:@") for one in (a, b))
    try:
        return meant(TWO, "POST", target, JSON, json.dumps(body).encode())
    except Refused:
        return None


@given(st.tuples(segments, segments, json_values), st.tuples(segments, segments, json_values))
def test_two_requests_mean_one_act_only_where_they_are_one(
    one: tuple[str, str, Any], two: tuple[str, str, Any]
) -> None:
    """No choice of values lets one request pass for another that was approved."""
    first, second = (moved(a, b, {"what": what}) for a, b, what in (one, two))
    if first is not None and second is not None and first.digest == second.digest:
        assert one[:2] == two[:2]
        assert json.dumps(one[2], sort_keys=True) == json.dumps(two[2], sort_keys=True)


@given(
    st.text(st.sampled_from("ab/.%\\{}:"), min_size=1, max_size=6),
    st.text(st.sampled_from("ab/.%\\{}:"), min_size=1, max_size=6),
)
def test_a_value_stays_within_its_segment(a: str, b: str) -> None:
    act = moved(a, b, {"what": 1})
    if act is not None:
        start, one, middle, two = act.resource.removeprefix("https://orders.acme.test/").split("/")
        assert (start, unquote(one), middle, unquote(two)) == ("from", a, "to", b)


@given(st.dictionaries(st.text(max_size=4), json_values, min_size=1, max_size=3), json_values)
def test_whatever_the_body_has_besides_is_refused(more: dict[str, Any], what: Any) -> None:
    body = {"what": what} | {name: value for name, value in more.items() if name != "what"}
    assert (moved("a", "b", body) is None) == (len(body) > 1)


@given(json_values)
def test_a_pointer_to_the_whole_covers_everything_and_none_covers_nothing(value: Any) -> None:
    assert covers([()], value)
    assert not covers([], value)
    assert not covers([("elsewhere",)], {"here": value})


@given(st.text(string.printable, max_size=30) | st.from_regex(r"\A(path|query|body|header):.{0,10}\Z"))
def test_any_text_is_a_source_or_a_mistake(text: str) -> None:
    try:
        source = parse_source(text)
    except ValueError:
        return
    assert text == f"{source.origin}:{source.name}"
    if source.origin == "body":
        assert (
            "/".join(["", *(one.replace("~", "~0").replace("/", "~1") for one in parse_pointer(source.name))])
            == source.name
        )


@given(st.text(st.sampled_from("https://a.test{}x:/?#%.query"), max_size=40))
def test_any_text_is_a_template_or_a_mistake(text: str) -> None:
    try:
        parts = template_parts(text)
    except ValueError:
        return
    assert isinstance(parts[0], str)
    assert parts[0].partition(":")[0]


words = st.text(string.ascii_lowercase + "/{}:", max_size=8)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=8,
)


@given(
    st.fixed_dictionaries(
        {},
        optional=dict.fromkeys(("method", "path", "action", "resource", "parameters", "ignore", "check"), anything),
    )
)
def test_any_rule_is_taken_or_is_a_mistake(rule: dict[str, Any]) -> None:
    try:
        Rules(rules=[rule])
    except ValidationError:
        return
    assert {"method", "action", "resource"} <= rule.keys()
