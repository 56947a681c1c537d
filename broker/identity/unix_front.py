"""The socket that callers without a secret connect to: it knows which process wrote each byte, and passes it on.

gRPC does not tell its handlers who is behind a Unix socket. So this front accepts, holds the peer (peer.py), and
splices (splice.py) the bytes to gRPC's private socket from a path of its own for each connection. A handler hands
`context.peer()`, which is that path, to `UnixFront.peer`.

Only bytes that the peer's own process wrote are passed on: SO_PASSCRED names the writer of each read (unix(7); the
kernel never joins two writers' bytes in one read). A descriptor passed to another process or inherited by a fork is
worth nothing. A process with CAP_SYS_ADMIN can claim any writer: it owns the machine anyway.
"""

import asyncio
import errno
import os
import secrets
import socket
import stat
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import structlog

from broker.errors import BrokerError, Reason, Refused, Unavailable
from broker.identity.peer import Peer, peer_of, peer_uid, require_peer_pidfd
from broker.identity.splice import Connection

_MAX_PATH = 107  # sun_path holds 108 bytes with its end (unix(7))
_BACKLOG = 1024
_ACCEPTS_AT_ONCE = 32  # then others get their turn on the event loop
_ACCEPT_PAUSE_S = 0.1  # after accept(2) failed; the listener stays readable, so going on at once would spin
_TELL_AGAIN_S = 60.0  # a reason is logged once in this time: strangers must not fill the disk

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much strangers may hold. A connection costs four descriptors, gRPC's side included.

    first_byte_s: a connection on which nothing came within it is closed. Later silence is allowed, since a stream may
    be quiet for long; the connection ends at the latest when its process does.
    """

    connections: int = 1024
    connections_per_uid: int = 256
    first_byte_s: float = 10.0


class UnixFront:
    """Accepts at `path` and splices to the socket `backend`.

    path: its folder is made if missing; a socket that nobody listens on is replaced. mode: of the socket; connecting
    takes the write permission. backend: in a folder that belongs to us and is closed to all others (0700).
    on_refused: hears of each connection that was not taken, or was cut because another wrote on it; must not raise.

    Not checked: what the bytes mean, and whether the peer changed since it was accepted (`Peer.unchanged`).
    """

    def __init__(
        self,
        path: str | Path,
        backend: str | Path,
        mode: int = 0o666,
        *,
        limits: Limits | None = None,
        on_refused: Callable[[BrokerError], None] | None = None,
    ) -> None:
        self.path = Path(path)
        self._backend = Path(backend)
        self._mode = mode
        self._limits = limits or Limits()
        self._on_refused = on_refused
        self._connections: dict[str, Connection] = {}
        self._per_uid: Counter[int] = Counter()
        self._told: dict[Reason, float] = {}
        self._listener: socket.socket | None = None
        self._inode = 0
        self._resume: asyncio.TimerHandle | None = None

    async def start(self) -> None:
        """Begins to accept.

        Raises: Unavailable on a kernel that cannot tell callers apart; OSError when the path is taken by a running
        server or by what is no socket, or a folder is open to strangers.
        """
        require_peer_pidfd()
        _check_private(self._backend.parent)
        self._listener = _listen(self.path, self._mode)
        self._inode = self.path.lstat().st_ino
        asyncio.get_running_loop().add_reader(self._listener.fileno(), self._accept)

    async def close(self) -> None:
        """Stops accepting, cuts every connection and removes the socket if it is still ours. May be called twice."""
        if self._resume is not None:
            self._resume.cancel()
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener.fileno())
            self._listener.close()
            self._listener = None
            if self.path.exists() and self.path.lstat().st_ino == self._inode:
                self.path.unlink()
        for connection in list(self._connections.values()):
            connection.close()

    def peer(self, grpc_peer: str) -> Peer | None:
        """Who is behind the connection that gRPC calls `grpc_peer` (`context.peer()`), while it lasts."""
        connection = self._connections.get(unquote(grpc_peer.removeprefix("unix:")))
        return connection.peer if connection else None

    def __len__(self) -> int:
        """How many connections there are now."""
        return len(self._connections)

    def _accept(self) -> None:
        for _ in range(_ACCEPTS_AT_ONCE):
            if self._listener is None:
                return
            try:
                accepted, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:  # most likely out of descriptors
                self._refused(Unavailable(Reason.ATTESTATION_UNAVAILABLE, f"cannot accept: {error.strerror}"))
                self._pause(self._listener)
                return
            try:
                self._take(accepted)
            except BrokerError as error:
                accepted.close()
                self._refused(error)

    def _pause(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(listener.fileno())
        self._resume = loop.call_later(_ACCEPT_PAUSE_S, loop.add_reader, listener.fileno(), self._accept)

    def _take(self, accepted: socket.socket) -> None:
        """Raises: Refused or Unavailable; the socket is then still the caller's to close."""
        uid = peer_uid(accepted)
        if len(self._connections) >= self._limits.connections or self._per_uid[uid] >= self._limits.connections_per_uid:
            raise Refused(Reason.QUOTA, f"uid {uid} or all callers together hold too many connections")
        accepted.setblocking(False)
        name = str(self._backend.parent / secrets.token_hex(8))
        peer = peer_of(accepted, name)
        try:
            backend = socket.socket(socket.AF_UNIX)
        except OSError as error:
            peer.pidfd.close()
            raise Unavailable(Reason.ATTESTATION_UNAVAILABLE, f"cannot connect: {error.strerror}") from error
        backend.setblocking(False)
        self._per_uid[uid] += 1
        self._connections[name] = connection = Connection(
            accepted, backend, peer, lambda error: self._ended(name, uid, error)
        )
        connection.start(self._backend, self._limits.first_byte_s)

    def _ended(self, name: str, uid: int, error: BrokerError | None) -> None:
        del self._connections[name]
        self._per_uid[uid] -= 1
        if not self._per_uid[uid]:
            del self._per_uid[uid]
        if error is not None:
            self._refused(error)

    def _refused(self, error: BrokerError) -> None:
        now = asyncio.get_running_loop().time()
        if now - self._told.get(error.reason, -_TELL_AGAIN_S) >= _TELL_AGAIN_S:
            self._told[error.reason] = now
            _log.warning("connection refused", socket=str(self.path), reason=str(error.reason), detail=error.detail)
        if self._on_refused is not None:
            self._on_refused(error)


