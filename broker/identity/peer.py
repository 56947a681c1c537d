"""The process behind a Unix socket: who connected, and whether it is still the same process running the same program.

A PID alone is no identity: it is reused, and what runs under it changes with exec. So a peer is held by a pidfd from
the moment it is accepted, and its start time, effective IDs and executable are compared again at each request.

Sources: unix(7) for SO_PEERCRED, proc_pid_stat(5) and proc_pid_status(5), pidfd_open(2).
"""

import asyncio
import os
import select
import socket
import struct
from dataclasses import dataclass, fields

from attestors.contract import Process
from broker.errors import Reason, Refused, Unavailable

SO_PEERPIDFD = 77  # include/uapi/asm-generic/socket.h since Linux 6.5; Python's socket module does not name it
_UCRED = struct.Struct("3i")  # struct ucred: pid, uid, gid
_START_TIME = 19  # field 22 of /proc/PID/stat, counted from the one after the parenthesised command
_MAX_PROC_FILE = 16 * 1024


class Pidfd:
    """A descriptor that stands for one process, whatever happens to its PID. Owns it; `close` may be called twice."""

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        """The descriptor. Raises: Refused once closed, since its number may by then be another file's."""
        if self._fd < 0:
            raise Refused(Reason.NOT_ATTESTED, "the caller's connection has ended")
        return self._fd

    def exited(self) -> bool:
        """Whether the process has exited, reaped or not. Raises: Refused once closed."""
        poll = select.poll()
        poll.register(self.fileno(), select.POLLIN)
        return bool(poll.poll(0))

    async def wait(self) -> None:
        """Returns when the process exits, also when this Pidfd is closed meanwhile. Raises: Refused once closed."""
        loop = asyncio.get_running_loop()
        gone = asyncio.Event()
        own = os.dup(self.fileno())
        loop.add_reader(own, gone.set)
        try:
            await gone.wait()
        finally:
            loop.remove_reader(own)
            os.close(own)

    def close(self) -> None:
        """Gives the descriptor back."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A caller on a Unix socket, as it was when it was accepted.

    connection: unique in this broker's life; the path that the backend sees. pidfd: the connection's; it closes it.
    """

    connection: str
    process: Process
    pidfd: Pidfd

    def unchanged(self) -> None:
        """Checks that the same process still runs the same program with the same rights, and has not exited.

        Call it at each request, after attestation by PID: what was attested was then this process. Looks at the pidfd
        last, so that everything read before it came from this process and not from a later one with its PID.

        Raises: Refused(not_attested) when anything differs; Unavailable when we may not look.
        Not checked: that the program in memory is the file it was started from (a debugger of the same user can change
        it), nor which threads or libraries run in it.
        """
        now = look(self.process.pid)
        if now != self.process:
            changed = [
                field.name for field in fields(Process) if getattr(now, field.name) != getattr(self.process, field.name)
            ]
            raise Refused(Reason.NOT_ATTESTED, f"the caller changed since it connected: {', '.join(changed)}")
        if self.pidfd.exited():
            raise Refused(Reason.NOT_ATTESTED, "the caller has exited")

    async def exited(self) -> None:
        """Returns when the process exits, even after its connection ended. Raises: Refused if that already has."""
        await self.pidfd.wait()


