"""Requests that Envoy, the guard and the service could each read in another way: headers, paths, bodies, retries."""

import gzip
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from support.envoy import HOST, Edge, serving
from support.envoy_calls import (
    BASE,
    ISSUER,
    MALFORMED,
    REFUND,
    SCOPE,
    TABLE,
    call,
    dpop,
    now,
    on_the_wire,
    read,
    refund,
    token,
)
from support.issuer import AUDIENCE, CALLER, guard_for
from support.pki import CA

from broker.action import Action
from broker.errors import Reason

pytestmark = pytest.mark.asyncio(loop_scope="module")

BODY = {"amount": 30}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def envoy(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Edge]:
    guard = await guard_for(ISSUER, clock=now)
    async with serving(guard, TABLE, tmp_path_factory.mktemp("envoy"), CA(now=now())) as edge:
        yield edge


@pytest.fixture
def edge(envoy: Edge) -> Edge:
    """With a service that nothing has reached yet."""
    envoy.seen.clear()
    envoy.answers.clear()
    return envoy


# -- headers -----------------------------------------------------------------------------------------------------------


async def test_headers_that_name_the_admitted_are_the_guards_alone(edge: Edge) -> None:
    forged = [
        ("x-action-broker-principal", "spiffe://acme.test/admin"),
        ("X-Action-Broker-Principal", "spiffe://acme.test/root"),
        ("x-action-broker-action", "orders.delete"),
        ("x-action-broker-role", "admin"),
    ]
    assert (await call(edge, [*forged, *dpop(token(refund()))], BODY)).status == 200
    assert (await call(edge, forged, method="GET", path="/healthz")).status == 200
    assert (
        await edge.send(on_the_wire(dpop(token(refund())), closes="close, x-action-broker-principal"))
    ).status == 200
    ours = ([("x-action-broker-action", "orders.refund"), ("x-action-broker-principal", CALLER)], [])
    for seen, expected in zip(edge.seen, (ours[0], ours[1], ours[0]), strict=True):
        found = [(name.lower(), value) for name, value in seen.headers]
        assert sorted(one for one in found if one[0].startswith("x-action-broker")) == expected


async def test_a_header_that_cgi_would_take_for_the_guards_is_refused(edge: Edge) -> None:
    forged = [("x_action_broker_principal", "spiffe://acme.test/admin")]
    assert (await edge.send(on_the_wire([*forged, *dpop(token(refund()))]))).status == 400
    assert edge.seen == []
    assert (await edge.send(on_the_wire(dpop(token(refund()))))).status == 200


async def test_two_credentials_are_none(edge: Edge) -> None:
    one, two = dpop(token(refund(), use="ttl")), dpop(token(refund(), use="ttl"))
    for double in (
        [*one, two[0]],
        [*one, two[1]],
        [("authorization", f"{one[0][1]},{two[0][1]}"), one[1]],
        [one[0], ("dpop", f"{one[1][1]}, {two[1][1]}")],
        [("Authorization", "Basic eA=="), *one],
    ):
        (await edge.send(on_the_wire(double))).refused(Reason.MALFORMED, MALFORMED)
    assert edge.seen == []
    assert (await edge.send(on_the_wire(one))).status == 200


async def test_headers_that_would_make_another_act_of_it_do_not_reach_the_service(edge: Edge) -> None:
    others = ["x-http-method-override", "x-http-method", "x-method-override", "x-original-url", "x-rewrite-url"]
    assert (await call(edge, [*((name, "DELETE") for name in others), *dpop(token(refund()))], BODY)).status == 200
    (seen,) = edge.seen
    assert [name for name in others if seen.values(name)] == []


async def test_an_act_that_was_approved_once_is_not_done_twice_because_a_client_asks_for_retries(edge: Edge) -> None:
    edge.answers[:] = [503]
    retries = [("x-envoy-retry-on", "5xx"), ("x-envoy-max-retries", "3"), ("x-envoy-hedge-on-per-try-timeout", "true")]
    assert (await call(edge, [*retries, *dpop(token(refund()))], BODY)).status == 503
    assert len(edge.seen) == 1


# -- paths -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "//v1/orders/17/refund",
        "/v1//orders/17/refund",
        "/v1/orders/17/refund/",
        "/v1/orders/17%2Frefund",
        "/v1/orders/17%2frefund",
        "/v1/orders/17%5Crefund",
        "/v1/orders/17\\refund",
        "/v1/orders/16/../17/refund",
        "/v1/orders/16/%2e%2e/17/refund",
        "/v1/orders/./17/refund",
        "/healthz/../v1/orders/17/refund",
        "/v1/orders/17%00/refund",
        "/v1/orders/17;a=b/refund",
        "/v1/orders/17/refund%3F",
        "/v1/orders/17/refund#x",
        "/v1/orders/%31%37/refund",
        "/V1/orders/17/refund",
        f"http://{HOST}/v1//orders/17/refund",
    ],
)
async def test_a_path_that_could_be_read_in_two_ways_admits_nobody(edge: Edge, path: str) -> None:
    """The proof is for the path as it was sent."""
    sent = dpop(token(refund()), path=path.removeprefix(f"http://{HOST}"))
    assert (await edge.send(on_the_wire(sent, path))).status in {400, 401, 403}
    assert edge.seen == []


