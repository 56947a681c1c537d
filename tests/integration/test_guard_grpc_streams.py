"""A gRPC call that streams ends when its credential dies, whatever it waits for; one that does not is carried out."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from support.issuer import AUDIENCE, CALLER, Issuer, guard_for, x5t
from support.pki import CA, der
from support.processes import PATIENCE_S, until
from support.told_scope import ToldScope

from broker.action import Action
from broker.errors import Reason
from broker.guard import GuardInterceptor, Rule, ScopeFeed, Table
from broker.status import CORRELATION_ID, DETAILS, STATUS, reason_of

AUTHORITY, SERVICE = "orders.acme.test", "acme.Streams"
ISSUER = Issuer()
ACT = Action("orders.refund", "https://orders.acme.test/v1/orders/17", AUDIENCE)
STREAMS = ("Lines", "WriteLines", "Flood", "Upload", "ReadUpload", "Talk", "WriteTalk")
DYING, OTHER = "the-token-that-dies", "another-token"


class Clock:
    """The guard's."""

    def __init__(self) -> None:
        self.ahead = timedelta()

    def __call__(self) -> datetime:
        return datetime.now(UTC) + self.ahead


class Service:
    """Handlers that go on until they are told to stop. begun, ended: in order; how each ended."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.ended: list[str] = []
        self.stop = asyncio.Event()

    @contextlib.contextmanager
    def _runs(self, name: str) -> Any:
        self.begun.append(name)
        try:
            yield
        except BaseException as error:
            self.ended.append(type(error).__name__)
            raise
        self.ended.append("done")

    async def lines(self, _: bytes, __: Any) -> AsyncIterator[bytes]:
        with self._runs("Lines"):
            yield b"line 0"
            await self.stop.wait()
            yield b"line 1"

    async def write_lines(self, _: bytes, context: Any) -> None:
        with self._runs("WriteLines"):
            await context.write(b"line 0")
            await self.stop.wait()
            await context.write(b"line 1")

    async def flood(self, _: bytes, __: Any) -> AsyncIterator[bytes]:
        """To a client that reads one message and no more: what is waited for is its window."""
        with self._runs("Flood"):
            yield b"line 0"
            while not self.stop.is_set():
                yield b"x" * 2**20

    async def stubborn(self, _: bytes, __: Any) -> AsyncIterator[bytes]:
        """Goes on when it is cancelled, as a handler does that reconnects after whatever happens."""
        yield b"line 0"
        while not self.stop.is_set():
            with contextlib.suppress(BaseException):
                await asyncio.sleep(0.01)
            yield b"line"

    async def stubborn_writes(self, _: bytes, context: Any) -> None:
        """The same, and it writes."""
        await context.write(b"line 0")
        while not self.stop.is_set():
            with contextlib.suppress(BaseException):
                await asyncio.sleep(0.01)
            await context.write(b"line")

    async def upload(self, requests: AsyncIterator[bytes], context: Any) -> bytes:
        with self._runs("Upload"):
            await context.send_initial_metadata(())
            return b",".join([message async for message in requests])

    async def read_upload(self, _: Any, context: Any) -> bytes:
        with self._runs("ReadUpload"):
            await context.send_initial_metadata(())
            found = []
            while (message := await context.read()) is not grpc.aio.EOF:
                found.append(message)
            return b",".join(found)

    async def talk(self, requests: AsyncIterator[bytes], _: Any) -> AsyncIterator[bytes]:
        with self._runs("Talk"):
            async for message in requests:
                yield message

    async def write_talk(self, _: Any, context: Any) -> None:
        with self._runs("WriteTalk"):
            while (message := await context.read()) is not grpc.aio.EOF:
                await context.write(message)

    async def refund(self, request: bytes, _: Any) -> bytes:
        with self._runs("Refund"):
            await self.stop.wait()
            return request

    def handlers(self) -> dict[str, Any]:
        kinds = {
            "Lines": (self.lines, "unary_stream"),
            "WriteLines": (self.write_lines, "unary_stream"),
            "Flood": (self.flood, "unary_stream"),
            "Stubborn": (self.stubborn, "unary_stream"),
            "StubbornWrites": (self.stubborn_writes, "unary_stream"),
            "Upload": (self.upload, "stream_unary"),
            "ReadUpload": (self.read_upload, "stream_unary"),
            "Talk": (self.talk, "stream_stream"),
            "WriteTalk": (self.write_talk, "stream_stream"),
            "Refund": (self.refund, "unary_unary"),
        }
        return {
            name: getattr(grpc, f"{kind}_rpc_method_handler")(behaviour) for name, (behaviour, kind) in kinds.items()
        }


class Guarded:
    """The service behind a guard that hears `told`, and a caller of it."""

    def __init__(self, service: Service, told: ToldScope, clock: Clock, channel: grpc.aio.Channel, leaf: bytes) -> None:
        self.service, self.told, self.clock, self.channel, self._leaf = service, told, clock, channel, leaf

    def token(self, jti: str, *, age_s: float = 0) -> str:
        """One that is good for 200 s from when it was given."""
        given = self.clock() - timedelta(seconds=age_s)
        ends = int(given.timestamp()) + 200
        return ISSUER.token(ACT, jti=jti, use="ttl", now=given, exp=ends, cnf=x5t(self._leaf))

    def call(self, method: str, jti: str = DYING, **how: float) -> Any:
        """One that has begun: its first message is on the way."""
        sent = [("authorization", f"Bearer {self.token(jti, **how)}")]
        path = f"/{SERVICE}/{method}"
        if method in {"Lines", "WriteLines", "Flood", "Stubborn", "StubbornWrites"}:
            return self.channel.unary_stream(path)(b"17", metadata=sent)
        if method == "Refund":
            return self.channel.unary_unary(path)(b"17", metadata=sent)
        if method in {"Upload", "ReadUpload"}:
            return self.channel.stream_unary(path)(metadata=sent)
        return self.channel.stream_stream(path)(metadata=sent)

    async def begun(self, method: str, jti: str = DYING, **how: float) -> Any:
        """The same, and its handler has it."""
        before = len(self.service.begun)
        call = self.call(method, jti, **how)
        if method not in {"Lines", "WriteLines", "Flood", "Refund"}:
            await call.write(b"17")
        await until(lambda: len(self.service.begun) > before, "the handler runs")
        if method not in {"Upload", "ReadUpload", "Refund"}:
            assert await call.read() in {b"line 0", b"17"}
        return call


async def ends(call: Any, *, after: Callable[[], object] = lambda: True) -> str:
    """The reason with which a call is ended while nothing moves, checked against its code.

    after: what has to hold before its client reads on; gRPC tells the end after what was sent before.
    """
    await until(after, "it has ended before its client read on")
    async with asyncio.timeout(PATIENCE_S):
        if hasattr(call, "read"):
            with contextlib.suppress(grpc.aio.AioRpcError):
                while await call.read() is not grpc.aio.EOF:
                    pass
        code = await call.code()
        trailers = dict(await call.trailing_metadata())
    reason = reason_of(trailers[DETAILS])
    assert code is STATUS[reason].grpc
    assert await call.details() == str(reason)  # and nothing else: invariant 9
    assert len(trailers[CORRELATION_ID]) == 32
    return reason


def resource(message: bytes) -> str:
    return f"https://orders.acme.test/v1/orders/{message.decode().split('/')[0]}"


@pytest.fixture
async def guarded() -> AsyncIterator[Guarded]:
    clock, told, service, ca = Clock(), ToldScope(ISSUER), Service(), CA(now=datetime.now(UTC))
    rules = [
        Rule(method=f"/{SERVICE}/{name}", action="orders.refund", resource=resource) for name in service.handlers()
    ]
    async with ScopeFeed(told, audiences=[AUDIENCE], max_silence=timedelta(seconds=60), clock=clock) as scope:
        await scope.ready()
        guard = await guard_for(ISSUER, clock=clock, scope=scope)
        server = grpc.aio.server(interceptors=[GuardInterceptor(guard, Table(rules), authorities=[AUTHORITY])])
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, service.handlers()),))
        own, caller = ca.svid(AUDIENCE, dns=[AUTHORITY]), ca.svid(CALLER)
        root = ca.certificate.public_bytes(Encoding.PEM)
        port = server.add_secure_port(
            "127.0.0.1:0",
            grpc.ssl_server_credentials([(own.key_pem, own.chain_pem)], root, require_client_auth=True),
        )
        await server.start()
        credentials = grpc.ssl_channel_credentials(root, caller.key_pem, caller.chain_pem)
        options = [("grpc.ssl_target_name_override", AUTHORITY)]
        async with grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials, options) as channel:
            yield Guarded(service, told, clock, channel, der(caller.leaf))
        await server.stop(None)


Dies = Callable[[Guarded], None]
WAYS: dict[str, Dies] = {
    Reason.SESSION_RISK: lambda found: found.told.refuse(DYING, "session_risk"),
    Reason.REVOKED: lambda found: found.told.refuse(DYING, "of_a_newer_broker"),
    Reason.SUSPENDED: lambda found: found.told.suspend(DYING),
}


@pytest.mark.parametrize("reason", WAYS)
@pytest.mark.parametrize("method", STREAMS)
async def test_invariant_8_a_stream_ends_when_its_credential_is_refused_and_no_other_does(
    guarded: Guarded, method: str, reason: str
) -> None:
    """Invariant 8: while nothing moves, in whichever direction it streams; also where the client does not read."""
    other = await guarded.begun("Talk", OTHER)
    call = await guarded.begun(method)
    WAYS[reason](guarded)
    assert await ends(call, after=lambda: guarded.service.ended) == reason
    assert guarded.service.ended == ["GeneratorExit" if method == "Flood" else "CancelledError"]
    await other.write(b"17/more")
    assert await other.read() == b"17/more"


@pytest.mark.parametrize("method", STREAMS)
async def test_invariant_3_a_stream_ends_when_its_credential_expires(guarded: Guarded, method: str) -> None:
    """Invariant 3, with 5 s of leeway, of which all but a moment has gone when it begins."""
    call = await guarded.begun(method, age_s=204)
    assert await ends(call, after=lambda: guarded.service.ended) == Reason.EXPIRED


@pytest.mark.parametrize("method", STREAMS)
async def test_invariant_8_a_stream_ends_when_nothing_is_heard_from_the_broker(guarded: Guarded, method: str) -> None:
    """Invariant 8: a silent feed, and a guard whose clock has left the broker's alike."""
    call = await guarded.begun(method)
    guarded.clock.ahead = timedelta(seconds=70)
    assert await ends(call, after=lambda: guarded.service.ended) == Reason.SCOPE_STALE


