"""The front socket passes on what the peer's own process wrote, and nothing else."""

import asyncio
import hashlib
import json
import os
import socket
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from support.processes import on_both_loops, script, until

from broker.errors import BrokerError, Reason, Refused
from broker.identity.peer import Peer
from broker.identity.unix_front import Limits, UnixFront

MANY = 4 * 1024 * 1024


class Backend:
    """A server that keeps what each connection sent, by the path that it came from, and answers as told."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.received: dict[str, bytearray] = {}
        self.writers: dict[str, asyncio.StreamWriter] = {}
        self.reads = asyncio.Event()
        self.reads.set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        name = writer.get_extra_info("peername")
        self.received[name], self.writers[name] = bytearray(), writer
        try:
            while await self.reads.wait() and (data := await reader.read(65536)):
                self.received[name] += data
                if data.startswith(b"echo "):
                    writer.write(data[5:])
            if self.received[name].startswith(b"after me"):
                writer.write(b"you first")
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    @property
    def all(self) -> bytes:
        return b"|".join(bytes(part) for part in self.received.values())


class Refusals(list[BrokerError]):
    def details(self) -> str:
        return "\n".join(error.detail for error in self)


@asynccontextmanager
async def front_of(folder: Path, limits: Limits | None = None) -> AsyncIterator[tuple[UnixFront, Backend, Refusals]]:
    private = folder / "private"
    private.mkdir(mode=0o700)
    backend, refusals = Backend(private / "b"), Refusals()
    server = await asyncio.start_unix_server(backend.serve, backend.path)
    front = UnixFront(folder / "front", backend.path, limits=limits, on_refused=refusals.append)
    await front.start()
    try:
        yield front, backend, refusals
    finally:
        await front.close()
        server.close()
        assert [path.name for path in private.iterdir() if path.name != "b"] == []  # no source path is left


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def only_peer(front: UnixFront, backend: Backend) -> Peer:
    (name,) = backend.received
    found = front.peer(f"unix:{name}")
    assert found is not None
    return found


SPEAKS = "s = connect(sys.argv[1]); s.sendall(b'mine,'); "


async def whoami(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
    found = whoami.front.peer(context.peer())
    if found is None:
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, context.peer())
    found.unchanged()
    return json.dumps({"pid": found.process.pid, "uid": found.process.uid, "connection": found.connection}).encode()


@asynccontextmanager
async def grpc_front(folder: Path) -> AsyncIterator[UnixFront]:
    private = folder / "private"
    private.mkdir(mode=0o700)
    server = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(whoami)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t.T", {"WhoAmI": handler}),))
    server.add_insecure_port(f"unix:{private}/b")
    await server.start()
    front = whoami.front = UnixFront(folder / "front", private / "b")
    await front.start()
    try:
        yield front
    finally:
        await server.stop(None)
        await front.close()


GRPC_CALLER = """
import grpc
channel = grpc.insecure_channel('unix:' + sys.argv[1])
tell(channel.unary_unary('/t.T/WhoAmI')(b'', timeout=10).decode()); hear()
"""


@on_both_loops
async def test_a_grpc_handler_knows_the_process_that_called(tmp_path: Path) -> None:
    async with grpc_front(tmp_path) as front, grpc.aio.insecure_channel(f"unix:{front.path}") as channel:
        with script(GRPC_CALLER, str(front.path)) as child:
            theirs = json.loads(await child.line())
        ours = json.loads(await channel.unary_unary("/t.T/WhoAmI")(b"", timeout=10))
        assert (theirs["pid"], ours["pid"]) == (child.pid, os.getpid())
        assert ours["uid"] == os.geteuid()
        assert theirs["connection"] != ours["connection"]


@on_both_loops
async def test_many_calls_at_once_each_find_their_own_connection(tmp_path: Path) -> None:
    async with grpc_front(tmp_path) as front:
        options = [("grpc.use_local_subchannel_pool", 1)]
        channels = [grpc.aio.insecure_channel(f"unix:{front.path}", options=options) for _ in range(8)]
        calls = [channel.unary_unary("/t.T/WhoAmI")(b"", timeout=20) for channel in channels for _ in range(40)]
        answers = [json.loads(answer) for answer in await asyncio.gather(*calls)]
        assert {answer["pid"] for answer in answers} == {os.getpid()}
        assert len({answer["connection"] for answer in answers}) == len(channels) == len(front)
        for channel in channels:
            await channel.close()


async def test_who_reaches_the_private_socket_directly_has_no_peer(tmp_path: Path) -> None:
    async with grpc_front(tmp_path) as front:
        async with grpc.aio.insecure_channel(f"unix:{tmp_path}/private/b") as channel:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await channel.unary_unary("/t.T/WhoAmI")(b"", timeout=10)
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert front.peer("") is None
        assert front.peer("unix:") is None
        assert front.peer("ipv4:127.0.0.1:1") is None


@on_both_loops
async def test_what_a_forked_child_writes_is_never_passed_on(tmp_path: Path) -> None:
    code = SPEAKS + "hear(); os.fork() or (s.sendall(b'FORGED'), os._exit(0)); tell(rest(s)); hear()"
    async with front_of(tmp_path) as (front, backend, refusals):
        with script(code, str(front.path)) as child:
            await until(lambda: backend.all == b"mine,", "the peer's own bytes arrive")
            child.tell()
            await until(lambda: not front, "the connection is cut")
            assert await child.line() == "b''"
        assert backend.all == b"mine,"
        assert "another process" in refusals.details()


@on_both_loops
async def test_what_a_process_with_a_passed_descriptor_writes_is_never_passed_on(tmp_path: Path) -> None:
    other = """
