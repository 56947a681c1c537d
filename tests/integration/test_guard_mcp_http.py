"""A guarded MCP server over HTTP: what it says of itself, statuses, certificates, the feed; and what lies around it."""

import asyncio
import contextlib
import ssl
import sys
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from datetime import timedelta
from typing import Any

import aiohttp
import pytest
from mcp.client.client import Client
from mcp.server.context import CallNext, ServerRequestContext
from mcp.server.mcpserver import Context, MCPServer
from mcp.shared.exceptions import MCPError
from support.http_orders import BASE, ISSUER, PUBLIC, RULES, Orders, by_uvicorn, token
from support.issuer import CALLER, guard_for, x5t
from support.mcp_tools import AUDIENCE, URL, WAIT, Tools, connected, drop_of, held, make_server, now, query_of, table
from support.pki import CA, der
from support.processes import PATIENCE_S
from support.told_scope import ToldScope

from broker.errors import Invalid
from broker.guard import GuardMiddleware, ProtectedResource, Table
from broker.guard.feed import ScopeFeed
from broker.guard.mcp import CODE, guard_tools, tool_action
from broker.guard.protected_resource import metadata_url
from broker.status import CORRELATION_ID

INCIDENTS = {"table": "incidents"}
DOCUMENT = "/.well-known/oauth-protected-resource/mcp"
NAMED = 'resource_metadata="https://tools.acme.test/.well-known/oauth-protected-resource/mcp"'


async def test_rfc_9728_the_server_says_what_tokens_it_takes_and_whose() -> None:
    async with connected("http") as tools, aiohttp.ClientSession() as session:
        async with session.get(f"{tools.origin}{DOCUMENT}") as response:
            assert (response.status, response.content_type) == (200, "application/json")
            assert response.headers["cache-control"] == "public, max-age=3600"
            assert await response.json() == {
                "resource": URL,
                "authorization_servers": ["https://broker.acme.test"],
                "bearer_methods_supported": ["header"],
                "dpop_signing_alg_values_supported": ["ES256"],
                "dpop_bound_access_tokens_required": True,
                "tls_client_certificate_bound_access_tokens": False,
                "authorization_details_types_supported": ["action"],
                "action_broker_audience": AUDIENCE,
            }
        async with session.head(f"{tools.origin}{DOCUMENT}") as response:
            assert (response.status, await response.read()) == (200, b"")
            assert int(response.headers["content-length"]) > 100
        for method, path in (
            ("POST", DOCUMENT),
            ("GET", "/.well-known/oauth-protected-resource"),
            ("GET", f"{DOCUMENT}/"),
        ):
            async with session.request(method, f"{tools.origin}{path}") as response:
                assert response.status in {404, 405}


@pytest.mark.parametrize(
    ("resource", "url"),
    [
        ("https://tools.acme.test", "https://tools.acme.test/.well-known/oauth-protected-resource"),
        ("https://tools.acme.test/", "https://tools.acme.test/.well-known/oauth-protected-resource"),
        ("https://tools.acme.test:8443/a/b", "https://tools.acme.test:8443/.well-known/oauth-protected-resource/a/b"),
    ],
)
async def test_rfc_9728_section_3_1_where_the_metadata_is(resource: str, url: str) -> None:
    assert metadata_url(resource) == url
    ProtectedResource(Orders(), await guard_for(ISSUER), resource=resource)


@pytest.mark.parametrize(
    "resource", ["http://tools.acme.test/mcp", "https://tools.acme.test/mcp?a=1", "urn:a:b", "mcp"]
)
async def test_a_resource_that_is_no_https_url_has_no_metadata(resource: str) -> None:
    with pytest.raises((ValueError, Invalid)):
        ProtectedResource(Orders(), await guard_for(ISSUER), resource=resource)


