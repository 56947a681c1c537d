"""A whole broker that signs: the policies of examples/release-signing, a CA of its own, a builder that it trusts.

This process is build agent and operator, each call names which; those who approve are processes of their own.
"""

import asyncio
import base64
import hashlib
import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from support.broker import ISSUER, folder_for, write_config
from support.processes import Child, running
from support.trust_domain import TESTS, trust_domain
from support.whole_broker import Whole, serving

from attestors.dsse import STATEMENT_TYPE, pae
from broker.action import Action
from broker.client import Client
from broker.client.signing import SigningGrant, signing_action
from broker.errors import ApprovalRequired

AGENT = "spiffe://acme.test/build/agent"
OWN_KEY_AGENT = "spiffe://acme.test/build/own-key-agent"
ALICE, BOB = (f"spiffe://acme.test/release-managers/{name}" for name in ("alice", "bob"))
OPERATOR = "spiffe://acme.test/operator"
BUILDER = "https://ci.acme.test/builders/release"
RESOURCE = "https://releases.acme.test/app"
CONTENT = b"release 1.0\n"
EXAMPLE = Path(__file__).parents[2] / "examples" / "release-signing" / "policy"
_PATHS = tuple(one.removeprefix("spiffe://acme.test/") for one in (AGENT, OWN_KEY_AGENT, OPERATOR))


def digests(content: bytes) -> dict[str, str]:
    """How an artifact is named."""
    return {name: hashlib.new(name, content).hexdigest() for name in ("sha256", "sha384", "sha512")}


def statement(content: bytes = CONTENT, **changes: Any) -> dict[str, Any]:
    """SLSA provenance that the example's policies accept, with these changes."""
    now = datetime.now(UTC).replace(microsecond=0).isoformat().replace("+00:00", "Z")
    source = {"uri": "git+https://git.acme.test/acme/app@refs/heads/main", "digest": {"gitCommit": "8" * 40}}
    made: dict[str, Any] = {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": "app", "digest": digests(content)}],
        "predicateType": "https://slsa.dev/provenance/v1",
        "predicate": {
            "buildDefinition": {
                "buildType": "https://ci.acme.test/build-types/container/v1",
                "externalParameters": {
                    "source": "https://git.acme.test/acme/app",
                    "ref": "refs/heads/main",
                },
                "resolvedDependencies": [source],
            },
            "runDetails": {
                "builder": {"id": BUILDER},
                "metadata": {"invocationId": "https://ci.acme.test/runs/17", "startedOn": now, "finishedOn": now},
            },
        },
    }
    return made | changes


@dataclass(frozen=True)
class Builder:
    """Who builds. Its key is configured at the broker until `distrust`."""

    key: ec.EllipticCurvePrivateKey
    trust_file: Path

    def envelope(self, content: bytes = CONTENT, **changes: Any) -> bytes:
        """A DSSE envelope about this content."""
        return json.dumps(self.sealed(json.dumps(statement(content, **changes)).encode())).encode()

    def sealed(self, payload: bytes, payload_type: str = STATEMENT_TYPE) -> dict[str, Any]:
        """A DSSE envelope of any payload, as an object to tamper with."""
        signature = self.key.sign(pae(payload_type, payload), ec.ECDSA(hashes.SHA256()))
        return {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": payload_type,
            "signatures": [{"sig": base64.b64encode(signature).decode()}],
        }

    def trusted(self) -> None:
        """The broker is told of its key."""
        public = self.trust_file.with_name("builder.pub")
        encoding, form = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        public.write_bytes(self.key.public_key().public_bytes(encoding, form))
        self.trust_file.write_text(f'max_age_s = 3600\n[builders."{BUILDER}"]\nkeys = {{ release = "{public}" }}\n')

    def distrusted(self) -> None:
        """And told to forget it."""
        self.trust_file.write_text("max_age_s = 3600\n")


