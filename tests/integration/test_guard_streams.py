"""An answer that is still being streamed when its credential dies breaks off; one that comes in one piece is sent."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from typing import Any

import aiohttp
import pytest
from support.http_orders import (
    BASE,
    ISSUER,
    LINES,
    LISTING,
    PROVER,
    REFUND,
    Clock,
    Service,
    act,
    by_uvicorn,
    dpop,
    nearly_dead,
    order,
    serving,
    token,
)
from support.issuer import AUDIENCE, URL, guard_for
from support.processes import PATIENCE_S, until
from support.told_scope import ToldScope

from broker.guard import GuardMiddleware, Presented, Rule, Table
from broker.guard.feed import ScopeFeed

Serve = Callable[..., Awaitable[Service]]


@pytest.fixture(params=["asgi", "aiohttp"])
async def serve(request: pytest.FixtureRequest) -> AsyncIterator[Serve]:
    """The service in each of the two ways. clock: its guard's; told: who tells it of scope."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(clock: Clock, told: ToldScope | None = None) -> Service:
            scope = None
            if told is not None:
                feed = ScopeFeed(told, audiences=[AUDIENCE], max_silence=timedelta(seconds=1), clock=clock)
                scope = await stack.enter_async_context(feed)
                await scope.ready()
            checker = await guard_for(ISSUER, clock=clock, scope=scope)
            return await stack.enter_async_context(serving(request.param, checker))

        yield start


def listing(service: Service, access: str) -> Any:
    return service.open("GET", LINES, dpop(access, "GET", LINES))


async def test_invariant_8_an_idle_stream_breaks_off_when_its_credential_expires(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    """Invariant 8: nothing moves, and still it ends; its handler is cancelled."""
    caplog.set_level("INFO", "broker.guard")
    service = await serve(Clock())
    async with asyncio.timeout(PATIENCE_S), listing(service, nearly_dead(LISTING)) as response:
        assert response.status == 200
        assert await response.content.readline() == b"line 0\n"
        with pytest.raises((aiohttp.ClientPayloadError, ConnectionError)):
            await response.content.readline()
    await until(lambda: service.orders.ended, "the handler has ended")
    assert service.orders.ended == ["CancelledError"]
    (record,) = [record for record in caplog.records if record.name == "broker.guard"]
    assert (record.reason, record.args[0]) == ("expired", f"GET {LINES}, cut off")


@pytest.mark.parametrize("reason", ["revoked", "suspended", "scope_stale"])
async def test_invariant_8_an_idle_stream_breaks_off_when_the_broker_says_so_or_is_not_heard(
    serve: Serve, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Invariant 8: refused, suspended, or nothing heard for longer than `max_silence`."""
    caplog.set_level("INFO", "broker.guard")
    told = ToldScope(ISSUER)
    service = await serve(Clock(), told)
    async with (
        asyncio.timeout(PATIENCE_S),
        listing(service, token(LISTING, jti="another-token-of-the-same")) as other,
        listing(service, token(LISTING, jti="the-token-that-is-refused")) as response,
    ):
        for one in (other, response):
            assert await one.content.readline() == b"line 0\n"
        if reason == "revoked":
            told.refuse("the-token-that-is-refused", reason)
        elif reason == "suspended":
            told.suspend("the-token-that-is-refused")
        with pytest.raises((aiohttp.ClientPayloadError, ConnectionError)):
            await response.content.readline()
        if reason != "scope_stale":  # which hits all
            service.orders.more.put_nowait(b"")
            assert await other.read() == b""
    found = [record.reason for record in caplog.records if record.name == "broker.guard" and hasattr(record, "reason")]
    assert set(found) == {reason}


async def test_a_stream_whose_credential_lives_comes_to_its_end(serve: Serve) -> None:
    service = await serve(Clock())
    service.orders.more.put_nowait(b"line 1\n")
    service.orders.more.put_nowait(b"")
    async with listing(service, token(LISTING)) as response:
        assert await response.read() == b"line 0\nline 1\n"
    assert service.orders.ended == ["done"]


async def test_an_answer_in_one_piece_is_sent_though_its_credential_died_meanwhile(serve: Serve) -> None:
    """An act that was admitted is carried out, and its caller hears of it."""
    clock = Clock()
    service = await serve(clock)
    service.orders.go.clear()
    headers = dpop(token(act()), "POST", REFUND)
    async with asyncio.TaskGroup() as tasks:
        call = tasks.create_task(service.call("POST", REFUND, headers, raw=b'{"amount": 30}'))
        await until(lambda: service.orders.seen, "the handler runs")
        clock.ahead = timedelta(minutes=10)
        service.orders.go.set()
    assert call.result()[0] == 200
    late = await service.call("POST", REFUND, dpop(token(act()), "POST", REFUND), body={"amount": 30})
    assert late[1]["reason"] == "expired"


@pytest.mark.parametrize("ending", [b"", b"line 1\n"])
async def test_nothing_more_is_told_once_the_credential_is_dead(serve: Serve, ending: bytes) -> None:
    """A clock that jumps wakes nobody: the next piece finds out. An end that tells nothing is let through."""
    clock = Clock()
    service = await serve(clock)
    async with asyncio.timeout(PATIENCE_S), listing(service, token(LISTING)) as response:
        assert await response.content.readline() == b"line 0\n"
        clock.ahead = timedelta(minutes=10)
        service.orders.more.put_nowait(ending)
        if ending:
            with pytest.raises((aiohttp.ClientPayloadError, ConnectionError)):
                await response.content.readline()
        else:
            assert await response.read() == b""
    assert service.orders.ended == ["CutOff" if ending else "done"]


async def test_a_client_that_leaves_a_stream_ends_its_handler_as_without_a_guard(serve: Serve) -> None:
    service = await serve(Clock())
    async with listing(service, token(LISTING)) as response:
        assert await response.content.readline() == b"line 0\n"
        response.close()
    service.orders.more.put_nowait(b"line 1\n")
    service.orders.more.put_nowait(b"")
    await until(lambda: service.orders.ended, "the handler has ended")
    assert service.orders.ended[0] in {"done", "CancelledError", "ClientConnectionResetError"}


async def test_a_body_that_is_whole_in_its_first_piece_is_no_stream() -> None:
    """As what lies between an ASGI application and its server sends it; its end comes late, and comes."""
    end = asyncio.Event()

    async def app(_: Any, __: Any, send: Any) -> None:
        headers = [(b"Content-Length", b"5")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"whole", "more_body": True})
        await end.wait()
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        ended.append("done")

    ended: list[str] = []
    checker = await guard_for(ISSUER, clock=Clock())
    table = Table([Rule(method=("GET", "/v1/orders/{id}/lines"), action="orders.list", resource=order)])
    access, later = nearly_dead(LISTING), nearly_dead(LISTING)
    shown = Presented(token=later, proof=PROVER.proof(later, now=Clock()()), method="POST", urls=(URL,))
    dead = asyncio.create_task(checker.until_dead(await checker.admit(shown, LISTING)))
    async with (
        by_uvicorn(GuardMiddleware(app, checker, table, base_url=BASE)) as origin,
        aiohttp.ClientSession() as session,
        listing(Service(None, origin, session), access) as response,
    ):
        await dead  # and so is the other, which is not younger
        end.set()
        assert await response.read() == b"whole"
    assert ended == ["done"]
