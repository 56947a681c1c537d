"""The answers to Envoy: whatever is missing, wrong or unforeseen is a no, and a yes says it where no client can."""

import ssl
from typing import Any
from urllib.parse import quote

import pytest
from support.issuer import AUDIENCE, CALLER, LEAF, NOW, Issuer, Prover, guard_for

from broker._proto.envoy.config.core.v3 import base_pb2
from broker._proto.envoy.service.auth.v3 import attribute_context_pb2, external_auth_pb2
from broker.action import Action
from broker.errors import Invalid, Reason
from broker.guard import Rule, Table
from broker.guard.envoy import EnvoyAuthorization
from broker.status import STATUS

HOST = "orders.acme.test"
ISSUER, PROVER = Issuer(), Prover()
REFUND = Action("orders.refund", f"https://{HOST}/orders/17", AUDIENCE, {"amount": 30})
PATH = "/orders/17/refund"
TABLE = Table(
    [
        Rule(
            method=("POST", "/orders/{order}/refund"),
            action="orders.refund",
            resource=lambda request: f"https://{HOST}/orders/{request.params['order']}",
            parameters=lambda request: {"amount": request.json()["amount"]},
            body=True,
        ),
        Rule(method="/acme.Orders/List", action="orders.list", resource=lambda _: f"https://{HOST}/orders"),
    ],
    public=[("GET", "/healthz"), "/acme.Orders/Ping"],
)
LIST = Action("orders.list", f"https://{HOST}/orders", AUDIENCE)
PEM = quote(ssl.DER_cert_to_PEM_cert(LEAF), safe="")
JSON = ("content-type", "application/json")
GRPC = ("content-type", "application/grpc")
TOLD = ("x-envoy-auth-partial-body", "false")


def proved(action: Action = REFUND, path: str = PATH) -> list[tuple[str, str]]:
    access = ISSUER.token(action, cnf=PROVER.cnf)
    proof = PROVER.proof(access, htu=f"https://{HOST}{path}")
    return [("authorization", f"DPoP {access}"), ("dpop", proof)]


def asked(*headers: tuple[str, str], certificate: str = "", **changes: Any) -> external_auth_pb2.CheckRequest:
    """As Envoy asks. changes: of what it tells of the request."""
    told = base_pb2.HeaderMap(
        headers=[base_pb2.HeaderValue(key=name, raw_value=value.encode("latin-1")) for name, value in headers]
    )
    parts = {"method": "POST", "path": PATH, "host": HOST, "header_map": told, "raw_body": b'{"amount": 30}'} | changes
    http = attribute_context_pb2.AttributeContext.HttpRequest(**{k: v for k, v in parts.items() if v is not None})
    return external_auth_pb2.CheckRequest(
        attributes=attribute_context_pb2.AttributeContext(
            source=attribute_context_pb2.AttributeContext.Peer(certificate=certificate),
            request=attribute_context_pb2.AttributeContext.Request(http=http),
        )
    )


async def answered(request: external_auth_pb2.CheckRequest, **changes: Any) -> external_auth_pb2.CheckResponse:
    guard = await guard_for(ISSUER, **changes)
    return await EnvoyAuthorization(guard, TABLE, authorities=[HOST]).Check(request, None)


def headers_of(answer: external_auth_pb2.CheckResponse) -> dict[str, str]:
    """What it sets. Nothing is appended to what a client sent."""
    options = [*answer.ok_response.headers, *answer.denied_response.headers]
    assert all(one.append_action == base_pb2.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD for one in options)
    return {one.header.key: one.header.value for one in options}


def admitted(answer: external_auth_pb2.CheckResponse) -> bool:
    assert (answer.status.code == 0) == (answer.WhichOneof("http_response") == "ok_response")
    return answer.status.code == 0


async def reason(request: external_auth_pb2.CheckRequest, **changes: Any) -> str:
    """Of a no. What it says agrees with itself."""
    answer = await answered(request, **changes)
    assert not admitted(answer), answer
    found = Reason(answer.dynamic_metadata["reason"])
    assert answer.denied_response.status.code == STATUS[found].http
    assert answer.status.code == STATUS[found].grpc.value[0]
    assert headers_of(answer)["x-correlation-id"] == answer.dynamic_metadata["correlation_id"]
    return str(found)


