"""A timestamp authority in memory (RFC 3161), at any time and with any defect on request; its answers are real CMS.

The real one, Sigstore's timestamp-server, is in support/sigstore_tools.py.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Self

from asn1crypto import algos, cms, core, tsp
from asn1crypto import x509 as asn1_x509
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID
from support.pki import NOW, der, name, usage

from attestors.rfc3161 import TimestampRoot
from broker.signing.der import sequence

STAMPING = (ExtendedKeyUsageOID.TIME_STAMPING,)


@dataclass(frozen=True, kw_only=True)
class Tsa:
    """key: of the authority's own certificate, which is first in the chain."""

    key: ec.EllipticCurvePrivateKey
    chain: tuple[x509.Certificate, ...]

    @classmethod
    def made(
        cls,
        at: datetime = NOW,
        *,
        purposes: Sequence[x509.ObjectIdentifier] = STAMPING,
        critical: bool = True,
        days: int = 365,
    ) -> Self:
        """One whose own certificate begins a day before `at` and lives for `days`."""
        root_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
        root_name, begin = name("timestamps root"), at - timedelta(days=1)
        root = (
            _builder(root_name, root_name, root_key, begin, 3650)
            .serial_number(x509.random_serial_number())
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage("key_cert_sign", "crl_sign"), critical=True)
            .sign(root_key, hashes.SHA256())
        )
        own = (
            _builder(name("timestamps"), root_name, key, begin, days)
            .serial_number(x509.random_serial_number())
            .add_extension(usage("digital_signature"), critical=True)
            .add_extension(x509.ExtendedKeyUsage(purposes), critical=critical)
            .sign(root_key, hashes.SHA256())
        )
        return cls(key=key, chain=(own, root))

    def twin(self) -> x509.Certificate:
        """A certificate of the same issuer's name and serial number as its own, which nobody believes."""
        own, key = self.chain[0], ec.generate_private_key(ec.SECP256R1())
        begin = own.not_valid_before_utc
        return (
            _builder(own.subject, own.issuer, key, begin, 365)
            .serial_number(own.serial_number)
            .sign(key, hashes.SHA256())
        )

    @property
    def root(self) -> TimestampRoot:
        return TimestampRoot(chain=self.chain)

    @property
    def pem(self) -> bytes:
        return b"".join(one.public_bytes(serialization.Encoding.PEM) for one in self.chain)

    def answer(self, query: bytes, at: datetime = NOW, **changes: Any) -> bytes:
        """To a TimeStampReq: a TimeStampResp. changes: as in `stamp`."""
        asked = tsp.TimeStampReq.load(query)
        imprint = asked["message_imprint"]
        told = {
            "imprint": imprint["hashed_message"].native,
            "hash_name": imprint["hash_algorithm"]["algorithm"].native,
            "nonce": asked["nonce"].native,
        }
        return self.stamp(at=at, **(told | changes))

    def stamp(
        self,
        message: bytes = b"",
        at: datetime = NOW,
        *,
        imprint: bytes | None = None,
        hash_name: str = "sha256",
        nonce: int | None = None,
        status: int = 0,
        certificates: Sequence[x509.Certificate] | None = None,
    ) -> bytes:
        """A TimeStampResp over the message, or over an imprint. status: PKIStatus. certificates: else its own one."""
        info = {
            "version": 1,
            "policy": "1.2.3.4",
            "message_imprint": {
                "hash_algorithm": {"algorithm": hash_name},
                "hashed_message": hashlib.new(hash_name, message).digest() if imprint is None else imprint,
            },
            "serial_number": x509.random_serial_number(),
            "gen_time": at,
        } | ({} if nonce is None else {"nonce": nonce})
        granted = [self._signed(tsp.TSTInfo(info).dump(), self.chain[:1] if certificates is None else certificates)]
        # By hand: asn1crypto makes no response without a token.
        return sequence(tsp.PKIStatusInfo({"status": status}).dump(), *([] if status > 1 else granted))

    def _signed(self, info: bytes, certificates: Sequence[x509.Certificate]) -> bytes:
        attributes = cms.CMSAttributes(
            [
                {"type": "content_type", "values": ["tst_info"]},
                {"type": "message_digest", "values": [hashlib.sha256(info).digest()]},
            ]
        )
        own = asn1_x509.Certificate.load(der(self.chain[0]))
        signer = {
            "version": "v1",
            "sid": cms.SignerIdentifier(
                name="issuer_and_serial_number",
                value=cms.IssuerAndSerialNumber({"issuer": own.issuer, "serial_number": own.serial_number}),
            ),
            "digest_algorithm": algos.DigestAlgorithm({"algorithm": "sha256"}),
            "signed_attrs": attributes,
            "signature_algorithm": algos.SignedDigestAlgorithm({"algorithm": "sha256_ecdsa"}),
            "signature": self.key.sign(attributes.untag().dump(), ec.ECDSA(hashes.SHA256())),
        }
        content = {
            "version": "v3",
            "digest_algorithms": [algos.DigestAlgorithm({"algorithm": "sha256"})],
            "encap_content_info": {"content_type": "tst_info", "content": core.ParsableOctetString(info)},
            "certificates": [asn1_x509.Certificate.load(der(one)) for one in certificates],
            "signer_infos": [signer],
        }
        found: bytes = cms.ContentInfo({"content_type": "signed_data", "content": cms.SignedData(content)}).dump()
        return found


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, begin: datetime, days: int
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .not_valid_before(begin)
        .not_valid_after(begin + timedelta(days=days))
    )
