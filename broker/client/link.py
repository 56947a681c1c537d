"""One channel to the broker: proves our key in each call, keeps the nonces, repeats what is safe."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Generic, Protocol, TypeVar
from urllib.parse import urlsplit

import grpc

from broker._proto.actionbroker.v1 import approvals_pb2_grpc, broker_pb2_grpc, scope_pb2_grpc
from broker.action import check_uri
from broker.client.faults import RefusedByBroker, Unreachable, from_rpc, late
from broker.client.nonces import Nonce, NoncePool
from broker.client.repeat import repeat
from broker.credentials.dpop import ProofKey
from broker.errors import BrokerError, Invalid, Reason

SERVICE: Final = "actionbroker.v1.ActionBroker"
APPROVALS: Final = "actionbroker.v1.Approvals"
SCOPE: Final = "actionbroker.v1.Scope"
PROOF: Final = "dpop"
NONCE: Final = "dpop-nonce"
SILENCE_MS: Final = 5_000
"""Of a connection with calls on it: after so long it is asked whether it lives, and after so long again given up."""
MAX_ANSWER: Final = 8 * 1024 * 1024  # bytes: 256 tokens of 16 KiB, and the rest of a batch's answer
_Q = TypeVar("_Q")
_R = TypeVar("_R")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stubs:
    """The broker's services over one channel."""

    broker: "broker_pb2_grpc.ActionBrokerAsyncStub"
    approvals: "approvals_pb2_grpc.ApprovalsAsyncStub"
    scope: "scope_pb2_grpc.ScopeAsyncStub"


@dataclass(frozen=True, slots=True, kw_only=True)
class Method(Generic[_Q, _R]):
    """A unary method: its name, which its proofs name too, and where it is in the stubs (renewed with the channel)."""

    name: str
    of: "Callable[[Stubs], grpc.aio.UnaryUnaryMultiCallable[_Q, _R]]"
    service: str = SERVICE


@dataclass(frozen=True, slots=True, kw_only=True)
class Feed(Generic[_Q, _R]):
    """The same for a method that answers with a stream."""

    name: str
    of: "Callable[[Stubs], grpc.aio.UnaryStreamMultiCallable[_Q, _R]]"
    service: str = SERVICE


class Hop(Protocol):
    """What dials the broker and checks who it is (broker/identity/tls_dial.py). gRPC talks to it in the clear."""

    @property
    def last_error(self) -> str | None:
        """Why the last connection was not made, in a sentence for people."""

    async def start(self) -> str:
        """Begins to listen. Returns the gRPC target."""

    async def close(self) -> None:
        """Cuts every connection."""


def authority_of(issuer: str) -> str:
    """The host and port under which proofs name the broker. Raises: Invalid unless `issuer` is an https URL."""
    check_uri(issuer, "issuer")
    parts = urlsplit(issuer)
    if parts.scheme != "https":
        raise Invalid("issuer is not an https URL: give the `issuer` of the broker's configuration")
    return parts.netloc


