"""A certificate authority in a folder, and what a certificate is to say, with any of it changed on request."""

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec

from broker.identity.spiffe_id import SpiffeId
from broker.signing.authority import Authority
from broker.signing.ca_extend import Plan, extend
from broker.signing.ca_folder import CaFolder
from broker.signing.ca_key import signer_at
from broker.signing.content import CertificateContent, validity

NOW = datetime(2031, 5, 6, 7, 8, 9, tzinfo=UTC)
ISSUER = "https://broker.acme.test"
AGENT = SpiffeId.parse("spiffe://acme.test/build/agent")
SHA256 = "ab" * 32
# What the provenance attestor tells, all of it; "" is what it does not know.
PROVENANCE = {
    "builder": "https://ci.acme.test/builders/linux",
    "build_type": "https://ci.acme.test/types/make",
    "source": "https://git.acme.test/shop",
    "source_digest": "sha1:" + "0123456789" * 4,
    "source_ref": "refs/heads/main",
    "invocation": "https://ci.acme.test/runs/4711",
    "signer": "key:ci",
    "started_at": 1,
    "finished_at": 2,
    "external_parameters": "{}",
    "dependencies": [],
    "subjects": [f"sha256:{SHA256}"],
    "config_uri": "https://git.acme.test/shop/build.yml",
    "config_digest": "sha1:" + "9876543210" * 4,
    "runner": "self-hosted",
}


def make_folder(path: Path, now: datetime = NOW, **plan: Any) -> CaFolder:
    """A root and an issuing CA, made now."""
    wanted = {"organization": "acme", "use_from": now, "root": True} | plan
    return asyncio.run(extend(CaFolder.create(path, ISSUER), Plan(**wanted), signer_at, now))


def make_authority(path: Path, now: datetime = NOW) -> Authority:
    """The issuing CA of a new folder."""
    make_folder(path, now)
    return Authority.open(path, signer_at, now)


def content(**changes: Any) -> CertificateContent:
    """About one artifact, from a build that is known in full."""
    begin, end = validity(NOW, until=NOW + timedelta(minutes=2))
    values: dict[str, Any] = {
        "spiffe_id": AGENT,
        "issuer": ISSUER,
        "not_before": begin,
        "not_after": end,
        "grant_id": "6802a9b9d3c1f0b2a1928374",
        "action_digest": bytes(range(32)),
        "artifacts": ({"sha256": SHA256},),
        "policy_revision": "f" * 64,
        "provenance": PROVENANCE,
        "node": "node-7.acme.test",
        "pod_uid": "7b1f3c1e-9d0a-4e55-8a55-0d6a8f0d2c11",
    }
    if "public_key" not in changes:
        values["public_key"] = ec.generate_private_key(ec.SECP256R1()).public_key()
    return CertificateContent(**values | changes)