@dataclass
class SigningBroker:
    """A broker that signs. whole: its process, domain and ledger."""

    whole: Whole
    builder: Builder
    ca_folder: Path
    approvers: dict[str, Child]

    def client(self, spiffe_id: str = AGENT, **options: Any) -> Client:
        return self.whole.client(spiffe_id, **options)

    def action(
        self, content: bytes = CONTENT, *, environment: str = "staging", signer: str = "keyless", **changes: Any
    ) -> Action:
        """A signing action that the example's policies know."""
        asked: dict[str, Any] = {"artifacts": [digests(content)], "purpose": "release"} | changes
        return signing_action(
            "release.sign",
            asked.pop("resource", RESOURCE),
            issuer=ISSUER,
            signer=signer,
            parameters={"environment": environment},
            **asked,
        )

    def nightly(self, content: bytes = CONTENT, *, signer: str = "keyless", **changes: Any) -> Action:
        """A signing action that needs no approval, where the policies are with support/signing_calls.py's NIGHTLY."""
        asked: dict[str, Any] = {"artifacts": [digests(content)], "purpose": "release"} | changes
        return signing_action("nightly.sign", asked.pop("resource", RESOURCE), issuer=ISSUER, signer=signer, **asked)

    async def reloaded(self) -> None:
        """The broker has taken policies and files as they are now."""
        before = len(self.whole.broker.events("reload_asked"))
        self.whole.broker.process.send_signal(signal.SIGHUP)  # which says so once for policies and once for files
        await asyncio.to_thread(self.whole.broker.wait_for, "reload_asked", before + 2)

    async def tell(self, approver: str, command: str) -> str:
        """What an approver answers to a command of support/approver.py."""
        child = self.approvers[approver]
        child.tell(command)
        return await child.line()

    async def approve(self, digest: str, *approvers: str) -> None:
        """These say yes."""
        for approver in approvers:
            assert await self.tell(approver, f"approve {digest}") == "approved"

    async def granted(
        self,
        agent: Client,
        action: Action,
        provenance: tuple[bytes, ...],
        *approvers: str,
        request_id: str | None = None,
    ) -> SigningGrant:
        """A grant, approved by these first."""
        request_id = request_id or secrets.token_urlsafe(24)
        try:
            return await agent.signing.grant(action, provenance, request_id=request_id)
        except ApprovalRequired as error:
            await self.approve(error.request_digest, *approvers)
        return await agent.signing.grant(action, provenance, request_id=request_id)


def example_policies() -> dict[str, str]:
    """The folder of the example."""
    return {file.name: file.read_text() for file in EXAMPLE.iterdir() if file.suffix in {".cedar", ".cedarschema"}}


@contextmanager
def signing_broker(
    policies: Mapping[str, str] | None = None, *, issuing_days: int = 30, **tables: Mapping[str, Any]
) -> Iterator[SigningBroker]:
    """Everything but a timestamp authority and a token, which are tables of the configuration file."""
    with (
        folder_for(example_policies() if policies is None else policies) as folder,
        trust_domain(folder / "td") as domain,
    ):
        ca_folder = folder / "ca"
        command = [sys.executable, "-m", "broker.cli", "ca", "init", str(ca_folder), "--issuer", ISSUER]
        subprocess.run([*command, "--issuing-days", str(issuing_days)], check=True, capture_output=True, timeout=60)
        builder = Builder(ec.generate_private_key(ec.SECP256R1()), folder / "trust.toml")
        builder.trusted()
        entries = {f"spiffe://acme.test/{path}": domain.entry(path, os.getpid()) for path in _PATHS}
        given = {
            "signing": {"ca_folder": str(ca_folder), "node": "node-7"},
            "provenance": {"trust_file": str(builder.trust_file)},
        }
        for name, table in tables.items():
            given[name] = {**given.get(name, {}), **table}
        config = write_config(folder, domain.workload_api, domain.broker_api, **given)
        with serving(config, domain) as found, ExitStack() as stack:
            environment = {**os.environ, "PYTHONPATH": f"{TESTS}:{TESTS.parent}"}
            approvers = {}
            for name in (ALICE, BOB):
                command = (sys.executable, "-m", "support.approver", found.socket)
                child = approvers[name] = stack.enter_context(running(*command, env=environment))
                domain.entry(name.removeprefix("spiffe://acme.test/"), child.pid)
                assert child.process.stdout.readline().strip() == "ready"
            yield SigningBroker(Whole(found, domain, entries), builder, ca_folder, approvers)
