"""The guard in front of an HTTP service: ASGI, served by uvicorn, and aiohttp; DPoP, and mutual TLS."""

import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from support.http_orders import (
    BASE,
    ISSUER,
    PUBLIC,
    REFUND,
    RULES,
    Orders,
    Service,
    act,
    by_aiohttp,
    dpop,
    now,
    refused,
    serving,
    tls_files,
    token,
)
from support.issuer import AUDIENCE, CALLER, guard_for, x5t
from support.pki import CA, Svid, der

from broker.action import Action
from broker.errors import Reason
from broker.guard import GuardMiddleware, Table, guard_application

Serve = Callable[..., Awaitable[Service]]


@pytest.fixture(params=["asgi", "aiohttp"])
async def serve(request: pytest.FixtureRequest) -> AsyncIterator[Serve]:
    """The service on loopback, in this loop, in each of the two ways."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(**changes: Any) -> Service:
            checker = await guard_for(ISSUER, **({"clock": now} | changes))
            return await stack.enter_async_context(serving(request.param, checker))

        yield start


async def test_a_key_bound_token_admits_its_act_and_the_body_reaches_the_application(serve: Serve) -> None:
    service = await serve()
    status, body, _ = await service.call("POST", REFUND, dpop(token(act()), "POST", REFUND), body={"amount": 30})
    assert (status, body) == (200, {"who": CALLER, "path": REFUND, "body": '{"amount": 30}'})
    assert service.orders.seen == 1


async def test_invariant_13_another_body_order_or_query_than_approved_is_refused(serve: Serve) -> None:
    """Invariant 13: the whole act is rebuilt from the request, its body and query included."""
    service = await serve()
    scope = 'DPoP error="insufficient_scope", algs="ES256"'
    other = "/v1/orders/18/refund"
    for path, body in ((REFUND, {"amount": 31}), (other, {"amount": 30})):
        headers = dpop(token(act()), "POST", path)
        refused(await service.call("POST", path, headers, body=body), Reason.OUT_OF_SCOPE, scope)
    read_path = "/v1/orders/17"
    for query in ("?amount=31", "?amount=x", ""):
        headers = dpop(token(act()), "GET", read_path)
        reason = Reason.MALFORMED if not query else Reason.OUT_OF_SCOPE
        challenge = 'DPoP error="invalid_request", algs="ES256"' if not query else scope
        refused(await service.call("GET", read_path + query, headers), reason, challenge)
    assert service.orders.seen == 0
    status, _, _ = await service.call("GET", f"{read_path}?amount=30", dpop(token(act()), "GET", read_path))
    assert status == 200


async def test_no_mapping_no_entry_whatever_the_credential(serve: Serve) -> None:
    service = await serve()
    for method, path in (("DELETE", "/v1/orders/17"), ("GET", "/admin"), ("POST", "/healthz"), ("HEAD", "/healthz")):
        status, _, _ = await service.call(method, path, dpop(token(act()), method, path))
        assert status == 403
    assert service.orders.seen == 0
    assert (await service.call("GET", "/healthz"))[1]["who"] == "nobody"


async def test_a_path_with_two_readings_reaches_nobody(serve: Serve) -> None:
    service = await serve()
    for path in ("/v1/orders/17%2Frefund", "/v1//orders/17", "/v1/orders/%2e%2e/admin", "/v1/orders/1%37/refund"):
        status, body, _ = await service.call("GET", path, dpop(token(act()), "GET", path))
        assert (status, body["reason"]) == (400, "malformed")
    assert service.orders.seen == 0


async def test_invariant_10_the_log_has_the_reason_in_one_line_and_no_credential(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    """Invariant 10: hashes only; and a path cannot write a line of its own."""
    caplog.set_level("DEBUG", "broker.guard")
    service, access = await serve(), token(act())
    sent = dpop(access, "POST", "/v1/orders/18/refund")
    _, body, _ = await service.call("POST", "/v1/orders/18/refund", sent, body={"amount": 30})
    await service.call("GET", "/v1/x%0Arefused%20nobody")
    records = [record for record in caplog.records if record.name == "broker.guard"]
    assert [r.reason for r in records if r.levelname == "INFO"] == ["out_of_scope", "malformed"]
    assert records[0].correlation_id == body["correlation_id"]
    assert all("\n" not in record.getMessage() for record in records)
    written = caplog.text + repr([vars(record) for record in records])
    for secret in (access, access.rpartition(".")[2], sent[1][1], sent[1][1].rpartition(".")[2]):
        assert secret not in written


async def test_a_request_without_a_credential_is_told_which_one_to_bring(serve: Serve) -> None:
    service = await serve()
    refused(await service.call("POST", REFUND, body={"amount": 30}), Reason.UNAUTHENTICATED, 'DPoP algs="ES256"')


async def test_replays_foreign_proofs_and_bare_tokens_are_refused(serve: Serve) -> None:
    service = await serve()
    access = token(act(), use="ttl")
    sent = dpop(access, "POST", REFUND)
    body = {"amount": 30}
    proof_error = 'DPoP error="invalid_dpop_proof", algs="ES256"'
    assert (await service.call("POST", REFUND, sent, body=body))[0] == 200
    refused(await service.call("POST", REFUND, sent, body=body), Reason.PROOF_REPLAYED, proof_error)
    for wrong in (
        {"htm": "GET"},
        {"htu": f"{BASE}/v1/orders/18/refund"},
        {"htu": f"http://127.0.0.1{REFUND}"},
        {"ath": "x"},
        {"now": datetime(2020, 1, 1, tzinfo=UTC)},
    ):
        headers = dpop(access, "POST", REFUND, **wrong)
        refused(await service.call("POST", REFUND, headers, body=body), Reason.INVALID_PROOF, proof_error)
    bearer = [("authorization", f"Bearer {access}")]
    refused(await service.call("POST", REFUND, bearer, body=body), Reason.KEY_MISMATCH, 'Bearer error="invalid_token"')
    assert service.orders.seen == 1


async def test_a_certificate_in_a_header_is_nobodys_certificate(serve: Serve) -> None:
    service = await serve()
    svid = CA(now=now()).svid(CALLER)
    access = token(act(), cnf=x5t(der(svid.leaf)))
    pem = svid.chain_pem.decode().replace("\n", " ")
    for name in ("x-forwarded-client-cert", "x-ssl-client-cert", "ssl-client-cert", "x-client-cert", "client-cert"):
        headers = [("authorization", f"Bearer {access}"), (name, pem)]
        status, body, _ = await service.call("POST", REFUND, headers, body={"amount": 30})
        assert (status, body["reason"]) == (401, "key_mismatch")


async def test_an_oversized_or_ambiguous_body_is_refused_and_a_strangers_is_not_read(serve: Serve) -> None:
    service = await serve()
    for raw in (
        b'{"amount": 30, "amount": 31}',
        b'{"amount": 30',
        b'{"x": "' + b"x" * 1024 * 1024 + b'", "amount": 30}',
    ):
        status, body, _ = await service.call("POST", REFUND, dpop(token(act()), "POST", REFUND), raw=raw)
        assert (status, body["reason"]) == (400, "malformed")
    status, body, _ = await service.call("POST", REFUND, raw=b"x" * 2 * 1024 * 1024)
    assert (status, body["reason"]) == (401, "unauthenticated")
    assert service.orders.seen == 0


async def test_a_body_is_read_to_the_limit_and_no_further(serve: Serve) -> None:
    service = await serve()
    sent = 0  # MiB

    async def long() -> AsyncIterator[bytes]:
        nonlocal sent
        while sent < 64:
            yield b"x" * 1024 * 1024
            sent += 1

    headers = [*dpop(token(act()), "POST", REFUND), ("content-type", "application/json")]
    async with service.open("POST", REFUND, headers, data=long()) as response:
        assert (response.status, (await response.json(content_type=None))["reason"]) == (400, "malformed")
    assert sent < 64
    assert service.orders.seen == 0


async def test_a_rule_at_the_handler_counts_and_knows_whether_it_was_the_one(serve: Serve) -> None:
    service = await serve()
    path = "/declared/17"
    sound = Action("orders.declared", f"{BASE}/v1/orders/17", AUDIENCE)
    assert (await service.call("POST", path, dpop(token(sound), "POST", path), body={}))[1]["who"] == CALLER
    status, _, _ = await service.call("POST", path, dpop(token(act()), "POST", path), body={})
    assert status == 403


async def test_two_credentials_are_none(serve: Serve) -> None:
    service = await serve()
    sent = dpop(token(act(), use="ttl"), "POST", REFUND)
    for double in ([*sent, sent[0]], [*sent, sent[1]]):
        status, body, _ = await service.call("POST", REFUND, double, body={"amount": 30})
        assert (status, body["reason"]) == (400, "malformed")
    assert (await service.call("POST", REFUND, sent, body={"amount": 30}))[0] == 200


def bridge(app: Any) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    """Aiohttp's server as an ASGI server with the TLS extension."""

    async def handle(request: web.Request) -> web.StreamResponse:
        peer = request.transport.get_extra_info("ssl_object").getpeercert(binary_form=True)
        chain = [ssl.DER_cert_to_PEM_cert(peer)] if peer else []
        scope = {
            "type": "http",
            "method": request.method,
            "path": request.path,
            "raw_path": request.raw_path.partition("?")[0].encode(),
            "query_string": request.query_string.encode(),
            "headers": request.raw_headers,
            "extensions": {"tls": {"client_cert_chain": chain}},
        }
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": await request.read(), "more_body": False}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        await app(scope, receive, send)
        headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
        return web.Response(status=sent[0]["status"], headers=headers, body=sent[1]["body"])

    return handle


