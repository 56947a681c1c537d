"""The guard in front of an ASGI application, whatever its framework."""

from collections.abc import Awaitable, Callable, MutableMapping
from functools import partial
from typing import Any

from broker.errors import BrokerError, Invalid, Reason, Refused
from broker.guard.credential import log_refusal
from broker.guard.going_on import CutOff, GoingOn, while_good
from broker.guard.http_edge import HttpEdge, Incoming, decoded, leaf_of, refuse
from broker.guard.http_request import MAX_BODY
from broker.guard.mapping import Table, admitted
from broker.guard.verify import Allowed, Guard

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class GuardMiddleware:
    """Refuses every request that no rule and no credential admits. WebSockets have no rules, so they are refused.

    base_url: scheme, host and any prefix under which clients call us; a DPoP proof's `htu` is that and the path.
    A certificate-bound token needs a server with the ASGI TLS extension: the peer's certificate is never taken from a
    header, which anybody could have written.

    An answer that is streamed ends when its credential dies: the connection breaks off, so that the client sees that
    it is incomplete. One that comes in one piece is sent: an act that was admitted is carried out.

    Put it outermost, so that nothing else sees what is refused, and behind nothing that changes the path.
    """

    def __init__(self, app: App, guard: Guard, table: Table, *, base_url: str) -> None:
        self._app, self._edge = app, HttpEdge(guard, table, base_url)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Decides on one request. Raises: Refused, Unavailable for one whose credential died while it was streamed."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        else:
            log_refusal(Refused(Reason.OUT_OF_SCOPE, "no rules for WebSockets"), scope["type"])
            await send({"type": "websocket.close", "code": 1008})  # RFC 6455 section 7.4.1: policy violation

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = decoded(scope["headers"])
        body = _Body(receive)
        incoming = Incoming(
            method=scope["method"],
            path=scope["path"],
            raw_path=scope.get("raw_path"),
            query_string=scope.get("query_string", b"").decode("latin-1"),
            headers=headers,
            leaf_pem=partial(leaf_of, scope),
            read=body.read,
        )
        try:
            found = await self._edge.admit(incoming)
        except BrokerError as error:
            answer = refuse(error, incoming.method, incoming.path, headers)
            encoded = [(name.encode(), value.encode()) for name, value in answer.headers.items()]
            await send({"type": "http.response.start", "status": answer.status, "headers": encoded})
            await send({"type": "http.response.body", "body": answer.body})
            return
        except _Gone:
            return
        if found is None:  # public
            await self._app(scope, receive, send)
            return
        allowed, rule = found
        with admitted(allowed, rule):
            await self._while_good(allowed, scope, body.replay, send)

    async def _while_good(self, allowed: Allowed, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with while_good(self._edge.guard, allowed) as going:
                await self._app(scope, receive, _Answer(send, going).send)
        except CutOff as cut:
            log_refusal(cut.error, f"{scope['method']} {scope['path']}, cut off")
            raise cut.error from cut  # the answer has begun: a server breaks the connection off


class _Answer:
    """What the application sends, stopped when the credential behind it dies."""

    def __init__(self, send: Send, going: GoingOn) -> None:
        self._send, self._going = send, going
        self._left: int | None = None  # of a body whose length was said

    async def send(self, message: Message) -> None:
        """One message on its way. Raises: CutOff."""
        if message["type"] == "http.response.start":
            lengths = [value for name, value in message.get("headers", ()) if name.lower() == b"content-length"]
            self._left = int(lengths[0]) if len(lengths) == 1 and lengths[0].isdigit() else None
        elif message["type"] == "http.response.body":
            body = message.get("body", b"")
            if self._going.begun:
                if body or message.get("more_body"):  # an end without anything more tells nothing
                    self._going.check()
            elif message.get("more_body") and len(body) != self._left:  # a whole body is no stream, even if sent as one
                self._going.begin()
        await self._send(message)


class _Gone(Exception):
    """The client went away before it had sent its request."""


class _Body:
    """A request's body, read for the mapping and given to the application again."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._read: bytes | None = None

    async def read(self) -> bytes:
        """All of it. Raises: Invalid where it is too large; _Gone."""
        parts, size, more = [], 0, True
        while more:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise _Gone
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > MAX_BODY:
                raise Invalid(f"a body of more than {MAX_BODY} bytes")
            more = message.get("more_body", False)
        self._read = b"".join(parts)
        return self._read

    async def replay(self) -> Message:
        """What the application receives: the body first if it was read, then whatever comes."""
        if self._read is None:
            return await self._receive()
        body, self._read = self._read, None
        return {"type": "http.request", "body": body, "more_body": False}
