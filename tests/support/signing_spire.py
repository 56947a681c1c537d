"""A broker that signs, with nothing embedded: real SPIRE, keys and CA in a real token, a real timestamp authority.

Build agent and approvers are processes of different users, known by nothing but that.
"""

import base64
import json
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from support.broker import ISSUER, RunningBroker, folder_for, start, write_config
from support.processes import Child, running
from support.signing import AGENT, ALICE, BOB, CONTENT, RESOURCE, Builder, digests, example_policies
from support.signing_calls import wire_action
from support.signing_parts import ca_in, merged, timestamps, token_keys
from support.sigstore_tools import TimestampServer
from support.softhsm import SoftHsm
from support.spire import Spire
from support.trust_domain import TESTS

from attestors.approval import request_digest
from broker.action import Action
from broker.client.signing import signing_action
from broker.ledger.reading import read
from broker.ledger.records import Record

UIDS = {AGENT: 1603, ALICE: 1701, BOB: 1702}  # other tests' entries are for others: SPIRE's agent may still know those
LIMITS = {"requests_per_second": 10_000, "burst": 10_000}
"""Tests ask until SPIRE has noticed."""
TTL_S = 10
"""Of certificates: they end in seconds."""


@dataclass(frozen=True)
class SpireSigning:
    """A signing broker among the workloads of a real SPIRE. tsa_pem: the chain of whoever stamps for it."""

    running: RunningBroker
    builder: Builder
    ca_folder: Path
    tsa_pem: bytes

    def records(self) -> list[Record]:
        """All that is in the ledger now."""
        return [row.record() for row in read(self.running.ledger)]

    @contextmanager
    def _child(self, role: str, uid: int) -> Iterator[Child]:
        command = (sys.executable, "-m", "support.signing_workload", role, str(uid), self.running.socket)
        with running(*command, env={**os.environ, "PYTHONPATH": f"{TESTS}:{TESTS.parent}"}) as child:
            yield child

    @contextmanager
    def agent(self, uid: int = UIDS[AGENT]) -> Iterator["AgentProcess"]:
        """Wait until it is `ready` before the first command."""
        with self._child("agent", uid) as child:
            yield AgentProcess(child, self.builder)

    @contextmanager
    def approver(self, who: str) -> Iterator[Child]:
        """Follows the commands of support/approver.py."""
        with self._child("approver", UIDS[who]) as child:
            yield child


class AgentProcess:
    """Talks to an agent of support/signing_workload.py."""

    def __init__(self, child: Child, builder: Builder) -> None:
        self.child, self._builder = child, builder

    async def ready(self) -> None:
        """It has become its user."""
        assert json.loads(await self.child.line()) == "ready"

    async def do(self, what: str, **arguments: Any) -> Any:
        self.child.tell(json.dumps({"do": what, **arguments}))
        return json.loads(await self.child.line())

    async def grant(self, action: Action, request_id: str, content: bytes = CONTENT) -> dict[str, str]:
        """Its answer. It shows the builder's provenance of the content."""
        wired = wire_action(action)
        asked = {name: getattr(wired, name) for name in ("name", "resource", "audience", "parameters")}
        shown = [base64.b64encode(self._builder.envelope(content)).decode()]
        return await self.do("grant", action=asked, provenance=shown, request_id=request_id)

    async def sign(self, statement: bytes = b"", idempotency_id: str = "") -> dict[str, Any]:
        """Its answer, on the grant that it got last."""
        made = idempotency_id or secrets.token_urlsafe(24)
        return await self.do("sign", idempotency_id=made, statement=base64.b64encode(statement).decode())


def action(signer: str = "keyless", content: bytes = CONTENT, environment: str = "production") -> Action:
    """As the example's policies know it."""
    return signing_action(
        "release.sign",
        RESOURCE,
        issuer=ISSUER,
        artifacts=[digests(content)],
        purpose="release",
        signer=signer,
        parameters={"environment": environment},
    )


def digest_of(asked: Action, request_id: str) -> str:
    """What approvers approve, computed here."""
    return request_digest(asked.digest.hex(), AGENT, request_id)


@contextmanager
def signing_on(spire: Spire, hsm: SoftHsm, tsa: TimestampServer) -> Iterator[SpireSigning]:
    """A broker as a workload of this SPIRE: root's, like this process. The token has the key "release-2026"."""
    with folder_for(example_policies()) as folder:
        ca_folder = ca_in(hsm, folder / "ca")
        builder = Builder(ec.generate_private_key(ec.SECP256R1()), folder / "trust.toml")
        builder.trusted()
        tables = merged(
            {
                "limits": LIMITS,
                "signing": {"ca_folder": str(ca_folder), "node": "node-7", "certificate_ttl_s": TTL_S},
                "provenance": {"trust_file": str(builder.trust_file)},
            },
            timestamps(folder, tsa.url, tsa.pem),
            token_keys(hsm, release="release-2026"),
        )
        config = write_config(folder, spire.workload_api, spire.broker_api, **tables)
        with start(config) as found:
            yield SpireSigning(found, builder, ca_folder, tsa.pem)
