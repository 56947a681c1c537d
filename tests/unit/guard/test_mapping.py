"""The declared mapping: what has no rule, a failing rule or two rules is refused; a handler relies on its own rule."""

from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from support.issuer import AUDIENCE, NOW, REFUND, Issuer, by_certificate, guard_for

from broker import guard
from broker.errors import Invalid, Reason, Refused
from broker.guard import Allowed, Rule, Table
from broker.guard.mapping import admitted, rule_of


def refund(**changes: Any) -> Rule:
    parts = {
        "method": "/acme.Orders/Refund",
        "action": "orders.refund",
        "resource": lambda r: f"https://orders.acme.test/v1/orders/{r['id']}",
        "parameters": lambda r: {"amount": r["amount"], "currency": "EUR"},
    }
    return Rule(**(parts | changes))


@pytest.fixture
async def allowed() -> Allowed:
    return (await guard_for(Issuer())).verify(by_certificate(Issuer().token()), REFUND, NOW)


def test_a_rule_rebuilds_the_whole_act_for_our_own_audience() -> None:
    assert refund().rebuild({"id": 17, "amount": 30}, AUDIENCE) == REFUND


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"resource": lambda r: r["missing"]}, Reason.OUT_OF_SCOPE),
        ({"parameters": lambda _: 1 / 0}, Reason.OUT_OF_SCOPE),
        ({"resource": lambda _: None}, Reason.OUT_OF_SCOPE),
        ({"resource": lambda _: "https://orders.acme.test/v1/../admin"}, Reason.MALFORMED),
        ({"resource": lambda r: f"https://orders.acme.test/{r['id']}/"}, Reason.MALFORMED),
        ({"parameters": lambda _: {"amount": object()}}, Reason.MALFORMED),
        ({"parameters": lambda _: {"amount": float("nan")}}, Reason.MALFORMED),
        ({"parameters": lambda _: [1]}, Reason.MALFORMED),
    ],
)
def test_a_mapping_that_fails_refuses(changes: dict[str, Any], reason: Reason) -> None:
    with pytest.raises(Refused) as caught:
        refund(**changes).rebuild({"id": 17, "amount": 30}, AUDIENCE)
    assert caught.value.reason is reason
    assert refund().rebuild({"id": 17, "amount": 30}, AUDIENCE)


@pytest.mark.parametrize(
    "method",
    [
        "Refund",
        "/acme.Orders",
        "/acme.Orders/Refund/",
        "/acme.Orders/Refund\n",
        "/a b/C",
        ("post", "/x"),
        ("POST", "x"),
    ],
)
def test_a_method_that_no_request_can_have_is_a_mistake(method: Any) -> None:
    with pytest.raises(ValueError, match="is not"):
        refund(method=method)
    assert refund(method=("POST", "/orders/{id}/refund"))


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (("GET", "/orders/{id}"), ("GET", "/orders/{name}")),
        (("GET", "/orders/{id}"), ("GET", "/orders/search")),
        (("GET", "/{kind}/search"), ("GET", "/orders/{id}")),
        ("/acme.Orders/Refund", "/acme.Orders/Refund"),
    ],
)
def test_two_rules_that_may_mean_the_same_request_are_a_mistake(one: Any, two: Any) -> None:
    with pytest.raises(ValueError, match=r"twice|may mean the same"):
        Table([refund(method=one), refund(method=two)])
    with pytest.raises(ValueError, match=r"twice|may mean the same"):
        Table([refund(method=one)], public=[two]) if "{" not in two[1] else Table(
            [refund(method=two), refund(method=one)]
        )
    assert Table([refund(method=one)])


def test_a_public_path_is_named_in_full() -> None:
    with pytest.raises(ValueError, match="public"):
        Table(public=[("GET", "/files/{name}")])
    assert Table(public=[("GET", "/files/logo")]).http("GET", "/files/logo") == (None, {})


@pytest.mark.parametrize(
    ("verb", "path"),
    [
        ("GET", "/orders/17/refund"),
        ("post", "/orders/17/refund"),
        ("POST", "/orders/17/refund/"),
        ("POST", "/orders//refund"),
        ("POST", "/orders/17"),
        ("POST", "/orders/17/refund/now"),
        ("POST", "/Orders/17/refund"),
        ("POST", ""),
    ],
)
def test_a_request_without_a_rule_is_refused(verb: str, path: str) -> None:
    rule = refund(method=("POST", "/orders/{id}/refund"))
    table = Table([rule])
    with pytest.raises(Refused) as caught:
        table.http(verb, path)
    assert caught.value.reason is Reason.OUT_OF_SCOPE
    assert table.http("POST", "/orders/17/refund") == (rule, {"id": "17"})


@guard.action("orders.refund", resource=lambda r: r.uri, method=("POST", "/refund"))
async def answer(value: int) -> int:
    return value


@guard.action("orders.list", resource=lambda r: r.uri)
async def stream(value: int) -> AsyncIterator[int]:
    for number in range(value):
        yield number


def test_a_decorated_handler_does_not_run_when_nobody_installed_a_guard() -> None:
    """Forgetting the interceptor lets nobody in."""
    with pytest.raises(Refused, match="no guard admitted"):
        answer(1).send(None)


async def test_a_decorated_handler_runs_under_its_own_rule_only(allowed: Allowed) -> None:
    own, other = rule_of(answer), rule_of(stream)
    assert own
    assert other
    with admitted(allowed, own):
        assert await answer(7) == 7
        assert guard.current() is allowed
        with pytest.raises(Refused):
            _ = [item async for item in stream(2)]
    with admitted(allowed, other):
        assert [item async for item in stream(2)] == [0, 1]
        with pytest.raises(Refused):
            await answer(7)


def test_outside_of_a_guarded_call_nobody_is_current(allowed: Allowed) -> None:
    with pytest.raises(LookupError, match="no guard admitted"):
        guard.current()
    with admitted(allowed, refund()):
        assert guard.current() is allowed
    with pytest.raises(LookupError):
        guard.current()


def test_only_async_handlers_can_be_guarded() -> None:
    def answers(_: object) -> None: ...

    def generates(_: object) -> Iterator[int]:
        yield 1

    for handler in (answers, generates):
        with pytest.raises(TypeError, match="async"):
            guard.action("orders.refund", resource=lambda r: r.uri)(handler)


def test_a_table_takes_decorated_handlers_and_nothing_that_has_no_rule() -> None:
    assert Table([answer]).http("POST", "/refund") == (rule_of(answer), {})
    for handler in (stream, refund, lambda: None):
        with pytest.raises(ValueError, match="no rule that names its method"):
            Table([handler])


def test_a_rule_that_reads_a_body_has_to_say_so() -> None:
    rule = refund(parameters=lambda r: r.json())
    request = guard.Request(method="POST", path="/", params={}, query_string="", headers=())
    with pytest.raises(Invalid, match="body=True"):
        Rule(action="a", resource=lambda _: "https://a.test", parameters=rule.parameters).rebuild(request, AUDIENCE)
