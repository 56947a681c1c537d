"""How fast a credential that dies is refused, measured at 100 connected guards, with 10,000 live credentials.

From the moment at which the broker learns of a change (a process: of its exit) on which 100 credentials hang, to the
moment at which the last of 100 guards refuses: guard n looks at credential n. (On one approval hangs one credential, by
which all of them look.) Beside it, in turns, the bare fan-out: one
message of 200 bytes from the same server to the same connections. Guards are real (`ScopeFeed` over mutual TLS), all in
this one process, as are the clocks: both processes read CLOCK_MONOTONIC.

Then a policy that touches all 10,000: until all are suspended, until all are decided in bare decisions, and what that
does to requests meanwhile.
"""

import asyncio
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import uvloop
from support.measured import MeasuredServer
from support.receiving import claims_of

from broker._proto.actionbroker.v1 import scope_pb2, scope_pb2_grpc
from broker.credentials.action_token import VerifiedClaims
from broker.errors import BrokerError
from broker.guard import ScopeFeed

AUDIENCE = "spiffe://acme.test/service/orders"
KINDS = ("policy", "ticket", "approval", "session", "process_exit")
SIZES = {"small": (5, 200, 2, 0.5), "full": (100, 10_000, 40, 5)}  # guards, live, rounds of each kind, seconds idle
ASKED = ("process_exit.act", "spiffe://acme.test/service/other")  # by requests beside it
PATIENCE_S = 60.0


def _now() -> datetime:
    return datetime.now(UTC)