def behind_guard(edge: str, orders: Orders, checker: Any) -> web.Application:
    table = Table(RULES, public=PUBLIC)
    if edge == "aiohttp":
        app = orders.aiohttp()
        guard_application(app, checker, table, base_url=BASE)
    else:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", bridge(GuardMiddleware(orders, checker, table, base_url=BASE)))
    return app


@pytest.mark.parametrize("edge", ["asgi", "aiohttp"])
async def test_a_certificate_bound_token_admits_over_mutual_tls_its_own_connection_alone(
    edge: str, tmp_path: Path
) -> None:
    ca = CA(now=now())
    roots, chain, key = tls_files(tmp_path, ca, ca.svid(AUDIENCE), "server")
    server_tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=roots)
    server_tls.verify_mode = ssl.CERT_OPTIONAL
    server_tls.load_cert_chain(chain, key)
    orders = Orders()
    caller, thief = ca.svid(CALLER), ca.svid("spiffe://acme.test/build/thief")

    async def call(origin: str, svid: Svid | None, access: str) -> tuple[int, Any]:
        context = ssl.create_default_context(cafile=roots)
        context.check_hostname = False
        if svid:
            context.load_cert_chain(*tls_files(tmp_path, ca, svid, "client")[1:])
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context)) as session:
            status, body, _ = await Service(orders, origin, session).call(
                "POST", REFUND, [("authorization", f"Bearer {access}")], body={"amount": 30}
            )
            return status, body

    access = token(act(), cnf=x5t(der(caller.leaf)))
    app = behind_guard(edge, orders, await guard_for(ISSUER, clock=now))
    async with by_aiohttp(app, server_tls) as origin:
        assert (await call(origin, thief, access))[1]["reason"] == "key_mismatch"
        assert (await call(origin, None, access))[1]["reason"] == "key_mismatch"
        assert (await call(origin, caller, access)) == (
            200,
            {"who": CALLER, "path": REFUND, "body": '{"amount": 30}'},
        )
        assert (await call(origin, caller, access))[1]["reason"] == "already_used"