class Link:
    """A channel through `hop`. Belongs to the event loop that it was opened in.

    generation: counts the channels; a stream of an older one should end.
    where: the broker's address, for messages. authority: the host in what proofs are for. key: None where the
    connection itself (mutual TLS) proves who calls.
    """

    def __init__(self, hop: Hop, *, where: str, authority: str, key: ProofKey | None) -> None:
        self.where, self.key, self.nonces = where, key, NoncePool()
        self._hop, self._authority = hop, authority
        self._target, self.generation = "", 0
        self._channels: list[grpc.aio.Channel] = []  # the last one is in use, the others end
        self._endings: set[asyncio.Task[None]] = set()
        self._closed = False
        self.stubs: Stubs  # of the newest channel

    async def open(self) -> None:
        """Makes the channel. It connects with the first call."""
        self._target = await self._hop.start()
        self._renew()

    async def close(self) -> None:
        """Ends every call and connection."""
        self._closed = True
        for ending in self._endings:
            ending.cancel()
        if self._endings:
            await asyncio.wait(self._endings)
        await asyncio.gather(*(channel.close() for channel in self._channels))
        await self._hop.close()

    def renew(self, grace_s: float) -> None:
        """Makes the next calls on a new connection, as who we are now. Calls on the old one have `grace_s` to end."""
        ending = asyncio.create_task(self._end(self._channels[-1], grace_s), name="client-old-channel")
        self._endings.add(ending)
        ending.add_done_callback(self._endings.discard)
        self._renew()

    async def _end(self, channel: grpc.aio.Channel, grace_s: float) -> None:
        await asyncio.sleep(grace_s)  # not gRPC's own grace, which cannot be cut short
        await channel.close()
        self._channels.remove(channel)

    def _renew(self) -> None:
        self.generation += 1
        channel = grpc.aio.insecure_channel(
            self._target,
            options=[
                ("grpc.default_authority", self._authority),
                ("grpc.use_local_subchannel_pool", 1),  # never another client's connection, which proves another caller
                ("grpc.enable_retries", 0),  # a repeated proof is a replayed proof: we make a new one for each attempt
                ("grpc.http2.bdp_probe", 0),  # a ping beside each answer, to size windows that a token never fills
                ("grpc.initial_reconnect_backoff_ms", 100),
                ("grpc.max_reconnect_backoff_ms", 2000),
                ("grpc.max_receive_message_length", MAX_ANSWER),
                ("grpc.keepalive_time_ms", SILENCE_MS),
                ("grpc.http2.ping_timeout_ms", SILENCE_MS),
                ("grpc.http2.max_pings_without_data", 0),  # who listens to a feed sends none
            ],
        )
        self._channels.append(channel)
        self.stubs = Stubs(
            broker=broker_pb2_grpc.ActionBrokerStub(channel),
            approvals=approvals_pb2_grpc.ApprovalsStub(channel),
            scope=scope_pb2_grpc.ScopeStub(channel),
        )

    def proof(self, name: str, nonce: Nonce | None, service: str = SERVICE) -> str:
        """A proof for one call of method `name` (RFC 9449; WIRE: always POST, as gRPC is). "" without a key."""
        if self.key is None:
            return ""
        url = f"https://{self._authority}/{service}/{name}"
        return self.key.prove("POST", url, datetime.now(UTC), nonce=nonce.value if nonce else None)

    def keep_nonce(self, metadata: Iterable[tuple[str, str | bytes]] | None) -> None:
        """Takes the nonce out of an answer's metadata, if there is one."""
        for name, value in metadata or ():
            if name == NONCE and isinstance(value, str):
                self.nonces.put(value)

    def fault(self, error: grpc.aio.AioRpcError, seconds: float) -> BrokerError:
        """What a failed call means to its caller. seconds: the deadline it had."""
        return from_rpc(error, where=self.where, seconds=seconds, last_error=self._hop.last_error)

    def late(self, seconds: float) -> Unreachable:
        """For an answer that did not come in time."""
        return late(self.where, seconds, self._hop.last_error)

    def was_cut(self) -> Unreachable:
        """For a call whose channel was closed under it."""
        why = "the client was closed" if self._closed else "its connection ended"
        return Unreachable(f"the call to {self.where} was cut: {why}", may_retry=not self._closed)

    def require_open(self) -> None:
        """Raises: Unreachable once this is closed."""
        if self._closed:
            raise self.was_cut()

    def wants_nonce(self, error: BrokerError, nonce: Nonce | None) -> bool:
        """Whether to ask again: the broker wanted another nonce than `nonce`, and gave one. Nothing was decided yet."""
        if not isinstance(error, RefusedByBroker) or error.reason is not Reason.NONCE_REQUIRED:
            return False
        self.nonces.refused(nonce)
        return self.key is not None and len(self.nonces) > 0

    async def call(self, method: Method[_Q, _R], request: _Q, seconds: float) -> _R:
        """The answer of a unary method. Raises: BrokerError."""
        clock = asyncio.get_running_loop().time

        async def attempt(left: float) -> _R:
            until, nonce = clock() + left, self.nonces.take()
            try:
                return await self._once(method, request, nonce, until - clock(), seconds)
            except RefusedByBroker as error:
                if not self.wants_nonce(error, nonce):
                    raise
            return await self._once(method, request, self.nonces.take(), until - clock(), seconds)

        return await repeat(attempt, seconds)

    async def _once(self, method: Method[_Q, _R], request: _Q, nonce: Nonce | None, left: float, seconds: float) -> _R:
        self.require_open()
        proof = self.proof(method.name, nonce, method.service)
        metadata = ((PROOF, proof),) if proof else ()
        call = method.of(self.stubs)(request, timeout=max(left, 0.001), metadata=metadata)
        try:
            answer = await call
        except grpc.aio.AioRpcError as error:
            self.keep_nonce(error.initial_metadata())
            self.keep_nonce(error.trailing_metadata())
            raise self.fault(error, seconds) from error
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise self.was_cut() from None  # gRPC's own way to say that the channel was closed
        self.keep_nonce(await call.trailing_metadata())
        return answer

    async def feed(self, method: Feed[_Q, _R], request: _Q, seconds: float) -> AsyncGenerator[_R]:
        """The answers of a streaming method until it ends, or `seconds` are over and there was one.

        Raises: BrokerError.
        """
        clock = asyncio.get_running_loop().time
        until, nonce = clock() + seconds, self.nonces.take()
        for last in (False, True):
            attempt = self._feed_once(method, request, nonce, until - clock(), seconds)
            try:
                async with contextlib.aclosing(attempt) as answers:
                    async for answer in answers:
                        yield answer
            except RefusedByBroker as error:
                if last or not self.wants_nonce(error, nonce):
                    raise
                nonce = self.nonces.take()
            else:
                return

    async def _feed_once(
        self, method: Feed[_Q, _R], request: _Q, nonce: Nonce | None, left: float, seconds: float
    ) -> AsyncGenerator[_R]:
        self.require_open()
        proof = self.proof(method.name, nonce, method.service)
        call = method.of(self.stubs)(request, timeout=max(left, 0.001), metadata=((PROOF, proof),) if proof else ())
        came = False
        try:
            async for answer in call:
                if not came:  # with the nonce for what is asked while this goes on
                    self.keep_nonce(await call.initial_metadata())
                came = True
                yield answer
            self.keep_nonce(await call.trailing_metadata())
        except grpc.aio.AioRpcError as error:
            self.keep_nonce(error.initial_metadata())
            self.keep_nonce(error.trailing_metadata())
            if not came or error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
                raise self.fault(error, seconds) from error
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise self.was_cut() from None  # as in `_once`
        finally:
            call.cancel()
