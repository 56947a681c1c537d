"""Bytes between a caller on a Unix socket and the server behind it, each read checked for who wrote it.

Callbacks on raw sockets, for asyncio's own event loop and for uvloop: neither has recvmsg.
"""

import asyncio
import socket
import struct
from collections.abc import Callable
from pathlib import Path

from broker.errors import BrokerError, Reason, Refused, Unavailable
from broker.identity.peer import Peer

_UCRED = struct.Struct("3i")  # struct ucred: pid, uid, gid
_READ = 64 * 1024  # bytes; also the most that is held for a slow reader, in each direction
_BACKEND_BUSY = (0.005, 200)  # its backlog is full: try again after 5 ms, for 1 s in all


class Connection:
    """One caller's connection and the backend's, and all that belongs to them: closed together, once."""

    def __init__(
        self,
        caller: socket.socket,
        backend: socket.socket,
        peer: Peer,
        ended: Callable[[BrokerError | None], None],
    ) -> None:
        self.peer = peer
        self._loop = asyncio.get_running_loop()
        self._caller = caller
        self._backend = backend
        self._ended = ended
        self._open = True
        self._timer: asyncio.TimerHandle | None = None
        self._inward = _Flow(self._loop, caller, backend, self._from_caller, self._flow_ended, self.close)
        self._outward = _Flow(self._loop, backend, caller, self._from_backend, self._flow_ended, self.close)

    def start(self, backend: Path, first_byte_s: float) -> None:
        """Connects to the backend and begins to splice. What goes wrong ends the connection; nothing is raised."""
        self._loop.add_reader(self.peer.pidfd.fileno(), self._peer_exited)
        try:
            self._backend.bind(self.peer.connection)
        except OSError as error:
            self.close(_backend_away(error))
            return
        self._connect(str(backend), first_byte_s, _BACKEND_BUSY[1])

    def _connect(self, backend: str, first_byte_s: float, tries: int) -> None:
        try:
            self._backend.connect(backend)
        except BlockingIOError as error:  # Unix sockets do not connect later: the backlog is full
            if tries:
                self._timer = self._loop.call_later(_BACKEND_BUSY[0], self._connect, backend, first_byte_s, tries - 1)
            else:
                self.close(_backend_away(error))
            return
        except OSError as error:
            self.close(_backend_away(error))
            return
        Path(self.peer.connection).unlink()  # the backend still sees the name; no other can be bound over it
        self._timer = self._loop.call_later(first_byte_s, self._silent)
        self._inward.resume()
        self._outward.resume()

    def _from_caller(self) -> bytes:
        data, ancillary, flags, _ = self._caller.recvmsg(_READ, socket.CMSG_SPACE(_UCRED.size))
        if not data:
            return data
        # The only room is for credentials: the kernel closes descriptors sent along and says that it cut something off.
        if flags & socket.MSG_CTRUNC:
            raise Refused(Reason.NOT_ATTESTED, f"the caller, PID {self.peer.process.pid}, sent descriptors")
        writers = [
            _UCRED.unpack(content[: _UCRED.size])[0]
            for level, kind, content in ancillary
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS)
        ]
        if writers != [self.peer.process.pid]:
            raise Refused(
                Reason.NOT_ATTESTED, f"another process than the caller, PID {self.peer.process.pid}, wrote: {writers}"
            )
        if self.peer.pidfd.exited():  # then the writer may be another process that was given its PID
            raise Refused(Reason.NOT_ATTESTED, f"the caller, PID {self.peer.process.pid}, has exited")
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        return data

    def _from_backend(self) -> bytes:
        return self._backend.recv(_READ)

    def _flow_ended(self) -> None:
        if self._inward.ended and self._outward.ended:
            self.close()

    def _peer_exited(self) -> None:
        self.close()  # its descriptor may live on elsewhere, but nobody is left to be identified

    def _silent(self) -> None:
        self.close(Refused(Reason.NOT_ATTESTED, f"the caller, PID {self.peer.process.pid}, sent nothing"))

    def close(self, error: BrokerError | None = None) -> None:
        """Cuts both sides and gives everything back. Later calls do nothing."""
        if not self._open:
            return
        self._open = False
        if self._timer is not None:
            self._timer.cancel()
        self._inward.stop()
        self._outward.stop()
        self._loop.remove_reader(self.peer.pidfd.fileno())
        self.peer.pidfd.close()
        self._caller.close()
        self._backend.close()
        Path(self.peer.connection).unlink(missing_ok=True)
        self._ended(error)


class _Flow:
    """One direction. Reads again only when the other side took what was read: a slow reader slows its writer down."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        source: socket.socket,
        sink: socket.socket,
        read: Callable[[], bytes],
        on_end: Callable[[], None],
        cut: Callable[[BrokerError | None], None],
    ) -> None:
        self.ended = False
        self._loop = loop
        self._source = source
        self._sink = sink
        self._read = read
        self._on_end = on_end
        self._cut = cut
        self._pending = memoryview(b"")

    def resume(self) -> None:
        self._loop.add_reader(self._source.fileno(), self._readable)

    def stop(self) -> None:
        """Forgets both sockets. They are still open."""
        self._loop.remove_reader(self._source.fileno())
        self._loop.remove_writer(self._sink.fileno())

    def _readable(self) -> None:
        try:
            data = self._read()
        except (BlockingIOError, InterruptedError):
            return
        except OSError:  # the other side is gone: an end like any other
            self._cut(None)
            return
        except Refused as error:
            self._cut(error)
            return
        if data:
            self._write(memoryview(data))
        else:
            self._half_close()

    def _half_close(self) -> None:
        """The source has said its last word: the sink hears so, and may go on talking."""
        self._loop.remove_reader(self._source.fileno())
        self.ended = True
        try:
            self._sink.shutdown(socket.SHUT_WR)
        except OSError:  # the other side is gone: an end like any other
            self._cut(None)
            return
        self._on_end()

    def _write(self, data: memoryview) -> None:
        try:
            sent = self._sink.send(data)
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError:  # the other side is gone: an end like any other
            self._cut(None)
            return
        waiting = bool(self._pending)
        self._pending = data[sent:]
        if self._pending and not waiting:
            self._loop.remove_reader(self._source.fileno())
            self._loop.add_writer(self._sink.fileno(), self._writable)
        elif waiting and not self._pending:
            self._loop.remove_writer(self._sink.fileno())
            self.resume()

    def _writable(self) -> None:
        self._write(self._pending)


def _backend_away(error: OSError) -> Unavailable:
    return Unavailable(Reason.ATTESTATION_UNAVAILABLE, f"the server behind this socket is not up: {error.strerror}")
