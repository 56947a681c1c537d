"""An agent may read one table while an incident in a ticket system says so: who authorises what is never the agent."""

import asyncio
import time
import tomllib
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.postgres import Postgres, postgres
from support.receiving import claims_of
from support.roundup import Tracker, free_port, roundup_tracker
from support.scenario import EXAMPLES, Service, joins, policies_of, refusals, service
from support.shop import say
from support.whole_broker import Whole, eventually, whole_broker

from broker.client import ActionToken, Client
from broker.errors import BrokerError, Reason
from broker.ledger.records import Intent, Refusal

EXAMPLE = "incident-query"
GATEWAY, BASE, SHOP = "spiffe://acme.test/service/db-gateway", "https://db.acme.test", "https://db.acme.test/shop"
FOR_THE_AGENT = "triage-agent"  # a keyword
DATABASE = (
    "CREATE TABLE orders (id int, state text)",
    "INSERT INTO orders VALUES (17, 'stuck in payment'), (18, 'shipped')",
    "CREATE TABLE customers (id int, name text)",
    "INSERT INTO customers VALUES (1, 'Dora')",
    "CREATE ROLE gateway LOGIN",
    "GRANT SELECT ON orders, customers TO gateway",
)


@dataclass
class Desk:
    """Everybody there is."""

    whole: Whole
    tracker: Tracker
    database: Postgres
    gateway: Service
    agent: Client

    async def ask(self, ticket: str, table: str = "orders", limit: int = 10) -> ActionToken:
        named = f"incidents:{ticket}" if ticket else ""
        return await self.agent.request("db.read", SHOP, GATEWAY, {"table": table, "limit": limit}, ticket=named)

    async def why_not(self, ticket: str, table: str = "orders", limit: int = 10) -> str:
        """Why the broker gives no token; "" where it does."""
        try:
            await self.ask(ticket, table, limit)
        except BrokerError as error:
            return error.reason
        return ""

    async def query(self, token: ActionToken, table: str = "orders", limit: int = 10) -> str:
        """The rows, or why not."""
        answer = await self.gateway.get(f"/shop/tables/{table}?limit={limit}", token)
        return answer.reason or str(answer.body["rows"])


@asynccontextmanager
async def desk(folder: Path) -> AsyncIterator[Desk]:
    async with AsyncExitStack() as stack:
        database = stack.enter_context(postgres(*DATABASE))
        port = stack.enter_context(free_port())
        webhook = f"https://127.0.0.1:{port}/hooks/tickets/incidents"
        tracker = await asyncio.to_thread(stack.enter_context, roundup_tracker(webhook))
        tables = {"http": {"listen": f"127.0.0.1:{port}"}, **_ticket_tables(tracker, folder)}
        whole = stack.enter_context(whole_broker(policies_of(EXAMPLE), **tables))
        tracker.trust(whole.domain.svid("tracker", 0))
        program = (f"{EXAMPLE}/gateway.py", "--database", database.url("gateway"))
        gateway = await stack.enter_async_context(service(whole, "service/db-gateway", BASE, *program))
        agent = await stack.enter_async_context(whole.client(joins(whole, "agent/triage")))
        yield Desk(whole, tracker, database, gateway, agent)


def _ticket_tables(tracker: Tracker, folder: Path) -> dict[str, dict[str, Any]]:
    """As ticket.toml has them, with the tracker's address and our files in place of others'."""
    system = tomllib.loads((EXAMPLES / EXAMPLE / "ticket.toml").read_text())["ticket"]["systems"]["incidents"]
    headers, webhook = system.pop("headers"), system.pop("webhook")
    assert system["poll_ms"] >= 60_000  # so what is noticed sooner was told by Roundup
    system["url"] = system["url"].replace("https://tracker.acme.test/", tracker.url)
    system["credentials_file"] = tracker.system(folder)["credentials_file"]
    webhook["secret_file"] = tracker.hook(folder)["secret_file"]
    name = "ticket.systems.incidents"
    return {name: system, f"{name}.headers": headers, f"{name}.webhook": webhook}


async def test_an_agent_reads_what_an_open_incident_authorises_and_not_one_query_longer(tmp_path: Path) -> None:
    async with desk(tmp_path) as found:
        create = found.tracker.create
        incident = await asyncio.to_thread(create, "orders", FOR_THE_AGENT)
        others = await asyncio.to_thread(create, "customers")
        say(f"In Roundup somebody on call opens incident {incident}: its keywords are `orders` and `{FOR_THE_AGENT}`.")
        say(f"Incident {others} is open as well: it names `customers`, and no agent.")
        token = await found.ask(incident)
        say(f"The agent asks to read `orders` for incident {incident}, and its query runs on PostgreSQL:")
        rows = await found.query(token)
        assert rows == "[{'id': 17, 'state': 'stuck in payment'}, {'id': 18, 'state': 'shipped'}]"
        say(f"    {rows}")
        await _tries_other_tables(found, token, incident, others)
        customers = await _is_given_another_table(found, incident, token)
        await _loses_it(found, incident, token, customers)
        await _is_stopped(found, incident, token)
        await _comes_back(found, incident, token)
        queries = [one for one in found.database.statements("gateway") if " LIMIT " in one]
        assert len(queries) == sum(found.gateway.served.values())
        say(f"The database saw {len(queries)} queries: each that was answered, and none that was refused.")
        _check_the_ledger(found.whole, incident, token, customers)