async def test_what_was_approved_is_what_arrives_also_where_envoy_resolves_the_path(edge: Edge) -> None:
    sent = on_the_wire(dpop(token(refund("17"))), "/v1/orders/18/../17/refund")
    assert (await edge.send(sent)).status == 200
    sent = on_the_wire(dpop(token(refund("18")), path="/v1/orders/18/refund"), "/v1/orders/18/../17/refund")
    assert (await edge.send(sent)).status == 401
    assert [seen.path for seen in edge.seen] == [REFUND]


async def test_a_public_path_leads_nowhere_else(edge: Edge) -> None:
    for path in ("/healthz/../v1/orders/17", "/healthz/%2e%2e/v1/orders/17", "/healthz;/../v1/orders/17", "/healthz/"):
        assert (await edge.send(on_the_wire([], path, b"", "GET"))).status in {400, 401, 403}
    assert edge.seen == []
    assert (await edge.send(on_the_wire([], "/healthz", b"", "GET"))).status == 200


# -- queries and bodies ------------------------------------------------------------------------------------------------


async def test_a_query_parameter_is_a_number_in_one_spelling(edge: Edge) -> None:
    path, act = "/v1/orders", Action("orders.list", f"{BASE}/v1/orders", AUDIENCE, {"limit": 10})

    def proved() -> list[tuple[str, str]]:
        return dpop(token(act), "GET", path)

    for query in ("?limit=11", "?limit=010", "?limit=%2010", "", "?limit=10&offset=3", "?Limit=10", "?limit=10;x=1"):
        answer = await call(edge, proved(), method="GET", path=path + query)
        answer.refused(Reason.OUT_OF_SCOPE, SCOPE)
    for query in ("?limit=10&limit=99", "?limit=10&", "?limit"):
        (await call(edge, proved(), method="GET", path=path + query)).refused(Reason.MALFORMED, MALFORMED)
    assert edge.seen == []
    assert (await call(edge, proved(), method="GET", path=f"{path}?limit=10")).status == 200


async def test_a_body_that_could_be_read_in_two_ways_is_refused(edge: Edge) -> None:
    for body in (b'{"amount": 30, "amount": 31}', b'{"amount": 30', b"", '{"amount": 30}'.encode("utf-16")):
        (await call(edge, dpop(token(refund())), body)).refused(Reason.MALFORMED, MALFORMED)
    for kind in ("text/plain", "application/x-www-form-urlencoded", "application/json; charset=utf-16"):
        (await call(edge, dpop(token(refund())), BODY, kind=kind)).refused(Reason.MALFORMED, MALFORMED)
    packed = [("content-encoding", "gzip"), *dpop(token(refund()))]
    (await call(edge, packed, gzip.compress(b'{"amount": 30}'))).refused(Reason.MALFORMED, MALFORMED)
    assert edge.seen == []
    assert (await call(edge, dpop(token(refund())), BODY)).status == 200


async def test_a_body_that_is_too_large_to_be_told_is_refused(edge: Edge) -> None:
    for body in (b'{"amount": 30}' + b" " * 1024 * 1024, b"x" * 4 * 1024 * 1024):
        assert (await call(edge, dpop(token(refund())), body)).status == 413
    assert edge.seen == []
    most = b'{"amount": 30}' + b" " * (1024 * 1024 - 14)
    assert (await call(edge, dpop(token(refund())), most)).status == 200
    assert len(edge.seen[0].body) == 1024 * 1024


async def test_a_grpc_content_type_brings_no_unread_body_past_an_http_rule(edge: Edge) -> None:
    """Envoy does not tell the body of what says that it is gRPC."""
    path = "/v1/orders/17"
    for method, where, act in (("GET", path, read()), ("POST", REFUND, refund())):
        for kind in ("application/grpc", "application/grpc+json", "application/grpc-web"):
            answer = await call(edge, dpop(token(act), method, where), b"{}", method=method, path=where, kind=kind)
            assert answer.headers.get("grpc-status") == "7" or answer.status == 403
    assert edge.seen == []


async def test_a_websocket_is_refused(edge: Edge) -> None:
    path = "/v1/orders/17"
    upgrade = [("upgrade", "websocket"), ("sec-websocket-version", "13"), ("sec-websocket-key", "eA==")]
    sent = on_the_wire([*upgrade, *dpop(token(read()), "GET", path)], path, b"", "GET", "upgrade")
    assert (await edge.send(sent)).status == 403
    assert edge.seen == []
