"""A whole broker in a process of its own: `action-broker serve`, as an operator starts it."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ISSUER = "https://broker.acme.test"
STARTED_S = 30.0


@dataclass(kw_only=True)
class RunningBroker:
    """Where it listens, and its log. `folder` holds policy/, state/ and broker.sock."""

    folder: Path
    process: subprocess.Popen[str]
    log: list[dict[str, Any]] = field(default_factory=list)
    grpc_port: int = 0
    http_port: int = 0
    operations_port: int = 0
    _told: threading.Condition = field(default_factory=threading.Condition)

    @property
    def socket(self) -> str:
        return str(self.folder / "broker.sock")

    @property
    def ledger(self) -> Path:
        return self.folder / "state" / "ledger.sqlite"

    def events(self, name: str) -> list[dict[str, Any]]:
        return [entry for entry in self.log if entry.get("event") == name]

    def wait_for(self, name: str, count: int = 1, timeout_s: float = STARTED_S) -> dict[str, Any]:
        """The newest log entry of this name, once there are `count`; AssertionError with the log otherwise."""
        with self._told:
            if not self._told.wait_for(lambda: len(self.events(name)) >= count or self._ended(), timeout_s):
                raise AssertionError(f"the broker did not log {name}: {self.log[-20:]}")
            if len(self.events(name)) < count:
                raise AssertionError(f"the broker ended without {name}: {self.log[-20:]}")
            return self.events(name)[-1]

    def _ended(self) -> bool:
        return any(entry.get("event") == "(end of log)" for entry in self.log)

    def read_log(self) -> None:
        """Runs in a thread of its own until the broker ends."""
        for line in self.process.stderr:
            try:
                entry = json.loads(line)
            except ValueError:
                entry = {"event": "(not JSON)", "line": line.rstrip()}
            with self._told:
                self.log.append(entry)
                self._told.notify_all()
        with self._told:
            self.log.append({"event": "(end of log)"})
            self._told.notify_all()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)

    def stop(self) -> int:
        """Asks it to stop, as an init system does. Its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(20)


def write_config(folder: Path, workload_api: str, broker_api: str, **tables: Mapping[str, Any]) -> Path:
    """broker.toml for ports that the system chooses."""
    values: dict[str, Mapping[str, Any]] = {
        "spire": {"workload_api": workload_api, "broker_api": broker_api},
        "unix": {"socket": str(folder / "broker.sock")},
        "grpc": {"listen": "127.0.0.1:0"},
        "http": {"listen": "127.0.0.1:0", "operations_listen": "127.0.0.1:0"},
    }
    for name, table in tables.items():
        values[name] = {**values.get(name, {}), **table}
    lines = [
        f"issuer = {json.dumps(ISSUER)}",
        'trust_domain = "acme.test"',
        f"state_folder = {json.dumps(str(folder / 'state'))}",
        f"policy_folder = {json.dumps(str(folder / 'policy'))}",
    ]
    for name, table in values.items():
        lines.append(f"[{name}]")
        lines += [f"{json.dumps(key)} = {json.dumps(value)}" for key, value in table.items()]
    file = folder / "broker.toml"
    file.write_text("\n".join(lines) + "\n")
    return file


@contextmanager
def start(config: Path, **environment: str) -> Iterator[RunningBroker]:
    """A broker until the block ends; it may also be ended inside."""
    process = subprocess.Popen(
        [sys.executable, "-m", "broker.cli", "serve", "--config", str(config)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    found = RunningBroker(folder=config.parent, process=process)
    reader = threading.Thread(target=found.read_log, daemon=True)
    reader.start()
    try:
        serving = found.wait_for("serving")
        found.grpc_port, found.http_port = serving["grpc_port"], serving["http_port"]
        found.operations_port = serving["operations_port"]
        yield found
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)
        reader.join(10)
        process.stderr.close()


@contextmanager
def folder_for(policies: Mapping[str, str]) -> Iterator[Path]:
    """A short-named folder (Unix socket paths are short) with these policy files in policy/; other users may enter."""
    with tempfile.TemporaryDirectory(prefix="ab-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "policy").mkdir()
        for file, text in policies.items():
            (folder / "policy" / file).write_text(text)
        yield folder
