"""Which tickets are told as changed: by polling, by a webhook, by a request that sees it first. On a real server."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import pytest
from support.processes import until
from support.tickets import MAPPING, TicketServer, ticket, ticket_server
from support.watched_tickets import LONG_S, SHORT_S, Watched, looked_again, watching

from attestors import ticket_polls
from attestors.contract import AttestationFailed, AttestationUnavailable
from attestors.ticket import TicketAttestor
from attestors.ticket_mapping import Content, TicketName
from attestors.ticket_reads import TicketReads, TicketSystem
from broker.identity.turns import Turns


@pytest.fixture
async def server() -> AsyncIterator[TicketServer]:
    async with ticket_server(**{f"_{number}": ticket() for number in range(1, 21)}) as found:
        yield found


# -- polling ---------------------------------------------------------------------------------------------------------


async def test_polling_tells_of_what_closed_vanished_or_says_another_thing_and_not_of_the_rest(
    server: TicketServer,
) -> None:
    async with watching(server, SHORT_S) as watched:
        await watched.attest("1", "2", "3", "4", "5", "6")
        server.tickets["1"] = ticket("closed")
        del server.tickets["2"]
        server.tickets["3"] = ticket(tables=["orders", "customers"])
        server.tickets["4"] = ticket(owner="emil")
        server.tickets["5"] = ticket() | {"comments": ["nothing that counts"]}
        await watched.hears("1", "2", "3", "4")
        server.asked.clear()
        await looked_again(server, "3", "4", "5", "6")
        assert not {"1", "2"} & server.asked.keys(), "nothing can rest on what is closed, until it is attested again"
        assert watched.told == [], "each change once"
        server.tickets["6"] = ticket("working")  # another open state is another fact
        await watched.hears("6")


async def test_polling_asks_whether_it_changed(server: TicketServer) -> None:
    async with watching(server, SHORT_S) as watched:
        await watched.attest("1")
        await looked_again(server, "1")
        assert server.unchanged >= 1


async def test_a_ticket_is_looked_at_no_more_often_than_it_should_be(server: TicketServer) -> None:
    async with watching(server, LONG_S) as watched:
        await watched.attest("1")
        watched.polls._whole = 0  # the interval is over
        watched.polls._woken.set()
        await until(lambda: server.asked["1"] == 2, "it is looked at")
        loop = asyncio.get_running_loop()
        await until(lambda: watched.polls._whole > loop.time() + 0.8 * LONG_S - 60, "and then not for a while")
        assert watched.polls._whole <= loop.time() + LONG_S
        assert server.asked["1"] == 2


async def test_a_closed_ticket_is_told_within_the_interval(server: TicketServer) -> None:
    """The bound of docs/staleness.md: the interval, and what a look at all of them takes."""
    async with watching(server, 1.0) as watched:
        await watched.attest(*map(str, range(1, 21)))
        server.tickets["17"] = ticket("closed")
        async with asyncio.timeout(2.0):  # a second for the look, on a machine that others use, too
            await watched.hears("17")


async def test_few_questions_are_put_at_one_time(server: TicketServer) -> None:
    async with watching(server, SHORT_S) as watched:
        await watched.attest(*map(str, range(1, 21)))
        server.hangs()
        await until(lambda: server.at_once == ticket_polls.AT_ONCE, "so many are asked about")
        server.behaves()
        server.closing.set()
        await looked_again(server, *map(str, range(1, 21)))
        assert server.most_at_once == ticket_polls.AT_ONCE


async def test_a_ticket_is_watched_for_as_long_as_a_credential_can_live(server: TicketServer) -> None:
    assert ticket_polls.WATCH_S >= 300 + 5 + 5
    async with watching(server, SHORT_S) as watched:
        await watched.attest("1", "2")
        watched.polls._watched[next(iter(watched.polls._watched))].until = 0
        await until(lambda: len(watched.polls._watched) == 1, "it is forgotten")
        await watched.attest("1")
        assert len(watched.polls._watched) == 2
        assert watched.told == []


async def test_what_is_watched_is_bounded_and_what_falls_out_is_told(
    server: TicketServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ticket_polls, "WATCHED", 3)
    async with watching(server) as watched:
        await watched.attest("1", "2", "3", "1", "4")
        await watched.hears("2")  # attested longest ago
        assert len(watched.polls._watched) == 3


# -- what a request sees first -----------------------------------------------------------------------------------------


async def test_a_change_that_a_request_sees_first_is_told_too(server: TicketServer) -> None:
    async with watching(server) as watched:
        await watched.attest("1", "2", "3")
        server.tickets["1"] = ticket(tables=["customers"])
        await watched.attest("1")
        await watched.hears("1")
        server.tickets["2"] = ticket("closed")
        with pytest.raises(AttestationFailed):
            await watched.attest("2")
        await watched.hears("2")
        server.tickets["2"] = ticket()
        await watched.attest("2", "3")  # opened again: what comes now rests on what it says now
        assert watched.told == []


async def test_a_request_that_could_not_look_says_nothing_of_a_change(server: TicketServer) -> None:
    async with watching(server) as watched:
        await watched.attest("1", "2")
        server.says(status=503, of="1")
        with pytest.raises(AttestationUnavailable):
            await watched.attest("1")
        server.tickets["2"] = ticket("working")
        await watched.attest("2")
        await watched.hears("2")


async def test_what_was_told_is_not_told_again_when_it_is_then_looked_at(server: TicketServer) -> None:
    """Whoever was told looks at the ticket, and sees what changed: that is no second change."""
    async with watching(server) as watched:
        await watched.attest("1", "2")
        server.tickets["1"] = ticket("working")
        assert watched.attestor.tell("desk", "1")
        await watched.hears("1")
        await watched.attest("1")
        assert watched.told == []
        server.tickets["1"] = ticket()  # but what changes after that look is one
        await watched.attest("1")
        await watched.hears("1")


# -- webhooks ----------------------------------------------------------------------------------------------------------


async def test_a_webhook_tells_a_watched_ticket_at_once_and_asks_nobody(server: TicketServer) -> None:
    async with watching(server) as watched:
        await watched.attest("1", "2")
        server.asked.clear()
        assert watched.attestor.tell("desk", "1") is True
        await watched.hears("1")
        assert not server.asked


async def test_a_webhook_about_a_ticket_on_which_nothing_rests_is_forgotten(server: TicketServer) -> None:
    async with watching(server) as watched:
        await watched.attest("1")
        server.asked.clear()
        for system, ticket_id in (("desk", "2"), ("desk", "99"), ("other", "1"), ("", ""), ("desk", "../1")):
            assert watched.attestor.tell(system, ticket_id) is False
        assert watched.attestor.tell("desk", "1") is True
        await watched.hears("1")
        assert not server.asked


async def test_a_flood_of_webhooks_is_told_a_few_times_a_second_and_the_last_one_counts(server: TicketServer) -> None:
    async with watching(server) as watched:
        await watched.attest("1")
        loop = asyncio.get_running_loop()
        begun, said = loop.time(), 0
        while loop.time() < begun + 3.5 * ticket_polls.GAP_S:
            watched.attestor.tell("desk", "1")
            said += 1
            await asyncio.sleep(0)
        told = len(watched.told)
        assert said > 100
        assert 2 <= told <= 5
        await until(lambda: len(watched.told) > told, "the last ones are told, too")


async def test_a_ticket_that_is_said_to_have_changed_is_looked_at_each_second_for_a_while(
    server: TicketServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many systems send the webhook before the change can be read: who was told then still sees the old."""
    monkeypatch.setattr(ticket_polls, "SOON_S", 0.1)
    async with watching(server, LONG_S) as watched:
        await watched.attest("1", "2")
        watched.attestor.tell("desk", "1")
        await watched.hears("1")
        await watched.attest("1")  # looked at, and nothing has changed yet
        server.asked.clear()
        await looked_again(server, "1")
        server.tickets["1"] = ticket("closed")
        await watched.hears("1")
        assert not server.asked["2"]


