"""Customers' accounts over HTTP, in front of PostgreSQL: an old endpoint that tells everything, and a new one.

    python accounts.py --broker /run/action-broker/broker.sock --issuer https://broker.acme.test --database postgresql:///shop

The database has one user for all callers and knows none of them. Who may read what is decided before each request gets
here, and the guard holds this service to it: a token for just this act, from a caller who would get it again now.
"""

import argparse
import asyncio
import sys

import asyncpg
from aiohttp import web

from broker import guard
from broker.client import Client
from broker.guard import Guard, Request, ScopeFeed, Table, guard_application

AUDIENCE = "spiffe://acme.test/service/accounts"  # who we are; tokens for others are refused
BASE = "https://accounts.acme.test"  # as callers know us

POOL = web.AppKey("pool", asyncpg.Pool)


def account(request: Request) -> str:
    """The resource: a customer's account as the endpoint shows it."""
    return BASE + request.path


@guard.action("accounts.read-all", resource=account, method=("GET", "/v1/accounts/{id}"))
async def read_all(request: web.Request) -> web.Response:
    """The old endpoint."""
    return await answer(request, "SELECT name, iban, balance FROM accounts WHERE id = $1")


@guard.action("accounts.read", resource=account, method=("GET", "/v2/accounts/{id}"))
async def read(request: web.Request) -> web.Response:
    """The new one."""
    return await answer(request, "SELECT name, balance FROM accounts WHERE id = $1")


async def answer(request: web.Request, query: str) -> web.Response:
    """The one row, and who was told."""
    row = await request.app[POOL].fetchrow(query, request.match_info["id"])
    if row is None:
        raise web.HTTPNotFound
    return web.json_response({"account": dict(row), "told": guard.current().principal})


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
        app.router.add_get("/v1/accounts/{id}", read_all)
        app.router.add_get("/v2/accounts/{id}", read)
        own_guard = Guard(issuer=options.issuer, audience=AUDIENCE, scope=scope)
        guard_application(app, own_guard, Table([read_all, read]), base_url=BASE)
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
