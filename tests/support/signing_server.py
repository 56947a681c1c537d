"""A broker that signs, in a process of its own, for measuring (measured_server.py): keyless, and by a key in a token.

The policies are those of examples/release-signing, and beside them one agent that needs no approvals. What attestors
would look for is in memory.

Answers each line with its CPU seconds so far.
usage: python -m support.signing_server FOLDER [MODULE TOKEN PIN_FILE KEY]
"""

import asyncio
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import ExitStack
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import uvloop
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from support.measured_server import ISSUER, measured, now, obey

from attestors.contract import AttestationRequest, Attestor, FactKey, Facts
from broker.acts import Means
from broker.decision.store import PolicyStore
from broker.ledger.store import Ledger
from broker.signing.authority import Authority
from broker.signing.ca_make import ISSUING_LIFETIME, ROOT_LIFETIME, make_issuing, make_root
from broker.signing.file_key import FileSigner
from broker.signing.named_key import NamedKey
from broker.signing.pkcs11 import Token
from broker.signing.profile import Issuing

AGENT = "spiffe://acme.test/build/nightly-agent"
KEY = "release"
EXAMPLE = Path(__file__).parents[2] / "examples" / "release-signing" / "policy"
POLICIES = {file.name: file.read_text() for file in EXAMPLE.iterdir() if file.suffix in {".cedar", ".cedarschema"}}
POLICIES["nightly.cedar"] = "\n".join(
    f'@id("nightly-{name}") {obligation} @max_ttl("120s")'
    f' permit (principal == Workload::"{AGENT}", action == Action::"release.sign",'
    ' resource in Resource::"https://releases.acme.test/app")'
    f' when {{ context.spire.ids.contains("{AGENT}") && context.parameters.environment == "nightly" &&'
    ' context.parameters.signing.purpose == "release" };'
    for name, obligation in {"keyless": "", "by-key": f'@key("{KEY}")'}.items()
)
SEEN: Mapping[str, Mapping[str, Any]] = {
    "spire": {"ids": [AGENT]},
    "approval": {"count": 0, "by": [], "people": 0, "workloads": 0},
    "provenance": {
        "builder": "https://ci.acme.test/builders/release",
        "build_type": "https://ci.acme.test/build-types/container/v1",
        "source": "https://git.acme.test/acme/app",
        "source_digest": "8304c42402aa3a569882687e0642c359e5a74ac2",
        "source_ref": "refs/heads/main",
        "config_uri": "git+https://git.acme.test/acme/app@refs/heads/main#build.yml",
        "config_digest": "8304c42402aa3a569882687e0642c359e5a74ac2",
        "runner": "self-hosted",
        "invocation": "https://ci.acme.test/runs/17",
        "signer": "key:release",
        "started_at": 1_795_000_000,
        "finished_at": 1_795_000_600,
        "external_parameters": '{"ref":"refs/heads/main","source":"https://git.acme.test/acme/app"}',
        "dependencies": [
            "git+https://git.acme.test/acme/app@refs/heads/main@gitCommit:8304c42402aa3a569882687e0642c359e5a74ac2"
        ],
        "subjects": [f"sha256:{'ab' * 32}"],
    },
}


class InMemory:
    """An attestor that has looked already."""

    def __init__(self, name: str) -> None:
        self.name = name

    async def attest(self, request: AttestationRequest, now: datetime) -> Facts:
        """The same of everybody."""
        expires_at = now + timedelta(hours=1)
        key = FactKey(f"{self.name}:{request.principal}")
        return Facts(attestor=self.name, key=key, values=SEEN[self.name], attested_at=now, expires_at=expires_at)

    async def watch(self) -> AsyncIterator[FactKey]:
        """Nothing changes."""
        await asyncio.Event().wait()
        yield FactKey("")

    def blind(self) -> dict[str, float]:
        """It sees everything."""
        return {}


def attestors(_: Ledger, __: PolicyStore) -> dict[str, Attestor]:
    """All that the policies name."""
    return {name: InMemory(name) for name in SEEN}


async def authority() -> Authority:
    """A root and an issuing CA, with keys in memory."""
    root_key, key = (
        FileSigner.from_key(ec.generate_private_key(curve), name)
        for curve, name in ((ec.SECP384R1(), "root-1"), (ec.SECP256R1(), "issuing-1"))
    )
    root = await make_root(root_key, "root-1", "acme.test", now(), ROOT_LIFETIME)
    issuing = await make_issuing(key, "issuing-1", "acme.test", root, root_key, now(), ISSUING_LIFETIME)
    chain = tuple(one.public_bytes(Encoding.DER) for one in (issuing, root))
    return Authority("issuing-1", chain, Issuing.of(issuing), key)


async def nothing(_: str) -> dict[str, Any]:
    """There is nothing else to ask for."""
    return {}


async def main(folder: Path, *token: str) -> None:
    with ExitStack() as stack:
        keys = {}
        if token:
            module, label, pin_file, key = token
            signer = stack.enter_context(Token(Path(module), label, Path(pin_file))).signer(key, KEY)
            keys[KEY] = NamedKey.of(signer)
        ca = await authority()
        means = Means(issuer=ISSUER, authority=lambda: ca, keys=keys)
        async with measured(folder, AGENT, POLICIES, attestors=attestors, means=means):
            await obey(nothing)


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(Path(sys.argv[1]), *sys.argv[2:]))
