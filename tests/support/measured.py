"""The other side of measured_server.py: starts a measured process, asks it, and calls it over mutual TLS."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc

TESTS = Path(__file__).resolve().parent.parent


class MeasuredServer:
    """The measured process; ended by its own handle. Ready once it is made."""

    def __init__(self, module: str, folder: Path, *arguments: str) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, folder, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": f"{TESTS}:{TESTS.parent}"},
        )
        try:
            self.port = self._read()["port"]
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def _read(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("the measured server ended")
        return json.loads(line)

    def ask(self, command: str) -> dict[str, Any]:
        """What it answers; `cpu`: the CPU seconds that took."""
        self.process.stdin.write(f"{command}\n")
        self.process.stdin.flush()
        return self._read()

    def cpu(self) -> float:
        """CPU seconds so far, user and system, of all its threads."""
        return self.ask("")["cpu"]

    def channel(self) -> grpc.aio.Channel:
        """A connection of its own, with the caller's SVID."""
        credentials = grpc.ssl_channel_credentials(
            *((self.folder / name).read_bytes() for name in ("root.pem", "client.key", "client.pem"))
        )
        options = [
            ("grpc.ssl_target_name_override", "broker.acme.test"),
            ("grpc.use_local_subchannel_pool", 1),
        ]
        return grpc.aio.secure_channel(f"127.0.0.1:{self.port}", credentials, options)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(20)
        self.process.stdout.close()
