"""Sigstore's own programs on loopback: cosign, which verifies what we made, and timestamp-server, which stamps it."""

import contextlib
import fcntl
import os
import re
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from support.spire import wait_for
from tools.build_sigstore import sigstore_binaries

from attestors.rfc3161 import TimestampRoot, read_chain

START_S = 30.0
"""How long a server may take to be ready: half a second is usual, more on a busy machine."""
COSIGN_S = 60.0
ALONE_S = 120.0
"""Longer than any test has a server."""

_SERVING = re.compile(r"Serving timestamp server at (http://127\.0\.0\.1:\d+)")


class TimestampServerDidNotStart(Exception):
    """With the end of its log."""


@cache
def sigstore_tools() -> Path:
    """The folder with cosign and timestamp-server, built the first time."""
    return sigstore_binaries()


@dataclass(frozen=True, kw_only=True)
class TimestampServer:
    """base: its URL without a path. pem: its chain, its own certificate first, the root last."""

    base: str
    pem: bytes

    @property
    def url(self) -> str:
        """Where queries go."""
        return f"{self.base}/api/v1/timestamp"

    @property
    def root(self) -> TimestampRoot:
        return read_chain(self.pem)


@contextlib.contextmanager
def timestamp_authority() -> Iterator[TimestampServer]:
    """A real timestamp-server with a key of its own, until the block ends. Raises: TimestampServerDidNotStart.

    One at a time on a machine, since it takes port 2112 for its metrics and ends where that is taken: others wait.
    """
    # Without --port it takes a free one, which it says in its log.
    options = ["--host", "127.0.0.1", "--scheme", "http", "--timestamp-signer", "memory", "--disable-ntp-monitoring"]
    command = [sigstore_tools() / "timestamp-server", "serve", *options]
    with _alone(), tempfile.TemporaryDirectory(prefix="tsa-") as folder:
        log = Path(folder, "log")
        with log.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=out, cwd=folder) as server:
            try:
                base = _base(server, log)
                yield TimestampServer(base=base, pem=_get(f"{base}/api/v1/timestamp/certchain"))
            finally:
                server.kill()  # it keeps nothing


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Raises: TimeoutError when another one, perhaps within this very block, does not end."""
    with Path(tempfile.gettempdir(), f"action-broker-timestamp-server-{os.getuid()}.lock").open("a") as lock:

        def mine() -> bool:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            return False

        wait_for(mine, ALONE_S)
        yield


def _base(server: subprocess.Popen[bytes], log: Path) -> str:
    """Its URL, once it answers."""
    found: list[str] = []

    def ready() -> bool:
        if server.poll() is not None:
            raise TimestampServerDidNotStart(log.read_text(errors="replace")[-2000:])
        said = _SERVING.search(log.read_text(errors="replace"))
        if said is None:
            return False
        with contextlib.suppress(urllib.error.URLError):
            _get(f"{said[1]}/ping")
            found.append(said[1])
        return bool(found)

    try:
        wait_for(ready, START_S)
    except TimeoutError as error:
        raise TimestampServerDidNotStart(log.read_text(errors="replace")[-2000:]) from error
    return found[0]


def _get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310 - loopback
        body: bytes = answer.read()
        return body


@dataclass(frozen=True)
class Cosign:
    """How a run of cosign ended. err: what it said."""

    code: int
    err: str


def cosign(folder: Path, *arguments: object) -> Cosign:
    """Runs cosign in a folder, which is its home too: it finds no key, cache or root of somebody's there."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("COSIGN_", "SIGSTORE_", "TUF_"))}
    ran = subprocess.run(
        [sigstore_tools() / "cosign", *map(str, arguments)],
        cwd=folder,
        env={**ours, "HOME": str(folder), "SIGSTORE_NO_CACHE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=COSIGN_S,
    )
    return Cosign(ran.returncode, ran.stdout + ran.stderr)