async def test_restlessness_ends(server: TicketServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ticket_polls, "SOON_S", 0.05)
    monkeypatch.setattr(ticket_polls, "RESTLESS_S", 0.2)
    async with watching(server, LONG_S) as watched:
        await watched.attest("1")
        watched.attestor.tell("desk", "1")
        loop, (one,) = asyncio.get_running_loop(), watched.polls._watched.values()
        await until(lambda: loop.time() > one.restless_until + 0.1, "the while is over")
        asked = server.asked["1"]
        assert asked >= 2
        await until(lambda: loop.time() > one.restless_until + 0.4, "some time goes by")
        assert server.asked["1"] == asked


# -- who listens -------------------------------------------------------------------------------------------------------


async def test_while_nobody_listens_nothing_is_kept_for_him_and_nobody_is_asked(server: TicketServer) -> None:
    async with server.source() as source:
        systems = {"desk": TicketSystem(source=source, mapping=MAPPING, poll_s=SHORT_S)}
        turns = Turns(TicketReads(systems).look)
        watched = Watched(TicketAttestor(systems, turns.ask))
        await watched.attest("1", "2")
        server.tickets["1"] = ticket("closed")
        with pytest.raises(AttestationFailed):
            await watched.attest("1")
        watched.attestor.tell("desk", "2")
        assert not watched.attestor._changed
        asked = server.asked.total()
        listening = asyncio.create_task(watched.listen())
        await until(lambda: server.asked.total() > asked, "now somebody does")
        listening.cancel()
        with suppress(asyncio.CancelledError):
            await listening
        assert watched.attestor._some is None
        await turns.close()


async def test_two_cannot_listen(server: TicketServer) -> None:
    async with watching(server) as watched:
        with pytest.raises(RuntimeError):
            await anext(watched.attestor.watch())
        await watched.attest("1")
        watched.attestor.tell("desk", "1")
        await watched.hears("1")


async def test_what_ends_the_polling_is_raised_to_who_listens(server: TicketServer) -> None:
    async def broken(_: object) -> Any:
        raise ZeroDivisionError

    async with server.source() as source:
        systems = {"desk": TicketSystem(source=source, mapping=MAPPING, poll_s=0)}
        attestor = TicketAttestor(systems, broken)
        attestor._polls["desk"].follow(TicketName("desk", "1"), Content(state="open", authorises=()))
        with pytest.raises(ExceptionGroup) as raised:
            await anext(attestor.watch())
        assert raised.group_contains(ZeroDivisionError)
