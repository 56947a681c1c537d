"""A real SPIRE for tests: server and agent of one trust domain on loopback, with the Broker API on.

The agent runs as root, so that its `unix` attestor can look at processes of other users; those stand in for workloads.
Everything lies in one folder under /tmp (the paths of Unix sockets are short) and ends by its own process handles.
"""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from support.processes import PATIENCE_S
from tools.build_spire import spire_binaries

from broker.identity.spire_broker_api import SpireBrokerApi
from broker.identity.workload_api import WorkloadApi

START_S = 30.0
"""How long a server or agent may take to be ready: a second is usual, more on a busy machine."""

SERVER = """\
server {{
  bind_address = "127.0.0.1"
  bind_port = "{port}"
  socket_path = "{folder}/server/api.sock"
  trust_domain = "{name}"
  data_dir = "{folder}/server"
  log_level = "INFO"
  ca_key_type = "ec-p256"
  ca_ttl = "24h"
  default_x509_svid_ttl = "{x509_ttl}s"
  default_jwt_svid_ttl = "{jwt_ttl}s"
  ratelimit {{ signing = {sign_limit} }}
  experimental {{
    cache_reload_interval = "{sync}s"
  }}
}}
plugins {{
  DataStore "sql" {{ plugin_data {{ database_type = "sqlite3" connection_string = "{folder}/server/db.sqlite3" }} }}
  NodeAttestor "join_token" {{ plugin_data {{}} }}
  KeyManager "memory" {{ plugin_data {{}} }}
}}
"""

# The agent's keys are on disk: a join token is good once, so an agent that lost its key could not come back.
AGENT = """\
agent {{
  server_address = "127.0.0.1"
  server_port = "{port}"
  socket_path = "{folder}/workload/api.sock"
  trust_domain = "{name}"
  data_dir = "{folder}/agent"
  log_level = "INFO"
  trust_bundle_path = "{folder}/agent/bundle.pem"
  join_token_file = "{folder}/agent/token"
  experimental {{
    sync_interval = "{sync}s"
    broker {{
      socket_path = "{folder}/broker/broker.sock"
      brokers = [{{
        id = "spiffe://{name}/action-broker"
        allowed_reference_types = [{{ type_url = "type.googleapis.com/spiffe.broker.WorkloadPIDReference" }}]
      }}]
    }}
  }}
}}
plugins {{
  NodeAttestor "join_token" {{ plugin_data {{}} }}
  KeyManager "disk" {{ plugin_data {{ directory = "{folder}/agent" }} }}
  WorkloadAttestor "unix" {{ plugin_data {{ discover_workload_path = true }} }}
}}
"""


class SpireDidNotStart(Exception):
    """With the end of the log of the part that did not."""


