"""Listeners for the HTTP edge: TLS for callers, and, where wanted, a plain one for the platform's probes.

What aiohttp leaves open is bounded here: a connection that never finishes its first request, and how many there are.
"""

import asyncio
import ssl
from typing import Any, Final

import structlog
from aiohttp import web

from broker.edges.grpc_peer import correlation_id
from broker.edges.http_answers import finish, problem

MAX_CONNECTIONS: Final = 4096  # on one listener
HANDSHAKE_TIMEOUT_S: Final = 10.0
FIRST_REQUEST_TIMEOUT_S: Final = 10.0  # from the handshake's end to the end of the first request's headers
KEEPALIVE_S: Final = 30.0  # from an answer to the end of the next request's headers
MAX_HEADER: Final = 8190  # bytes of one header or of the request line; a DPoP proof has about 700
MAX_HEADERS: Final = 64
DRAIN_S: Final = 5.0  # what runs when we close may finish; above it is cut off

_log = structlog.get_logger(__name__)
Address = tuple[str, int]


class Connection(web.RequestHandler):
    """One HTTP connection that has to send a request soon, and is told nothing of what the parser thinks of it."""

    __slots__ = ("_first_request", "_first_request_s", "_handshake", "_handshaking")

    def __init__(
        self,
        manager: web.Server,
        handshaking: "set[Connection]",
        *,
        handshake_s: float,
        first_request_s: float,
        keepalive_s: float,
    ) -> None:
        super().__init__(
            manager,
            loop=asyncio.get_running_loop(),
            keepalive_timeout=keepalive_s,
            max_line_size=MAX_HEADER,
            max_field_size=MAX_HEADER,
            max_headers=MAX_HEADERS,
            lingering_time=1.0,
            auto_decompress=False,
            access_log=None,  # type: ignore[arg-type]  # None turns it off; http_answers.py writes ours
        )
        self._first_request_s = first_request_s
        self._first_request: asyncio.TimerHandle | None = None
        self._handshaking = handshaking
        handshaking.add(self)
        # Nobody is told when a handshake fails; it has ended by then.
        self._handshake = self._loop.call_later(handshake_s, handshaking.discard, self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """After the handshake. Starts its timer."""
        self._handshake.cancel()
        self._handshaking.discard(self)
        self._first_request = self._loop.call_later(self._first_request_s, self._check_first_request)
        super().connection_made(transport)

    def connection_lost(self, exc: BaseException | None) -> None:
        """Ends its timer, too."""
        if self._first_request is not None:
            self._first_request.cancel()
        super().connection_lost(exc)

    def _check_first_request(self) -> None:
        if self._request_count == 0:
            self.force_close()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,  # noqa: ARG002 -- aiohttp's, and it repeats what was sent
    ) -> web.StreamResponse:
        """What cannot be read as HTTP. It never reached the application."""
        correlation = correlation_id()
        _log.debug("http_unreadable", status=status, error=type(exc).__name__, correlation_id=correlation)
        if request.writer.output_size > 0:
            raise ConnectionError("an answer was begun already")
        response = problem(status, correlation)
        finish(response, correlation)
        response.force_close()
        return response


class _Full(asyncio.Protocol):
    """A connection too many."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if isinstance(transport, asyncio.Transport):
            transport.abort()


class HttpServer:
    """Serves an application at one address. `await start()`, then `port` is known; `await close()` lets answers finish.

    tls: None for the operations listener alone. address: port 0 lets the system choose.
    """

    def __init__(
        self,
        app: web.Application,
        address: Address,
        tls: ssl.SSLContext | None,
        *,
        handshake_s: float = HANDSHAKE_TIMEOUT_S,
        first_request_s: float = FIRST_REQUEST_TIMEOUT_S,
        keepalive_s: float = KEEPALIVE_S,
        max_connections: int = MAX_CONNECTIONS,
    ) -> None:
        self._address, self._tls = address, tls
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=DRAIN_S)
        self._limits = {"handshake_s": handshake_s, "first_request_s": first_request_s, "keepalive_s": keepalive_s}
        self._max_connections = max_connections
        self._listener: asyncio.Server | None = None
        self._handshaking: set[Connection] = set()

    async def start(self) -> None:
        """Listens. Raises: OSError when the address cannot be had."""
        await self._runner.setup()
        timeouts: dict[str, Any] = {} if self._tls is None else {"ssl_handshake_timeout": self._limits["handshake_s"]}
        host, port = self._address
        self._listener = await asyncio.get_running_loop().create_server(
            self._connection, host, port, ssl=self._tls, **timeouts
        )

    @property
    def port(self) -> int:
        """Where it listens. Raises: RuntimeError before `start`."""
        if self._listener is None:
            raise RuntimeError("start the server first")
        return int(self._listener.sockets[0].getsockname()[1])

    @property
    def listening(self) -> bool:
        """Whether new connections are let in."""
        return self._listener is not None and self._listener.is_serving()

    @property
    def connections(self) -> int:
        """How many there are now, with those whose TLS handshake has not ended, or has failed within its time."""
        server = self._runner.server
        return len(self._handshaking) + (0 if server is None else len(server.connections))

    async def close(self) -> None:
        """Stops listening, lets requests in progress finish for a while, then cuts off."""
        if self._listener is not None:
            self._listener.close()
        await self._runner.cleanup()
        if self._listener is not None:
            await self._listener.wait_closed()
            self._listener = None

    def _connection(self) -> asyncio.BaseProtocol:
        server = self._runner.server
        if server is None or self.connections >= self._max_connections:
            return _Full()
        return Connection(server, self._handshaking, **self._limits)