def require_peer_pidfd() -> None:
    """Checks that this kernel hands out pidfds of socket peers.

    There is no fallback to pidfd_open(2): a peer could send its request, exit, and have its PID taken by a process with
    more rights before we open it. Nothing that /proc tells could show that this happened.

    Raises: Unavailable on Linux before 6.5 and on other systems.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    try:
        Pidfd(ours.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)).close()
    except OSError as error:
        raise Unavailable(
            Reason.ATTESTATION_UNAVAILABLE,
            "this kernel has no SO_PEERPIDFD, so callers on a Unix socket cannot be told apart: "
            "use Linux 6.5 or newer, or serve mutual TLS only",
        ) from error
    finally:
        ours.close()
        theirs.close()


def peer_uid(connection: socket.socket) -> int:
    """The effective uid with which the other side connected."""
    return int(_UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))[1])


def peer_of(connection: socket.socket, name: str) -> Peer:
    """Who connected. The caller owns the peer's pidfd.

    SO_PEERCRED holds the credentials of the moment of connect(2); /proc those of now. They must agree: else the process
    ran a set-user-ID program in between.

    Raises: Refused(not_attested) when it cannot be held to be one process; Unavailable when we may not look.
    """
    pid, uid, gid = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    if pid <= 0:
        raise Refused(
            Reason.NOT_ATTESTED,
            "the caller is in a PID namespace that we cannot see: run the broker in the host's PID namespace",
        )
    try:
        pidfd = Pidfd(connection.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD))
    except OSError as error:  # a process that is already reaped has none on some kernels
        raise Refused(Reason.NOT_ATTESTED, f"the caller, PID {pid}, cannot be held: {error.strerror}") from error
    try:
        process = _held_process(pid, uid, gid, pidfd)
    except BaseException:
        pidfd.close()
        raise
    return Peer(connection=name, process=process, pidfd=pidfd)


def _held_process(pid: int, uid: int, gid: int, pidfd: Pidfd) -> Process:
    process = look(pid)
    if pidfd.exited():  # asked last: what was read before is of the process that the pidfd holds
        raise Refused(Reason.NOT_ATTESTED, f"the caller, PID {pid}, has exited")
    if (process.uid, process.gid) != (uid, gid):
        raise Refused(Reason.NOT_ATTESTED, f"the caller, PID {pid}, changed its user or group since it connected")
    return process


def look(pid: int) -> Process:
    """`read_process` in the broker's terms. Raises: Refused(not_attested), Unavailable(attestation_unavailable)."""
    try:
        return read_process(pid)
    except ProcessLookupError as error:
        raise Refused(Reason.NOT_ATTESTED, f"the caller, PID {pid}, is gone, or /proc hides it") from error
    except PermissionError as error:
        raise Unavailable(
            Reason.ATTESTATION_UNAVAILABLE,
            f"/proc/{pid} may not be read: run the broker as root or with CAP_SYS_PTRACE",
        ) from error


def read_process(pid: int) -> Process:
    """What /proc says of `pid` now; all of it about one process, and of one program in it.

    Raises: ProcessLookupError when there is no such process (or it is a zombie, a kernel thread, or just running exec);
    PermissionError when we may not look, which for another user's executable takes CAP_SYS_PTRACE.
    """
    try:
        # Files opened below this descriptor belong to this process or fail, even if its PID is reused meanwhile.
        folder = os.open(f"/proc/{pid}", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            exe = os.stat("exe", dir_fd=folder)
            status = _read(folder, "status")
            stat = _read(folder, "stat")
            exe_after = os.stat("exe", dir_fd=folder)
        finally:
            os.close(folder)
    except FileNotFoundError as error:
        raise ProcessLookupError(f"no process {pid}") from error
    if (exe.st_dev, exe.st_ino) != (exe_after.st_dev, exe_after.st_ino):
        raise ProcessLookupError(f"process {pid} was running exec")  # its uid may be of one program, its exe of another
    # The command in parentheses may hold anything, parentheses too; no field after it does.
    start_time = int(stat.rpartition(b")")[2].split()[_START_TIME])
    return Process(
        pid=pid,
        start_time=start_time,
        uid=_effective(status, b"Uid"),
        gid=_effective(status, b"Gid"),
        exe_device=exe.st_dev,
        exe_inode=exe.st_ino,
    )


def _read(folder: int, name: str) -> bytes:
    file = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder)
    try:
        return os.read(file, _MAX_PROC_FILE)
    finally:
        os.close(file)


def _effective(status: bytes, field: bytes) -> int:
    """The effective one of real, effective, saved, file system. The kernel escapes newlines in the name above it."""
    return int(status.partition(b"\n" + field + b":\t")[2].split(None, 2)[1])