u = socket.socket(socket.AF_UNIX); u.bind(sys.argv[1]); u.listen(); tell('ready')
c, _ = u.accept()
_, fds, _, _ = socket.recv_fds(c, 1, 1)
s = socket.socket(fileno=fds[0]); s.sendall(b'FORGED'); tell('wrote'); hear()
"""
    passes = SPEAKS + "hear(); u = connect(sys.argv[2]); socket.send_fds(u, [b'x'], [s.fileno()]); hear()"
    async with front_of(tmp_path) as (front, backend, refusals):
        with script(other, f"{tmp_path}/u") as thief, script(passes, str(front.path), f"{tmp_path}/u") as child:
            assert await thief.line() == "ready"
            await until(lambda: backend.all == b"mine,", "the peer's own bytes arrive")
            child.tell()
            assert await thief.line() == "wrote"
            await until(lambda: not front, "the connection is cut")
        assert backend.all == b"mine,"
        assert f"[{thief.pid}]" in refusals.details()


async def test_another_writer_between_two_of_the_peers_is_found_even_before_accept(tmp_path: Path) -> None:
    code = """
s = connect(sys.argv[1]); s.sendall(b'mine,')
pid = os.fork()
if pid == 0: s.sendall(b'FORGED'); os._exit(0)
os.waitpid(pid, 0); s.sendall(b'mine'); tell('wrote'); hear()
"""
    async with front_of(tmp_path) as (front, backend, refusals):
        asyncio.get_running_loop().remove_reader(front._listener.fileno())  # a busy broker accepts late
        with script(code, str(front.path)) as child:
            assert await child.line() == "wrote"
            front._accept()
            await until(lambda: refusals, "the connection is cut")
        assert b"FORGED" not in backend.all


async def test_a_caller_that_sends_descriptors_is_cut_and_they_are_not_kept(tmp_path: Path) -> None:
    code = SPEAKS + "hear(); socket.send_fds(s, [b'more'], [0, 1, 2] * 50); tell(rest(s)); hear()"
    async with front_of(tmp_path) as (front, backend, refusals):
        before = descriptors()
        with script(code, str(front.path)) as child:
            await until(lambda: backend.all == b"mine,", "the peer's own bytes arrive")
            child.tell()
            await until(lambda: not front, "the connection is cut")
        assert "sent descriptors" in refusals.details()
        assert backend.all == b"mine,"
        await until(lambda: descriptors() <= before, "all descriptors are given back")


@on_both_loops
async def test_a_connection_ends_with_its_process_even_if_its_descriptor_lives_on(tmp_path: Path) -> None:
    code = SPEAKS + "os.fork() or (hear(), os._exit(0)); hear(); os._exit(0)"
    async with front_of(tmp_path) as (front, backend, _):
        with script(code, str(front.path)) as child:
            await until(lambda: backend.all == b"mine,", "the peer's own bytes arrive")
            found = only_peer(front, backend)
            found.unchanged()
            os.kill(child.pid, 9)  # the fork still holds the descriptor
            await until(lambda: not front, "the connection is cut")
            assert front.peer(found.connection) is None
            with pytest.raises(Refused):
                found.unchanged()


async def test_a_peer_that_becomes_another_program_is_refused_at_its_next_request(tmp_path: Path) -> None:
    # The shell writes under the same PID and on the same connection: only its executable gives it away.
    code = SPEAKS + "os.set_inheritable(s.fileno(), True); hear(); "
    code += "os.execv('/bin/sh', ['sh', '-c', f'echo other >&{s.fileno()}; read x'])"
    async with front_of(tmp_path) as (front, backend, refusals):
        with script(code, str(front.path)) as child:
            await until(lambda: backend.all == b"mine,", "the peer's own bytes arrive")
            only_peer(front, backend).unchanged()
            child.tell()
            await until(lambda: backend.all == b"mine,other\n", "the other program writes")
            with pytest.raises(Refused, match="exe_inode"):
                only_peer(front, backend).unchanged()
        assert refusals == []


@pytest.mark.root
async def test_a_peer_that_takes_another_user_is_refused_at_its_next_request(tmp_path: Path) -> None:
    code = SPEAKS + "hear(); os.setresuid(1600, 1600, 1600); s.sendall(b'as 1600'); hear()"
    async with front_of(tmp_path) as (front, backend, _):
        with script(code, str(front.path)) as child:
            await until(lambda: backend.all == b"mine,", "the peer's own bytes arrive")
            only_peer(front, backend).unchanged()
            child.tell()
            await until(lambda: backend.all.endswith(b"as 1600"), "it writes as another user")
            with pytest.raises(Refused, match="uid"):
                only_peer(front, backend).unchanged()


@on_both_loops
async def test_many_connections_are_kept_apart_and_all_given_back(tmp_path: Path) -> None:
    code = """
