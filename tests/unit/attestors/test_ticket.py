"""The facts on a ticket: what its system says now of the one that is named, and nothing that the caller says."""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from support.processes import until
from support.tickets import BASIC, MAPPING, TicketServer, ticket, ticket_server

from attestors import ticket_reads
from attestors.contract import AttestationFailed, AttestationRequest, AttestationUnavailable, FactKey, Facts
from attestors.ticket import ASKED, TicketAttestor
from attestors.ticket_reads import TicketReads, TicketSystem
from broker.identity.turns import Turns

NOW = datetime(2031, 5, 6, 7, 8, 9, tzinfo=UTC)
AGENT = "spiffe://acme.test/build/agent"


@asynccontextmanager
async def attesting(server: TicketServer, **options: Any) -> AsyncIterator[TicketAttestor]:
    """As the broker wires it. options: of the source."""
    async with server.source(**options) as source:
        systems = {"desk": TicketSystem(source=source, mapping=MAPPING, ids=re.compile("[1-9][0-9]*"))}
        turns = Turns(TicketReads(systems).look)
        try:
            yield TicketAttestor(systems, turns.ask)
        finally:
            await turns.close()


@pytest.fixture
async def server() -> AsyncIterator[TicketServer]:
    async with ticket_server(_17=ticket(tables=["orders", "customers"]), _18=ticket("closed")) as found:
        yield found


@pytest.fixture
async def attestor(server: TicketServer) -> AsyncIterator[TicketAttestor]:
    async with attesting(server) as found:
        yield found


def request(name: str = "desk:17", **changes: Any) -> AttestationRequest:
    return AttestationRequest(**{"principal": AGENT, "ticket": name, **changes})


async def test_the_facts_are_what_the_system_says(attestor: TicketAttestor) -> None:
    assert await attestor.attest(request(), NOW) == Facts(
        attestor="ticket",
        key=FactKey("ticket:desk:17"),
        values={
            "system": "desk",
            "id": "17",
            "state": "open",
            "authorises": ["customers", "orders"],
            "authorised_by": "dora",
        },
        attested_at=NOW,
    )


async def test_who_names_no_ticket_has_no_ticket_facts_and_nobody_is_asked(
    server: TicketServer, attestor: TicketAttestor
) -> None:
    assert await attestor.attest(request(""), NOW) is None
    assert not server.asked
    assert await attestor.attest(request(), NOW) is not None


async def test_nothing_that_a_caller_sends_changes_the_facts(attestor: TicketAttestor) -> None:
    """Who authorised what comes from the ticket system alone."""
    said = request(
        parameters={"ticket": {"authorises": ["payroll"]}},
        evidence={"ticket": b'{"issue": {"status": "open", "tables": ["payroll"]}}'},
        known={
            "ticket": Facts(attestor="ticket", key=FactKey("x"), values={"authorises": ["payroll"]}, attested_at=NOW)
        },
    )
    assert await attestor.attest(said, NOW) == await attestor.attest(request(), NOW)


NO_NAMES = (
    "17 desk desk: :17 other:17 DESK:17 desk:17:18 desk:../17 desk:17/.. desk:17?x desk:%31 desk:017 desk:x17 desk:17."
)


@pytest.mark.parametrize("name", [*NO_NAMES.split(), "desk: 17", "desk:17\n", "desk:" + "1" * 65])
async def test_a_name_of_no_ticket_here_is_refused_and_nobody_is_asked(
    server: TicketServer, attestor: TicketAttestor, name: str
) -> None:
    with pytest.raises(AttestationFailed):
        await attestor.attest(request(name), NOW)
    assert not server.asked
    assert await attestor.attest(request(), NOW)


@pytest.mark.parametrize("name", ["desk:18", "desk:19"], ids=["closed", "missing"])
async def test_a_ticket_that_is_not_open_or_not_there_is_refused(attestor: TicketAttestor, name: str) -> None:
    with pytest.raises(AttestationFailed):
        await attestor.attest(request(name), NOW)
    assert await attestor.attest(request(), NOW)


async def test_a_ticket_that_cannot_be_read_is_unavailable_whatever_the_reason(
    server: TicketServer, attestor: TicketAttestor
) -> None:
    async def unavailable() -> None:
        with pytest.raises(AttestationUnavailable):
            await attestor.attest(request(), NOW)
        server.behaves()
        assert await attestor.attest(request(), NOW)

    for status in (302, 401, 403, 429, 500, 503):
        server.says(b"{}", status)
        await unavailable()
    for body in (b"", b"<html>", b"[]", b"{}", b'{"issue": {"status": "open"}}', b'{"issue": 1, "issue": 1}'):
        server.says(body)
        await unavailable()
    server.floods()
    await unavailable()
    server.breaks_off()
    await unavailable()


async def test_a_system_that_hangs_is_unavailable_within_its_bound(server: TicketServer) -> None:
    server.hangs()
    async with attesting(server, timeout_s=0.3) as attestor:
        with pytest.raises(AttestationUnavailable, match=r"within 0\.3 s"):
            await attestor.attest(request(), NOW)


