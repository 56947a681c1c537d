"""The guard in front of an aiohttp application."""

import ssl
from contextlib import suppress
from contextvars import ContextVar
from typing import Any, Final

from aiohttp import hdrs, web
from aiohttp.payload import Payload
from aiohttp.typedefs import Handler

from broker.errors import BrokerError, Invalid, Reason, Refused
from broker.guard.credential import log_refusal
from broker.guard.going_on import CutOff, GoingOn, while_good
from broker.guard.http_edge import HttpEdge, Incoming, decoded, refuse
from broker.guard.http_request import MAX_BODY
from broker.guard.mapping import Table, admitted
from broker.guard.verify import Allowed, Guard


def guard_application(app: web.Application, guard: Guard, table: Table, *, base_url: str) -> None:
    """Puts the guard in front of everything in `app`: every request is refused that no rule and no credential admits.

    To be called before the application runs. The guard becomes the outermost middleware, so that nothing else sees what
    is refused. WebSockets have no rules, so they are refused.

    base_url: scheme, host and any prefix under which clients call us; a DPoP proof's `htu` is that and the path.
    A certificate-bound token needs TLS that ends here and asks for client certificates: the peer's is never taken from
    a header, which anybody could have written.

    A handler behind a rule with `body=True` gets the body again by `read()`, `text()`, `json()` or `post()` of a form;
    `content` and `multipart()` are at their end.

    An answer that is streamed ends when its credential dies: the handler is cancelled and the connection breaks off, so
    that the client sees that it is incomplete. One that comes in one piece is sent: an act that was admitted is carried
    out.
    """
    edge = HttpEdge(guard, table, base_url)

    @web.middleware
    async def admit(request: web.Request, handler: Handler) -> web.StreamResponse:
        reader = _Reader(request)
        try:
            found = await edge.admit(_incoming(request, reader))
        except BrokerError as error:
            answer = refuse(error, request.method, request.path, decoded(request.raw_headers))
            return web.Response(status=answer.status, headers=answer.headers, body=answer.body)
        if found is None:  # public
            return await handler(request)
        allowed, rule = found
        with admitted(allowed, rule):
            return await _serve(guard, allowed, reader.request, handler)

    app.middlewares.insert(0, admit)
    app.on_response_prepare.append(_begins)


def _incoming(request: web.Request, reader: "_Reader") -> Incoming:
    """Raises: Refused for a WebSocket, Invalid for a target that others could read otherwise."""
    if "websocket" in request.headers.get(hdrs.UPGRADE, "").lower():
        raise Refused(Reason.OUT_OF_SCOPE, "no rules for WebSockets")
    path, _, query = request.raw_path.partition("?")
    if "#" in query:  # RFC 9112 section 3.2: a target has no fragment; aiohttp would leave it out
        raise Invalid("a fragment in the request's target")
    return Incoming(
        method=request.method,
        path=request.path,
        raw_path=path.encode("utf-8", "surrogateescape"),
        query_string=query,
        headers=decoded(request.raw_headers),
        leaf_pem=reader.leaf_pem,
        read=reader.read,
    )


class _Reader:
    """What the guard looks at in a request, which the handler gets after it."""

    def __init__(self, request: web.Request) -> None:
        self.request = request

    def leaf_pem(self) -> str | None:
        """The peer's certificate on this connection."""
        tls: Any = self.request.get_extra_info("ssl_object")
        der = None if tls is None else tls.getpeercert(binary_form=True)
        return ssl.DER_cert_to_PEM_cert(der) if der else None

    async def read(self) -> bytes:
        """The body. Raises: Invalid where it is too large."""
        too_large = Invalid(f"a body of more than {MAX_BODY} bytes")
        with suppress(RuntimeError):  # it was read already, by a middleware before us
            # Kept in the copy, which the handler gets, whose limit is ours whatever the application's is.
            self.request = self.request.clone(client_max_size=MAX_BODY)
        try:
            body = await self.request.read()
        except web.HTTPRequestEntityTooLarge as error:
            raise too_large from error
        if len(body) > MAX_BODY:
            raise too_large
        return body


class _Answering:
    """A guarded request whose handler is running, and the response that it has begun."""

    def __init__(self, going: GoingOn) -> None:
        self.going = going
        self.response: web.StreamResponse | None = None

    def begin(self, response: web.StreamResponse) -> None:
        """It is streamed. Raises: CutOff where its credential died already."""
        self.response = response
        self.going.begin()
        write = response.write

        async def checked(data: bytes | bytearray | memoryview) -> None:
            self.going.check()
            await write(data)

        response.write = checked  # type: ignore[method-assign] # of this one response; its handler may hold it already


_answering: Final[ContextVar[_Answering | None]] = ContextVar("action_broker_answering", default=None)


async def _begins(_: web.Request, response: web.StreamResponse) -> None:
    """Hears of each response whose headers are about to be sent; it is a stream where its handler still runs."""
    if (answering := _answering.get()) is not None and not _is_whole(response):
        answering.begin(response)


def _is_whole(response: web.StreamResponse) -> bool:
    """Whether its body is at hand, and sent in one piece."""
    return isinstance(response, web.Response) and not isinstance(response.body, Payload)


async def _serve(guard: Guard, allowed: Allowed, request: web.Request, handler: Handler) -> web.StreamResponse:
    answering = None
    try:
        async with while_good(guard, allowed) as going:
            answering = _Answering(going)
            token = _answering.set(answering)
            try:
                response = await handler(request)
                if isinstance(response, web.Response | web.FileResponse) and not (
                    response.prepared or _is_whole(response)
                ):  # a file or a source of data: aiohttp would send it after us, and nobody would watch
                    await response.prepare(request)
                    await response.write_eof()
                    return _Sent(response)
                return response
            finally:
                _answering.reset(token)
    except CutOff as cut:
        log_refusal(cut.error, f"{request.method} {request.path}, cut off")
        if request.transport is not None:
            request.transport.abort()
        return _Sent(answering.response if answering and answering.response else web.StreamResponse())


class _Sent(web.StreamResponse):
    """Tells the server that there is nothing left to send."""

    def __init__(self, response: web.StreamResponse) -> None:
        super().__init__(status=response.status, reason=response.reason, headers=response.headers)
        self._kept, self._length = response.keep_alive, response.body_length

    @property
    def body_length(self) -> int:
        """As was sent, for the access log."""
        return self._length

    @property
    def keep_alive(self) -> bool | None:
        """As of the response that was sent."""
        return self._kept

    async def prepare(self, _: web.BaseRequest) -> None:
        """It was."""

    async def write_eof(self, _: bytes = b"") -> None:
        """It was."""
