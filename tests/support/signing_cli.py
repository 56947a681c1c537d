"""`action-broker` as a workload of its own beside a broker that signs, and files for it to sign.

with signing_place() as place:
    ran = place.cli("build/agent", "sign", place.file(), *place.asking(), "--bundle", place.folder / "b.json")
"""

import json
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from support.broker import ISSUER
from support.cli import COMMAND, LIMIT_S, Ran, clean_environment
from support.processes import Child
from support.signing import CONTENT, RESOURCE, SigningBroker, example_policies, signing_broker
from support.whole_broker import BROKER

# Over mutual TLS there is no process to look at, so `release.sign`, which wants that, is not for who comes that way.
REMOTE = {
    "remote.cedarschema": """
action "remote.sign" appliesTo {
  principal: [Workload], resource: [Resource],
  context: { provenance: Provenance, approval: Approval, parameters: { signing: Signing } }
};
""",
    "remote.cedar": """
@id("remote") permit (
  principal == Workload::"spiffe://acme.test/build/agent", action == Action::"remote.sign", resource
) when { context.approval.count >= 1 };
@id("remote-own-key") @agent_key permit (
  principal == Workload::"spiffe://acme.test/build/own-key-agent", action == Action::"remote.sign", resource
) when { context.provenance.source == "https://git.acme.test/acme/app" };
@id("remote-desk") permit (
  principal in Path::"spiffe://acme.test/release-managers", action == Action::"broker.approve", resource
) when { context.parameters.action == "remote.sign" };
""",
}
AGENT = "build/agent"
OWN_KEY_AGENT = "build/own-key-agent"
ALICE, BOB = "release-managers/alice", "release-managers/bob"


@dataclass
class SigningPlace:
    """Where commands run."""

    broker: SigningBroker

    @property
    def folder(self) -> Path:
        return self.broker.whole.broker.folder

    @property
    def socket(self) -> tuple[str, ...]:
        return ("--socket", self.broker.whole.broker.socket, "--issuer", ISSUER)

    @property
    def mtls(self) -> tuple[str, ...]:
        whole = self.broker.whole
        address = f"127.0.0.1:{whole.broker.grpc_port}"
        agent = ("--workload-api", whole.domain.workload_api)
        return ("--address", address, "--broker-id", BROKER, "--issuer", ISSUER, *agent)

    def file(self, content: bytes = CONTENT, name: str = "app") -> Path:
        """One to sign."""
        found = self.folder / name
        found.parent.mkdir(exist_ok=True)
        found.write_bytes(content)
        return found

    def provenance(self, content: bytes = CONTENT, name: str = "") -> Path:
        """Always the same for the same content: a grant holds for what it was given on."""
        found = self.folder / (name or f"provenance-{sha256(content).hexdigest()[:8]}")
        if not found.exists():
            found.write_bytes(self.broker.builder.envelope(content))
        return found

    def asking(self, environment: str = "staging", content: bytes = CONTENT) -> tuple[object, ...]:
        """What the example's policies permit, approved by enough."""
        parameters = ("--parameters", json.dumps({"environment": environment}))
        return ("--resource", RESOURCE, "--provenance", self.provenance(content), *parameters)

    def asking_remotely(self, content: bytes = CONTENT) -> tuple[object, ...]:
        """What REMOTE permits, over mutual TLS: the agent when somebody approved, the other one with its own key."""
        asked = ("--action", "remote.sign", "--resource", RESOURCE, "--provenance", self.provenance(content))
        return (*asked, *self.mtls)

    @contextmanager
    def running(self, path: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
        """`action-broker ARGUMENTS` as this workload, which is registered before it begins."""
        process = subprocess.Popen(
            ["sh", "-c", 'read begin; exec "$@"', "sh", *COMMAND, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=clean_environment(),
        )
        with process:
            try:
                self.broker.whole.domain.entry(path, process.pid)
                Child(process).tell("")
                yield process
            finally:
                process.kill()

    def cli(self, path: str, *arguments: object, told: str = "") -> Ran:
        """The same, to its end."""
        with self.running(path, *arguments) as process:
            return ended(process, told)

    def approve(self, digest: str, *approvers: str) -> None:
        """These say yes, each by a command of its own."""
        for approver in approvers:
            ran = self.cli(approver, "approve", digest, "--yes", "--json", *self.socket)
            assert ran.code == 0, (ran.out, ran.err)


def ended(process: subprocess.Popen[str], told: str = "") -> Ran:
    """How a command ended. told: the rest of its standard input."""
    out, err = process.communicate(told, LIMIT_S)
    return Ran(process.returncode, out, err)


@contextmanager
def signing_place(**tables: Mapping[str, Any]) -> Iterator[SigningPlace]:
    """Running, with these tables in its configuration."""
    with signing_broker({**example_policies(), **REMOTE}, **tables) as broker:
        yield SigningPlace(broker)
