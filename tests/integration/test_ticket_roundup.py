"""A real Roundup as the ticket system: what it says of an issue, and how soon a broker and its guards hear of more.

Tables that may be read are keywords of the issue. The broker is `action-broker serve`; the guard hears its feed.
"""

import asyncio
import json
import re
import tomllib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from support.receiving import claims_of
from support.roundup import Tracker, free_port, roundup_tracker
from support.scoped import Receiver, receiver
from support.whole_broker import AGENT, ORDERS, Whole, whole_broker

from attestors.contract import AttestationFailed, AttestationRequest, AttestationUnavailable, Facts
from attestors.ticket import TicketAttestor
from attestors.ticket_reads import TicketReads
from broker.cli.config_ticket import System
from broker.cli.serve_evidence import http_tickets, ticket_system
from broker.client import ActionToken, Client
from broker.errors import BrokerError
from broker.identity.turns import Turns
from broker.ledger.records import Intent, ScopeRefused

NOW = datetime(2031, 5, 6, 7, 8, 9, tzinfo=UTC)
NEVER_MS = 300_000  # the longest interval: what is noticed sooner was told
SCHEMA = """
action "db.read" appliesTo {
  principal: [Workload], resource: [Resource], context: { ticket: Ticket, parameters: { table: String } }
};
action "db.ping" appliesTo { principal: [Workload], resource: [Resource], context: {} };
"""
POLICY = """
@id("as-the-ticket-says") @reuse("ttl") @max_ttl("200s") permit (principal, action == Action::"db.read", resource)
when { context.ticket.system == "roundup" && context.ticket.authorises.contains(context.parameters.table)
  && context.ticket.authorised_by == "admin" };
@id("pings") permit (principal, action == Action::"db.ping", resource);
"""


@pytest.fixture(scope="module")
def tracker() -> Iterator[Tracker]:
    with roundup_tracker() as found:
        yield found


# -- what it says ----------------------------------------------------------------------------------------------------


@asynccontextmanager
async def attesting(tracker: Tracker, folder: Path, **changes: Any) -> AsyncIterator[Callable[[str], Any]]:
    """As it is configured: takes an issue, gives its facts."""
    table = System(**tracker.system(folder, **changes))
    async with http_tickets(table) as source:
        systems = {"roundup": ticket_system(table, source)}
        turns = Turns(TicketReads(systems).look)
        attestor = TicketAttestor(systems, turns.ask)

        async def attest(issue: str) -> Facts | None:
            return await attestor.attest(AttestationRequest(principal=AGENT, ticket=f"roundup:{issue}"), NOW)

        yield attest
        await turns.close()


async def test_an_open_issue_authorises_what_its_keywords_name(tracker: Tracker, tmp_path: Path) -> None:
    issue = tracker.create("orders", "customers")
    async with attesting(tracker, tmp_path) as attest:
        facts = await attest(issue)
        assert facts.values == {
            "system": "roundup",
            "id": issue,
            "state": "in-progress",
            "authorises": ["customers", "orders"],
            "authorised_by": "admin",
        }
        tracker.change(issue, keyword=[tracker.keyword("orders")], status="testing")
        facts = await attest(issue)
        assert (facts.values["state"], facts.values["authorises"]) == ("testing", ["orders"])
        tracker.change(issue, keyword=[])
        assert (await attest(issue)).values["authorises"] == []


async def test_a_resolved_a_retired_and_a_missing_issue_are_refused(tracker: Tracker, tmp_path: Path) -> None:
    """Roundup shows a retired issue to who asks for it by id, as if nothing had happened: so it is searched for."""
    resolved, retired = tracker.create("orders"), tracker.create("orders")
    async with attesting(tracker, tmp_path) as attest:
        assert await attest(resolved)
        assert await attest(retired)
        tracker.close(resolved)
        tracker.retire(retired)
        assert tracker.read(retired)["attributes"]["status"]["name"] == "in-progress"
        for issue in (resolved, retired, "99999"):
            with pytest.raises(AttestationFailed):
                await attest(issue)
        assert await attest(tracker.create("orders"))


