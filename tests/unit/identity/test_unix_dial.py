"""A broker's Unix socket is believed only where the right user serves it."""

import asyncio
import os
from contextlib import asynccontextmanager
from tempfile import TemporaryDirectory

import pytest
from support.processes import on_both_loops, script

from broker.identity.unix_dial import UnixDialer


@asynccontextmanager
async def echo(path):
    """Answers when the other side has said all, so the answer comes after its half of the connection is closed."""

    async def serve(reader, writer):
        writer.write(await reader.read())
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_unix_server(serve, path) as server:
        yield server


async def through(dialer, data):
    """What comes back through the hop for `data`."""
    reader, writer = await asyncio.open_unix_connection((await dialer.start()).removeprefix("unix:"))
    writer.write(data)
    writer.write_eof()
    try:
        return await reader.read()
    except ConnectionResetError:
        return b""
    finally:
        writer.close()
        await dialer.close()


@on_both_loops
async def test_the_right_users_socket_is_used_and_each_half_closes_by_itself(tmp_path):
    data = os.urandom(4 * 1024 * 1024)
    async with echo(tmp_path / "s"):
        dialer = UnixDialer(str(tmp_path / "s"), allowed={os.geteuid(), 12345})
        assert await through(dialer, data) == data
        assert dialer.last_error is None


@on_both_loops
async def test_another_users_socket_gets_no_byte_of_ours(tmp_path):
    async with echo(tmp_path / "s"):
        for allowed in (set(), {os.geteuid() + 1}):
            dialer = UnixDialer(str(tmp_path / "s"), allowed=allowed)
            assert await through(dialer, b"secret") == b""
            assert f"is served by user {os.geteuid()}" in dialer.last_error
        assert await through(UnixDialer(str(tmp_path / "s"), allowed={os.geteuid()}), b"secret") == b"secret"


@pytest.mark.root
async def test_a_socket_planted_by_another_user_is_recognised():
    code = """
s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen(); tell("ready")
tell(repr(rest(s.accept()[0])))
"""
    user = ("setpriv", "--reuid=1600", "--regid=1600", "--clear-groups")
    with TemporaryDirectory(dir="/tmp") as folder:
        os.chown(folder, 1600, 1600)
        with script(code, f"{folder}/s", wrapper=user) as planted:
            assert await planted.line() == "ready"
            dialer = UnixDialer(f"{folder}/s", allowed={0, os.geteuid()})
            assert await through(dialer, b"secret") == b""
            assert "is served by user 1600, not by 0" in dialer.last_error
            assert await planted.line() == "b''"


async def test_nobody_there_is_explained(tmp_path):
    dialer = UnixDialer(str(tmp_path / "nobody"), allowed={os.geteuid()})
    assert await through(dialer, b"hello") == b""
    assert "FileNotFoundError" in dialer.last_error
