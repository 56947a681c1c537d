"""The payroll of a month over HTTP, streamed row by row out of PostgreSQL.

    python payroll.py --broker /run/action-broker/broker.sock --issuer https://broker.acme.test --database postgresql:///hr

An export takes minutes, and its credential can die meanwhile. The guard then ends it where it stands: the connection
breaks off, so that nobody takes the half of it for the whole, the handler is cancelled, and so is its query.
"""

import argparse
import asyncio
import contextlib
import json
import sys

import asyncpg
from aiohttp import web

from broker import guard
from broker.client import Client
from broker.guard import Guard, ScopeFeed, Table, guard_application

AUDIENCE = "spiffe://acme.test/service/payroll"  # who we are; tokens for others are refused
BASE = "https://payroll.acme.test"  # as callers know us

POOL = web.AppKey("pool", asyncpg.Pool)


@guard.action("payroll.export", resource=lambda request: BASE + request.path, method=("GET", "/exports/{month}"))
async def export(request: web.Request) -> web.StreamResponse:
    """A line of JSON for each employee."""
    response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
    await response.prepare(request)
    query = "SELECT employee, amount FROM payroll WHERE month = $1 ORDER BY employee"
    with contextlib.suppress(ConnectionResetError):  # the client went away
        async with request.app[POOL].acquire() as connection, connection.transaction(readonly=True):
            async for row in connection.cursor(query, request.match_info["month"], prefetch=500):
                await response.write(json.dumps(dict(row)).encode() + b"\n")
        await response.write_eof()
    return response


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
        app = web.Application()
        app[POOL] = pool
        app.router.add_get("/exports/{month}", export)
        own_guard = Guard(issuer=options.issuer, audience=AUDIENCE, scope=scope)
        guard_application(app, own_guard, Table([export]), base_url=BASE)
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
