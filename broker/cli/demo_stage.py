"""The demo's processes and its folder: started together, ended one by one by their own handles."""

import asyncio
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

from broker.cli import dev_entries
from broker.cli.dev_folder import DevFolder
from broker.cli.starter_policy import CALLER, SERVICE
from broker.errors import BrokerError

PATIENCE_S: Final = 40.0  # for a process to start on a slow machine; everything else takes milliseconds
LEAVES_S: Final = 5.0
_LINE: Final = 1024 * 1024
_LONGEST: Final = 40  # bytes of a temporary folder's name; sockets go in, and their names are short (unix(7))


class StageError(Exception):
    """A process did not do what every step takes for granted: start, answer, end."""


class Actor:
    """One process, told line by line."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, log: Path) -> None:
        if process.stdin is None or process.stdout is None:
            raise ValueError("an actor is talked to through pipes")
        self.name, self.process, self._log = name, process, log
        self._ears, self._mouth = process.stdin, process.stdout

    @classmethod
    async def start(cls, name: str, folder: Path, *arguments: str) -> "Actor":
        """`python -m ARGUMENTS`. It has a session of its own, so that Ctrl-C ends it through us, in good order.

        folder: for its log, and for whatever it puts into a temporary folder.
        """
        log = folder / f"{name}.log"
        with log.open("wb") as file:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                *arguments,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=file,
                start_new_session=True,
                limit=_LINE,
                env={**os.environ, "TMPDIR": str(folder)},
            )
        return cls(name, process, log)

    async def heard(self) -> dict[str, Any]:
        """Its next line. Raises: StageError with the end of its log."""
        line = b""
        try:
            async with asyncio.timeout(PATIENCE_S):
                line = await self._mouth.readline()
            found: dict[str, Any] = json.loads(line)
            if "error" in found:
                raise StageError(f"the {self.name} does not start: {found['error']}")
        except (TimeoutError, ValueError) as error:
            log = self._log.read_text(errors="replace").strip()[-2000:] or "nothing"
            said = f"the {self.name} does not answer as it should ({line[:200]!r}); its log says:\n{log}"
            raise StageError(said) from error
        return found

    async def do(self, act: str, **told: Any) -> dict[str, Any]:
        """Has it do something, and waits for its answer. Raises: StageError."""
        self._ears.write(json.dumps({"do": act, **told}).encode() + b"\n")
        return await self.heard()

    async def end(self) -> int:
        """Ends it: it is told to stop, and ended by force if it must be. Its exit code."""
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.terminate()
            try:
                async with asyncio.timeout(PATIENCE_S):
                    return await self.process.wait()
            except TimeoutError:
                self.process.kill()
        return await self.process.wait()

    async def leave(self) -> None:
        """Ends one that follows lines: it goes when there are no more, else as by `end`."""
        self._ears.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LEAVES_S):
                await self.process.wait()
        await self.end()


class Stage:
    """Who is on it. shown: what `dev` says of itself. entry_id: the agent's registration."""

    def __init__(self, shown: dict[str, Any], entries: Path) -> None:
        self.shown, self._entries = shown, entries
        self.dev: Actor
        self.orders: Actor
        self.agent: Actor
        self.stranger: Actor
        self._entry_id = ""

    async def register_agent(self) -> None:
        """What a platform team does once for each kind of workload; here for this one process."""
        selectors = [dev_entries.selector(self.agent.process.pid)]
        self._entry_id = await _asked(dev_entries.create, self._entries, CALLER, selectors)

    async def unregister_agent(self) -> None:
        """Takes it away again."""
        await _asked(dev_entries.delete, self._entries, self._entry_id)


async def _asked(call: Any, *arguments: Any) -> Any:
    try:
        return await asyncio.to_thread(call, *arguments)
    except (BrokerError, OSError) as error:
        raise StageError(f"the trust domain refuses an entry: {error}") from error


@contextlib.asynccontextmanager
async def stage() -> AsyncIterator[Stage]:
    """All processes, up and ready; ended, and their folder gone, when the block ends. Raises: StageError."""
    async with contextlib.AsyncExitStack() as stack:
        name = stack.enter_context(_folder())

        folder = DevFolder(path=Path(name) / "dev")

        async def start(name: str, *arguments: str) -> Actor:
            actor = await Actor.start(name, folder.path.parent, *arguments)
            stack.push_async_callback(actor.end if name == "broker" else actor.leave)
            return actor

        socket, issuer = str(Path(name) / "orders.sock"), folder.environment["ACTION_BROKER_ISSUER"]
        asks = ("agent", socket, str(folder.broker_socket), issuer)
        dev = await start("broker", "broker.cli", "--json", "dev", "--folder", str(folder.path))
        agent = await start("agent", "broker.cli.demo_roles", *asks)
        stranger = await start("stranger", "broker.cli.demo_roles", *asks)
        found = Stage(await dev.heard(), folder.entries)
        found.dev, found.agent, found.stranger = dev, agent, stranger
        serves = ("orders", socket, str(folder.broker_socket), issuer, found.shown["key_set"], found.shown["broker_id"])
        found.orders = await start(
            "service",
            *("broker.cli", "dev", "exec", "--folder", str(folder.path), "--id", SERVICE, "--"),
            *(sys.executable, "-m", "broker.cli.demo_roles", *serves, folder.environment["SPIFFE_ENDPOINT_SOCKET"]),
        )
        for actor in (found.agent, found.stranger, found.orders):
            await actor.heard()  # "ready"
        yield found


def _folder() -> "tempfile.TemporaryDirectory[str]":
    """0700, and short enough for sockets wherever TMPDIR is."""
    short = len(tempfile.gettempdir()) <= _LONGEST
    return tempfile.TemporaryDirectory(prefix="action-broker-demo-", dir=None if short else "/tmp")  # noqa: S108
