"""`action-broker dev` in a process of its own: an embedded trust domain and a broker, for tests of what talks to them.

with dev_broker() as dev:
    dev.cli_as("/support/agent", "request", *REFUND, "--parameters", '{"amount": 30}')
"""

import json
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.cli import COMMAND, LIMIT_S, Ran, clean_environment, run

from broker.cli.dev_entries import create, selector

CALLER = "spiffe://dev.test/support/agent"
SERVICE = "spiffe://dev.test/service/orders"
ORDER = "https://orders.dev.test/orders/17"
REFUND = ("orders.refund", ORDER, SERVICE)
"""What the policy that `dev` begins with permits CALLER up to an amount of 100."""


@dataclass
class DevBroker:
    """Where it is. shown: what it said of itself as JSON."""

    process: subprocess.Popen[str]
    folder: Path
    log: Path
    shown: dict[str, Any]

    @property
    def environment(self) -> dict[str, str]:
        """For a program that is to find the broker and its own identity."""
        return self.shown["environment"]

    @property
    def socket(self) -> str:
        return self.environment["ACTION_BROKER_UNIX__SOCKET"].removeprefix("unix://")

    def command_as(self, path: str) -> tuple[str, ...]:
        """What to put before a command, to run it as this workload."""
        return (*COMMAND, "dev", "exec", "--folder", str(self.folder), "--id", path, "--")

    def exec_as(self, path: str, *command: object) -> Ran:
        """Runs a command as this workload, by `action-broker dev exec`."""
        return run(*self.command_as(path), *command)

    def cli_as(self, path: str, *arguments: object, told: str = "") -> Ran:
        """Runs `action-broker ARGUMENTS` as this workload, which is registered before it begins."""
        process = subprocess.Popen(
            ["sh", "-c", 'read begin; exec "$@"', "sh", *COMMAND, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=clean_environment(**self.environment),
        )
        with process:
            try:
                create(Path(self.shown["entries"]), f"spiffe://dev.test{path}", [selector(process.pid)])
                out, err = process.communicate(f"\n{told}", LIMIT_S)
            finally:
                process.kill()
        return Ran(process.returncode, out, err)

    def events(self, name: str) -> list[dict[str, Any]]:
        """The log's entries of this name so far."""
        found = []
        for line in self.log.read_text().splitlines():
            entry = json.loads(line)
            if entry.get("event") == name:
                found.append(entry)
        return found

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Ends it as a user or an init system does. Its exit code."""
        self.process.send_signal(number)
        return self.process.wait(30)


@contextmanager
def dev_broker(folder: Path | None = None, *options: object, **environment: str) -> Iterator[DevBroker]:
    """One that serves, until the block ends; it may also be ended inside. folder: a new one without."""
    with tempfile.TemporaryDirectory(prefix="ab-dev-") as name:
        Path(name).chmod(0o755)
        chosen, log = folder or Path(name) / "dev", Path(name) / "log"
        with (
            log.open("w") as file,
            subprocess.Popen(
                [*COMMAND, "--json", "dev", "--folder", str(chosen), *map(str, options)],
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env=clean_environment(**environment),
            ) as process,
        ):
            try:
                line = process.stdout.readline()
                assert line, log.read_text()
                yield DevBroker(process=process, folder=chosen, log=log, shown=json.loads(line))
            finally:
                if process.poll() is None:
                    process.terminate()
                    try:
                        process.wait(20)
                    except subprocess.TimeoutExpired:
                        process.kill()