import random
socks = [connect(sys.argv[1]) for _ in range(200)]
random.shuffle(socks)
for n, s in enumerate(socks): s.sendall(b'echo %d' % n)
tell(all(s.recv(100) == b'%d' % n for n, s in enumerate(socks))); hear()
"""
    async with front_of(tmp_path) as (front, backend, _):
        before = descriptors()
        with script(code, str(front.path)) as child:
            assert await child.line() == "True"
            assert len(front) == len(backend.received) == 200
            assert {front.peer(name).process.pid for name in backend.received} == {child.pid}
        await until(lambda: not front, "connections end")
        await until(lambda: descriptors() <= before, "all descriptors are given back")


@pytest.mark.parametrize("limits", [Limits(connections_per_uid=3), Limits(connections=3)], ids=["per-uid", "in-all"])
async def test_a_connection_over_the_cap_is_refused_until_another_ends(tmp_path: Path, limits: Limits) -> None:
    code = """
socks = [connect(sys.argv[1]) for _ in range(3)]
for s in socks: s.sendall(b'echo hi'); s.recv(10)
tell(rest(connect(sys.argv[1])))
hear(); socks.pop().close(); hear()
s = connect(sys.argv[1]); s.sendall(b'echo room again'); tell(s.recv(100)); hear()
"""
    async with front_of(tmp_path, limits) as (front, _, refusals):
        with script(code, str(front.path)) as child:
            assert await child.line() == "b''"
            assert [error.reason for error in refusals] == [Reason.QUOTA]
            child.tell()
            await until(lambda: len(front) == 2, "one ends")
            child.tell()
            assert await child.line() == "b'room again'"


@on_both_loops
async def test_a_caller_that_does_not_read_slows_the_server_down(tmp_path: Path) -> None:
    code = """
import hashlib
s = connect(sys.argv[1]); s.sendall(b'mine,'); hear(); tell(hashlib.sha256(rest(s)).hexdigest()); hear()
"""
    content = os.urandom(MANY)
    async with front_of(tmp_path) as (front, backend, _):
        with script(code, str(front.path)) as child:
            await until(lambda: backend.all == b"mine,", "the peer's own bytes arrive")
            (writer,) = backend.writers.values()
            writer.write(content)
            left = writer.transport.get_write_buffer_size
            await until(lambda: left() < MANY, "some is taken")
            for _ in range(100):
                await asyncio.sleep(0)
            assert left() > MANY - 1024 * 1024  # the rest waits at its sender, not with us
            writer.write_eof()
            child.tell()
            assert await child.line() == hashlib.sha256(content).hexdigest()


@on_both_loops
async def test_a_server_that_does_not_read_slows_the_caller_down(tmp_path: Path) -> None:
    code = """
s = connect(sys.argv[1]); s.setblocking(False); left = memoryview(b'x' * int(sys.argv[2]))
quiet = 0
while quiet < 100:
    try: left = left[s.send(left):]; quiet = 0
    except BlockingIOError: quiet += 1; time.sleep(.002)
