"""What /proc says of one process, read so that all of it is of that process and not of a later one with its PID."""

import os
import select
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

from attestors.contract import AttestationFailed, AttestationUnavailable, Process


@contextmanager
def held(pid: int) -> Iterator[int]:
    """A pidfd: what is read of `pid` before it is seen not to have exited is of one process."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError as error:
        raise AttestationFailed(f"process {pid} is gone") from error
    except OSError as error:
        raise AttestationUnavailable(f"cannot hold process {pid}: {error.strerror}") from error
    try:
        yield pidfd
    finally:
        os.close(pidfd)


def exited(pidfd: int) -> bool:
    """Whether the process behind it has exited."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


@contextmanager
def open_exe(process: Process) -> Iterator[BufferedReader]:
    """The file that the process runs, whatever its path leads to by now."""
    try:
        exe = Path(f"/proc/{process.pid}/exe").open("rb")  # noqa: SIM115 - closed below, by its own with
    except FileNotFoundError as error:
        raise AttestationFailed(f"process {process.pid} is gone") from error
    except PermissionError as error:
        raise may_not_look(process.pid) from error
    except OSError as error:
        raise AttestationUnavailable(f"cannot read the executable of {process.pid}: {error.strerror}") from error
    with exe:
        found = os.fstat(exe.fileno())
        if (found.st_dev, found.st_ino) != (process.exe_device, process.exe_inode):
            raise AttestationFailed(f"process {process.pid} runs another program than when it was identified")
        yield exe


def exe_path(pid: int) -> str:
    """As the process sees it: in a container, inside that. Ends in " (deleted)" when the file was removed."""
    try:
        path = str(Path(f"/proc/{pid}/exe").readlink())
        path.encode()
    except UnicodeEncodeError as error:
        raise AttestationFailed(f"the executable's path of process {pid} is not UTF-8") from error
    except OSError as error:
        raise AttestationFailed(f"process {pid} is gone") from error
    return path


def cgroup(pid: int) -> str:
    """The path in the unified hierarchy (cgroups(7)), or in systemd's own where there is none, or ""."""
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise AttestationFailed(f"the cgroup of process {pid} is not UTF-8") from error
    except OSError as error:
        raise AttestationFailed(f"process {pid} is gone") from error
    paths = {controllers: path for _, controllers, path in (line.split(":", 2) for line in lines)}
    return paths.get("") or paths.get("name=systemd", "")


def may_not_look(pid: int) -> AttestationUnavailable:
    """Another user's process, and we are not root."""
    return AttestationUnavailable(f"/proc/{pid} may not be read: run the broker as root or with CAP_SYS_PTRACE")