async def _tries_other_tables(found: Desk, token: ActionToken, incident: str, others: str) -> None:
    assert await found.query(token, "customers") == Reason.OUT_OF_SCOPE
    assert await found.query(token, limit=100) == Reason.OUT_OF_SCOPE
    say("With the same token it tries `customers`, then more rows than it asked for: out_of_scope, both.")
    for ticket, how in (
        (incident, f"for incident {incident}"),
        (others, f"for incident {others}"),
        ("", "for none"),
    ):
        assert await found.why_not(ticket, "customers") == Reason.DENIED
        say(f"It asks to read `customers` {how}: denied.")
    assert await found.why_not("4711") == Reason.TICKET_CLOSED
    say("It makes an incident up: ticket_closed, as for every one that is not open.")


async def _is_given_another_table(found: Desk, incident: str, token: ActionToken) -> ActionToken:
    keywords = [found.tracker.keyword(name) for name in ("orders", "customers", FOR_THE_AGENT)]
    await asyncio.to_thread(found.tracker.change, incident, keyword=keywords)
    customers = await found.ask(incident, "customers")
    assert "Dora" in await found.query(customers, "customers")
    assert "stuck" in await found.query(token)
    say(f"They add the keyword `customers` to incident {incident}: now the agent reads that table, too.")
    return customers


async def _loses_it(found: Desk, incident: str, token: ActionToken, customers: ActionToken) -> None:
    keywords = [found.tracker.keyword(name) for name in ("orders", FOR_THE_AGENT)]
    await asyncio.to_thread(found.tracker.change, incident, keyword=keywords)
    took = await _until_refused(found, customers, "customers", Reason.DENIED, time.monotonic())
    assert "stuck" in await found.query(token)
    say(f"They take it away. {took:.0f} ms later the gateway refuses the token for it: denied.")
    say("That for `orders` lives on.")


async def _is_stopped(found: Desk, incident: str, token: ActionToken) -> None:
    await asyncio.to_thread(found.tracker.close, incident)
    began = time.monotonic()
    assert await found.why_not(incident) == Reason.TICKET_CLOSED
    say(f"Incident {incident} is resolved. The agent's very next query needs a token: ticket_closed.")
    took = await _until_refused(found, token, "orders", Reason.TICKET_CLOSED, began)
    say(f"The token that it still holds is dead at the gateway, {took:.0f} ms after Roundup took that: ticket_closed.")


async def _comes_back(found: Desk, incident: str, token: ActionToken) -> None:
    await asyncio.to_thread(found.tracker.change, incident, status="in-progress")
    again = await found.ask(incident)
    assert "stuck" in await found.query(again)
    assert await found.query(token) == Reason.TICKET_CLOSED
    say("It was not solved, and is opened again: a new token works, and the one that died stays dead.")


async def _until_refused(found: Desk, token: ActionToken, table: str, reason: Reason, began: float) -> float:
    """Milliseconds since then until queries with it are refused for this reason."""
    await eventually(lambda: found.query(token, table), reason)
    return 1000 * (time.monotonic() - began)


def _check_the_ledger(whole: Whole, incident: str, token: ActionToken, customers: ActionToken) -> None:
    records, ticket = whole.records(), f"incidents:{incident}"
    given = [one for one in records if isinstance(one, Intent)]
    tables = [one.to_action().parameters["table"] for one in given]
    assert ({one.ticket for one in given}, tables) == ({ticket}, ["orders", "customers", "orders"])
    died = [(one.jtis, one.reason, one.cause) for one in refusals(whole)]
    lost, closed = claims_of(customers.access_token).jti, claims_of(token.access_token).jti
    assert died == [
        ((lost,), Reason.DENIED, f"ticket:{ticket}"),
        ((closed,), Reason.TICKET_CLOSED, f"ticket:{ticket}"),
    ]
    refused = [str(one.reason) for one in records if isinstance(one, Refusal) and one.action == "db.read"]
    assert refused == [Reason.DENIED] * 3 + [Reason.TICKET_CLOSED] * 2
    say(f"The ledger has three tokens, all for {ticket}; two that died of it; and five requests that were refused:")
    for record in refusals(whole):
        say(f"    {record.at:%H:%M:%S} {record.reason} {record.cause}")