tell(len(left)); s.setblocking(True); s.sendall(left); s.shutdown(socket.SHUT_WR); hear()
"""
    async with front_of(tmp_path) as (front, backend, _):
        backend.reads.clear()
        with script(code, str(front.path), str(MANY)) as child:
            assert int(await child.line()) > MANY - 1024 * 1024
            backend.reads.set()
            await until(lambda: len(backend.all) == MANY, "everything arrives")


@on_both_loops
async def test_who_has_finished_speaking_still_hears_the_answer(tmp_path: Path) -> None:
    code = "s = connect(sys.argv[1]); s.sendall(b'after me'); s.shutdown(socket.SHUT_WR); tell(rest(s)); hear()"
    async with front_of(tmp_path) as (front, backend, refusals):
        with script(code, str(front.path)) as child:
            assert await child.line() == "b'you first'"
            await until(lambda: not front, "both have finished")
        assert backend.all == b"after me"
        assert refusals == []


async def test_a_caller_that_never_speaks_is_closed_and_a_quiet_one_is_not(tmp_path: Path) -> None:
    code = "s = connect(sys.argv[1]); t = connect(sys.argv[1]); s.sendall(b'hi'); tell(rest(t)); hear()"
    async with front_of(tmp_path, Limits(first_byte_s=0.3)) as (front, backend, refusals):
        with script(code, str(front.path)) as child:
            assert await child.line() == "b''"
            assert len(front) == 1
            assert "sent nothing" in refusals.details()
            assert b"hi" in backend.all


async def test_a_caller_is_told_at_once_when_the_server_behind_is_away(tmp_path: Path) -> None:
    async with front_of(tmp_path) as (front, backend, refusals):
        backend.path.rename(backend.path.with_name("away"))
        with script("tell(rest(connect(sys.argv[1])))", str(front.path)) as child:
            assert await child.line() == "b''"
        assert "not up" in refusals.details()
        backend.path.with_name("away").rename(backend.path)
        with script("s = connect(sys.argv[1]); s.sendall(b'echo hi'); tell(s.recv(9))", str(front.path)) as child:
            assert await child.line() == "b'hi'"


async def test_a_socket_that_nobody_listens_on_is_replaced_and_removed_at_the_end(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "front"))
    async with front_of(tmp_path) as (front, _, _):
        assert stat.S_IMODE(front.path.stat().st_mode) == 0o666
        with script("s = connect(sys.argv[1]); s.sendall(b'echo hi'); tell(s.recv(9))", str(front.path)) as child:
            assert await child.line() == "b'hi'"
    assert not (tmp_path / "front").exists()


async def test_a_running_server_or_a_plain_file_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("precious")
    async with front_of(tmp_path) as (front, backend, _):
        for path in (front.path, tmp_path / "plain"):
            with pytest.raises(OSError, match=r"stop it|not a socket"):
                await UnixFront(path, backend.path).start()
        with script("s = connect(sys.argv[1]); s.sendall(b'echo hi'); tell(s.recv(9))", str(front.path)) as child:
            assert await child.line() == "b'hi'"
    assert (tmp_path / "plain").read_text() == "precious"


async def test_at_the_end_a_successors_socket_is_left_alone(tmp_path: Path) -> None:
    async with front_of(tmp_path) as (front, _, _):
        front.path.unlink()
        with socket.socket(socket.AF_UNIX) as successor:
            successor.bind(str(front.path))
            await front.close()
            assert front.path.exists()


async def test_a_front_does_not_start_where_strangers_could_step_in(tmp_path: Path) -> None:
    private, shared, open_backend = tmp_path / "private", tmp_path / "shared", tmp_path / "open"
    private.mkdir(mode=0o700)
    for folder, mode in ((shared, 0o777), (open_backend, 0o750)):
        folder.mkdir()
        folder.chmod(mode)
    with pytest.raises(PermissionError, match="replace the socket"):
        await UnixFront(shared / "front", private / "b").start()
    with pytest.raises(PermissionError, match="0700"):
        await UnixFront(tmp_path / "front", open_backend / "b").start()
    with pytest.raises(OSError, match="107 bytes"):
        await UnixFront(tmp_path / ("x" * 100) / "front", private / "b").start()
    shared.chmod(0o1777)  # sticky, as /tmp is
    front = UnixFront(shared / "new" / "front", private / "b", mode=0o600)
    await front.start()
    assert stat.S_IMODE(front.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(front.path.parent.stat().st_mode) & 0o022 == 0
    await front.close()
    await front.close()
