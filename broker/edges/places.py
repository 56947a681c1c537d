"""Who may keep a call open, so that nobody's open calls take the place of everybody's requests.

A call costs a place (`grpc.max_concurrent_requests`) from its first header to its last, whoever makes it. So what stays
open is bounded apart from what is being worked on: calls whose message has not come, streams of callers not known yet,
streams of known callers, and what anybody may ask (health, reflection).
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable
from types import TracebackType
from typing import Any, Final, Self

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from broker.edges.grpc_peer import Context
from broker.errors import BrokerError, Invalid, Reason, Refused

PATIENCE_S: Final = 10.0  # for a call's message, and for a stream's first message of a caller that is then known
MAX_UNKNOWN_STREAMS: Final = 256
MAX_UNKNOWN_STREAMS_OF_ONE: Final = 16
MAX_STREAMS: Final = 512
MAX_STREAMS_OF_ONE: Final = 64
MAX_WATCHES: Final = 32
MAX_REFLECTIONS: Final = 32

Abort = Callable[[Context, Refused], Awaitable[None]]


class Waiting:
    """Those who have begun and not yet said who they are.

    most: in all. of_one: of one peer. Over either the one that waited longest gives way: who means it needs
    milliseconds, so strangers displace each other.
    """

    def __init__(self, most: int, of_one: int | None = None, patience_s: float = PATIENCE_S) -> None:
        self._most, self._of_one, self._patience_s = most, of_one or most, patience_s
        self._waiting: dict[asyncio.Timeout, Hashable] = {}  # oldest first

    def __len__(self) -> int:
        return len(self._waiting)

    def enter(self, peer: Hashable = None) -> asyncio.Timeout:
        """A bound for `async with`: TimeoutError once patience ends or another takes the place. Then `leave` it."""
        if len(self._waiting) >= self._most:
            self._end(next(iter(self._waiting)))
        elif self._of_one < self._most:
            own = [one for one, whose in self._waiting.items() if whose == peer]
            if len(own) >= self._of_one:
                self._end(own[0])
        place = asyncio.timeout(self._patience_s)
        self._waiting[place] = peer
        return place

    def leave(self, place: asyncio.Timeout) -> None:
        """It waits no longer. May be said twice."""
        self._waiting.pop(place, None)

    def _end(self, place: asyncio.Timeout) -> None:
        self.leave(place)
        with contextlib.suppress(RuntimeError):  # it was made and not entered, or has just ended by itself
            place.reschedule(0)  # the past


class Held:
    """Streams of known callers: `of_one` for each, `most` in all."""

    def __init__(self, most: int = MAX_STREAMS, of_one: int = MAX_STREAMS_OF_ONE) -> None:
        self._most, self._of_one = most, of_one
        self._held: Counter[str] = Counter()

    def take(self, caller: str) -> None:
        """Counts one more. Raises: Refused(QUOTA)."""
        if self._held[caller] >= self._of_one or self._held.total() >= self._most:
            raise Refused(Reason.QUOTA, "this caller, or all callers together, hold too many streams")
        self._held[caller] += 1

    def give_back(self, caller: str) -> None:
        """Counts one less."""
        self._held[caller] -= 1
        if not self._held[caller]:
            del self._held[caller]


class StreamPlace:
    """A stream's place, for `async with` around all of it: first a stranger's, then a known caller's.

    peer: whose the stream is while we know no more. caller: who opened it, where that is known already. Leaving the
    block raises BrokerError where the stream was ended here. Raises: Refused(QUOTA) when made, where caller is given.
    """

    def __init__(self, unknown: Waiting, held: Held, peer: Hashable, caller: str | None = None) -> None:
        self._unknown, self._held, self._caller = unknown, held, caller
        self._why: BrokerError = Refused(Reason.UNAUTHENTICATED, "nobody made himself known on the stream")
        if caller is not None:
            held.take(caller)
        self._bound = asyncio.timeout(None) if caller is not None else unknown.enter(peer)

    def known(self, caller: str) -> None:
        """Somebody sent a message and was identified. Raises: Refused(QUOTA), and the stream ends."""
        if self._caller is not None:
            return
        try:
            self._held.take(caller)
        except Refused as error:
            self.end(error)
            raise
        self._caller = caller
        self._unknown.leave(self._bound)
        with contextlib.suppress(RuntimeError):  # it has just ended
            self._bound.reschedule(None)

    def end(self, why: BrokerError) -> None:
        """Ends the stream with this refusal."""
        self._why = why
        with contextlib.suppress(RuntimeError):  # it has just ended
            self._bound.reschedule(0)

    async def __aenter__(self) -> Self:
        await self._bound.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._unknown.leave(self._bound)
        if self._caller is not None:
            self._held.give_back(self._caller)
        try:
            await self._bound.__aexit__(kind, error, where)
        except TimeoutError as late:
            raise self._why from late


class PromptCalls(grpc.GenericRpcHandler):
    """A service whose calls are ended where their one message does not come; gRPC by itself waits without end.

    gRPC reads a unary call's message before it runs the handler. So the handler is told to gRPC as one for streams,
    which is the same on the wire, and the message is read here.
    """

    def __init__(self, service: grpc.GenericRpcHandler, waiting: Waiting, places: "Few", abort: Abort) -> None:
        self._service, self._waiting, self._places, self._abort = service, waiting, places, abort
        self._made: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> "grpc.RpcMethodHandler[Any, Any] | None":
        """The handler for a method."""
        method = handler_call_details.method
        made = self._made.get(method)
        if made is None:
            found = self._service.service(handler_call_details)
            if found is None or found.request_streaming:
                return found
            made = self._made[method] = self._prompt(found)
        return made

    def _prompt(self, found: Any) -> "grpc.RpcMethodHandler[Any, Any]":
        made = (
            grpc.stream_stream_rpc_method_handler if found.response_streaming else grpc.stream_unary_rpc_method_handler
        )
        answer = found.unary_stream if found.response_streaming else found.unary_unary

        async def prompt(_: Any, context: Context) -> Any:
            message = await self._message(context)
            await self._places.take(context)
            try:
                return await answer(message, context)
            finally:
                self._places.give_back()

        async def watch(_: Any, context: Context) -> Any:  # bounds itself: it is not work, and lasts
            return await answer(await self._message(context), context)

        return made(
            watch if found.response_streaming else prompt, found.request_deserializer, found.response_serializer
        )

    async def _message(self, context: Context) -> Any:
        place = self._waiting.enter()
        try:
            async with place:
                message = await context.read()
        except TimeoutError:
            await self._abort(context, Refused(Reason.QUOTA, "a call without its message"))
        except DecodeError:  # said here, or else gRPC logs each with a traceback: strangers must not fill the disk
            await self._abort(context, Invalid("the message cannot be read"))
        finally:
            self._waiting.leave(place)
        if message is grpc.aio.EOF:  # also for one that is too large, which gRPC ends by itself as RESOURCE_EXHAUSTED
            await self._abort(context, Invalid("a call without its message, or with one that is too large"))
        return message


class Registrar:
    """Stands in for the server while services are added to it, so that generated code adds them as `PromptCalls`.

    most: how many requests are worked on at once, and how many calls may wait for their message.
    """

    def __init__(self, server: grpc.aio.Server, most: int, abort: Abort) -> None:
        self._server, self._waiting, self._places, self._abort = server, Waiting(most), Few(most), abort

    def add_generic_rpc_handlers(self, handlers: tuple[grpc.GenericRpcHandler, ...]) -> None:
        """As the server's."""
        self._server.add_generic_rpc_handlers(
            tuple(PromptCalls(one, self._waiting, self._places, self._abort) for one in handlers)
        )

    def add_registered_method_handlers(self, service: str, handlers: Any) -> None:
        """As the server's, which in asyncio does nothing."""


