"""A gateway to a database: each query is an act with a credential of its own, and runs when its guard says so.

    python gateway.py --broker /run/action-broker/broker.sock --issuer https://broker.acme.test --database postgresql:///shop

It knows nothing of tickets, and has no list of who may read what. A token says which table may be read and how much of
it; the guard finds that the request means exactly this, and hears at once when the reasons for it have ended.
"""

import argparse
import asyncio
import json
import sys
from typing import Any

import asyncpg
from aiohttp import web

from broker import guard
from broker.client import Client
from broker.guard import Guard, Request, ScopeFeed, Table, guard_application

AUDIENCE = "spiffe://acme.test/service/db-gateway"  # who we are; tokens for others are refused
BASE = "https://db.acme.test"  # as callers know us
DATABASE = f"{BASE}/shop"  # the resource

POOL = web.AppKey("pool", asyncpg.Pool)


def asked(request: Request) -> dict[str, Any]:
    """All that changes what the query does; what is left out here nobody would have approved."""
    return {"table": request.params["table"], "limit": int(request.query("limit"))}


@guard.action("db.read", resource=lambda _: DATABASE, parameters=asked, method=("GET", "/shop/tables/{table}"))
async def read(request: web.Request) -> web.Response:
    """So many rows of a table, as JSON."""
    approved = guard.current().action.parameters  # not the request again: what runs is what was approved
    query = f"SELECT * FROM public.{quoted(approved['table'])} LIMIT $1"  # noqa: S608 - a quoted name
    try:
        rows = await request.app[POOL].fetch(query, approved["limit"])
    except asyncpg.UndefinedTableError as error:
        raise web.HTTPNotFound from error
    return web.json_response({"rows": [dict(row) for row in rows]}, dumps=lambda found: json.dumps(found, default=str))


def quoted(name: str) -> str:
    """One SQL identifier, whatever is in it."""
    return '"' + name.replace('"', '""') + '"'


async def main() -> None:
    """Serves until it is ended."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--broker", required=True, help="the broker's socket")
    parser.add_argument("--issuer", required=True, help="the broker's issuer")
    parser.add_argument("--database", required=True, help="as a user that may do no more than read")
    parser.add_argument("--port", type=int, default=0, help="on loopback; 0 for any")
    options = parser.parse_args()
    async with (
        Client.unix(options.broker, issuer=options.issuer) as broker,
        ScopeFeed(broker, audiences=[AUDIENCE]) as scope,
        asyncpg.create_pool(options.database, min_size=1) as pool,
    ):
        app = web.Application()
        app[POOL] = pool
        app.router.add_get("/shop/tables/{table}", read)
        own_guard = Guard(issuer=options.issuer, audience=AUDIENCE, scope=scope)
        guard_application(app, own_guard, Table([read]), base_url=BASE)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", options.port).start()
        await scope.ready()
        sys.stdout.write(f"serving {runner.addresses[0][1]}\n")
        sys.stdout.flush()
        try:
            await asyncio.Event().wait()
        finally:
            await runner.cleanup()


if __name__ == "__main__":
    asyncio.run(main())