async def test_a_yes_says_who_and_takes_the_credential_off() -> None:
    answer = await answered(asked(*proved(), JSON, TOLD))
    assert admitted(answer)
    ours = {"x-action-broker-principal": CALLER, "x-action-broker-action": "orders.refund"}
    assert headers_of(answer) == ours
    assert list(answer.ok_response.headers_to_remove) == ["authorization", "dpop"]
    assert dict(answer.dynamic_metadata) == {"principal": CALLER, "action": "orders.refund"}


async def test_what_would_pass_for_the_guards_headers_is_taken_off_and_never_what_it_sets() -> None:
    """Envoy sets before it removes."""
    forged = ["x-action-broker-principal", "x_action_broker_principal", "x-action-broker-role", "x-action-broker-"]
    sent = [(name, "root") for name in forged]
    answer = await answered(asked(*proved(), *sent, JSON, TOLD))
    removed = ["x-action-broker-", "x-action-broker-role", "x_action_broker_principal", "authorization", "dpop"]
    assert list(answer.ok_response.headers_to_remove) == removed
    public = await answered(asked(*sent, ("authorization", "Basic eA=="), method="GET", path="/healthz"))
    assert sorted(public.ok_response.headers_to_remove) == sorted(forged)
    assert headers_of(public) == {}


async def test_a_certificate_counts_from_the_connection_alone() -> None:
    bound = ("authorization", f"Bearer {ISSUER.token(REFUND)}")
    assert admitted(await answered(asked(bound, JSON, TOLD, certificate=PEM)))
    told = ("x-forwarded-client-cert", f'Cert="{PEM}"')
    assert await reason(asked(bound, told, JSON, TOLD)) == "key_mismatch"
    assert (
        await reason(asked(bound, JSON, TOLD, certificate=quote(ssl.DER_cert_to_PEM_cert(b"other")))) == "key_mismatch"
    )
    assert await reason(asked(bound, JSON, TOLD, certificate="%FF")) == "scope_stale"
    assert await reason(asked(bound, JSON, TOLD, certificate="no certificate")) == "scope_stale"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"header_map": None}, "scope_stale"),
        ({"raw_body": b"", "body": '{"amount": 30}'}, "scope_stale"),
        ({"host": "evil.test"}, "out_of_scope"),
        ({"host": f"{HOST}:8443"}, "out_of_scope"),
        ({"host": ""}, "out_of_scope"),
        ({"method": "PUT"}, "out_of_scope"),
        ({"method": "post"}, "out_of_scope"),
        ({"path": "/orders/18/refund"}, "invalid_dpop_proof"),
        ({"path": f"{PATH}#x"}, "malformed"),
        ({"path": f"{PATH}?a=b#x"}, "malformed"),
        ({"path": f"{PATH}?a={{b}}"}, "malformed"),
        ({"path": "/orders/17%2Frefund"}, "malformed"),
        ({"path": "/orders//refund"}, "malformed"),
        ({"path": "/orders/%FF/refund"}, "malformed"),
        ({"path": "/orders/\u00e9/refund"}, "malformed"),
        ({"path": "*"}, "malformed"),
        ({"path": ""}, "malformed"),
        ({"raw_body": b'{"amount": 31}'}, "out_of_scope"),
        ({"raw_body": b""}, "malformed"),
        ({"raw_body": b" " * (1024 * 1024 + 1)}, "malformed"),
    ],
)
async def test_what_envoy_tells_otherwise_is_refused(changes: dict[str, Any], expected: str) -> None:
    assert await reason(asked(*proved(), JSON, TOLD, **changes)) == expected
    assert admitted(await answered(asked(*proved(), JSON, TOLD)))


@pytest.mark.parametrize(
    "more",
    [
        [("x-envoy-auth-partial-body", "true")],
        [("x-envoy-auth-partial-body", "")],
        [JSON],
        [("content-encoding", "gzip")],
        [("dpop", "a.b.c")],
        [("authorization", "Basic eA==")],
        [("Authorization", "Basic eA==")],
    ],
)
async def test_a_header_beside_the_usual_ones_can_refuse(more: list[tuple[str, str]]) -> None:
    assert await reason(asked(*proved(), JSON, TOLD, *more)) == "malformed"


@pytest.mark.parametrize("announced", [("content-length", "14"), ("transfer-encoding", "chunked")])
async def test_a_body_that_was_announced_and_not_told_is_refused(announced: tuple[str, str]) -> None:
    """Envoy buffers none for a route that says so: the service would still read it."""
    assert await reason(asked(*proved(), JSON, announced, raw_body=b"")) == "malformed"
    assert admitted(await answered(asked(*proved(), JSON, announced, TOLD)))


