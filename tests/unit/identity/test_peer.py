"""A peer is one process running one program as one user: anything else behind its PID is refused."""

import asyncio
import os
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
from support.processes import Child, on_both_loops, script, until

from broker.errors import Reason, Refused, Unavailable
from broker.identity.peer import Peer, Pidfd, look, peer_of, read_process, require_peer_pidfd

REPOSITORY = str(Path(__file__).parents[3])


@asynccontextmanager
async def connected(folder: Path, code: str, *arguments: str) -> AsyncIterator[tuple[Child, socket.socket]]:
    """A script whose first argument is a socket path, and its connection, accepted after the script's first line."""
    path = str(folder / "s")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        with script(code, path, *arguments) as child:
            assert await child.line() == "ready"
            with listener.accept()[0] as connection:
                yield child, connection


@asynccontextmanager
async def peer(folder: Path, code: str, *arguments: str) -> AsyncIterator[tuple[Child, Peer]]:
    async with connected(folder, code, *arguments) as (child, connection):
        found = peer_of(connection, "c1")
        try:
            yield child, found
        finally:
            found.pidfd.close()


@contextmanager
def zombie() -> Iterator[int]:
    """Our own child, which exits and is not waited for."""
    pid = os.posix_spawn("/bin/true", ["true"], {})
    try:
        yield pid
    finally:
        os.waitpid(pid, 0)


@contextmanager
def bound_for_all(folder: Path) -> Iterator[tuple[socket.socket, str]]:
    """A listener that every user of this machine reaches."""
    for above in (folder, folder.parent, folder.parent.parent):
        above.chmod(0o711)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "s"))
        (folder / "s").chmod(0o666)
        listener.listen()
        yield listener, str(folder / "s")


def runs(pid: int, program: str) -> bool:
    return Path(f"/proc/{pid}/exe").readlink().name == program


STAYS = "s = connect(sys.argv[1]); tell('ready'); hear(); tell('again'); hear()"


def test_this_kernel_can_hold_peers() -> None:
    require_peer_pidfd()


def test_proc_says_who_we_are() -> None:
    exe = Path(sys.executable).resolve().stat()
    found = read_process(os.getpid())
    assert (found.pid, found.uid, found.gid) == (os.getpid(), os.geteuid(), os.getegid())
    assert (found.exe_device, found.exe_inode) == (exe.st_dev, exe.st_ino)
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    assert 0 < found.start_time <= uptime * os.sysconf("SC_CLK_TCK")


async def test_a_name_made_to_look_like_proc_fields_changes_nothing() -> None:
    code = "open('/proc/self/comm', 'w').write(sys.argv[1]); tell('ready'); hear()"
    with script("tell('ready'); hear()") as plain, script(code, ") R 1 2 3 ((\nUid:") as odd:
        assert [await plain.line(), await odd.line()] == ["ready", "ready"]
        one, other = read_process(plain.pid), read_process(odd.pid)
    assert (one.uid, one.gid, one.exe_inode) == (other.uid, other.gid, other.exe_inode)
    assert abs(one.start_time - other.start_time) < 5 * os.sysconf("SC_CLK_TCK")


async def test_a_process_that_is_gone_is_no_process() -> None:
    with script("tell('ready'); hear()") as child:
        await child.line()
        assert read_process(child.pid).pid == child.pid
        pid = child.pid
    with pytest.raises(ProcessLookupError):
        read_process(pid)


async def test_a_zombie_is_no_process() -> None:
    with zombie() as pid:
        pidfd = Pidfd(os.pidfd_open(pid))
        await until(pidfd.exited, "the child exits")
        pidfd.close()
        with pytest.raises(ProcessLookupError):
            read_process(pid)
        with pytest.raises(Refused) as refused:
            look(pid)
        assert refused.value.reason is Reason.NOT_ATTESTED


async def test_what_we_may_not_look_at_is_unavailable_and_says_what_to_do() -> None:
    code = """
sys.path.insert(0, sys.argv[1])
from broker.errors import Unavailable
from broker.identity.peer import look
look(os.getpid())  # positive control
if os.geteuid() == 0: os.setresuid(1600, 1600, 1600)
try: look(1)
except Unavailable as error: tell(error)
"""
    with script(code, REPOSITORY) as child:
        told = await child.line()
    assert told.startswith(str(Reason.ATTESTATION_UNAVAILABLE))
    assert "CAP_SYS_PTRACE" in told


async def test_a_peer_that_stays_as_it_was_is_taken_at_each_request(tmp_path: Path) -> None:
    async with peer(tmp_path, STAYS) as (child, found):
        assert found.process == read_process(child.pid)
        found.unchanged()
        child.tell()
        assert await child.line() == "again"
        found.unchanged()


async def test_a_peer_that_runs_another_program_is_refused(tmp_path: Path) -> None:
    code = "s = connect(sys.argv[1]); tell('ready'); hear(); os.execv('/bin/sleep', ['sleep', '60'])"
    async with peer(tmp_path, code) as (child, found):
        found.unchanged()
        child.tell()
        await until(lambda: runs(child.pid, "sleep"), "exec")
        with pytest.raises(Refused, match="exe_inode") as refused:
            found.unchanged()
        assert refused.value.reason is Reason.NOT_ATTESTED
        assert not found.pidfd.exited()  # exec is invisible to a pidfd: that is why exe is compared


@pytest.mark.root
async def test_a_peer_that_takes_another_effective_user_is_refused(tmp_path: Path) -> None:
    code = "s = connect(sys.argv[1]); tell('ready'); hear(); os.seteuid(1600); tell('changed'); hear()"
    async with peer(tmp_path, code) as (child, found):
        found.unchanged()
        child.tell()
        assert await child.line() == "changed"
        with pytest.raises(Refused, match="uid"):
            found.unchanged()


