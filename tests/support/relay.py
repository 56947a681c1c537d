"""A relay between a client and the broker's Unix socket, that a test can cut, or make silent.

It runs in the test's own process, so the broker sees the same process on both sides of it.
"""

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path


class Relay:
    """Passes on what comes, from `path` to the socket `target`, until it is told otherwise."""

    def __init__(self, path: str, target: str) -> None:
        self.path, self._target = path, target
        self._connections: set[asyncio.Task[None]] = set()
        self._open, self._silent = True, asyncio.Event()

    def cut(self) -> None:
        """Ends every connection, and each new one at once: a network that is gone, and says so."""
        self._open = False
        for connection in self._connections:
            connection.cancel()

    def silence(self) -> None:
        """Nothing that is on the way, or comes over a connection of now, arrives any more, and nobody is told."""
        self._silent.set()
        self._silent = asyncio.Event()

    def mend(self) -> None:
        """New connections are passed on again. What was made silent stays so."""
        self._open = True

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            if self._open:
                await self._pass_on(reader, writer, self._silent)
        except (OSError, asyncio.CancelledError):  # the other side is away, or it was cut: nobody waits for this task
            return
        finally:
            self._connections.discard(task)
            writer.transport.abort()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, silent: asyncio.Event) -> None:
        far_reader, far_writer = await asyncio.open_unix_connection(self._target)
        pumps = [
            asyncio.create_task(_pump(reader, far_writer, silent)),
            asyncio.create_task(_pump(far_reader, writer, silent)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            far_writer.transport.abort()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, silent: asyncio.Event) -> None:
    while data := await reader.read(65536):
        if not silent.is_set():
            writer.write(data)
            await writer.drain()


@asynccontextmanager
async def relay(target: str) -> AsyncIterator[Relay]:
    """One to this socket, while the block lasts."""
    with tempfile.TemporaryDirectory(prefix="relay-") as folder:
        found = Relay(str(Path(folder) / "broker.sock"), target)
        server = await asyncio.start_unix_server(found.serve, found.path)
        try:
            yield found
        finally:
            server.close()
            found.cut()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(5):
                    await asyncio.gather(*found._connections)
