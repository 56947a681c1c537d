"""One GET for one ticket, against a real server that redirects, floods, hangs, compresses, refuses and breaks off."""

import asyncio
import gzip
import json
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from support.oidc import oidc_server
from support.processes import until
from support.tickets import BASIC, TicketServer, ticket, ticket_server

from attestors.contract import AttestationUnavailable
from attestors.ticket_http import MAX_BODY, HttpTickets
from attestors.ticket_reads import Page, SystemAway, Version


@pytest.fixture
async def server() -> AsyncIterator[TicketServer]:
    async with ticket_server(_17=ticket()) as found:
        yield found


async def got(server: TicketServer, ticket_id: str = "17", known: Version | None = None, **options: Any) -> Page | None:
    async with server.source(**options) as source:
        return await source.get(ticket_id, known)


async def test_a_ticket_is_asked_for_as_it_is_declared(server: TicketServer) -> None:
    page = await got(server, headers={"X-Requested-With": "rest"})
    assert page is not None
    assert json.loads(page.body or b"") == ticket()
    assert server.paths == ["/api/issues/17?fields=status,tables,owner"]
    sent = {"Authorization": BASIC, "X-Requested-With": "rest", "Accept-Encoding": "identity"}
    assert sent.items() <= server.seen.items()
    assert not {"If-None-Match", "Cookie"} & server.seen.keys()


async def test_no_ticket_is_no_ticket_and_is_not_taken_for_silence(server: TicketServer) -> None:
    assert await got(server, "18") is None
    server.says(status=410)
    assert await got(server) is None
    server.behaves()
    assert await got(server) is not None


@pytest.mark.parametrize("status", [201, 204, 206, 304, 400, 401, 403, 407, 418, 429, 500, 502, 503, 504])
async def test_a_system_that_does_not_tell_is_away(server: TicketServer, status: int) -> None:
    server.says(b"" if status in {204, 304} else json.dumps(ticket()).encode(), status)
    with pytest.raises(SystemAway, match=f"status {status}"):
        await got(server)
    server.behaves()
    assert await got(server)


async def test_wrong_credentials_are_not_a_missing_ticket_and_are_not_told(server: TicketServer) -> None:
    with pytest.raises(SystemAway) as refused:
        await got(server, authorization=lambda: "Basic c2VjcmV0OmhlcmU=")
    assert "c2VjcmV0" not in repr(refused.value)
    async with server.source() as source:
        assert BASIC not in repr(source)
        assert await source.get("17")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_is_not_followed(server: TicketServer, status: int) -> None:
    server.tickets["other"] = ticket(tables=["everything"])
    server.says(status=status, of="17", Location=server.template.replace("{id}", "other"))
    with pytest.raises(SystemAway, match=f"status {status}"):
        await got(server)
    assert server.asked == {"17": 1}


async def test_an_answer_that_is_too_large_or_compressed_is_not_taken(server: TicketServer) -> None:
    server.floods()
    with pytest.raises(AttestationUnavailable, match="larger than"):
        await got(server)
    server.says(b"[" + b" " * (MAX_BODY - 2) + b"]")
    assert await got(server)
    server.says(b"[" + b" " * (MAX_BODY - 1) + b"]")
    with pytest.raises(AttestationUnavailable, match="larger than"):
        await got(server)
    server.says(gzip.compress(json.dumps(ticket()).encode()), Content_Encoding="gzip")
    with pytest.raises(AttestationUnavailable, match="compressed"):
        await got(server)


async def test_what_cannot_be_taken_of_one_ticket_does_not_say_that_the_system_is_away(server: TicketServer) -> None:
    server.floods()
    with pytest.raises(AttestationUnavailable) as refused:
        await got(server)
    assert not isinstance(refused.value, SystemAway)


@pytest.mark.parametrize("misbehave", [TicketServer.hangs, TicketServer.breaks_off])
async def test_a_system_that_hangs_or_breaks_off_is_away_within_the_bound(
    server: TicketServer, misbehave: Callable[[TicketServer], None]
) -> None:
    misbehave(server)
    with pytest.raises(SystemAway):
        await got(server, timeout_s=0.3)