@pytest.mark.root
async def test_the_effective_user_counts_and_not_the_real_one(tmp_path: Path) -> None:
    code = "os.setegid(1601); os.seteuid(1600); s = connect(sys.argv[1]); tell('ready'); hear()"
    with bound_for_all(tmp_path) as (listener, path), script(code, path) as child:
        assert await child.line() == "ready"
        with listener.accept()[0] as connection:
            found = peer_of(connection, "c1")
            assert (found.process.uid, found.process.gid) == (1600, 1601)
            found.pidfd.close()


@pytest.mark.root
async def test_a_caller_that_changes_user_between_connect_and_accept_is_refused(tmp_path: Path) -> None:
    code = "s = connect(sys.argv[1]); os.seteuid(1600); tell('ready'); hear()"
    async with connected(tmp_path, code) as (_, connection):
        with pytest.raises(Refused, match="changed its user"):
            peer_of(connection, "c1")


async def test_a_caller_that_is_gone_at_accept_is_refused(tmp_path: Path) -> None:
    # The descriptor lives on in a child of the caller, so the connection does too.
    code = "s = connect(sys.argv[1]); pid = os.fork(); pid or (hear(), os._exit(0)); tell('ready'); os._exit(0)"
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        with script(code, path) as child:
            assert await child.line() == "ready"
            await until(lambda: child.process.poll() is not None, "the caller exits")
            with listener.accept()[0] as connection, pytest.raises(Refused):
                peer_of(connection, "c1")
            child.tell()


async def test_a_peer_that_exits_is_refused(tmp_path: Path) -> None:
    async with peer(tmp_path, STAYS) as (child, found):
        found.unchanged()
        child.end()
        assert found.pidfd.exited()
        with pytest.raises(Refused):
            found.unchanged()


@pytest.mark.root
async def test_a_later_process_with_the_peers_pid_is_refused(tmp_path: Path) -> None:
    # A process dies and the next one started gets its PID, runs the same program as the same user.
    async with peer(tmp_path, STAYS) as (child, found):
        child.end()
        code = """
wanted = int(sys.argv[1])
for _ in range(1000):
    open('/proc/sys/kernel/ns_last_pid', 'w').write(str(wanted - 1))
    pid = os.fork()
    if pid == 0: hear(); os._exit(0)
    if pid == wanted: break
    os.kill(pid, 9); os.waitpid(pid, 0)
tell(pid); hear(); os.kill(pid, 9); os.waitpid(pid, 0)
"""
        with script(code) as never_started:
            never_started.end()
        with script(code, str(found.process.pid)) as later:
            assert int(await later.line()) == found.process.pid
            impostor = read_process(found.process.pid)
            assert (impostor.pid, impostor.exe_inode) == (found.process.pid, found.process.exe_inode)
            with pytest.raises(Refused, match="start_time"):
                found.unchanged()
            # Even one that started within the same clock tick: the pidfd still names the first.
            lucky = Peer(connection="c1", process=impostor, pidfd=found.pidfd)
            with pytest.raises(Refused, match="exited"):
                lucky.unchanged()


async def test_a_caller_outside_our_pid_namespace_is_refused(tmp_path: Path) -> None:
    code = """
sys.path.insert(0, sys.argv[2])
from broker.errors import Refused
from broker.identity.peer import peer_of
listener = socket.socket(socket.AF_UNIX); listener.bind(sys.argv[1]); listener.listen()
tell('ready')
inner = os.fork()
if inner == 0: connect(sys.argv[1]); hear(); os._exit(0)
for _ in range(2):
    c, _ = listener.accept()
    try: peer = peer_of(c, 'c'); tell('taken' if peer.process.pid == inner else 'wrong')
    except Refused as error: tell(error)
os.kill(inner, 9)
"""
    path = str(tmp_path / "s")
    wrapper = ("unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child", "--mount-proc")
    with script(code, path, REPOSITORY, wrapper=wrapper) as child:
        assert await child.line() == "ready"
        assert await child.line() == "taken"
        with socket.socket(socket.AF_UNIX) as ours:
            ours.connect(path)
            assert "PID namespace" in await child.line()


@on_both_loops
async def test_who_waits_for_a_peers_exit_hears_of_it_even_after_its_connection_ended(tmp_path: Path) -> None:
    async with peer(tmp_path, STAYS) as (child, found):
        waiting = asyncio.create_task(found.exited())
        abandoned = asyncio.create_task(found.exited())
        await asyncio.sleep(0)
        abandoned.cancel()
        found.pidfd.close()
        await asyncio.wait([abandoned])
        assert not waiting.done()
        child.end()
        async with asyncio.timeout(5):
            await waiting


async def test_a_closed_pidfd_never_speaks_for_another_file(tmp_path: Path) -> None:
    async with peer(tmp_path, STAYS) as (_, found):
        number = found.pidfd.fileno()
        found.pidfd.close()
        taken = os.open("/dev/null", os.O_RDONLY)  # the kernel gives the lowest free number
        try:
            assert taken == number
            with pytest.raises(Refused, match="connection has ended"):
                found.unchanged()
            with pytest.raises(Refused):
                await found.exited()
            found.pidfd.close()
            os.fstat(taken)  # the second close did not take it
        finally:
            os.close(taken)


def test_unavailable_is_no_refusal() -> None:
    assert not issubclass(Unavailable, Refused)
