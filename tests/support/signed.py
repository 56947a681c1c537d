"""Signatures as the broker makes them, without a broker: a CA in memory, certificates in the profile, and bundles.

What is made without further arguments is valid at `NOW`, and is about `BLOB`.
"""

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Self

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from support.pki import ISSUER, NOW, WORKLOAD, der
from support.timestamps import Tsa

from attestors.dsse import STATEMENT_TYPE, pae
from broker.artifacts import HEX_DIGITS
from broker.identity.spiffe_id import SpiffeId
from broker.signing.assemble import sign_certificate
from broker.signing.bundle import Material, blob_bundle, statement_bundle
from broker.signing.ca_make import ISSUING_LIFETIME, ROOT_LIFETIME, make_issuing, make_root
from broker.signing.content import BACKDATED, CertificateContent
from broker.signing.file_key import FileSigner
from broker.signing.profile import Issuing, to_be_signed

BLOB = b"an artifact\n"
SOURCE = "https://git.acme.test/orders"
PROVENANCE = {"builder": "https://ci.acme.test/builder", "source": SOURCE, "source_ref": "refs/heads/main"}


def digests(blob: bytes = BLOB) -> dict[str, str]:
    """As `action-broker verify` reads them."""
    return {name: hashlib.new(name, blob).hexdigest() for name in HEX_DIGITS}


def statement(blob: bytes = BLOB, *, subjects: list[Mapping[str, Any]] | None = None, **changes: Any) -> bytes:
    """An in-toto Statement about the blob."""
    named = [{"name": "artifact", "digest": {"sha256": hashlib.sha256(blob).hexdigest()}}]
    whole = {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": named if subjects is None else subjects,
        "predicateType": "https://slsa.dev/provenance/v1",
        "predicate": {"buildDefinition": {"buildType": "https://acme.test/b", "externalParameters": {}}},
    }
    return json.dumps(whole | changes, separators=(",", ":")).encode()


def spki(key: Any) -> bytes:
    found: bytes = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return found


@dataclass(kw_only=True)
class Ca:
    """A root and an issuing CA. tsa: who stamps."""

    root: x509.Certificate
    issuing: x509.Certificate
    signer: FileSigner
    tsa: Tsa = field(default_factory=Tsa.made)

    @classmethod
    async def made(cls, at: datetime = NOW) -> Self:
        root_signer = FileSigner.from_key(ec.generate_private_key(ec.SECP384R1()), "root")
        signer = FileSigner.from_key(ec.generate_private_key(ec.SECP384R1()), "issuing")
        root = await make_root(root_signer, "root", "Acme", at - timedelta(hours=1), ROOT_LIFETIME)
        issuing = await make_issuing(signer, "1", "Acme", root, root_signer, at - timedelta(hours=1), ISSUING_LIFETIME)
        return cls(root=root, issuing=issuing, signer=signer, tsa=Tsa.made(at))

    async def certificate(
        self,
        key: Any,
        *,
        at: datetime = NOW,
        lifetime: timedelta = timedelta(minutes=2),
        blob: bytes = BLOB,
        **changes: Any,
    ) -> bytes:
        """For a public key, from just before `at`, for the blob; DER."""
        content = {
            "spiffe_id": SpiffeId.parse(WORKLOAD),
            "issuer": ISSUER,
            "public_key": key,
            "not_before": at - BACKDATED,
            "not_after": at - BACKDATED + lifetime,
            "grant_id": "grant-1",
            "action_digest": hashlib.sha256(b"action").digest(),
            "artifacts": ({"sha256": hashlib.sha256(blob).hexdigest()},),
            "policy_revision": "policy-1",
            "provenance": PROVENANCE,
            "node": "spiffe://acme.test/node/1",
        }
        tbs = to_be_signed(CertificateContent(**(content | changes)), Issuing.of(self.issuing))
        return await sign_certificate(tbs.spend(), self.signer)

    async def blob_bundle(
        self,
        blob: bytes = BLOB,
        *,
        at: datetime = NOW,
        stamped: bool = True,
        curve: ec.EllipticCurve | None = None,
        **changes: Any,
    ) -> dict[str, Any]:
        """A one-time key's signature over the blob: JSON as an object, to tamper with. changes: of the certificate."""
        signer = FileSigner.from_key(ec.generate_private_key(curve or ec.SECP256R1()), "")
        certificate = await self.certificate(signer.public_key, at=at, blob=blob, **changes)
        signature = await signer.sign_message(blob)
        material = Material(certificate=certificate, timestamp=self.tsa.stamp(signature, at) if stamped else b"")
        hash_name = signer.algorithm.hash_name or ""
        digest = hashlib.new(hash_name, blob).digest()
        return _load(blob_bundle(material, hash_name=hash_name, digest=digest, signature=signature))

    async def statement_bundle(
        self, said: bytes | None = None, *, at: datetime = NOW, stamped: bool = True, **changes: Any
    ) -> dict[str, Any]:
        """A one-time key's signature over a statement."""
        said = statement() if said is None else said
        signer = FileSigner.from_key(ec.generate_private_key(ec.SECP256R1()), "")
        certificate = await self.certificate(signer.public_key, at=at, **changes)
        signature = await signer.sign_message(pae(STATEMENT_TYPE, said))
        material = Material(certificate=certificate, timestamp=self.tsa.stamp(signature, at) if stamped else b"")
        return _load(statement_bundle(material, statement=said, signature=signature))

    def trusted_root(self, *, timestamps: bool = True, **valid_for: str) -> bytes:
        """The JSON, by hand. valid_for: of the CA."""
        own = {"certChain": _chain(self.issuing, self.root), "validFor": valid_for or {"start": "2020-01-01T00:00:00Z"}}
        stamping = {"certChain": _chain(*self.tsa.chain), "validFor": {"start": "2020-01-01T00:00:00Z"}}
        return json.dumps(
            {
                "mediaType": "application/vnd.dev.sigstore.trustedroot+json;version=0.1",
                "certificateAuthorities": [own],
                "timestampAuthorities": [stamping] if timestamps else [],
            }
        ).encode()


def _chain(*certificates: x509.Certificate) -> dict[str, Any]:
    return {"certificates": [{"rawBytes": base64.b64encode(der(one)).decode()} for one in certificates]}


def _load(text: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(text)
    return found
