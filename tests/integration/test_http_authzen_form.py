"""The form of AuthZEN 1.0 over real TLS: several questions at once, what is read, and what is refused unread."""

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from support.asking import MANY, RESOURCE, ask, decided, refund, subject, verdicts
from support.http_broker import AUDIENCE, CALLER, ISSUER, ORDERS, HttpBroker, http_broker

from broker.edges.authzen import MAX_EVALUATIONS

SIBLING = "spiffe://acme.test/build/sibling"


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[HttpBroker]:
    async with http_broker(tmp_path) as running:
        yield running


# -- several at once -------------------------------------------------------------------------------------------------


async def test_several_are_answered_in_their_order_with_what_stands_beside_them_as_default(
    broker: HttpBroker,
) -> None:
    asked = refund() | {
        "evaluations": [
            {},
            {"action": {"name": "orders.refund", "properties": {"amount": 51}}},
            {"action": {"name": "orders.read"}},
            {"action": {"name": "orders.refund"}},  # the whole default is replaced, its properties too
            {"subject": subject("spiffe://acme.test/web/shop")},
            {"context": {}},  # likewise: about ORDERS
        ]
    }
    assert await verdicts(broker, asked) == [True, "denied", True, "denied", "denied", True]


async def test_each_semantic_stops_where_it_should(broker: HttpBroker) -> None:
    yes, no = {}, {"action": {"name": "orders.delete"}}
    for semantic, asked, expected in (
        ("execute_all", [yes, no, yes], [True, "denied", True]),
        ("deny_on_first_deny", [yes, no, yes], [True, "denied"]),
        ("deny_on_first_deny", [yes, yes], [True, True]),
        ("deny_on_first_deny", [5, yes], ["malformed"]),
        ("permit_on_first_permit", [no, yes, no], ["denied", True]),
        ("permit_on_first_permit", [no, no], ["denied", "denied"]),
        ("permit_on_first_permit", [5, yes, no], ["malformed", True]),
    ):
        options = {"evaluations_semantic": semantic, "another_option": "value"}
        assert await verdicts(broker, refund(options=options, evaluations=asked)) == expected, semantic
    for wrong in ({"evaluations_semantic": "all"}, {"evaluations_semantic": 1}, "execute_all", None):
        answer = await ask(broker, refund(options=wrong, evaluations=[yes]), path=MANY)
        assert answer.status == 400, wrong


