"""Provenance with any defect on request: statements, envelopes, bundles, and whom a broker trusts for them.

What is made without further arguments is sound at `NOW`. Keys come from seeds and signatures are deterministic, so the
same calls give the same bytes.
"""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from support.pki import CA, NOW, Svid, seeded_ec_key, snapshot

from attestors.dsse import STATEMENT_TYPE, pae
from attestors.provenance_signers import SignerChecks
from attestors.provenance_trust import BuilderTrust, ProvenanceTrust
from attestors.signature_keys import SigningKey
from broker.identity.svid_check import SvidCheck

BUILDER, OTHER_BUILDER, SVID_BUILDER = (f"https://{name}.acme.test/v1" for name in ("builder", "other", "workload"))
TWO_BUILDER = "https://two.acme.test/v1"
BUILD_AGENT = "spiffe://acme.test/build/agent"
CONTENT = b"an artifact\n"
SHA256, SHA512 = hashlib.sha256(CONTENT).hexdigest(), hashlib.sha512(CONTENT).hexdigest()
ARTIFACT = {"sha256": SHA256, "sha512": SHA512}
COMMIT = "8304c42402aa3a569882687e0642c359e5a74ac2"
REPOSITORY = "https://git.acme.test/shop"
MAX_AGE = timedelta(hours=24)
KEY, OTHER_KEY, SECOND_KEY, STRANGER = (seeded_ec_key(f"provenance/{name}") for name in ("a", "b", "c", "stranger"))
FINISHED = int(NOW.timestamp()) - 600


def authority(trust_domain: str = "acme.test") -> CA:
    """The same one at each call, with nothing issued yet."""
    return CA(trust_domain, seed="provenance")


def spki_pem(key: Any) -> str:
    encoding, form = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_key().public_bytes(encoding, form).decode()


def builders() -> dict[str, BuilderTrust]:
    return {
        BUILDER: BuilderTrust(keys={"release": SigningKey(KEY.public_key())}),
        OTHER_BUILDER: BuilderTrust(keys={"other": SigningKey(OTHER_KEY.public_key())}),
        SVID_BUILDER: BuilderTrust(spiffe_ids=frozenset({BUILD_AGENT})),
        TWO_BUILDER: BuilderTrust(
            keys={"first": SigningKey(KEY.public_key()), "second": SigningKey(SECOND_KEY.public_key())}, threshold=2
        ),
    }


def trust(changed: Mapping[str, BuilderTrust] | None = None, **options: Any) -> ProvenanceTrust:
    found = builders() if changed is None else changed
    return ProvenanceTrust(builders=found, **{"max_age": MAX_AGE} | options)


def checks() -> SignerChecks:
    """SVIDs of acme.test count; those of evil.test come from a domain that we have no bundle of."""
    current = snapshot(authority().bundle())
    return SignerChecks(x509_svid=SvidCheck(lambda: current))


def predicate(builder: str = BUILDER, **metadata: Any) -> dict[str, Any]:
    """SLSA Provenance v1. metadata: of the run; None leaves a member out."""
    times = {"startedOn": _rfc3339(FINISHED - 60), "finishedOn": _rfc3339(FINISHED)}
    known = {"invocationId": f"{builder}/runs/17", **times, **metadata}
    return {
        "buildDefinition": {
            "buildType": "https://acme.test/make/v1",
            "externalParameters": {"repository": REPOSITORY, "ref": "refs/heads/main", "path": "release.yml"},
            "internalParameters": {"github": {"runner_environment": "self-hosted"}},
            "resolvedDependencies": [
                {"uri": f"git+{REPOSITORY}@refs/heads/main", "digest": {"gitCommit": COMMIT}},
                {"uri": "pkg:docker/debian@13", "digest": {"sha256": "ab" * 32}},
            ],
        },
        "runDetails": {
            "builder": {"id": builder},
            "metadata": {name: value for name, value in known.items() if value is not None},
        },
    }


def _rfc3339(epoch: int) -> str:
    return (NOW + timedelta(seconds=epoch - int(NOW.timestamp()))).strftime("%Y-%m-%dT%H:%M:%SZ")


def at(seconds_ago: int) -> str:
    """RFC 3339, so long before `NOW`."""
    return _rfc3339(int(NOW.timestamp()) - seconds_ago)


def statement(**changes: Any) -> dict[str, Any]:
    """An in-toto Statement v1. changes: members instead of the usual ones; None leaves one out."""
    usual = {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": "shop.tar", "digest": dict(ARTIFACT)}],
        "predicateType": "https://slsa.dev/provenance/v1",
        "predicate": predicate(),
    }
    return {name: value for name, value in (usual | changes).items() if value is not None}


def encoded(document: Any) -> bytes:
    return document if isinstance(document, bytes) else json.dumps(document).encode()


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def sign(key: ec.EllipticCurvePrivateKey, message: bytes) -> bytes:
    return key.sign(message, ec.ECDSA(hashes.SHA256(), deterministic_signing=True))


def envelope(
    document: Any = None,
    *,
    keys: Sequence[ec.EllipticCurvePrivateKey] = (KEY,),
    keyids: Sequence[str] = (),
    payload_type: str = STATEMENT_TYPE,
) -> dict[str, Any]:
    """A DSSE envelope. document: what is signed, as JSON or bytes."""
    payload = encoded(statement() if document is None else document)
    signatures = [{"keyid": "", "sig": b64(sign(key, pae(payload_type, payload)))} for key in keys]
    for signature, keyid in zip(signatures, keyids, strict=False):
        signature["keyid"] = keyid
    return {"payload": b64(payload), "payloadType": payload_type, "signatures": signatures}


def bundle(
    found: Mapping[str, Any] | None = None,
    *,
    chain: Sequence[bytes] = (),
    timestamps: Sequence[bytes] = (),
    **more: Any,
) -> dict[str, Any]:
    """A Sigstore bundle. more: members beside or instead of the usual ones; None leaves one out."""
    material: dict[str, Any] = {}
    if len(chain) == 1:
        material["certificate"] = {"rawBytes": b64(chain[0])}
    elif chain:
        material["x509CertificateChain"] = {"certificates": [{"rawBytes": b64(one)} for one in chain]}
    else:
        material["publicKey"] = {"hint": ""}
    if timestamps:
        responses = [{"signedTimestamp": b64(one)} for one in timestamps]
        material["timestampVerificationData"] = {"rfc3161Timestamps": responses}
    usual = {
        "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
        "verificationMaterial": material,
        "dsseEnvelope": envelope() if found is None else found,
    }
    return {name: value for name, value in (usual | more).items() if value is not None}


def svid_bundle(svid: Svid, document: Any = None, **options: Any) -> dict[str, Any]:
    """A bundle that the holder of an X.509-SVID signed."""
    document = statement(predicate=predicate(SVID_BUILDER)) if document is None else document
    return bundle(envelope(document, keys=[svid.key]), chain=svid.chain, **options)
