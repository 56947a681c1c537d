"""A receiving service over HTTP, as an ASGI and as an aiohttp application, behind a guard; and callers of it."""

import asyncio
import contextlib
import io
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
import uvicorn
from aiohttp import web
from support.issuer import AUDIENCE, Issuer, Prover
from support.pki import CA, Svid, der

from broker import guard
from broker.action import Action
from broker.errors import Reason
from broker.guard import Guard, GuardMiddleware, Request, Rule, Table, guard_application
from broker.status import CORRELATION_ID, STATUS

BASE = "https://orders.acme.test"
REFUND = "/v1/orders/17/refund"
LINES = "/v1/orders/17/lines"
ISSUER, PROVER = Issuer(), Prover()
COUNT = iter(range(10_000))


class Clock:
    """The time, which may be moved."""

    def __init__(self) -> None:
        self.ahead = timedelta()

    def __call__(self) -> datetime:
        return datetime.now(UTC) + self.ahead


now = Clock()  # of tests that move nothing


def act(order: str = "17", **parameters: Any) -> Action:
    return Action("orders.refund", f"{BASE}/v1/orders/{order}", AUDIENCE, parameters or {"amount": 30})


LISTING = Action("orders.list", f"{BASE}/v1/orders/17", AUDIENCE)


def order(request: Request) -> str:
    return f"{BASE}/v1/orders/{request.params['id']}"


def amount(request: Request) -> dict[str, Any]:
    return {"amount": request.json()["amount"]}


@guard.action("orders.declared", resource=order, method=("POST", "/declared/{id}"))
async def declared(scope: Any, receive: Any, send: Any) -> None:
    await answer(send, scope["path"], await read(receive))


@guard.action("orders.declared", resource=order, method=("POST", "/declared/{id}"))
async def declared_in_aiohttp(request: web.Request) -> web.Response:
    return web.json_response(shown(request.path, await request.read()))


RULES = [
    Rule(
        method=("POST", "/v1/orders/{id}/refund"), action="orders.refund", resource=order, parameters=amount, body=True
    ),
    Rule(
        method=("GET", "/v1/orders/{id}"),
        action="orders.refund",
        resource=order,
        parameters=lambda r: {"amount": int(r.query("amount"))},
    ),
    Rule(method=("GET", "/v1/orders/{id}/lines"), action="orders.list", resource=order),
]
PUBLIC = [("GET", "/healthz")]


async def read(receive: Any) -> bytes:
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    return body


def shown(path: str, body: bytes) -> dict[str, str]:
    try:
        who = guard.current().principal
    except LookupError:
        who = "nobody"
    return {"who": who, "path": path, "body": body.decode()}