async def test_an_issue_that_nobody_answers_for_cannot_be_read(tracker: Tracker, tmp_path: Path) -> None:
    issue = tracker.create("orders", assigned_to="")
    async with attesting(tracker, tmp_path) as attest:
        with pytest.raises(AttestationUnavailable, match="authorised_by"):
            await attest(issue)
        tracker.change(issue, assignedto="admin")
        assert await attest(issue)


async def test_wrong_credentials_are_no_closed_ticket(tracker: Tracker, tmp_path: Path) -> None:
    issue = tracker.create("orders")
    wrong = tmp_path / "wrong"
    wrong.write_text("broker:wrong")
    wrong.chmod(0o600)
    async with attesting(tracker, tmp_path, credentials_file=str(wrong)) as attest:
        with pytest.raises(AttestationUnavailable, match="401"):
            await attest(issue)
    async with attesting(tracker, tmp_path) as attest:
        assert await attest(issue)


def test_the_example_in_the_documents_is_what_is_tested_here(tracker: Tracker, tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/api.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```toml shown\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (shown,) = (found["ticket"]["systems"]["roundup"] for found in map(tomllib.loads, blocks) if "ticket" in found)
    places = {"url": tracker.url, "credentials_file": f"{tmp_path}/", "secret_file": f"{tmp_path}/"}
    hook, tested = tracker.hook(tmp_path), tracker.system(tmp_path)
    for table, said in ((hook, shown.pop("webhook")), (tested, shown)):
        for key, place in places.items():
            if key in table:
                table[key] = table[key].replace(place, "")
                said[key] = said[key].removeprefix("https://tickets.acme.test/t/").removeprefix("/etc/action-broker/")
        assert table == said


# -- a whole broker --------------------------------------------------------------------------------------------------


@dataclass
class Desk:
    """A broker that asks a tracker."""

    whole: Whole
    tracker: Tracker
    agent: Client
    guard: Receiver

    async def token(self, issue: str, table: str = "orders") -> ActionToken:
        resource, ticket = f"https://db.acme.test/{table}", f"roundup:{issue}" if issue else ""
        return await self.agent.request("db.read", resource, ORDERS, {"table": table}, ticket=ticket)

    async def refused(self, issue: str, table: str = "orders") -> str:
        """Why there is no token; "" where there is one."""
        try:
            await self.token(issue, table)
        except BrokerError as error:
            return error.reason
        return ""

    def refusals(self, token: ActionToken) -> list[ScopeRefused]:
        return [one for one in self.whole.records() if isinstance(one, ScopeRefused) and jti_of(token) in one.jtis]


def jti_of(token: ActionToken) -> str:
    return claims_of(token.access_token).jti


@asynccontextmanager
async def desk(tmp_path: Path, *, webhook: bool, poll_ms: int) -> AsyncIterator[Desk]:
    """A tracker of its own, which calls the broker's webhook where it is to."""
    async with AsyncExitStack() as stack:
        port = stack.enter_context(free_port())
        url = f"https://127.0.0.1:{port}/hooks/tickets/roundup" if webhook else ""
        tracker = await asyncio.to_thread(stack.enter_context, roundup_tracker(url))
        system = tracker.system(tmp_path, poll_ms=poll_ms)
        tables = {"ticket.systems.roundup.headers": system.pop("headers"), "ticket.systems.roundup": system}
        if webhook:
            tables["ticket.systems.roundup.webhook"] = tracker.hook(tmp_path)
        policies = {"db.cedarschema": SCHEMA, "db.cedar": POLICY}
        whole = stack.enter_context(whole_broker(policies, http={"listen": f"127.0.0.1:{port}"}, **tables))
        tracker.trust(whole.domain.svid("tracker", 0))
        agent = await stack.enter_async_context(whole.client(AGENT))
        yield Desk(whole, tracker, agent, await stack.enter_async_context(receiver(whole)))


async def test_a_closed_issue_kills_what_rests_on_it_the_moment_that_roundup_says_so(tmp_path: Path) -> None:
    """The interval is five minutes: the webhook alone brings it about."""
    async with desk(tmp_path, webhook=True, poll_ms=NEVER_MS) as found:
        tracker = found.tracker
        closed, other = tracker.create("orders"), tracker.create("orders")
        hit, spared = await found.token(closed), await found.token(other)
        assert await found.guard.refused(hit) == await found.guard.refused(spared) == ""
        assert await found.refused(closed, "customers") == "denied"
        assert await found.refused("99999") == "ticket_closed"
        assert await found.refused("roundup:1") == "ticket_closed"  # no name of an issue
        assert await found.refused("") == "denied"

        await asyncio.to_thread(tracker.close, closed)
        await found.guard.hears(hit.access_token, "ticket_closed")
        assert await found.guard.refused(hit) == "ticket_closed"
        assert await found.refused(closed) == "ticket_closed"
        (record,) = found.refusals(hit)
        assert (record.reason, record.cause) == ("ticket_closed", f"ticket:roundup:{closed}")

        assert await found.guard.refused(spared) == ""
        assert await found.refused(other) == ""
        await asyncio.to_thread(tracker.change, closed, status="in-progress")  # opened again: what is dead stays dead
        assert await found.refused(closed) == ""
        assert await found.guard.refused(hit) == "ticket_closed"


async def test_a_table_that_an_issue_no_longer_authorises_is_refused_and_the_other_stays(tmp_path: Path) -> None:
    async with desk(tmp_path, webhook=True, poll_ms=NEVER_MS) as found:
        tracker = found.tracker
        issue = tracker.create("orders", "customers")
        orders, customers = await found.token(issue), await found.token(issue, "customers")
        keep = tracker.keyword("orders")
        await asyncio.to_thread(tracker.change, issue, keyword=[keep])
        await found.guard.hears(customers.access_token, "denied")
        await found.guard.hears(orders.access_token, "")  # it may have been suspended, until it was decided
        assert await found.guard.refused(orders) == ""
        assert await found.refused(issue, "customers") == "denied"
        assert await found.refused(issue) == ""


async def test_without_a_webhook_polling_finds_the_closed_issue(tmp_path: Path) -> None:
    async with desk(tmp_path, webhook=False, poll_ms=1000) as found:
        closed, other = found.tracker.create("orders"), found.tracker.create("orders")
        hit, spared = await found.token(closed), await found.token(other)
        assert await found.guard.refused(hit) == ""
        await asyncio.to_thread(found.tracker.close, closed)
        await found.guard.hears(hit.access_token, "ticket_closed")
        assert await found.guard.refused(spared) == ""


async def test_a_tracker_that_goes_away_refuses_requests_and_soon_what_rests_on_it(tmp_path: Path) -> None:
    """A ticket that cannot be read is a refusal."""
    async with desk(tmp_path, webhook=False, poll_ms=1000) as found:
        issue = found.tracker.create("orders")
        token = await found.token(issue)
        assert await found.guard.refused(token) == ""
        found.tracker.process.kill()
        assert await found.refused(issue) == "attestation_unavailable"
        await found.guard.hears(token.access_token, "attestation_unavailable")
        ping = await found.agent.request("db.ping", "https://db.acme.test/", ORDERS)
        assert await found.guard.refused(ping) == ""  # what rests on no ticket stays


async def test_the_intent_names_the_ticket_and_the_ledger_holds_no_secret(tmp_path: Path) -> None:
    async with desk(tmp_path, webhook=True, poll_ms=NEVER_MS) as found:
        issue = found.tracker.create("orders")
        token = await found.token(issue)
        intent = found.whole.intents()[jti_of(token)]
        assert isinstance(intent, Intent)
        assert intent.ticket == f"roundup:{issue}"
        assert intent.facts["ticket"].startswith("sha256:")
        everything = json.dumps(found.whole.broker.log) + str(found.whole.records())
        for secret in ("what the broker says", "d2hhdCB0aGUgYnJva2Vy", "what Roundup signs"):
            assert secret not in everything
