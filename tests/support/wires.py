"""Watching scope as whoever one likes, over mutual TLS, and a wire that can be cut and mended."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Self

import grpc
from support.processes import PATIENCE_S
from support.whole_broker import BROKER, Whole, dialled, utc_now

from broker._proto.actionbroker.v1 import scope_pb2, scope_pb2_grpc
from broker.errors import Reason, Unavailable
from broker.identity.spiffe_id import SpiffeId
from broker.identity.tls_dial import SpiffeDialer
from broker.identity.trust import TrustSnapshot
from broker.status import DETAILS, reason_of


class Cut:
    """Passes bytes on to a port of this machine. cut: ends what is open, and takes nothing. hold: passes nothing on."""

    def __init__(self, port: int) -> None:
        self._to, self.port, self.is_cut = port, 0, False
        self._open: set[asyncio.Task[Any]] = set()
        self._passes = asyncio.Event()
        self._passes.set()
        self.opened = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._pass_on, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cut()
        self._server.close()
        if self._open:
            await asyncio.wait(self._open)

    def cut(self) -> None:
        self.is_cut = True
        for task in self._open:
            task.cancel()

    def mend(self, port: int = 0) -> None:
        """port: where it leads from now on."""
        self._to, self.is_cut = port or self._to, False
        self._passes.set()

    def hold(self) -> None:
        self._passes.clear()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        self.opened += 1
        try:
            if not self.is_cut:
                theirs, out = await asyncio.open_connection("127.0.0.1", self._to)
                with contextlib.closing(out):
                    async with asyncio.TaskGroup() as both:
                        both.create_task(self._pump(reader, out))
                        both.create_task(self._pump(theirs, writer))
        except (OSError, asyncio.CancelledError, ExceptionGroup):
            pass
        finally:
            self._open.discard(task)
            writer.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            await self._passes.wait()
            writer.write(data)
            await writer.drain()
        raise ConnectionResetError("the other side has gone")


class Watcher:
    """Whoever has this connection."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel

    def watch(self, *audiences: str, feed: str = "", after: int = 0) -> Any:
        """The call. Read it, or do not."""
        request = scope_pb2.WatchRequest(audiences=audiences, feed=feed, after=after)
        return scope_pb2_grpc.ScopeStub(self.channel).Watch(request)


@asynccontextmanager
async def watcher(whole: Whole, path: str = "service/orders", **how: Any) -> AsyncIterator[Watcher]:
    """The workload with this path. how: as in TrustDomainProcess.svid."""
    async with whole.mtls(whole.domain.svid(path, **how)) as wire:
        yield Watcher(wire.channel)


@asynccontextmanager
async def narrow(whole: Whole, path: str = "service/orders") -> AsyncIterator[Watcher]:
    """The same, with a window of 64 KiB; gRPC by itself widens it to 6 MB where somebody reads."""
    snapshot = whole.domain.svid(path)
    dialer = SpiffeDialer(f"127.0.0.1:{whole.broker.grpc_port}", SpiffeId.parse(BROKER), lambda: snapshot, utc_now)
    options = [("grpc.default_authority", "localhost"), ("grpc.http2.bdp_probe", 0)]
    try:
        async with grpc.aio.insecure_channel(await dialer.start(), options) as channel:
            yield Watcher(channel)
    finally:
        await dialer.close()


async def told(call: Any, count: int = 1) -> list[scope_pb2.WatchResponse]:
    """The next messages. Raises: AioRpcError."""
    async with asyncio.timeout(PATIENCE_S):
        return [await call.read() for _ in range(count)]


async def ended(call: Any) -> tuple[str, grpc.StatusCode]:
    """Reads on until the broker ends it: with which reason, and code."""
    async with asyncio.timeout(PATIENCE_S):
        try:
            while await call.read() is not grpc.aio.EOF:
                pass
        except grpc.aio.AioRpcError as error:
            trailers = dict(error.trailing_metadata() or ())
            return str(reason_of(trailers.get(DETAILS, b"")) or ""), error.code()
    return "", grpc.StatusCode.OK


class Wired:
    """A source of scope for a guard: `snapshot`, through the wire to this port. asked: where it went on, each time."""

    def __init__(self, port: int, snapshot: TrustSnapshot) -> None:
        self.port, self._snapshot = port, snapshot
        self.asked: list[tuple[str, int]] = []

    async def watch_scope(
        self, audiences: Sequence[str], *, feed: str = "", after: int = 0
    ) -> AsyncIterator[scope_pb2.WatchResponse]:
        self.asked.append((feed, after))
        async with dialled(self.port, self._snapshot) as wire:
            try:
                async for message in Watcher(wire.channel).watch(*audiences, feed=feed, after=after):
                    yield message
            except grpc.aio.AioRpcError as error:
                raise Unavailable(Reason.BROKER_UNREACHABLE, error.details() or "") from error
