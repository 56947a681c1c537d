"""A ticket system on loopback that does as the test wants: tickets with ETags, and every way of not answering.

Whom it lets in, and what it says, is the test's. It is a real HTTP server.
"""

import asyncio
import hashlib
import json
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from attestors.json_pointer import Pointer
from attestors.ticket_http import HttpTickets
from attestors.ticket_mapping import TicketMapping

BASIC = "Basic YnJva2VyOmh1bnRlcjI="  # broker:hunter2
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

MAPPING = TicketMapping(
    state=Pointer.parse("/issue/status"),
    open_states=frozenset({"open", "working"}),
    authorises=Pointer.parse("/issue/tables"),
    authorised_by=Pointer.parse("/issue/owner/login"),
)


def ticket(state: str = "open", tables: Any = "orders", owner: str = "dora", **more: Any) -> dict[str, Any]:
    """As this system shows it."""
    return {"issue": {"status": state, "tables": tables, "owner": {"login": owner}} | more}


@dataclass
class TicketServer:
    """tickets: by id. instead: what answers for a ticket in place of what should; under "" for all.

    asked: how often for each id. unchanged: how many of these were answered by 304. seen: the last request's headers.
    most_at_once: how many questions there were at one time.
    """

    port: int = 0
    tickets: dict[str, Any] = field(default_factory=dict)
    instead: dict[str, Handler] = field(default_factory=dict)
    asked: Counter[str] = field(default_factory=Counter)
    unchanged: int = 0
    seen: dict[str, str] = field(default_factory=dict)
    paths: list[str] = field(default_factory=list)
    expects: str = BASIC
    knows_etags: bool = True
    at_once: int = 0
    most_at_once: int = 0
    closing: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def template(self) -> str:
        return f"http://127.0.0.1:{self.port}/api/issues/{{id}}?fields=status,tables,owner"

    def source(self, authorization: Callable[[], str] = lambda: BASIC, **options: Any) -> HttpTickets:
        """Asks this server. Use it as an async context manager."""
        return HttpTickets(self.template, authorization, **({"timeout_s": 5.0} | options))

    async def answer(self, request: web.Request) -> web.StreamResponse:
        ticket_id = request.match_info["id"]
        self.asked[ticket_id] += 1
        self.seen = dict(request.headers)
        self.paths.append(request.raw_path)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            handler = self.instead.get(ticket_id) or self.instead.get("") or self._ticket
            return await handler(request)
        finally:
            self.at_once -= 1

    async def _ticket(self, request: web.Request) -> web.StreamResponse:
        if request.headers.get("Authorization", "") != self.expects:
            raise web.HTTPUnauthorized
        found = self.tickets.get(request.match_info["id"])
        if found is None:
            raise web.HTTPNotFound
        body = json.dumps(found).encode()
        if not self.knows_etags:
            return web.Response(body=body, content_type="application/json")
        etag = f'"{hashlib.sha256(body).hexdigest()[:16]}"'
        if request.headers.get("If-None-Match") == etag:
            self.unchanged += 1
            return web.Response(status=304, headers={"ETag": etag})
        return web.Response(body=body, content_type="application/json", headers={"ETag": etag})

    # -- misbehaviour ----------------------------------------------------------------------------------------------

    def says(self, body: bytes = b"", status: int = 200, *, of: str = "", **headers: str) -> None:
        """It answers this."""

        async def say(_: web.Request) -> web.Response:
            return web.Response(body=body, status=status, headers={k.replace("_", "-"): v for k, v in headers.items()})

        self.instead[of] = say

    def hangs(self, *, of: str = "") -> None:
        """It takes the question and never answers."""

        async def hang(_: web.Request) -> web.Response:
            await self.closing.wait()
            return web.Response(status=503)

        self.instead[of] = hang

    def floods(self, *, of: str = "") -> None:
        """It answers without end."""

        async def flood(request: web.Request) -> web.StreamResponse:
            answer = web.StreamResponse()
            await answer.prepare(request)
            while not self.closing.is_set() and request.transport is not None:
                await answer.write(b" " * 65536)
                await asyncio.sleep(0)
            return answer

        self.instead[of] = flood

    def breaks_off(self, *, of: str = "") -> None:
        """It closes the connection in the middle of the answer."""

        async def break_off(request: web.Request) -> web.StreamResponse:
            answer = web.StreamResponse(headers={"Content-Length": "1000"})
            await answer.prepare(request)
            await answer.write(b'{"issue": ')
            assert request.transport is not None
            request.transport.close()
            return answer

        self.instead[of] = break_off

    def behaves(self) -> None:
        """As it should, again."""
        self.instead.clear()


@asynccontextmanager
async def ticket_server(**tickets: Any) -> AsyncIterator[TicketServer]:
    """Running, on a port of its own. tickets: by id, with an underscore before the digits."""
    server = TicketServer(tickets={name.removeprefix("_"): one for name, one in tickets.items()})
    app = web.Application()
    app.router.add_get("/api/issues/{id}", server.answer)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server.port = runner.addresses[0][1]
    try:
        yield server
    finally:
        server.closing.set()
        await runner.cleanup()