@pytest.mark.parametrize("reason", WAYS)
async def test_a_call_that_does_not_stream_is_carried_out(guarded: Guarded, reason: str) -> None:
    """What was admitted is done, and its caller hears of it; the next one is refused."""
    call = guarded.call("Refund")
    await until(lambda: guarded.service.begun, "the handler runs")
    stream = await guarded.begun("Talk")
    WAYS[reason](guarded)
    assert await ends(stream) == reason, "it is known by now"
    guarded.service.stop.set()
    async with asyncio.timeout(PATIENCE_S):
        assert await call == b"17"
    assert await ends(guarded.call("Refund")) == reason


async def test_a_stream_whose_credential_lives_comes_to_its_end(guarded: Guarded) -> None:
    calls = [await guarded.begun(method, OTHER) for method in ("Lines", "WriteLines")]
    upload = await guarded.begun("Upload", OTHER)
    guarded.told.refuse(DYING, "denied")
    guarded.service.stop.set()
    async with asyncio.timeout(PATIENCE_S):
        for call in calls:
            assert await call.read() == b"line 1"
            assert await call.code() is grpc.StatusCode.OK
        await upload.write(b"17/b")
        await upload.done_writing()
        assert await upload == b"17,17/b"


async def test_a_stream_that_is_begun_with_a_dead_credential_does_not_begin(guarded: Guarded) -> None:
    guarded.told.refuse(DYING, "denied")
    stream = await guarded.begun("Talk", OTHER)
    call = guarded.call("Lines")
    assert await ends(call) == Reason.DENIED
    assert guarded.service.begun == ["Talk"]
    await stream.write(b"17/on")
    assert await stream.read() == b"17/on"


@pytest.mark.parametrize("method", ["Stubborn", "StubbornWrites"])
async def test_a_handler_that_swallows_its_end_tells_nothing_more(guarded: Guarded, method: str) -> None:
    call = guarded.call(method)
    assert await call.read() == b"line 0"
    assert await call.read() == b"line"
    guarded.told.refuse(DYING, "session_risk")
    try:
        assert await ends(call) == Reason.SESSION_RISK
    finally:
        guarded.service.stop.set()