class _Source:
    """The feed over one connection of its own."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = scope_pb2_grpc.ScopeStub(channel)

    async def watch_scope(
        self, audiences: Sequence[str], *, feed: str = "", after: int = 0
    ) -> AsyncIterator[scope_pb2.WatchResponse]:
        call = self._stub.Watch(scope_pb2.WatchRequest(audiences=audiences, feed=feed, after=after))
        try:
            async for message in call:
                yield message
        finally:
            call.cancel()


class _Guards:
    """All of them, and the streams of the bare fan-out on their connections."""

    def __init__(self) -> None:
        self.feeds: list[ScopeFeed] = []
        self._heard: asyncio.Queue[float] = asyncio.Queue()
        self._listening: list[asyncio.Task[None]] = []

    @classmethod
    @asynccontextmanager
    async def connected(cls, server: MeasuredServer, count: int) -> "AsyncIterator[_Guards]":
        guards = cls()
        async with AsyncExitStack() as stack:
            for _ in range(count):
                channel = await stack.enter_async_context(server.channel())
                feed = ScopeFeed(_Source(channel), audiences=[AUDIENCE])
                guards.feeds.append(await stack.enter_async_context(feed))
                guards._listening.append(asyncio.create_task(guards._listen(channel)))
            async with asyncio.timeout(PATIENCE_S):
                for feed in guards.feeds:
                    await feed.ready()
                for _ in guards.feeds:
                    await guards._heard.get()
            try:
                yield guards
            finally:
                for task in guards._listening:
                    task.cancel()
                await asyncio.wait(guards._listening)

    async def _listen(self, channel: grpc.aio.Channel) -> None:
        async for _ in channel.unary_stream("/bench.Fan/Listen")(b""):
            self._heard.put_nowait(time.monotonic())

    async def fan(self, server: MeasuredServer) -> float:
        """Seconds from the first write to the last read."""
        written = (await asyncio.to_thread(server.ask, "fan"))["written"]
        async with asyncio.timeout(PATIENCE_S):
            return max([await self._heard.get() for _ in self.feeds]) - written

    async def all_refuse(self, claims: Sequence[VerifiedClaims]) -> float:
        """When the last of them refused its credential; guard n looks at credential n."""
        async with asyncio.timeout(PATIENCE_S):
            pairs = zip(self.feeds, claims, strict=False)
            return max(await asyncio.gather(*(_refuses(feed, one) for feed, one in pairs)))


async def _refuses(feed: ScopeFeed, claims: VerifiedClaims) -> float:
    with feed.changes() as changed:
        while not _reason(feed, claims):
            changed.clear()
            await changed.wait()
        return time.monotonic()


def _reason(feed: ScopeFeed, claims: VerifiedClaims) -> str:
    try:
        feed.require(claims, _now())
    except BrokerError as error:
        return error.reason
    return ""


async def _one(server: MeasuredServer, guards: _Guards, kind: str) -> float:
    """Seconds from learning to the last refusal."""
    hanging = 1 if kind == "approval" else 100
    tokens = (await asyncio.to_thread(server.ask, f"mint {kind} {hanging}"))["tokens"]
    claims: list[Any] = [claims_of(token) for token in tokens] * (100 // hanging)
    if any(_reason(feed, one) for feed, one in zip(guards.feeds, claims, strict=False)):
        raise RuntimeError(f"{kind}: refused before anything changed")
    waiting = asyncio.create_task(guards.all_refuse(claims))
    await asyncio.sleep(0)
    learned = (await asyncio.to_thread(server.ask, f"change {kind}"))["learned"]
    refused = await waiting
    await asyncio.to_thread(server.ask, "idle")
    return refused - learned


def _quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(int(len(values) * share), len(values) - 1)]


async def _mass(server: MeasuredServer, caller: MeasuredServer, guards: _Guards, seconds: float) -> dict[str, float]:
    """A policy that touches all: once with nothing beside it, and once beside requests."""
    sample: list[Any] = [claims_of(one) for one in (await _ask(server, "mint many 100"))["tokens"]]
    bare = (await _ask(server, "bare 1000"))["seconds"]
    waiting = asyncio.create_task(guards.all_refuse(sample))
    await asyncio.sleep(0)
    learned = (await _ask(server, "change all"))["learned"]
    ended = await _ask(server, "idle")
    refused = await waiting
    await _ask(caller, "begin")
    await asyncio.sleep(seconds)
    idle = (await _ask(caller, "end"))["took"]
    again = (await _ask(server, "change all"))["learned"]
    await _ask(caller, "begin")  # the folder was read and compiled by now, which is another matter
    busily = await _ask(server, "idle")
    busy = (await _ask(caller, "end"))["took"]
    return {
        "suspended": refused - learned,
        "decided": (ended["at"] - learned) / (ended["live"] * bare),
        "seconds": ended["at"] - learned,
        "busy_seconds": busily["at"] - again,
        "idle": _quantile(idle, 0.99),
        "busy": _quantile(busy, 0.99),
    }


async def _ask(process: MeasuredServer, command: str) -> dict[str, Any]:
    return await asyncio.to_thread(process.ask, command)


async def _measure(server: MeasuredServer, size: str) -> list[dict[str, Any]]:
    count, live, rounds, seconds = SIZES[size]
    await asyncio.to_thread(server.ask, f"fill {live}")
    took: dict[str, list[float]] = {kind: [] for kind in KINDS}
    fans: list[float] = []
    async with _Guards.connected(server, count) as guards:
        for _ in range(2):
            await guards.fan(server)
        for _ in range(rounds):
            for kind in KINDS:
                fans.append(await guards.fan(server))
                took[kind].append(await _one(server, guards, kind))
        with MeasuredServer("support.scope_caller", server.folder, str(server.port), *ASKED) as caller:
            mass = await _mass(server, caller, guards, seconds)
    bytes_each = (await asyncio.to_thread(server.ask, f"memory {live * 10}"))["bytes"]
    bare = _quantile(fans, 0.99)
    rows = []
    for kind, values in took.items():
        p50, p99 = statistics.median(values), _quantile(values, 0.99)
        rows += [
            _row(f"refuse_ms_{kind}", p50 * 1e3, "ms p50", 50.0),
            _row(f"refuse_ms_{kind}_p99", p99 * 1e3, "ms"),
            _row(f"refuse_ms_{kind}_worst", max(values) * 1e3, "ms"),
            _row(f"refuse_{kind}_p99_per_bare_fanout", p99 / bare, "ratio", 3.0),
        ]
    return [
        *rows,
        _row("bare_fanout_ms_p50", statistics.median(fans) * 1e3, "ms"),
        _row("bare_fanout_ms_p99", bare * 1e3, "ms"),
        _row("mass_suspend_ms", mass["suspended"] * 1e3, "ms", 3 * bare * 1e3),
        _row("mass_decide_per_bare_decisions", mass["decided"], "ratio", 2.0),
        _row("mass_decide_s", mass["seconds"], "s"),
        _row("mass_decide_beside_requests_s", mass["busy_seconds"], "s"),
        _row("mass_request_p99_ms", mass["busy"] * 1e3, "ms"),
        _row("mass_request_p99_per_idle", mass["busy"] / mass["idle"], "ratio", 2.0),
        _row("live_set_bytes_each", bytes_each, "bytes"),
    ]


def measure(size: str) -> list[dict[str, Any]]:
    """size: "small" or "full". Rows of {name, value, unit, bound, holds}."""
    run: Callable[[Awaitable[Any]], Any]
    with (
        tempfile.TemporaryDirectory() as folder,
        MeasuredServer("support.scope_server", Path(folder)) as server,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        run = runner.run  # type: ignore[assignment]
        return run(_measure(server, size))


def _row(name: str, value: float, unit: str, bound: float | None = None) -> dict[str, Any]:
    return {"name": name, "value": value, "unit": unit, "bound": bound, "holds": bound is None or value <= bound}
