"""What is aiohttp's own in the guard in front of it: bodies, files, sources of data, WebSockets, targets."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from support.http_orders import (
    BASE,
    ISSUER,
    Clock,
    Service,
    act,
    amount,
    by_aiohttp,
    dpop,
    nearly_dead,
    now,
    order,
    token,
)
from support.issuer import AUDIENCE, guard_for
from support.processes import PATIENCE_S, until

from broker import guard
from broker.action import Action
from broker.guard import Rule, Table, guard_application

READ = Action("orders.read", f"{BASE}/v1/orders/17", AUDIENCE)


async def serve(handlers: dict[tuple[str, str], Any], *rules: Rule, **settings: Any) -> Any:
    """The application behind a guard that admits `READ` to each handler, or what `rules` say."""
    app = web.Application(**settings)
    for (method, path), handler in handlers.items():
        app.router.add_route(method, path, handler)
    named = {rule.method for rule in rules}
    reading = [Rule(method=m, action="orders.read", resource=order) for m in handlers if m not in named]
    guard_application(app, await guard_for(ISSUER, clock=now), Table([*rules, *reading]), base_url=BASE)
    return by_aiohttp(app)


async def test_each_way_to_a_body_gives_it_again() -> None:
    async def show(request: web.Request) -> web.Response:
        ways = [await request.read(), (await request.text()).encode(), json.dumps(await request.json()).encode()]
        return web.json_response({"bodies": [way.decode() for way in ways], "id": request.match_info["id"]})

    method = ("POST", "/v1/orders/{id}/refund")
    rule = Rule(method=method, action="orders.refund", resource=order, parameters=amount, body=True)
    async with await serve({method: show}, rule) as origin, aiohttp.ClientSession() as session:
        path = "/v1/orders/17/refund"
        called = await Service(None, origin, session).call(
            "POST", path, dpop(token(act()), "POST", path), body={"amount": 30}
        )
    assert called[:2] == (200, {"bodies": ['{"amount": 30}'] * 3, "id": "17"})


async def test_our_limit_on_a_body_counts_and_the_applications_own_for_what_no_rule_reads() -> None:
    async def show(request: web.Request) -> web.Response:
        return web.json_response({"size": len(await request.read())})

    read, unread = ("POST", "/read/{id}"), ("POST", "/unread/{id}")
    rule = Rule(method=read, action="orders.read", resource=order, body=True)
    app = await serve({read: show, unread: show}, rule, client_max_size=3 * 1024 * 1024)
    async with app as origin, aiohttp.ClientSession() as session:
        service = Service(None, origin, session)

        async def post(path: str, size: int) -> tuple[int, Any]:
            return (await service.call("POST", path, dpop(token(READ), "POST", path), raw=b"x" * size))[:2]

        assert await post("/read/17", 1024 * 1024) == (200, {"size": 1024 * 1024})
        assert (await post("/read/17", 1024 * 1024 + 1))[1]["reason"] == "malformed"
        assert await post("/unread/17", 2 * 1024 * 1024) == (200, {"size": 2 * 1024 * 1024})


async def test_a_websocket_has_no_rule_even_where_its_path_has_one() -> None:
    reached = []

    async def talk(request: web.Request) -> web.StreamResponse:
        reached.append(request.headers.get("upgrade"))
        if "upgrade" not in request.headers:
            return web.json_response({})
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        return socket

    async with await serve({("GET", "/talk/{id}"): talk}) as origin, aiohttp.ClientSession() as session:
        for name in ("websocket", "WebSocket"):
            headers = dict(dpop(token(READ), "GET", "/talk/17")) | {"Upgrade": name}
            with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
                await session.ws_connect(f"{origin}/talk/17", headers=headers)
            assert caught.value.status == 403
        service = Service(None, origin, session)
        assert (await service.call("GET", "/talk/17", dpop(token(READ), "GET", "/talk/17")))[0] == 200
    assert reached == [None]


async def test_a_target_with_a_fragment_is_refused_which_aiohttp_would_leave_out() -> None:
    """A mapping would read another query than the handler."""

    async def show(request: web.Request) -> web.Response:
        return web.json_response(dict(request.query))

    method = ("GET", "/find/{id}")
    rule = Rule(method=method, action="orders.find", resource=order, parameters=lambda r: {"q": r.query("q")})
    async with await serve({method: show}, rule) as origin:

        async def get(query: str, approved: str) -> str:
            access = token(Action("orders.find", READ.resource, AUDIENCE, {"q": approved}))
            host, port = origin.removeprefix("http://").split(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            lines = [f"GET /find/17?q={query} HTTP/1.1", "host: x", "connection: close"]
            lines += [f"{name}: {value}" for name, value in dpop(access, "GET", "/find/17")]
            writer.write(("\r\n".join(lines) + "\r\n\r\n").encode())
            async with asyncio.timeout(PATIENCE_S):
                answered = (await reader.read()).decode()
            writer.close()
            return answered

        assert '{"q": "all"}' in await get("all", "all")
        assert "malformed" in await get("all#none", "all#none")
        assert "malformed" in await get("all#none", "all")


async def test_a_file_and_a_source_of_data_are_sent_whole_and_the_connection_serves_on(tmp_path: Path) -> None:
    file = tmp_path / "invoice"
    file.write_bytes(bytes(range(256)) * 4096)

    async def source() -> AsyncIterator[bytes]:
        for number in range(3):
            yield b"%d" % number

    handlers = {
        ("GET", "/file/{id}"): answering(lambda: web.FileResponse(file)),
        ("GET", "/source/{id}"): answering(lambda: web.Response(body=source())),
        ("GET", "/plain/{id}"): answering(lambda: web.Response(text="plain")),
    }
    async with await serve(handlers) as origin, aiohttp.ClientSession() as session:
        service = Service(None, origin, session)

        async def get(path: str, method: str = "GET", **more: str) -> tuple[int, bytes]:
            headers = [*dpop(token(READ), method, path), *more.items()]
            async with service.open(method, path, headers) as response:
                return response.status, await response.read()

        for _ in range(2):
            assert await get("/file/17") == (200, file.read_bytes())
            assert await get("/file/17", range="bytes=256-511") == (206, bytes(range(256)))
            assert await get("/source/17") == (200, b"012")
            assert await get("/plain/17") == (200, b"plain")


def answering(make: Callable[[], web.StreamResponse]) -> Any:
    async def handler(_: web.Request) -> web.StreamResponse:
        return make()

    return handler


async def test_a_source_of_data_breaks_off_when_its_credential_dies() -> None:
    """It is sent after its handler has returned, and watched all the same."""
    ended = []

    async def source() -> AsyncIterator[bytes]:
        try:
            yield b"line 0\n"
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    handlers = {("GET", "/source/{id}"): answering(lambda: web.Response(body=source()))}
    async with (
        asyncio.timeout(PATIENCE_S),
        await serve(handlers) as origin,
        aiohttp.ClientSession() as session,
        Service(None, origin, session).open(
            "GET", "/source/17", dpop(nearly_dead(READ), "GET", "/source/17")
        ) as response,
    ):
        assert await response.content.readline() == b"line 0\n"
        with pytest.raises((aiohttp.ClientPayloadError, ConnectionError)):
            await response.content.readline()
        await until(lambda: ended, "the source was closed")


async def test_what_the_application_raises_is_its_own() -> None:
    """Also a refusal of its own making, and a deadline: neither is taken for a credential's end."""

    async def missing(_: web.Request) -> web.Response:
        raise web.HTTPNotFound

    async def slow(_: web.Request) -> web.Response:
        raise TimeoutError

    @guard.action("orders.read", resource=order, method=("GET", "/other/{id}"))
    async def other(_: web.Request) -> web.Response:
        return web.Response()

    handlers = {("GET", "/missing/{id}"): missing, ("GET", "/slow/{id}"): slow, ("GET", "/wrong/{id}"): other}
    async with await serve(handlers) as origin, aiohttp.ClientSession() as session:
        service = Service(None, origin, session)
        found = []
        for path in ("/missing/17", "/slow/17", "/wrong/17"):
            async with service.open("GET", path, dpop(token(READ), "GET", path)) as response:
                found.append(response.status)
    assert found == [404, 504, 500]


async def test_it_is_put_in_front_before_the_application_runs() -> None:
    app = web.Application()
    checker = await guard_for(ISSUER, clock=Clock())
    app.freeze()
    with pytest.raises(RuntimeError):
        guard_application(app, checker, Table(), base_url=BASE)