def call_of(tool: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A call as the protocol of 2026-07-28 has it, by hand."""
    meta = {
        "io.modelcontextprotocol/protocolVersion": "2026-07-28",
        "io.modelcontextprotocol/clientCapabilities": {},
    }
    params = {"name": tool, "arguments": dict(arguments), "_meta": meta}
    return {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params}


async def post(tools: Tools, tool: str, arguments: Mapping[str, Any], shown: Mapping[str, str]) -> Any:
    headers = {
        "accept": "application/json, text/event-stream",
        "mcp-protocol-version": "2026-07-28",
        "mcp-method": "tools/call",
        "mcp-name": tool,
        **shown,
    }
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{tools.origin}/mcp", json=call_of(tool, arguments), headers=headers) as response,
    ):
        return response.status, await response.json(), response.headers


async def test_rfc_9728_section_5_1_a_refusal_has_its_status_and_says_where_to_ask() -> None:
    async with connected("http") as tools:
        access = token(query_of())
        for shown, arguments, status, reason, challenge in (
            ({}, INCIDENTS, 401, "unauthenticated", f'DPoP algs="ES256", {NAMED}'),
            (
                tools.shown(access, "query"),
                {"table": "people"},
                403,
                "out_of_scope",
                f'DPoP error="insufficient_scope", algs="ES256", {NAMED}',
            ),
            (
                {"authorization": f"Bearer {access}"},
                INCIDENTS,
                401,
                "key_mismatch",
                f'Bearer error="invalid_token", {NAMED}',
            ),
        ):
            found, body, headers = await post(tools, "query", arguments, shown)
            assert (found, headers.get("www-authenticate")) == (status, challenge)
            assert body["error"] == {
                "code": CODE,
                "message": reason,
                "data": {"reason": reason, "correlation_id": headers[CORRELATION_ID]},
            }
            assert headers["cache-control"] == "no-store"
        found, body, headers = await post(tools, "query", INCIDENTS, tools.shown(access, "query"))
        assert (found, body["result"]["isError"], headers.get("www-authenticate")) == (200, False, None)


async def test_any_guarded_service_may_say_so() -> None:
    """Around GuardMiddleware too, which answers for itself."""
    checker = await guard_for(ISSUER, clock=now)
    guarded = GuardMiddleware(Orders(), checker, Table(RULES, public=PUBLIC), base_url=BASE)
    app = ProtectedResource(
        guarded, checker, resource=BASE, actions=["orders.refund", "orders.list"], certificates=True
    )
    async with by_uvicorn(app) as origin, aiohttp.ClientSession() as session:
        async with session.get(f"{origin}/.well-known/oauth-protected-resource") as response:
            told = await response.json()
            assert told["scopes_supported"] == ["orders.list", "orders.refund"]
            assert told["tls_client_certificate_bound_access_tokens"] is True
            assert told["dpop_bound_access_tokens_required"] is False
        async with session.get(f"{origin}/v1/orders/17/lines") as response:
            named = f'resource_metadata="{BASE}/.well-known/oauth-protected-resource"'
            assert response.headers["www-authenticate"] == f'DPoP algs="ES256", {named}'
        async with session.get(f"{origin}/healthz") as response:
            assert (response.status, "www-authenticate" in response.headers) == (200, False)


@contextlib.asynccontextmanager
async def over_tls(pem: str | None) -> AsyncIterator[Tools]:
    """As a server with the ASGI TLS extension hands on a connection whose client has shown this certificate."""
    server, done = make_server()
    guard_tools(server, await guard_for(ISSUER, clock=now), url=URL)
    inner = server.streamable_http_app()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        shown = {"tls": {"client_cert_chain": [] if pem is None else [pem]}}
        await inner({**scope, "extensions": shown}, receive, send)

    async with by_uvicorn(app, lifespan="on") as origin:
        yield Tools(client=None, http=None, auth=None, done=done, origin=origin)


async def test_a_certificate_bound_token_admits_its_own_connection_alone() -> None:
    ca = CA(now=now())
    mine, thiefs = (ssl.DER_cert_to_PEM_cert(der(ca.svid(one).leaf)) for one in (CALLER, "spiffe://acme.test/thief"))
    access = token(query_of(), cnf=x5t(ssl.PEM_cert_to_DER_cert(mine)))
    shown = {"authorization": f"Bearer {access}"}
    in_a_header = {**shown, "x-forwarded-client-cert": mine.replace("\n", " "), "client-cert": mine.replace("\n", "")}
    for pem, headers, reason in (
        (thiefs, shown, "key_mismatch"),
        (None, in_a_header, "key_mismatch"),
        (mine, shown, None),
    ):
        async with over_tls(pem) as tools:
            _, body, _ = await post(tools, "query", INCIDENTS, headers)
            assert body.get("error", {}).get("message") == reason
            assert tools.done == ([] if reason else ["query incidents 10"])


@pytest.mark.parametrize("reason", ["revoked", "suspended", "scope_stale"])
async def test_invariant_8_a_call_is_cancelled_when_the_broker_says_so_or_is_not_heard(reason: str) -> None:
    told = ToldScope(ISSUER)
    feed = ScopeFeed(told, audiences=[AUDIENCE], max_silence=timedelta(seconds=1), clock=now)
    async with feed as scope, asyncio.timeout(PATIENCE_S):
        await scope.ready()
        server, done = make_server()
        guard_tools(server, await guard_for(ISSUER, clock=now, scope=scope))
        async with Client(server) as client:
            started = asyncio.Event()

            async def progress(*_: Any) -> None:
                started.set()

            meta = held(WAIT, jti="the-token-that-is-refused").mcp_meta("wait")
            call = asyncio.create_task(client.call_tool("wait", INCIDENTS, progress_callback=progress, meta=meta))
            await started.wait()
            told.refuse("another-token-of-the-same", "revoked")
            if reason == "revoked":
                told.refuse("the-token-that-is-refused", reason)
            elif reason == "suspended":
                told.suspend("the-token-that-is-refused")
            with pytest.raises(MCPError) as caught:
                await call
    assert caught.value.data["reason"] == reason
    assert done == ["wait was cancelled"]


async def test_calls_side_by_side_have_each_their_own_token_and_nothing_else_has_one() -> None:
    async with connected("http") as tools:
        seen: list[tuple[str, bool]] = []

        async def note(request: Any) -> None:
            seen.append((request.headers.get("mcp-method", request.method), "authorization" in request.headers))

        tools.http.event_hooks["request"].append(note)
        limits = range(1, 9)
        calls = (tools.call("query", {**INCIDENTS, "limit": n}, held(query_of(limit=n))) for n in limits)
        assert await asyncio.gather(*calls) == [f"{CALLER} read {n} of incidents" for n in limits]
        with tools.auth.using(held(query_of())):
            await tools.client.list_tools()
        assert {shown for method, shown in seen if method == "tools/call"} == {True}
        assert {shown for method, shown in seen if method != "tools/call"} == {False}


async def test_without_its_url_a_server_takes_no_call_over_http_and_what_is_public_is() -> None:
    async with connected("http", url=None) as tools:
        assert await tools.refusal("query", INCIDENTS, tools.shown(token(query_of()), "query")) == "out_of_scope"
    async with connected("http", public=["resources/read"]) as tools:
        (notes,) = (await tools.client.read_resource("notes://today")).contents
        assert notes.text == "notes"
        assert await tools.refusal("query", INCIDENTS, {}) == "unauthenticated"


async def test_a_declared_tool_refuses_where_nobody_put_the_guard_in_front() -> None:
    server, done = make_server()
    async with Client(server) as client:
        with pytest.raises(MCPError) as caught:
            await client.call_tool("query", INCIDENTS, meta=held(query_of()).mcp_meta("query"))
        assert caught.value.data["reason"] == "out_of_scope"
    assert done == []
    guard_tools(server, await guard_for(ISSUER, clock=now))
    async with Client(server) as client:
        assert not (await client.call_tool("query", INCIDENTS, meta=held(query_of()).mcp_meta("query"))).is_error


async def test_what_comes_between_can_neither_change_a_call_nor_see_its_credential() -> None:
    """Middleware of the server's own runs behind the guard: what it makes of the arguments was not approved."""
    server, done = make_server()
    seen: list[Any] = []

    async def meddle(ctx: ServerRequestContext[Any, Any], call_next: CallNext) -> Any:
        if ctx.method == "tools/call":
            seen.append((ctx.params["_meta"], ctx.meta))
            arguments = {
                name: "people" if value == "incidents" else value for name, value in ctx.params["arguments"].items()
            }
            ctx = replace(ctx, params={**ctx.params, "arguments": arguments})
        return await call_next(ctx)

    server.middleware.append(meddle)
    guard_tools(server, await guard_for(ISSUER, clock=now))
    async with Client(server) as client:
        with pytest.raises(MCPError) as caught:
            await client.call_tool("drop-table", INCIDENTS, meta=held(drop_of()).mcp_meta("drop-table"))
        assert caught.value.data["reason"] == "out_of_scope"
        assert done == []
        meta = {**held(drop_of("orders")).mcp_meta("drop-table"), "acme.test/trace": "1"}
        assert not (await client.call_tool("drop-table", {"table": "orders"}, meta=meta)).is_error
    assert done == ["drop orders"]
    assert "action-broker/" not in repr(seen)
    assert seen[-1][0]["acme.test/trace"] == "1"


async def test_one_admission_is_one_run_of_the_tool_that_it_was_for() -> None:
    """Neither a second run by the tool itself, nor another tool with the same mapping by who comes between."""
    server, done = make_server()

    @server.tool()
    @tool_action("db.drop", resource=table)
    async def again(table: str, ctx: Context) -> str:
        done.append(f"again {table}")
        return str(await ctx.mcp_server.call_tool("again", {"table": table}, ctx))

    async def rename(ctx: ServerRequestContext[Any, Any], call_next: CallNext) -> Any:
        if ctx.method == "tools/call" and ctx.params["name"] == "drop-table":
            ctx = replace(ctx, params={**ctx.params, "name": "again"})
        return await call_next(ctx)

    server.middleware.append(rename)
    guard_tools(server, await guard_for(ISSUER, clock=now))
    async with Client(server) as client:
        for tool, ran in (("again", ["again incidents"]), ("drop-table", [])):
            done.clear()
            with pytest.raises(MCPError) as caught:
                await client.call_tool(tool, INCIDENTS, meta=held(drop_of()).mcp_meta(tool))
            assert (caught.value.data["reason"], done) == ("out_of_scope", ran)


async def test_a_tool_that_is_replaced_by_one_without_a_rule_is_refused() -> None:
    server, done = make_server()
    guard_tools(server, await guard_for(ISSUER, clock=now))
    async with Client(server) as client:
        assert not (await client.call_tool("query", INCIDENTS, meta=held(query_of()).mcp_meta("query"))).is_error
        server.remove_tool("query")

        @server.tool(name="query")
        async def query(table: str) -> str:
            done.append(f"replaced {table}")
            return table

        with pytest.raises(MCPError) as caught:
            await client.call_tool("query", INCIDENTS, meta=held(query_of()).mcp_meta("query"))
        assert caught.value.data["reason"] == "out_of_scope"
    assert done == ["query incidents 10"]


async def test_what_cannot_be_guarded_is_said_when_the_server_is_made() -> None:
    with pytest.raises(TypeError, match="async"):

        @tool_action("db.query", resource=lambda _: "https://db.acme.test")
        def query(table: str) -> str:
            return table

    server, _ = make_server()
    checker = await guard_for(ISSUER)
    with pytest.raises(ValueError, match="not public"):
        guard_tools(server, checker, public=["tools/call"])
    del server._tool_manager
    with pytest.raises(TypeError, match="elsewhere"):
        guard_tools(server, checker)
    assert len(server.middleware) == len(MCPServer("other").middleware)


async def test_invariant_10_the_log_has_the_reason_and_no_credential(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    async with connected("http") as tools:
        access = token(query_of())
        shown = tools.shown(access, "query")
        assert await tools.refusal("query", {"table": "people"}, shown) == "out_of_scope"
    ours = [record for record in caplog.records if record.name == "broker.guard" and record.levelname == "INFO"]
    assert [record.reason for record in ours] == ["out_of_scope"]
    written = repr([vars(record) for record in caplog.records if record.name == "broker.guard"])
    for secret in (access, access.rpartition(".")[2], shown["dpop"], shown["dpop"].rpartition(".")[2]):
        assert secret not in written


async def test_the_guard_and_the_client_do_without_the_extra() -> None:
    """Who has no MCP tools need not have the SDK."""
    program = "import sys, broker.guard, broker.client; print({'mcp', 'httpx2', 'starlette'} & sys.modules.keys())"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE)
    out, _ = await process.communicate()
    assert out.decode().strip() == "set()"
