"""An in-process hop for a gRPC channel: gRPC dials a private Unix socket, and we dial on, checking whom we reach.

grpcio can check a server's DNS names only: neither its SPIFFE ID nor the user behind a Unix socket. So a channel dials
us, in plain text, on a socket that only this process can use, and each connection is carried on over one that was
checked first. tls_dial.py and unix_dial.py say how.
"""

import asyncio
import os
import shutil
import socket
import ssl
import struct
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import cast

from broker.errors import BrokerError

CONNECT_S = 5.0
"""For connecting and checking whom we reached; an honest server on a busy machine needs milliseconds."""
CLOSE_S = 1.0
"""For saying goodbye; after it the connection is cut."""
_UCRED = struct.Struct("3i")  # pid, uid, gid: unix(7)


class End(asyncio.Protocol):
    """One of the two connections of a hop. What it reads is written to the other one within the same callback.

    Until it is joined it holds back what it read, and reads no more; afterwards it reads as fast as the other one can
    be written to. made: hears of the connection. ended: nothing more comes from it. lost: done once it is closed.
    """

    transport: asyncio.Transport

    def __init__(self, made: "Callable[[End], None] | None" = None) -> None:
        self.ended = False
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._made = made
        self._held = b""
        self._other: End | None = None
        self._first: Callable[[], None] | None = None
        self._last: Callable[[Exception | None], None] | None = None

    def join(
        self,
        other: "End",
        first: Callable[[], None] | None = None,
        last: Callable[[Exception | None], None] | None = None,
    ) -> None:
        """Passes everything on to `other`, from now on. first: hears of the first byte. last: of the end, and why."""
        self._other, self._first, self._last = other, first, last
        if self._held:
            held, self._held = self._held, b""
            self.data_received(held)
        if self.ended:
            self._tell_end(None)
        elif not self.transport.is_closing():
            self.transport.resume_reading()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """For the event loop, like all below."""
        self.transport = cast("asyncio.Transport", transport)
        if self._made is not None:
            self._made(self)

    def data_received(self, data: bytes) -> None:
        """Passes it on."""
        if self._other is None:
            self._held += data
            self.transport.pause_reading()
            return
        if self._first is not None:
            self._first()
            self._first = None
        if not self._other.transport.is_closing():
            self._other.transport.write(data)

    def pause_writing(self) -> None:
        """Too much waits to be written here, so the other one reads no more. In flight: what two buffers hold."""
        if self._other is not None and not self._other.transport.is_closing():
            self._other.transport.pause_reading()

    def resume_writing(self) -> None:
        """The other one reads again."""
        if self._other is not None and not self._other.transport.is_closing():
            self._other.transport.resume_reading()

    def eof_received(self) -> bool:
        """Nothing more comes. True: this side may still be written to."""
        self.ended = True
        self._tell_end(None)
        return self.transport.can_write_eof() and (self._other is None or not self._other.ended)

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing more comes or goes."""
        if not self.ended:
            self.ended = True
            self._tell_end(exc)
        self.lost.set_result(None)

    def _tell_end(self, why: Exception | None) -> None:
        if self._last is not None:
            self._last(why)
        if self._other is None or self._other.transport.is_closing():
            return
        if self._other.transport.can_write_eof() and not self._other.ended:
            self._other.transport.write_eof()
        else:  # both have ended; or asyncio's TLS, which has no half-close: HTTP/2 has its own way to say "done"
            self._other.transport.close()


class Hop:
    """Carries connections from a private Unix socket to what `connect` returns.

    connect: opens one connection and checks it. Raises BrokerError or OSError where it must not be used.
    rejected: what to say when the far side ends a connection before its first byte.
    last_error: why the newest connection failed; None since one carried a byte back.
    """

    def __init__(self, connect: Callable[[], Awaitable[End]], *, rejected: Callable[[], str]) -> None:
        self._connect = connect
        self._rejected = rejected
        self._folder: Path | None = None
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._near: set[End] = set()
        self._closed = False
        self.last_error: str | None = None

    async def start(self) -> str:
        """Listens. Returns the target for an insecure gRPC channel, which only this process may dial."""
        self._folder = Path(tempfile.mkdtemp(prefix="hop-"))  # 0700
        path = self._folder / "s"
        self._server = await asyncio.get_running_loop().create_unix_server(lambda: End(self._accept), str(path))
        return f"unix:{path}"

    async def close(self) -> None:
        """Stops listening and cuts what is open. Close the channel first, gracefully."""
        self._closed = True
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        for near in self._near:  # a task that was cancelled before it began has cut nothing
            near.transport.abort()
        if self._near:
            await asyncio.wait([near.lost for near in self._near], timeout=CLOSE_S)
        if self._server is not None:
            await self._server.wait_closed()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._server = self._folder = None

    def _accept(self, near: End) -> None:
        pid = _UCRED.unpack(
            near.transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        )[0]
        if pid != os.getpid() or self._closed:  # root may enter our folder: it still does not speak with our identity
            near.transport.abort()
            return
        self._near.add(near)
        near.lost.add_done_callback(lambda _: self._near.discard(near))
        task = asyncio.create_task(self._carry(near))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _carry(self, near: End) -> None:
        try:
            async with asyncio.timeout(CONNECT_S):
                far = await self._connect()
        except (OSError, TimeoutError, BrokerError) as error:
            self.last_error = _explain(error)
            near.transport.abort()
            return
        except BaseException:
            near.transport.abort()
            raise
        try:
            # In TLS 1.3 a client's handshake is done before the server has looked at its certificate: only the first
            # byte says that it was accepted. Afterwards gRPC's own words are as good as ours.
            unheard = True

            def first() -> None:
                nonlocal unheard
                unheard, self.last_error = False, None

            def last(why: Exception | None) -> None:
                if unheard and not near.ended:  # else it was our own side that hung up
                    self.last_error = self._rejected() + (f" ({_explain(why)})" if why is not None else "")

            far.join(near, first, last)
            near.join(far)
            await asyncio.wait((near.lost, far.lost), return_when=asyncio.FIRST_COMPLETED)
            near.transport.close()  # what is written is sent
            far.transport.close()
            await asyncio.wait((near.lost, far.lost), timeout=CLOSE_S)
        finally:
            near.transport.abort()
            far.transport.abort()


def _explain(error: BaseException) -> str:
    match error:
        case BrokerError():
            return error.detail
        case TimeoutError():
            return f"no connection within {CONNECT_S:g} s"
        case ssl.SSLCertVerificationError():
            return f"the server's certificate does not lead to the trust bundle: {error.verify_message}"
        case ssl.SSLError():
            return f"TLS: {error.reason or error}"
        case _:
            return f"{type(error).__name__}: {error}"
