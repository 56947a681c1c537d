"""A shop's tools for agents: an MCP server over streamable HTTP, in front of PostgreSQL.

    python tools.py --broker /run/action-broker/broker.sock --issuer https://broker.acme.test --database postgresql:///shop

Which tools there are it tells anybody. Each call needs a token for just that call, and one that still runs when its
token dies is cancelled: what it has told by then it has told, and that is all.
"""

import argparse
import asyncio
import socket
import sys

import asyncpg
import uvicorn
from mcp.server.mcpserver import Context, MCPServer

from broker.client import Client
from broker.guard import Guard, ProtectedResource, ScopeFeed
from broker.guard.mcp import guard_tools, tool_action

AUDIENCE = "spiffe://acme.test/service/shop-tools"  # who we are; tokens for others are refused
URL = "https://tools.acme.test/mcp"  # the endpoint, as agents know it
ORDERS = "https://shop.acme.test/orders"  # the resource; each order is one below it
BATCH = 1000


def make_server(pool: asyncpg.Pool) -> MCPServer:
    """The tools, and what a call of each means."""
    server = MCPServer("shop", log_level="ERROR")

    @server.tool()
    @tool_action("shop.read-order", resource=lambda arguments: f"{ORDERS}/{arguments['order']}")
    async def read_order(order: int) -> str:
        """What is known of one order."""
        row = await pool.fetchrow("SELECT * FROM orders WHERE id = $1", order)
        return "there is no such order" if row is None else str(dict(row))

    @server.tool()
    @tool_action("shop.export-orders", resource=lambda _: ORDERS)
    async def export_orders(ctx: Context) -> str:
        """All orders there ever were, told in progress messages, so many at a time."""
        told = 0
        async with pool.acquire() as connection, connection.transaction(readonly=True):
            orders = await connection.cursor("SELECT * FROM orders_ever")
            while rows := await orders.fetch(BATCH):
                told += len(rows)
                await ctx.report_progress(told, message="\n".join(str(dict(row)) for row in rows))
        return f"that was all: {told} orders"

    @server.tool()
    @tool_action(
        "shop.delete-orders", resource=lambda _: ORDERS, parameters=lambda arguments: {"state": arguments["state"]}
    )
    async def delete_orders(state: str) -> str:
        """Deletes all orders in this state."""
        return str(await pool.execute("DELETE FROM orders WHERE state = $1", state))

    return server


async def main() -> None:
    """Serves until it is ended."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--broker", required=True, help="the broker's socket")
    parser.add_argument("--issuer", required=True, help="the broker's issuer")
    parser.add_argument("--database", required=True)
    parser.add_argument("--port", type=int, default=0, help="on loopback; 0 for any")
    options = parser.parse_args()
    async with (
        Client.unix(options.broker, issuer=options.issuer) as broker,
        ScopeFeed(broker, audiences=[AUDIENCE]) as scope,
        asyncpg.create_pool(options.database, min_size=1) as pool,
    ):
        server = make_server(pool)
        own_guard = Guard(issuer=options.issuer, audience=AUDIENCE, scope=scope)
        guard_tools(server, own_guard, url=URL)
        app = ProtectedResource(server.streamable_http_app(), own_guard, resource=URL)
        await scope.ready()
        with socket.create_server(("127.0.0.1", options.port)) as listening:
            sys.stdout.write(f"serving {listening.getsockname()[1]}\n")
            sys.stdout.flush()
            await uvicorn.Server(uvicorn.Config(app, log_config=None)).serve(sockets=[listening])


if __name__ == "__main__":
    asyncio.run(main())