def _check_private(folder: Path) -> None:
    """Raises: PermissionError unless only we can enter `folder`: who reaches the backend directly has no peer."""
    found = folder.stat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise PermissionError(errno.EPERM, "must be a folder of our own with mode 0700", str(folder))


def _listen(path: Path, mode: int) -> socket.socket:
    """A listening socket at `path` whose accepted connections name their writers. Raises: OSError."""
    if len(os.fsencode(path)) > _MAX_PATH:
        raise OSError(errno.ENAMETOOLONG, f"longer than {_MAX_PATH} bytes, which is all a socket can have", str(path))
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    folder = path.parent.stat().st_mode
    if folder & stat.S_IWOTH and not folder & stat.S_ISVTX:
        raise PermissionError(
            errno.EPERM, "everyone may write here, so anyone could replace the socket", str(path.parent)
        )
    remove_stale(path)
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.setblocking(False)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)  # each accepted socket inherits it
        listener.bind(str(path))
        path.chmod(mode)  # before listen: until then nobody can connect, whatever the umask is
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def remove_stale(path: Path) -> None:
    """Removes the socket that a server left behind when it was killed. Raises: OSError when it is something else."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise FileExistsError(errno.EEXIST, "is not a socket: remove it, or serve at another path", str(path))
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except BlockingIOError:  # its backlog is full: somebody listens
            pass
    raise OSError(errno.EADDRINUSE, "another server listens here: stop it, or serve at another path", str(path))