async def test_two_credentials_in_one_header_are_none() -> None:
    (name, access), proof = proved()
    assert await reason(asked((name, f"{access}, {access}"), proof, JSON, TOLD)) == "malformed"
    assert await reason(asked((name, f"{access},"), proof, JSON, TOLD)) == "malformed"
    assert await reason(asked((name, access), (proof[0], f"{proof[1]},x"), JSON, TOLD)) == "malformed"


async def test_a_grpc_call_is_known_by_its_method_alone() -> None:
    call = {"path": "/acme.Orders/List", "raw_body": b""}
    yes = proved(LIST, "/acme.Orders/List")
    for kind in (GRPC, ("content-type", "application/grpc+proto"), JSON):
        assert admitted(await answered(asked(*yes, kind, **call)))
    for change in (
        {"method": "GET"},
        {"path": "/acme.Orders/List?x=1"},
        {"path": "/acme.Orders/Other"},
        {"path": PATH},
    ):
        assert await reason(asked(*yes, GRPC, **(call | change))) == "out_of_scope"
    assert admitted(await answered(asked(GRPC, path="/acme.Orders/Ping")))
    assert await reason(asked(JSON, path="/acme.Orders/Ping")) == "out_of_scope"


async def test_a_grpc_client_is_told_its_status_and_the_reason() -> None:
    answer = await answered(asked(GRPC, path="/acme.Orders/List"))
    headers = headers_of(answer)
    assert (headers["grpc-status"], answer.denied_response.body) == ("16", "unauthenticated")
    assert "content-type" not in headers
    assert headers["grpc-status-details-bin"]


async def test_invariant_6_what_nobody_foresaw_is_a_no(caplog: pytest.LogCaptureFixture) -> None:
    """Invariant 6. It is told as a denial: a gRPC error would admit where an operator set failure_mode_allow."""

    def broken() -> Any:
        raise ZeroDivisionError

    assert await reason(asked(*proved(), JSON, TOLD), clock=broken) == "scope_stale"
    assert "ZeroDivisionError" in caplog.text
    assert await reason(external_auth_pb2.CheckRequest()) == "scope_stale"


async def test_a_misconfigured_envoy_is_told_of_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    await answered(asked(*proved(), JSON, TOLD, header_map=None))
    assert "set encode_raw_headers" in caplog.text


async def test_invariant_10_no_log_has_a_credential(caplog: pytest.LogCaptureFixture) -> None:
    """Invariant 10."""
    caplog.set_level("DEBUG", "broker.guard")
    (_, access), (_, proof) = sent = proved()
    await answered(asked(*sent, JSON, TOLD, raw_body=b'{"amount": 31}'))
    await answered(asked(*sent, JSON, TOLD, header_map=None))
    written = caplog.text + repr([vars(record) for record in caplog.records])
    for secret in (access.rpartition(".")[2], proof.rpartition(".")[2]):
        assert secret not in written


async def test_a_name_with_a_port_is_that_port_and_443_needs_none() -> None:
    guard = await guard_for(ISSUER)
    for authority, host in ((HOST, HOST), (HOST, f"{HOST}:443"), (HOST, HOST.upper()), ("[::1]", "[::1]:443")):
        service = EnvoyAuthorization(guard, TABLE, authorities=[authority])
        assert admitted(await service.Check(asked(method="GET", path="/healthz", host=host), None))
    service = EnvoyAuthorization(guard, TABLE, authorities=[f"{HOST}:8443"])
    for host in (HOST, f"{HOST}:443", f"{HOST}:8444"):
        assert not admitted(await service.Check(asked(method="GET", path="/healthz", host=host), None))


@pytest.mark.parametrize("authority", ["Orders.acme.test", "orders.acme.test:443", "user@orders.acme.test", "a b", ""])
async def test_an_authority_that_no_url_has_is_a_mistake(authority: str) -> None:
    guard = await guard_for(ISSUER)
    with pytest.raises(Invalid):
        EnvoyAuthorization(guard, TABLE, authorities=[authority])
    with pytest.raises(ValueError, match="name the authorities"):
        EnvoyAuthorization(guard, TABLE, authorities=[])


async def test_the_clock_is_the_guards() -> None:
    assert await reason(asked(*proved(), JSON, TOLD), clock=lambda: NOW.replace(year=2032)) == "expired"
