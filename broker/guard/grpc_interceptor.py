"""The guard in front of a grpc.aio server.

A call is decided before its handler runs. One with a single message and a single answer is then carried out. One that
streams, either way, is ended when its credential dies: it expired, the broker refuses it, or nothing is heard from the
broker. Where the client streams, its first message says what the act is; a later one that means another act ends it.
"""

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import aclosing, asynccontextmanager
from typing import Any, Final, NoReturn, TypeAlias

import grpc

from broker.action import Action, check_uri
from broker.errors import BrokerError, Reason, Refused
from broker.guard.credential import log_refusal, read_credential
from broker.guard.going_on import CutOff, GoingOn, while_good
from broker.guard.mapping import Rule, Table, admitted, rule_of
from broker.guard.verify import Allowed, Guard, Presented
from broker.status import STATUS, error_info_trailers

_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"  # only the stubs are generic
_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
_Behaviour = Callable[[Any, Any], Any]


class GuardInterceptor(grpc.aio.ServerInterceptor):
    """Refuses every call that no rule and no credential admits.

    table: rules for methods; a handler may have its own by `@action`.
    authorities: the names (host or host:port) under which clients call us; a DPoP proof's `htu` is
    https://<authority>/<package.Service>/<Method> for one of them, never for whatever name a client sends.

    Put it first among the interceptors, so that nothing else sees what is refused. Handlers must be async; a call to
    another one fails.
    """

    def __init__(self, guard: Guard, table: Table | None = None, *, authorities: Iterable[str]) -> None:
        self._guard, self._table = guard, table or Table()
        self._bases: Final = tuple(check_uri(f"https://{authority}", "an authority") for authority in authorities)
        if not self._bases:
            raise ValueError("name the authorities under which clients call this server")

    async def intercept_service(
        self,
        continuation: "Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]]",
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "_Handler | None":
        """Wraps the handler of one call. Raises: TypeError for one that is not async."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or method in self._table.public:
            return handler
        kind = f"{_form(handler.request_streaming)}_{_form(handler.response_streaming)}"
        behaviour: _Behaviour = getattr(handler, kind)
        rule = self._table.rpc.get(method) or rule_of(behaviour)
        call = _Call(self._guard, rule, method, tuple(base + method for base in self._bases))
        guarded = (_streaming if handler.response_streaming else _answering)(call, behaviour, handler.request_streaming)
        wrapped: _Handler = getattr(grpc, f"{kind}_rpc_method_handler")(
            guarded, request_deserializer=handler.request_deserializer, response_serializer=handler.response_serializer
        )
        return wrapped


def _form(streaming: object) -> str:
    return "stream" if streaming else "unary"


def _answering(call: "_Call", behaviour: _Behaviour, client_streams: object) -> _Behaviour:
    if not inspect.iscoroutinefunction(behaviour):
        raise TypeError(f"{call.method} is guarded, so its handler has to be async")

    async def answer(request: Any, context: _Context) -> Any:
        allowed, rule, request, context = await call.admit(request, context, client_streams)
        async with call.while_good(allowed, context, watched=bool(client_streams)):
            with admitted(allowed, rule):
                return await behaviour(request, context)

    return answer


def _streaming(call: "_Call", behaviour: _Behaviour, client_streams: object) -> _Behaviour:
    generates = inspect.isasyncgenfunction(behaviour)
    if not generates and not inspect.iscoroutinefunction(behaviour):
        raise TypeError(f"{call.method} is guarded, so its handler has to be async")

    # It writes by itself, so that whatever it waits for ends with the credential, be it a client that does not read.
    async def stream(request: Any, context: _Context) -> None:
        allowed, rule, request, context = await call.admit(request, context, client_streams)
        async with call.while_good(allowed, context, watched=True) as going:
            told = _CheckedContext(context, going)  # a handler may go on although it was told to end
            with admitted(allowed, rule):
                if not generates:
                    await behaviour(request, told)
                    return
                async with aclosing(behaviour(request, told)) as answers:
                    async for item in answers:
                        await told.write(item)

    return stream


class _Call:
    """One call on its way to its handler."""

    def __init__(self, guard: Guard, rule: Rule | None, method: str, urls: tuple[str, ...]) -> None:
        self._guard, self._rule, self.method, self._urls = guard, rule, method, urls

    async def admit(self, request: Any, context: _Context, client_streams: object) -> tuple[Allowed, Rule, Any, Any]:
        """Who and for what, and the request and context that the handler may see. Aborts the call when refused."""
        try:
            rule = self._rule
            if rule is None:
                raise Refused(Reason.OUT_OF_SCOPE, f"no rule for {self.method}: declare what it means")
            messages = aiter(request) if client_streams else None
            first = [] if messages else [request]

            async def rebuild() -> Action:
                if messages:
                    first.append(await _first(messages))
                return rule.rebuild(first[0], self._guard.audience)

            allowed = await self._guard.admit(self._presented(context), rebuild, check=rule.check)
        except BrokerError as error:
            await self.refuse(error, context)
        if messages is None:
            return allowed, rule, request, context
        stream = _ClientStream(self, rule, allowed, first[0], messages, context)
        return allowed, rule, stream, _StreamContext(context, stream)

    @asynccontextmanager
    async def while_good(self, allowed: Allowed, context: _Context, *, watched: bool) -> AsyncIterator[GoingOn]:
        """While the handler runs: where it streams, its call is ended when the credential dies."""
        try:
            async with while_good(self._guard, allowed) as going:
                if watched:
                    going.begin()
                yield going
        except CutOff as cut:
            await self.refuse(cut.error, context)

    def recheck(self, rule: Rule, allowed: Allowed, message: Any) -> None:
        """A later message of a client's stream. Raises: Refused when it means another act or comes too late."""
        self._guard.still_good(allowed)
        if rule.payload is not None and rule.payload(message):
            return
        if not allowed.action.covers(rule.rebuild(message, self._guard.audience)):
            raise Refused(Reason.OUT_OF_SCOPE, "a later message of the stream means another act")

    async def refuse(self, error: BrokerError, context: _Context) -> NoReturn:
        """Ends the call."""
        correlation_id = log_refusal(error, self.method)
        trailers = error_info_trailers(error.reason, correlation_id, retry_after_ms=error.retry_after_ms)
        await context.abort(STATUS[error.reason].grpc, str(error.reason), trailers)

    def _presented(self, context: _Context) -> Presented:
        found: dict[str, list[str]] = {"authorization": [], "dpop": []}
        for name, value in context.invocation_metadata() or ():
            if name in found:
                found[name].append(value if isinstance(value, str) else value.decode("ascii", "replace"))

        def leaf_pem() -> str | None:
            return b"".join(context.auth_context().get("x509_pem_cert", ())).decode("ascii") or None

        return read_credential(found["authorization"], found["dpop"], leaf_pem=leaf_pem, method="POST", urls=self._urls)


async def _first(messages: AsyncIterator[Any]) -> Any:
    async for message in messages:
        return message
    raise Refused(Reason.OUT_OF_SCOPE, "a stream without a message names no act")


class _ClientStream:
    """A client's messages, each looked at before the handler sees it."""

    def __init__(
        self, call: _Call, rule: Rule, allowed: Allowed, first: Any, rest: AsyncIterator[Any], context: _Context
    ) -> None:
        self._call, self._rule, self._allowed = call, rule, allowed
        self._first, self._rest, self._context = [first], rest, context

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        if self._first:
            return self._first.pop()
        message = await anext(self._rest)
        try:
            self._call.recheck(self._rule, self._allowed, message)
        except BrokerError as error:
            await self._call.refuse(error, self._context)
        return message


class _CheckedContext:
    """The call's context, except that nothing is written once the credential has died."""

    def __init__(self, context: _Context, going: GoingOn) -> None:
        self._context, self._going = context, going

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    async def write(self, message: Any) -> None:
        """Raises: CutOff."""
        self._going.check()
        await self._context.write(message)


class _StreamContext:
    """The call's context, except that read() gives looked-at messages too, and the first one again."""

    def __init__(self, context: _Context, stream: _ClientStream) -> None:
        self._context, self._stream = context, stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    async def read(self) -> Any:
        """The next message, or grpc.aio.EOF."""
        try:
            return await anext(self._stream)
        except StopAsyncIteration:
            return grpc.aio.EOF