async def answer(send: Any, path: str, body: bytes) -> None:
    told = json.dumps(shown(path, body)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(told)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": told})


class Orders:
    """What is behind the guard. seen: how much reached it. Answers in one piece wait for `go`; lines come each `more`.

    ended: how the streaming of lines ended.
    """

    def __init__(self) -> None:
        self.seen = 0
        self.go = asyncio.Event()
        self.go.set()
        self.more: asyncio.Queue[bytes] = asyncio.Queue()
        self.ended: list[str] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """As an ASGI application."""
        self.seen += 1
        if scope["path"].startswith("/declared/"):
            await declared(scope, receive, send)
        elif scope["path"].endswith("/lines"):

            async def write(line: bytes) -> None:
                await send({"type": "http.response.body", "body": line, "more_body": bool(line)})

            await send({"type": "http.response.start", "status": 200, "headers": []})
            await self.stream(write)
        else:
            body = await read(receive)
            await self.go.wait()
            await answer(send, scope["path"], body)

    def aiohttp(self) -> web.Application:
        """As an aiohttp application."""

        async def lines(request: web.Request) -> web.StreamResponse:
            self.seen += 1
            response = web.StreamResponse()
            await response.prepare(request)
            await self.stream(lambda line: response.write(line) if line else response.write_eof())
            return response

        async def refund(request: web.Request) -> web.Response:
            self.seen += 1
            await self.go.wait()
            return web.json_response(shown(request.path, await request.read()))

        async def at_handler(request: web.Request) -> web.Response:
            self.seen += 1
            return await declared_in_aiohttp(request)

        app = web.Application(client_max_size=0)  # without a limit of its own
        app.router.add_get("/v1/orders/{id}/lines", lines)
        app.router.add_post("/declared/{id}", at_handler)
        app.router.add_route("*", "/{path:.*}", refund)
        return app

    async def stream(self, write: Callable[[bytes], Awaitable[None]]) -> None:
        """Lines as they come, an empty one at the end."""
        try:
            line = b"line 0\n"
            while line:
                await write(line)
                line = await self.more.get()
            await write(line)
            self.ended.append("done")
        except BaseException as error:
            self.ended.append(type(error).__name__)
            raise


class Service:
    """A running server and a client session to it."""

    def __init__(self, orders: Orders, origin: str, session: aiohttp.ClientSession) -> None:
        self.orders, self.origin, self.session = orders, origin, session

    def open(self, method: str, path: str, headers: Any = (), *, data: Any = None) -> Any:
        url = aiohttp.client.URL(self.origin + path, encoded=True)
        return self.session.request(method, url, headers=list(headers), data=data, allow_redirects=False)

    async def call(
        self, method: str, path: str, headers: Any = (), *, body: Any = None, raw: bytes | None = None
    ) -> tuple[int, dict[str, Any], Any]:
        data = raw if body is None else json.dumps(body).encode()
        stream = None if data is None else io.BytesIO(data)
        sent = [*headers, ("content-type", "application/json")] if data is not None else headers
        async with self.open(method, path, sent, data=stream) as response:
            return response.status, await response.json(content_type=None), response.headers


@contextlib.asynccontextmanager
async def by_uvicorn(app: Any, lifespan: Any = "off") -> AsyncIterator[str]:
    """An ASGI application on loopback, in this loop. Its origin."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, lifespan=lifespan, ws="none"))
    server.install_signal_handlers = lambda: None
    started = asyncio.Event()
    begin = server.startup

    async def startup(sockets: Any = None) -> None:
        await begin(sockets)
        started.set()

    server.startup = startup
    task = asyncio.create_task(server._serve())
    await started.wait()
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        await task


@contextlib.asynccontextmanager
async def by_aiohttp(app: web.Application, tls: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    """An aiohttp application on loopback. Its origin."""
    runner = web.AppRunner(app, access_log=None, lingering_time=1)  # seconds for what a client still sends unasked
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls).start()
        yield f"http{'s' if tls else ''}://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@contextlib.asynccontextmanager
async def serving(edge: str, checker: Guard) -> AsyncIterator[Service]:
    """The service behind its guard. edge: "asgi" or "aiohttp"."""
    orders = Orders()
    if edge == "asgi":
        table = Table([*RULES, declared], public=PUBLIC)
        server = by_uvicorn(GuardMiddleware(orders, checker, table, base_url=BASE))
    else:
        app = orders.aiohttp()
        guard_application(app, checker, Table([*RULES, declared_in_aiohttp], public=PUBLIC), base_url=BASE)
        server = by_aiohttp(app)
    async with server as origin, aiohttp.ClientSession() as session:
        yield Service(orders, origin, session)


def token(action: Action, **changes: Any) -> str:
    defaults = {"cnf": PROVER.cnf, "jti": f"token-{next(COUNT)}", "now": now()}
    return ISSUER.token(action, **(defaults | changes))


def nearly_dead(action: Action, clock: Clock = now) -> str:
    """A token that a guard takes for two more seconds, or three."""
    return token(action, now=clock() - timedelta(seconds=62))


def dpop(access: str, method: str, path: str, **changes: Any) -> list[tuple[str, str]]:
    proof = PROVER.proof(access, **({"now": now(), "htm": method, "htu": BASE + path} | changes))
    return [("authorization", f"DPoP {access}"), ("dpop", proof)]


def refused(answered: tuple[int, dict[str, Any], Any], reason: Reason, challenge: str | None) -> None:
    status, body, headers = answered
    assert (status, body["reason"]) == (STATUS[reason].http, str(reason)), body
    assert set(body) == {"type", "status", "reason", "correlation_id"}  # and nothing else: invariant 9
    assert headers["content-type"] == "application/problem+json"
    assert headers["cache-control"] == "no-store"
    assert headers[CORRELATION_ID] == body["correlation_id"]
    assert headers.get("www-authenticate") == challenge


def tls_files(folder: Path, ca: CA, svid: Svid, name: str) -> tuple[str, str, str]:
    paths = [folder / f"{name}.{part}" for part in ("ca", "chain", "key")]
    chain = svid.chain_pem
    for path, data in zip(
        paths, (ssl.DER_cert_to_PEM_cert(der(ca.certificate)).encode(), chain, svid.key_pem), strict=True
    ):
        path.write_bytes(data)
    return tuple(map(str, paths))
