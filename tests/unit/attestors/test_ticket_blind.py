"""Ticket systems that cannot be asked: since when that is so, and that one bad ticket hides nothing of the others."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from support.processes import until
from support.tickets import TicketServer, ticket, ticket_server
from support.watched_tickets import LONG_S, SHORT_S, looked_again, watching

from attestors import ticket_polls


@pytest.fixture
async def server() -> AsyncIterator[TicketServer]:
    async with ticket_server(**{f"_{number}": ticket() for number in range(1, 21)}) as found:
        yield found


async def test_while_its_polls_fail_a_system_is_blind_and_nothing_of_it_is_told(server: TicketServer) -> None:
    async with watching(server, SHORT_S) as watched:
        await watched.attest("1", "2")
        assert watched.attestor.blind() == {}
        before = asyncio.get_running_loop().time()
        server.says(status=503)
        await until(lambda: watched.is_blind, "it is blind")
        (since,) = watched.attestor.blind().values()
        assert before <= since <= asyncio.get_running_loop().time()
        await until(lambda: server.asked.total() >= 10, "it is tried again")
        assert list(watched.attestor.blind().values()) == [since], "since it began, not since the last try"
        assert watched.told == []
        server.behaves()
        await until(lambda: not watched.is_blind, "it sees again")
        assert watched.told == [], "nothing had changed"


@pytest.mark.parametrize("status", [302, 401, 403, 429, 500])
async def test_whatever_keeps_us_from_reading_makes_it_blind(server: TicketServer, status: int) -> None:
    async with watching(server, SHORT_S) as watched:
        await watched.attest("1")
        server.says(status=status)
        await until(lambda: watched.is_blind, "it is blind")


async def test_a_system_that_hangs_makes_it_blind_within_its_bound(server: TicketServer) -> None:
    async with watching(server, SHORT_S, timeout_s=0.3) as watched:
        await watched.attest("1")
        server.hangs()
        async with asyncio.timeout(3):
            await until(lambda: watched.is_blind, "it is blind")


async def test_what_changed_while_it_was_blind_is_told_before_it_sees_again(server: TicketServer) -> None:
    async with watching(server, SHORT_S) as watched:
        await watched.attest("1", "2", "3")
        server.says(status=503)
        await until(lambda: watched.is_blind, "it is blind")
        server.tickets["2"] = ticket("closed")
        server.behaves()
        await until(lambda: not watched.is_blind, "it sees again")
        await watched.hears("2")


async def test_a_system_that_is_away_is_asked_little(server: TicketServer) -> None:
    async with watching(server, LONG_S) as watched:
        await watched.attest(*map(str, range(1, 21)))
        server.says(status=503)
        server.asked.clear()
        watched.polls._whole = 0
        watched.polls._woken.set()
        await until(lambda: watched.is_blind, "it is blind")
        assert server.asked.total() <= 2 * ticket_polls.AT_ONCE


async def test_a_ticket_that_alone_cannot_be_read_is_told_once_and_no_other_is(server: TicketServer) -> None:
    """Who can make one ticket unreadable must not have all others refused."""
    async with watching(server, SHORT_S) as watched:
        await watched.attest("1", "2", "3", "4")
        server.says(status=403, of="1")
        server.says(b"<html>", of="2")
        server.floods(of="3")
        await watched.hears("1", "2", "3")
        await looked_again(server, "1", "2", "3", "4")
        assert not watched.is_blind
        assert watched.told == []
        server.behaves()
        server.tickets["4"] = ticket("working")
        await watched.hears("4")


async def test_one_bad_ticket_that_a_webhook_names_does_not_make_its_system_blind(
    server: TicketServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ticket_polls, "SOON_S", 0.1)
    async with watching(server, LONG_S) as watched:
        await watched.attest("1", "2")
        server.says(status=503, of="1")
        watched.attestor.tell("desk", "1")
        await watched.hears("1")
        await watched.attest("2")
        await until(lambda: server.asked["2"] >= 3, "the others are looked at, too, to know")
        assert not watched.is_blind


async def test_a_system_of_which_nothing_is_watched_is_never_blind(server: TicketServer) -> None:
    async with watching(server, SHORT_S) as watched:
        await watched.attest("1")
        server.says(status=503)
        await until(lambda: watched.is_blind, "it is blind")
        for one in watched.polls._watched.values():
            one.until = 0
        await until(lambda: not watched.is_blind, "nobody needs to know any more")