class Few:
    """Places for calls of one kind, whoever makes them."""

    def __init__(self, most: int) -> None:
        self._free = most

    async def take(self, context: Context) -> None:
        """Ends the call where there is no place."""
        if not self._free:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many of these calls are open")
        self._free -= 1

    def give_back(self) -> None:
        """The call has ended."""
        self._free += 1


class Health(health.aio.HealthServicer):  # type: ignore[misc]  # it has no types
    """grpc.health.v1 for anybody. Watch: for `MAX_WATCHES` at once; who is refused asks Check, as most probes do."""

    def __init__(self) -> None:
        super().__init__()
        self._places = Few(MAX_WATCHES)

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Context) -> None:  # noqa: N802 -- gRPC's
        """Tells each change until the caller or its connection ends."""
        await self._places.take(context)
        try:
            await super().Watch(request, context)
        finally:
            self._places.give_back()


class Reflection(reflection.aio.ReflectionServicer):  # type: ignore[misc]  # it has no types
    """gRPC reflection for anybody: `MAX_REFLECTIONS` at once, each with `PATIENCE_S` for all it wants to know."""

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__(names)
        self._places = Few(MAX_REFLECTIONS)

    async def ServerReflectionInfo(  # noqa: N802 -- gRPC's
        self, requests: AsyncIterator[reflection_pb2.ServerReflectionRequest], context: Context
    ) -> AsyncIterator[reflection_pb2.ServerReflectionResponse]:
        """Answers each message."""
        await self._places.take(context)
        try:
            async with asyncio.timeout(PATIENCE_S):
                async for answer in super().ServerReflectionInfo(requests, context):
                    yield answer
        except TimeoutError:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "ask again on a new call")
        except DecodeError:
            await self._abort(context, Invalid("the message cannot be read"))
        finally:
            self._places.give_back()
