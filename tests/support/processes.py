"""Real processes for tests: children that follow a script line by line, and both event loops."""

import asyncio
import functools
import inspect
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import uvloop

PATIENCE_S = 20.0  # far more than anything takes; a test that reaches it has failed


def on_both_loops(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Runs an async test on asyncio's own event loop and on uvloop."""

    @functools.wraps(test)
    def run(new_loop: Callable[[], asyncio.AbstractEventLoop], **fixtures: object) -> None:
        with asyncio.Runner(loop_factory=new_loop) as runner:
            runner.run(test(**fixtures))

    signature = inspect.signature(test)
    new_loop = inspect.Parameter("new_loop", inspect.Parameter.KEYWORD_ONLY)
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), new_loop])
    loops = [asyncio.new_event_loop, uvloop.new_event_loop]
    return pytest.mark.parametrize("new_loop", loops, ids=["asyncio", "uvloop"])(run)


async def until(condition: Callable[[], object], what: str) -> None:
    """Returns once `condition` holds. Fails the test, naming `what`, when it does not come to hold."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - other processes bring it about, and set no event here
            await asyncio.sleep(0.002)
    assert condition(), what


class Child:
    """A process that talks over its standard streams in lines."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    @property
    def pid(self) -> int:
        return self.process.pid

    async def line(self) -> str:
        """The next line it prints."""
        assert self.process.stdout is not None
        async with asyncio.timeout(PATIENCE_S):
            return (await asyncio.to_thread(self.process.stdout.readline)).strip()

    def tell(self, text: str = "") -> None:
        """Gives it a line to read."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{text}\n")
        self.process.stdin.flush()

    def end(self) -> None:
        """Kills it if it still runs, and waits for it."""
        self.process.kill()
        self.process.wait(PATIENCE_S)


@contextmanager
def running(*command: str, **options: Any) -> Iterator[Child]:
    """Runs a command while the block lasts."""
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options) as process:
        child = Child(process)
        try:
            yield child
        finally:
            child.end()


# What the scripts below may use. `tell` prints a line, `hear` waits for one.
_PRELUDE = """
import array, os, socket, sys, time
def tell(text): print(text, flush=True)
def hear(): return sys.stdin.readline().strip()
def connect(path):
    s = socket.socket(socket.AF_UNIX)
    s.connect(path)
    return s
def rest(s):
    found = b""
    try:
        while data := s.recv(65536): found += data
    except ConnectionError: pass
    return found
"""


@contextmanager
def script(code: str, *arguments: str, wrapper: tuple[str, ...] = ()) -> Iterator[Child]:
    """Runs Python code in a process of its own while the block lasts. wrapper: a command to run it under."""
    with running(*wrapper, sys.executable, "-c", _PRELUDE + code, *arguments) as child:
        yield child