async def test_a_system_that_dribbles_is_away_within_the_bound(server: TicketServer) -> None:
    """The bound is on the whole question, not on each piece of the answer."""
    loop = asyncio.get_running_loop()
    dribbling = server.closing

    async def dribble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while not dribbling.is_set():
            writer.write(b"HTTP/1.1 200 OK\r\n"[:1])
            await asyncio.wait([loop.create_task(dribbling.wait())], timeout=0.05)
        writer.close()

    listener = await asyncio.start_server(dribble, "127.0.0.1", 0)
    async with listener:
        template = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}/{{id}}"
        async with HttpTickets(template, timeout_s=0.3) as source:
            with pytest.raises(SystemAway, match=r"within 0\.3 s|Error"):
                await source.get("17")
        dribbling.set()


async def test_nobody_there_is_away() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # and does not listen
        async with HttpTickets(f"http://127.0.0.1:{bound.getsockname()[1]}/{{id}}") as source:
            with pytest.raises(SystemAway, match="ClientConnectorError"):
                await source.get("17")


async def test_a_server_whose_certificate_leads_nowhere_is_away_and_gets_no_credentials(tmp_path: Path) -> None:
    async with oidc_server(tmp_path) as tls:
        tls.says("/17", b"{}")
        template = f"https://127.0.0.1:{tls.port}/{{id}}"
        async with HttpTickets(template, lambda: BASIC) as source:
            with pytest.raises(SystemAway, match="Certificate"):
                await source.get("17")
        other_name = template.replace("127.0.0.1", "localhost")
        async with HttpTickets(other_name, lambda: BASIC, ca_file=str(tls.ca_file)) as source:
            with pytest.raises(SystemAway, match="Certificate"):
                await source.get("17")
        assert not tls.fetched
        async with HttpTickets(template, lambda: BASIC, ca_file=str(tls.ca_file)) as source:
            assert await source.get("17") == Page(body=b"{}", version=None)


async def test_an_unchanged_ticket_is_not_sent_again(server: TicketServer) -> None:
    async with server.source() as source:
        first = await source.get("17")
        assert first is not None
        assert first.version is not None
        assert await source.get("17", first.version) == Page(body=None, version=first.version)
        assert server.unchanged == 1
        server.tickets["17"] = ticket("closed")
        changed = await source.get("17", first.version)
        assert changed is not None
        assert json.loads(changed.body or b"") == ticket("closed")


async def test_what_was_said_to_other_credentials_does_not_count_as_unchanged(server: TicketServer) -> None:
    """Another user may be shown another ticket under the same ETag."""
    shown = [BASIC]
    async with server.source(lambda: shown[0]) as source:
        first = await source.get("17")
        assert first is not None
        shown[0] = server.expects = "Bearer new"
        again = await source.get("17", first.version)
        assert again is not None
        assert again.body is not None
        assert "If-None-Match" not in server.seen


@pytest.mark.parametrize("etag", ["", "x", '"', '"a', "W/x", '"a"b"', '"' + "x" * 255 + '"', '"a b"', '"a", "b"'])
async def test_an_etag_that_is_none_is_not_sent_back(server: TicketServer, etag: str) -> None:
    server.says(b"{}", ETag=etag)
    page = await got(server)
    assert page is not None
    assert page.version is None
    for good in ('"a"', 'W/"a"', '""'):
        server.says(b"{}", ETag=good)
        page = await got(server)
        assert page is not None
        assert page.version is not None


async def test_cookies_are_not_kept(server: TicketServer) -> None:
    server.says(b"{}", Set_Cookie="session=of-somebody; Path=/")
    async with server.source() as source:
        await source.get("17")
        await source.get("17")
    assert "Cookie" not in server.seen


async def test_who_goes_away_leaves_no_question_behind(server: TicketServer) -> None:
    server.hangs()
    async with server.source() as source:
        asking = asyncio.create_task(source.get("17"))
        await until(lambda: server.at_once == 1, "it was asked")
        asking.cancel()
        await asyncio.wait([asking])
        server.closing.set()
        await until(lambda: server.at_once == 0, "it has ended there")
        server.behaves()
        assert await source.get("17")
