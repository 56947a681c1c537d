"""Many requests over one call: the cheapest way to make thousands a second, from as many tasks as you like."""

import asyncio
import itertools
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final, Self

import grpc

from broker._proto.actionbroker.v1 import broker_pb2
from broker.action import Action
from broker.client.faults import RefusedByBroker, refusal
from broker.client.link import Link
from broker.client.repeat import repeat
from broker.client.token import ActionToken, Holder
from broker.client.wire import to_wire
from broker.errors import BrokerError

METHOD: Final = "StreamActionTokens"
MAX_IN_FLIGHT: Final = 64  # what the broker works on at once for one stream; the others wait here for their turn

_Request = broker_pb2.StreamActionTokensRequest
_Response = broker_pb2.StreamActionTokensResponse


class TokenStream:
    """Requests over one stream. Safe to use from many tasks at once; a broken stream is opened again when needed."""

    def __init__(self, link: Link, holder: Holder, *, spiffe_id: str, seconds: float) -> None:
        self._link, self._holder, self._spiffe_id, self._seconds = link, holder, spiffe_id, seconds
        self._ids = itertools.count(1)
        self._newest: _Call | None = None
        self._calls: list[_Call] = []
        self._entered = False

    async def __aenter__(self) -> Self:
        self._entered = True
        return self

    async def __aexit__(self, *_: object) -> None:
        self._entered = False
        await asyncio.gather(*(call.close() for call in self._calls))

    async def request(
        self,
        name: str,
        resource: str,
        audience: str,
        parameters: Mapping[str, Any] | None = None,
        *,
        ticket: str = "",
        session: str = "",
        deadline_s: float | None = None,
    ) -> ActionToken:
        """As `Client.request`."""
        action = Action(name, resource, audience, parameters or {})
        return await self.request_action(action, ticket=ticket, session=session, deadline_s=deadline_s)

    async def request_action(
        self, action: Action, *, ticket: str = "", session: str = "", deadline_s: float | None = None
    ) -> ActionToken:
        """As `Client.request_action`."""
        wire = to_wire(action)
        seconds = self._seconds if deadline_s is None else deadline_s

        def message(proof: str) -> _Request:
            return _Request(
                action=wire,
                spiffe_id=self._spiffe_id,
                dpop=proof,
                message_id=next(self._ids),
                ticket=ticket,
                session=session,
            )

        async def attempt(left: float) -> broker_pb2.ActionTokenResult:
            try:
                async with asyncio.timeout(left):
                    return await self._call().ask(message, seconds)
            except TimeoutError:
                raise self._link.late(seconds) from None

        result = await repeat(attempt, seconds)
        return self._holder.take(result.token, action, result.correlation_id)

    def _call(self) -> "_Call":
        if not self._entered:
            raise RuntimeError("make requests inside `async with broker.stream() as stream:`")
        if self._newest is None or self._newest.is_over:
            if self._newest is not None:
                self._newest.retire()
            self._newest = _Call(self._link)
            self._calls = [*(call for call in self._calls if not call.has_ended), self._newest]
        return self._newest


class _Call:
    """One gRPC call of the stream: writes in order, and hands each answer to the one that asked.

    Two tasks own the call, so that a caller who gives up cancels its own request and not everybody's stream.
    """

    def __init__(self, link: Link) -> None:
        self._link, self._generation = link, link.generation
        self._places = asyncio.Semaphore(MAX_IN_FLIGHT)
        self._outgoing: asyncio.Queue[_Request] = asyncio.Queue()  # bounded by the places
        self._waiting: dict[int, asyncio.Future[_Response | None]] = {}
        self._retired = self.has_ended = False
        self._fault: Callable[[float], BrokerError] = lambda _: link.was_cut()
        link.require_open()
        self._call = link.stubs.broker.StreamActionTokens(metadata=())
        self._writer = asyncio.create_task(self._write(), name="token-stream-writer")
        self._reader = asyncio.create_task(self._read(), name="token-stream-reader")

    @property
    def is_over(self) -> bool:
        """Whether new requests belong on another call."""
        return self._retired or self.has_ended or self._generation != self._link.generation

    async def ask(self, message: Callable[[str], _Request], seconds: float) -> broker_pb2.ActionTokenResult:
        """The answer to a message made with a proof. Raises: BrokerError, also when the answer is no."""
        async with self._places:
            nonce = self._link.nonces.take()
            try:
                return await self._send(message(self._link.proof(METHOD, nonce)), seconds)
            except RefusedByBroker as error:
                if not self._link.wants_nonce(error, nonce):
                    raise
            return await self._send(message(self._link.proof(METHOD, self._link.nonces.take())), seconds)

    async def _send(self, message: _Request, seconds: float) -> broker_pb2.ActionTokenResult:
        answered: asyncio.Future[_Response | None] = asyncio.get_running_loop().create_future()
        self._waiting[message.message_id] = answered
        try:
            if self.has_ended:
                raise self._fault(seconds)
            self._outgoing.put_nowait(message)
            answer = await answered
        finally:
            del self._waiting[message.message_id]
            self._rest()
        if answer is None:
            raise self._fault(seconds)
        if answer.dpop_nonce:  # put here and not by the reader: who needs another nonce must find this one
            self._link.nonces.put(answer.dpop_nonce)
        if answer.result.HasField("refusal"):
            no = answer.result.refusal
            raise refusal(no.reason, no.correlation_id, retry_after_ms=no.retry_after_ms or None)
        return answer.result

    def retire(self) -> None:
        """Takes nothing new, and ends when everybody has an answer."""
        self._retired = True
        self._rest()

    def _rest(self) -> None:
        if self._retired and not self._waiting:
            self._reader.cancel()

    async def close(self) -> None:
        """Ends it now. Whoever still waits hears so."""
        self._reader.cancel()
        await asyncio.wait((self._reader, self._writer))

    async def _write(self) -> None:
        while True:
            message = await self._outgoing.get()
            try:
                await self._call.write(message)
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                return  # the call has ended; the reader hears why

    async def _read(self) -> None:
        try:
            self._link.keep_nonce(await self._call.initial_metadata())
            async for answer in self._call:
                waiting = self._waiting.get(answer.message_id)
                if waiting is not None and not waiting.done():
                    waiting.set_result(answer)
                elif answer.dpop_nonce:
                    self._link.nonces.put(answer.dpop_nonce)
        except grpc.aio.AioRpcError as error:
            self._fault = partial(self._link.fault, error)
        finally:
            self.has_ended = True
            self._writer.cancel()
            self._call.cancel()
            for waiting in self._waiting.values():
                if not waiting.done():
                    waiting.set_result(None)