@dataclass(slots=True, kw_only=True)
class Spire:
    """One trust domain. Use as a context manager, or `start()` and `stop()`.

    name: the trust domain's. x509_ttl, jwt_ttl: seconds that SVIDs live. SPIRE backdates certificates by 10 s and
    renews at half their life, so an X.509-SVID of x509_ttl is renewed after (x509_ttl - 10) / 2 s; at 10 s or less it
    is at every sync. sync: seconds between two looks of the agent at the server, and of the server at its database
    (SPIRE's own default is 5 for both). sign_limit: whether the server signs at most 500 SVIDs a second for one agent,
    as it does by default.
    """

    name: str = "acme.test"
    x509_ttl: int = 3600
    jwt_ttl: int = 300
    sync: int = 1
    sign_limit: bool = True
    folder: Path = field(init=False)
    port: int = field(init=False, default=0)
    _bin: Path = field(init=False)
    _server: subprocess.Popen[bytes] | None = field(init=False, default=None)
    _agent: subprocess.Popen[bytes] | None = field(init=False, default=None)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def workload_api(self) -> str:
        return f"unix:{self.folder}/workload/api.sock"

    @property
    def broker_api(self) -> str:
        return f"unix:{self.folder}/broker/broker.sock"

    def id(self, path: str) -> str:
        """The SPIFFE ID with this path: `id("build/agent")`."""
        return f"spiffe://{self.name}/{path}"

    def start(self) -> None:
        """Returns once both are healthy and the agent is attested. Raises: SpireDidNotStart."""
        self._bin = spire_binaries()
        self.folder = Path(tempfile.mkdtemp(prefix="spire-", dir="/tmp"))
        self.folder.chmod(0o711)  # workloads of other users go through it to the agent's sockets
        for part in ("server", "agent"):
            (self.folder / part).mkdir(mode=0o700)
        for part in ("workload", "broker"):
            (self.folder / part).mkdir(mode=0o755)
        try:
            self._start_server()
            self._write_agent_config()
            self.start_agent()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        self.kill_agent()
        if self._server is not None:
            _end(self._server, signal.SIGTERM)
            self._server = None
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start_server(self) -> None:
        for _ in range(5):  # between our look for a free port and SPIRE's bind another process may take it
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                self.port = probe.getsockname()[1]
            config = self.folder / "server.conf"
            config.write_text(self._fill(SERVER))
            self._server = self._run("spire-server", config)
            if self._healthy(self._server, "spire-server", "server"):
                return
            _end(self._server, signal.SIGKILL)
        raise SpireDidNotStart(self.logs())

    def _write_agent_config(self) -> None:
        token = self.server("token", "generate", "-spiffeID", self.id("node"), "-output", "json")
        (self.folder / "agent/token").write_text(json.loads(token)["value"])
        (self.folder / "agent/bundle.pem").write_text(self.server("bundle", "show"))
        (self.folder / "agent.conf").write_text(self._fill(AGENT))

    def start_agent(self) -> None:
        """Starts it, or starts it again with the identity that it had. Raises: SpireDidNotStart."""
        self._agent = self._run("spire-agent", self.folder / "agent.conf")
        if not self._healthy(self._agent, "spire-agent", "workload"):
            raise SpireDidNotStart(self.logs())

    def kill_agent(self) -> None:
        """As a crash: SIGKILL, sockets left behind."""
        if self._agent is not None:
            _end(self._agent, signal.SIGKILL)
            self._agent = None

    @property
    def agent_pid(self) -> int:
        """To stop it in its tracks, and let it go on."""
        assert self._agent is not None
        return self._agent.pid

    def _fill(self, template: str) -> str:
        return template.format(
            folder=self.folder,
            name=self.name,
            port=self.port,
            x509_ttl=self.x509_ttl,
            jwt_ttl=self.jwt_ttl,
            sync=self.sync,
            sign_limit=str(self.sign_limit).lower(),
        )

    def _run(self, program: str, config: Path) -> subprocess.Popen[bytes]:
        with (self.folder / f"{program}.log").open("ab") as log:
            return subprocess.Popen(
                [self._bin / program, "run", "-config", config],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def _healthy(self, process: subprocess.Popen[bytes], program: str, part: str) -> bool:
        check = [self._bin / program, "healthcheck", "-socketPath", self.folder / part / "api.sock"]

        def settled() -> bool:
            if process.poll() is not None:
                return True
            return subprocess.run(check, capture_output=True, check=False).returncode == 0

        with contextlib.suppress(TimeoutError):
            wait_for(settled, START_S)
        return process.poll() is None

    def logs(self) -> str:
        """The last lines of both, for a failed test."""
        found = []
        for program in ("spire-server", "spire-agent"):
            path = self.folder / f"{program}.log"
            lines = path.read_text(errors="replace").splitlines()[-40:] if path.exists() else ["(none)"]
            found.append("\n".join([f"--- {program}", *lines]))
        return "\n".join(found)

    # What an operator does at the server.

    def server(self, *arguments: str, text: str | None = None) -> str:
        """One `spire-server` command at this server; `text` is its input. Its output."""
        command = [self._bin / "spire-server", *arguments, "-socketPath", self.folder / "server/api.sock"]
        ran = subprocess.run(command, input=text, capture_output=True, text=True, check=False, timeout=30)
        assert ran.returncode == 0, f"spire-server {' '.join(arguments)}: {ran.stderr}{ran.stdout}\n{self.logs()}"
        return ran.stdout

    def create_entry(
        self, path: str, *, uid: int, federates_with: Sequence[str] = (), x509_ttl: int = 0, jwt_ttl: int = 0
    ) -> str:
        """Entitles processes of this effective uid to this ID; the entry's own id. TTLs: 0 is the server's default."""
        arguments = ["-parentID", self.id("node"), "-spiffeID", self.id(path), "-selector", f"unix:uid:{uid}"]
        for other in federates_with:
            arguments += ["-federatesWith", f"spiffe://{other}"]
        if x509_ttl:
            arguments += ["-x509SVIDTTL", str(x509_ttl)]
        if jwt_ttl:
            arguments += ["-jwtSVIDTTL", str(jwt_ttl)]
        made = json.loads(self.server("entry", "create", *arguments, "-output", "json"))
        return str(made["results"][0]["entry"]["id"])

    def delete_entry(self, entry_id: str) -> None:
        self.server("entry", "delete", "-entryID", entry_id)

    def entries(self) -> dict[str, str]:
        """Entry id → SPIFFE ID, without the node's own alias."""
        listed = json.loads(self.server("entry", "show", "-output", "json"))["entries"]
        found = {entry["id"]: f"spiffe://{self.name}{entry['spiffe_id']['path']}" for entry in listed}
        return {key: spiffe_id for key, spiffe_id in found.items() if spiffe_id != self.id("node")}

    def federate(self, other: "Spire") -> None:
        """Gives this one the other's bundle as it is now. Who sees it is said by an entry's `federates_with`."""
        bundle = other.server("bundle", "show", "-format", "spiffe")
        self.server("bundle", "set", "-format", "spiffe", "-id", f"spiffe://{other.name}", text=bundle)

    def defederate(self, other: "Spire") -> None:
        """Takes the other's bundle away, also from the entries that name it."""
        self.server("bundle", "delete", "-id", f"spiffe://{other.name}", "-mode", "dissociate")

    def prepare_authority(self) -> str:
        """Makes an X.509 authority that is trusted and signs nothing yet. Its ID."""
        made = json.loads(self.server("localauthority", "x509", "prepare", "-output", "json"))
        return str(made["prepared_authority"]["authority_id"])

    def authority(self, do: str, authority_id: str) -> None:
        """`activate` one that was prepared; `taint` and then `revoke` the one that signed before."""
        self.server("localauthority", "x509", do, "-authorityID", authority_id)


def wait_for(condition: Callable[[], bool], timeout_s: float) -> None:
    """Returns once it holds. Raises: TimeoutError."""
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {timeout_s} s")
        time.sleep(0.05)


def _end(process: subprocess.Popen[bytes], first: signal.Signals) -> None:
    process.send_signal(first)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextlib.contextmanager
def process_of(uid: int) -> Iterator[int]:
    """A process that does nothing, by its PID, until the block ends. Needs root where `uid` is not ours."""
    # `setpriv`, not Popen(user=…): that one forks, and the handlers that gRPC has for a fork crash the child.
    other = [] if uid == os.geteuid() else ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"]
    command = [*other, "sh", "-c", "echo ready; read -r _"]  # ends with us, even when we are killed
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            yield process.pid
        finally:
            process.kill()


def clock() -> datetime:
    return datetime.now(UTC)


@contextlib.asynccontextmanager
async def identity_from(spire: Spire) -> AsyncIterator[WorkloadApi]:
    """What this process gets from the agent's Workload API, live, with its first snapshot."""
    async with WorkloadApi(spire.workload_api) as found:
        async with asyncio.timeout(PATIENCE_S):
            await found.ready()
        yield found


@contextlib.asynccontextmanager
async def broker_api_of(spire: Spire) -> AsyncIterator[SpireBrokerApi]:
    """The agent's Broker API, asked by this process."""
    async with (
        identity_from(spire) as identity,
        SpireBrokerApi(spire.broker_api, identity.snapshot, clock) as found,
    ):
        yield found