async def test_several_one_after_the_other_take_no_longer_than_one_may(
    broker: HttpBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    ordered = {"options": {"evaluations_semantic": "permit_on_first_permit"}, "evaluations": [{}] * 3}
    assert await verdicts(broker, refund() | ordered) == [True]
    monkeypatch.setattr("broker.edges.http_authzen.REQUEST_TIMEOUT_S", 0.0)
    assert await verdicts(broker, refund() | ordered) == ["attestation_unavailable"] * 3


async def test_no_evaluations_are_one(broker: HttpBroker) -> None:
    for asked in (refund(), refund(evaluations=[])):
        assert (await ask(broker, asked, path=MANY)).body == {"decision": True}
    assert decided(await ask(broker, refund(51, evaluations=[]), path=MANY)) == "denied"
    answer = await ask(broker, {"evaluations": []}, path=MANY)
    assert answer.status == 400


async def test_one_that_is_wrong_is_a_no_among_others_and_a_wrong_request_is_none(broker: HttpBroker) -> None:
    asked = refund()
    del asked["resource"]
    resource = {"resource": {"type": "order", "id": RESOURCE}}
    evaluations = [resource, {}, {"resource": "x"}, {"resource": {"type": "order"}}, 5, None, [], resource]
    assert await verdicts(broker, asked | {"evaluations": evaluations}) == [True] + ["malformed"] * 6 + [True]
    for wrong in (
        {"evaluations": {}},
        {"evaluations": "x"},
        {"evaluations": None},
        {"evaluations": [resource], "subject": "alice"},
        {"evaluations": [resource] * (MAX_EVALUATIONS + 1)},
    ):
        answer = await ask(broker, asked | wrong, path=MANY)
        assert answer.status == 400, wrong
    assert await verdicts(broker, asked | {"evaluations": [resource] * MAX_EVALUATIONS}) == [True] * MAX_EVALUATIONS


# -- form ------------------------------------------------------------------------------------------------------------


async def test_the_examples_of_the_specification_are_understood(broker: HttpBroker) -> None:
    """Its people and documents have other names than ours, so they are nobody and nothing here: no."""
    alice = {"type": "user", "id": "alice@example.com"}
    first = {
        "subject": alice,
        "resource": {"type": "account", "id": "123"},
        "action": {"name": "can_read", "properties": {"method": "GET"}},
        "context": {"time": "1985-10-26T01:22-07:00"},
    }
    assert decided(await ask(broker, first)) == "malformed"
    boxcar = {
        "subject": alice,
        "context": {"time": "2024-05-31T15:22-07:00"},
        "action": {"name": "can_read"},
        "evaluations": [
            {"resource": {"type": "document", "id": "boxcarring.md"}},
            {"resource": {"type": "document", "id": "subject-search.md"}},
            {"action": {"name": "can_edit"}, "resource": {"type": "document", "id": "resource-search.md"}},
        ],
    }
    assert await verdicts(broker, boxcar) == ["malformed"] * 3
    deny_first = boxcar | {"options": {"evaluations_semantic": "deny_on_first_deny"}}
    assert await verdicts(broker, deny_first) == ["malformed"]


async def test_what_is_not_known_is_ignored_and_does_not_decide(broker: HttpBroker) -> None:
    asked = refund() | {"foo": "bar", "futureField": {"nested": True}}
    asked["subject"] = asked["subject"] | {"properties": {"role": "admin"}, "more": 1}
    asked["resource"] = asked["resource"] | {"properties": {"status": "active"}}
    asked["context"] = asked["context"] | {"time": "2025-06-27T18:03-07:00"}
    assert decided(await ask(broker, asked)) is True
    shop = subject("spiffe://acme.test/web/shop")
    asked["subject"] = shop | {"properties": {"role": "admin", "spire": {"ids": [CALLER]}, "id": CALLER}}
    assert decided(await ask(broker, asked)) == "denied"


@pytest.mark.parametrize("missing", ["subject", "action", "resource", "subject.type", "subject.id", "action.name"])
async def test_what_is_required_has_to_be_there(broker: HttpBroker, missing: str) -> None:
    asked = json.loads(json.dumps(refund()))
    key, _, inner = missing.partition(".")
    if inner:
        del asked[key][inner]
    else:
        del asked[key]
    answer = await ask(broker, asked)
    assert answer.status == 400
    assert answer.headers["Content-Type"] == "text/plain; charset=utf-8"
    assert f"`{inner or key}`" in answer.text
    assert decided(await ask(broker, refund())) is True


async def test_what_two_parsers_read_differently_is_refused(broker: HttpBroker) -> None:
    text = json.dumps(refund())
    for wrong in (
        "",
        "x",
        "[]",
        "null",
        text[:-1],
        text.replace('"subject"', '"subject": {}, "subject"'),
        text.replace('"amount"', '"amount": 500, "amount"'),
        text.replace('"orders.refund"', "5"),
        text.replace('{"amount": 5}', "[]"),
        text.replace('{"amount": 5}', "null"),
        text.replace(f'"{AUDIENCE}"', "5"),
        text.replace("5", "NaN"),
        "[" * 60_000,
        text.encode("utf-16"),
        b"\xff",
    ):
        answer = await ask(broker, wrong)
        assert answer.status == 400, wrong[:80]
        assert answer.text.startswith("malformed: ")
    for amount in ('"\\ud800"', "9007199254740993", "null", "[" * 20 + "]" * 20):
        answer = await ask(broker, text.replace("5", amount))
        assert decided(answer) == "malformed", amount
    assert decided(await ask(broker, text)) is True


async def test_only_json_of_a_bounded_size_without_query_is_read(broker: HttpBroker) -> None:
    text, svid = json.dumps(refund()), broker.svid(ORDERS)
    for headers in (
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/json; charset=utf-16"},
        {"Content-Encoding": "gzip"},
    ):
        assert (await ask(broker, text, headers=headers)).status == 400, headers
    assert (await ask(broker, text, path="/access/v1/evaluation?x=1")).status == 400
    assert (await ask(broker, text + " " * 65_536)).status == 413
    assert (await ask(broker, text + " " * 60_000)).status == 200
    assert (await ask(broker, text + " " * 60_000, path=MANY)).status == 200
    assert (await ask(broker, text + " " * 524_288, path=MANY)).status == 413
    assert (await broker.get("/access/v1/evaluation", svid=svid)).status == 405
    assert (await broker.get("/access/v1/search/subject", svid=svid)).status == 404


async def test_the_id_of_a_request_comes_back_with_every_answer(broker: HttpBroker) -> None:
    name = {"X-Request-ID": "bfe9eb29-ab87-4ca3-be83-a1d5d8305716"}
    for answer in (
        await ask(broker, refund(), headers=name),
        await ask(broker, refund(51), headers=name),
        await ask(broker, refund(), headers=name, path=MANY),
        await ask(broker, "x", headers=name),
        await ask(broker, refund(), headers=name, nobody=True),
        await ask(broker, refund(), headers=name, spiffe_id=SIBLING),
        await broker.get("/access/v1/evaluation", headers=name),
    ):
        assert answer.headers["X-Request-ID"] == name["X-Request-ID"]
    assert "X-Request-ID" not in (await ask(broker, refund())).headers
    odd = await ask(broker, refund(), headers={"X-Request-ID": "é"})
    assert (odd.status, "X-Request-ID" in odd.headers) == (400, False)


async def test_the_metadata_names_the_issuer_and_only_what_is_offered(broker: HttpBroker, tmp_path: Path) -> None:
    answer = await broker.get("/.well-known/authzen-configuration")
    assert (answer.status, answer.headers["Content-Type"]) == (200, "application/json")
    assert answer.headers["Cache-Control"] == "public, max-age=3600"
    assert answer.body == {
        "policy_decision_point": ISSUER,
        "access_evaluation_endpoint": f"{ISSUER}/access/v1/evaluation",
        "access_evaluations_endpoint": f"{ISSUER}/access/v1/evaluations",
    }
    tenants = tmp_path / "tenants"
    tenants.mkdir()
    async with http_broker(tenants, issuer="https://acme.test/tenants/a") as tenant:
        found = await tenant.get("/.well-known/authzen-configuration/tenants/a")
        assert found.body["policy_decision_point"] == "https://acme.test/tenants/a"
        assert decided(await ask(tenant, refund(), path="/tenants/a/access/v1/evaluation")) is True
