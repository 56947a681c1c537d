"""An MCP server with guarded tools, run in this process over HTTP or in its own over stdio; and callers of it."""

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx2
import pytest
from mcp.client.client import Client
from mcp.client.stdio import StdioServerParameters, stdio_client
from mcp.client.streamable_http import streamable_http_client
from mcp.server.mcpserver import Context, MCPServer
from mcp.shared.exceptions import MCPError
from support.http_orders import ISSUER, PROVER, by_uvicorn, token
from support.issuer import guard_for

from broker import guard
from broker.action import Action
from broker.client import ActionToken
from broker.client.mcp import TokenPerCall
from broker.credentials.dpop import ProofKey
from broker.guard import Guard, ProtectedResource
from broker.guard.mcp import CODE, guard_tools, tool_action

AUDIENCE = "spiffe://acme.test/service/orders"
URL = "https://tools.acme.test/mcp"
WAYS = ["stdio", "stdio-2025", "http", "http-2025", "http-2025-json"]
HERE = Path(__file__).parents[1]


def now() -> datetime:
    return datetime.now(UTC)


def table(arguments: Mapping[str, Any]) -> str:
    return f"https://db.acme.test/{arguments['table']}"


def query_of(name: str = "incidents", limit: int = 10) -> Action:
    return Action("db.query", f"https://db.acme.test/{name}", AUDIENCE, {"limit": limit})


def drop_of(name: str = "incidents") -> Action:
    return Action("db.drop", f"https://db.acme.test/{name}", AUDIENCE)


WAIT = Action("db.wait", "https://db.acme.test/incidents", AUDIENCE)
HISTORY = Action("db.history", "https://db.acme.test", AUDIENCE)


def make_server() -> tuple[MCPServer[Any], list[str]]:
    """The server, and what its handlers did."""
    server = MCPServer("incidents", log_level="ERROR")
    done: list[str] = []

    @server.tool()
    @tool_action("db.query", resource=table, parameters=lambda a: {"limit": a["limit"]})
    async def query(table: str, limit: int = 10) -> str:
        """Reads a table."""
        done.append(f"query {table} {limit}")
        return f"{guard.current().principal} read {limit} of {table}"

    @server.tool(name="drop-table")
    @tool_action("db.drop", resource=table)
    async def drop(table: str) -> str:
        done.append(f"drop {table}")
        return f"dropped {table}"

    @server.tool()
    @tool_action("db.wait", resource=table)
    async def wait(table: str, ctx: Context) -> str:
        await ctx.report_progress(1, 2, f"waiting on {table}")
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            done.append("wait was cancelled")
            raise
        return "never"

    @server.tool()
    @tool_action("db.nested", resource=table)
    async def nested(table: str, ctx: Context) -> str:
        return str(await ctx.mcp_server.call_tool("drop-table", {"table": table}, ctx))

    @server.tool()
    @tool_action("db.history", resource=lambda _: "https://db.acme.test")
    async def history() -> list[str]:
        return done

    @server.tool()
    async def shell(command: str) -> str:
        done.append(f"shell {command}")
        return "an undeclared tool ran"

    @server.resource("notes://today")
    def notes() -> str:
        done.append("notes")
        return "notes"

    return server, done


@dataclass(kw_only=True)
class Tools:
    """A client of the server. target: what a proof for a call of a tool is for."""

    client: Client
    http: httpx2.AsyncClient | None
    auth: TokenPerCall
    done: list[str] = field(default_factory=list)
    origin: str = ""

    def target(self, tool: str) -> str:
        return URL if self.http else f"{AUDIENCE}/{tool}"

    async def call(self, tool: str, arguments: dict[str, Any], token: ActionToken, **more: Any) -> str:
        """One call, as a user of our client makes it. What the tool said."""
        if self.http:
            with self.auth.using(token):
                result = await self.client.call_tool(tool, arguments, **more)
        else:
            result = await self.client.call_tool(tool, arguments, meta=token.mcp_meta(tool), **more)
        assert not result.is_error, result
        return result.content[0].text

    async def refusal(self, tool: str, arguments: Any, shown: Mapping[str, Any], **more: Any) -> str:
        """The reason for which a call with these credentials (`authorization`, `dpop`) is refused; nothing else is."""
        with pytest.raises(MCPError) as caught:
            await self.raw(tool, arguments, shown, **more)
        error = caught.value
        assert (error.code, error.message) == (CODE, error.data["reason"]), error
        assert set(error.data) == {"reason", "correlation_id"}  # and nothing else: invariant 9
        return error.message

    async def raw(self, tool: str, arguments: Any, shown: Mapping[str, Any], *, meta: Any = None) -> Any:
        """One call with whatever is shown. meta: beside it, over HTTP too."""
        if self.http:
            self.http.headers.update(shown)
        else:
            meta = {f"action-broker/{name}": value for name, value in shown.items()} | (meta or {})
        try:
            return await self.client.call_tool(tool, arguments, meta=meta)
        finally:
            if self.http:
                for name in shown:
                    del self.http.headers[name]

    def shown(self, access: str, tool: str, **changes: Any) -> dict[str, str]:
        """The credentials for one call, with any defect in the proof on request."""
        proof = PROVER.proof(access, **({"now": now(), "htm": "POST", "htu": self.target(tool)} | changes))
        return {"authorization": f"DPoP {access}", "dpop": proof}


def held(action: Action, **changes: Any) -> ActionToken:
    """A token in its holder's hands."""
    use = changes.get("use", "once")
    return ActionToken(
        access_token=token(action, **changes),
        token_type="DPoP",
        expires_at=now() + timedelta(seconds=60),
        use=use,
        action=action,
        correlation_id="1",
        key=ProofKey(PROVER.key),
    )


@contextlib.asynccontextmanager
async def connected(way: str, **changes: Any) -> AsyncIterator[Tools]:
    """A client of a server that runs in one of the `WAYS`. changes: arguments of guard_tools, over HTTP."""
    mode = "legacy" if "2025" in way else "auto"
    if way.startswith("stdio"):
        command = StdioServerParameters(
            command=sys.executable, args=["-m", "support.mcp_tools"], env={**os.environ, "PYTHONPATH": python_path()}
        )
        async with Client(stdio_client(command), mode=mode) as client:
            yield Tools(client=client, http=None, auth=TokenPerCall())
        return
    server, done = make_server()
    auth = TokenPerCall(URL)
    checker = await guard_for(ISSUER, clock=now)
    guard_tools(server, checker, **({"url": URL} | changes))
    app = ProtectedResource(server.streamable_http_app(json_response="json" in way), checker, resource=URL)
    async with (
        by_uvicorn(app, lifespan="on") as origin,
        httpx2.AsyncClient(auth=auth, timeout=20) as http,
        Client(streamable_http_client(f"{origin}/mcp", http_client=http), mode=mode) as client,
    ):
        yield Tools(client=client, http=http, auth=auth, done=done, origin=origin)


def python_path() -> str:
    return os.pathsep.join(filter(None, [str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH")]))


async def serve_stdio() -> None:
    server, _ = make_server()
    checker: Guard = await guard_for(ISSUER, clock=now)
    guard_tools(server, checker)
    await server.run_stdio_async()


if __name__ == "__main__":
    asyncio.run(serve_stdio())