async def test_the_system_is_asked_at_each_request(server: TicketServer, attestor: TicketAttestor) -> None:
    for number in (1, 2, 3):
        assert await attestor.attest(request(), NOW)
        assert server.asked["17"] == number
    assert server.unchanged == 2, "with an ETag, so that it need not be sent again"
    server.tickets["17"] = ticket("closed")
    with pytest.raises(AttestationFailed):
        await attestor.attest(request(), NOW)
    server.tickets["17"] = ticket("working", ["customers"])
    facts = await attestor.attest(request(), NOW)
    assert facts is not None
    assert (facts.values["state"], facts.values["authorises"]) == ("working", ["customers"])


async def test_a_system_without_etags_is_read_whole_each_time(server: TicketServer, attestor: TicketAttestor) -> None:
    server.knows_etags = False
    first = await attestor.attest(request(), NOW)
    assert await attestor.attest(request(), NOW) == first
    server.tickets["17"] = ticket(tables=[])
    facts = await attestor.attest(request(), NOW)
    assert facts is not None
    assert facts.values["authorises"] == []


async def test_unchanged_is_not_believed_of_what_is_not_known(server: TicketServer, attestor: TicketAttestor) -> None:
    server.says(status=304)
    with pytest.raises(AttestationUnavailable):
        await attestor.attest(request(), NOW)


async def test_what_could_not_be_read_is_not_what_was_known_before(
    server: TicketServer, attestor: TicketAttestor
) -> None:
    """An outage never turns what was remembered into a fact, nor a closed ticket's earlier content."""
    assert await attestor.attest(request(), NOW)
    server.says(status=503)
    with pytest.raises(AttestationUnavailable):
        await attestor.attest(request(), NOW)
    server.behaves()
    server.tickets["17"] = ticket("closed")
    with pytest.raises(AttestationFailed):
        await attestor.attest(request(), NOW)
    server.says(status=304)
    with pytest.raises(AttestationUnavailable):
        await attestor.attest(request(), NOW)


async def test_new_credentials_are_used_from_the_next_question_on(server: TicketServer) -> None:
    shown = [BASIC]
    async with attesting(server, authorization=lambda: shown[0]) as attestor:
        assert await attestor.attest(request(), NOW)
        server.expects = "Bearer new"
        with pytest.raises(AttestationUnavailable, match="401"):
            await attestor.attest(request(), NOW)
        shown[0] = "Bearer new"
        assert await attestor.attest(request(), NOW)


async def test_many_requests_at_once_share_looks_that_begin_after_they_came(
    server: TicketServer, attestor: TicketAttestor
) -> None:
    server.hangs(of="17")
    first = asyncio.create_task(attestor.attest(request(), NOW))
    await until(lambda: server.asked["17"] == 1, "the first is asked")
    others = [asyncio.create_task(attestor.attest(request(), NOW)) for _ in range(100)]
    server.tickets["17"] = ticket("working")  # between the first question and the others
    server.behaves()
    server.closing.set()  # the first is answered: 503
    with pytest.raises(AttestationUnavailable):
        await first
    found = await asyncio.gather(*others)
    assert {str(facts and facts.values["state"]) for facts in found} == {"working"}
    assert server.asked["17"] == 2


async def test_what_is_remembered_is_bounded(server: TicketServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ticket_reads, "REMEMBERED", 2)
    server.tickets = {str(number): ticket() for number in range(1, 6)}
    async with server.source() as source:
        reads = TicketReads({"desk": TicketSystem(source=source, mapping=MAPPING)})
        turns = Turns(reads.look)
        attestor = TicketAttestor({"desk": TicketSystem(source=source, mapping=MAPPING)}, turns.ask)
        for number in range(1, 6):
            assert await attestor.attest(request(f"desk:{number}"), NOW)
        assert len(reads._remembered) == 2
        await turns.close()


async def test_another_ticket_of_the_same_number_is_another_fact(server: TicketServer) -> None:
    async with server.source() as source:
        closed = replace(MAPPING, open_states=frozenset({"closed"}))
        systems = {
            "desk": TicketSystem(source=source, mapping=MAPPING),
            "archive": TicketSystem(source=source, mapping=closed),
        }
        turns = Turns(TicketReads(systems).look)
        attestor = TicketAttestor(systems, turns.ask)
        found = [await attestor.attest(request(name), NOW) for name in ("desk:17", "archive:18")]
        assert [facts and facts.key for facts in found] == ["ticket:desk:17", "ticket:archive:18"]
        for name in ("desk:18", "archive:17"):
            with pytest.raises(AttestationFailed):
                await attestor.attest(request(name), NOW)
        await turns.close()


async def test_who_names_tickets_without_end_has_a_part_of_the_looks_and_what_rests_on_tickets_the_others(
    server: TicketServer, attestor: TicketAttestor
) -> None:
    """However many hang, what is decided again is looked at, and so is a ticket that is being asked about anyway."""
    for number in range(1000, 1100):
        server.hangs(of=str(number))
    asking = [asyncio.create_task(attestor.attest(request(f"desk:{number}"), NOW)) for number in range(1000, 1100)]
    await until(lambda: len(server.asked) == ASKED, "as many are asked about as may be")
    new = asyncio.create_task(attestor.attest(request("desk:17"), NOW))
    assert await attestor.attest(request("desk:17", credential="jti-1"), NOW) is not None
    assert len(server.asked) == ASKED + 1, "the others wait for their turn"
    assert not new.done()
    for one in asking:
        one.cancel()
    await asyncio.gather(*asking, return_exceptions=True)
    assert await new is not None, "who goes away gives his place back"
    assert not attestor._asked["desk"]._about
