"""A Sigstore of its own in memory: certificate authority, certificate log and transparency log, each with one entry.

What it makes is what Fulcio and Rekor make, to the byte where it is signed, and is verified by sigstore-python.
"""

import base64
import hashlib
import json
import struct
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import rfc8785
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, ObjectIdentifier
from support.pki import NOW, der, name, usage
from support.provenance import b64, bundle, envelope

ISSUER = "https://token.ci.acme.test"
IDENTITY = "https://git.acme.test/shop/release.yml@refs/heads/main"
_FULCIO = "1.3.6.1.4.1.57264.1."
_SCT_LIST = ObjectIdentifier("1.3.6.1.4.1.11129.2.4.2")  # RFC 6962 section 3.3
_ORIGIN = "rekor.acme.test - 1"
_SHA256 = ec.ECDSA(hashes.SHA256())


def _new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def _spki(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def _log_id(key: ec.EllipticCurvePrivateKey) -> bytes:
    return hashlib.sha256(_spki(key)).digest()


@dataclass
class SigstoreInstance:
    """at: when everything happens; certificates live ten minutes around it."""

    at: datetime = NOW - timedelta(minutes=5)
    ca_key: ec.EllipticCurvePrivateKey = field(default_factory=_new_key)
    ct_key: ec.EllipticCurvePrivateKey = field(default_factory=_new_key)
    log_key: ec.EllipticCurvePrivateKey = field(default_factory=_new_key)

    def __post_init__(self) -> None:
        subject = name("fulcio of acme.test")
        self.ca = (
            self._builder(subject, subject, self.ca_key, timedelta(days=365))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage("key_cert_sign", "crl_sign"), critical=True)
            .sign(self.ca_key, hashes.SHA256())
        )

    def trusted_root(self) -> dict[str, Any]:
        """A TrustedRoot in JSON."""
        since = {"start": "2020-01-01T00:00:00Z"}
        return {
            "mediaType": "application/vnd.dev.sigstore.trustedroot+json;version=0.1",
            "tlogs": [self._log(self.log_key, "rekor", since)],
            "certificateAuthorities": [
                {
                    "subject": {"organization": "acme.test", "commonName": "fulcio"},
                    "uri": "https://fulcio.acme.test",
                    "certChain": {"certificates": [{"rawBytes": b64(der(self.ca))}]},
                    "validFor": since,
                }
            ],
            "ctlogs": [self._log(self.ct_key, "ctfe", since)],
            "timestampAuthorities": [],
        }

    def signed(self, document: Any, *, identity: str = IDENTITY, issuer: str = ISSUER) -> dict[str, Any]:
        """A bundle of what this identity signed, logged."""
        key = _new_key()
        found = envelope(document, keys=[key])
        del found["signatures"][0]["keyid"]
        certificate = self._certificate(key, identity, issuer)
        made = bundle(found, chain=[der(certificate)])
        made["verificationMaterial"]["tlogEntries"] = [self._entry(found, certificate)]
        return made

    def _log(self, key: ec.EllipticCurvePrivateKey, host: str, since: dict[str, str]) -> dict[str, Any]:
        public = {"rawBytes": b64(_spki(key)), "keyDetails": "PKIX_ECDSA_P256_SHA_256", "validFor": since}
        return {
            "baseUrl": f"https://{host}.acme.test",
            "hashAlgorithm": "SHA2_256",
            "publicKey": public,
            "logId": {"keyId": b64(_log_id(key))},
        }

    def _builder(
        self, subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, lifetime: timedelta
    ) -> x509.CertificateBuilder:
        authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.ca_key.public_key())
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(self.at)
            .not_valid_after(self.at + lifetime)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(authority, critical=False)
        )

    def _certificate(self, key: ec.EllipticCurvePrivateKey, identity: str, issuer: str) -> x509.Certificate:
        """Of the Fulcio profile. It is made twice: the certificate log signs it before the authority does."""
        utf8 = bytes([0x0C, len(issuer)]) + issuer.encode()
        builder = (
            self._builder(name(""), self.ca.subject, key, timedelta(minutes=10))
            .add_extension(usage("digital_signature"), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING]), critical=False)
            .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(identity)]), critical=True)
            .add_extension(x509.UnrecognizedExtension(ObjectIdentifier(_FULCIO + "1"), issuer.encode()), critical=False)
            .add_extension(x509.UnrecognizedExtension(ObjectIdentifier(_FULCIO + "8"), utf8), critical=False)
        )
        logged = self._sct(builder.sign(self.ca_key, hashes.SHA256()).tbs_certificate_bytes)
        return builder.add_extension(x509.UnrecognizedExtension(_SCT_LIST, logged), critical=False).sign(
            self.ca_key, hashes.SHA256()
        )

    def _sct(self, tbs: bytes) -> bytes:
        """RFC 6962 sections 3.2 and 3.3: a list of one, as the value of the extension."""
        at = int(self.at.timestamp() * 1000)
        entry = _log_id(self.ca_key) + len(tbs).to_bytes(3) + tbs
        signature = self.ct_key.sign(struct.pack("!BBQH", 0, 0, at, 1) + entry + b"\0\0", _SHA256)
        told = b"\0" + _log_id(self.ct_key) + struct.pack("!QHBBH", at, 0, 4, 3, len(signature)) + signature
        listed = struct.pack("!HH", len(told) + 2, len(told)) + told
        return bytes([0x04, len(listed)]) + listed if len(listed) < 128 else bytes([0x04, 0x81, len(listed)]) + listed

    def _entry(self, found: dict[str, Any], certificate: x509.Certificate) -> dict[str, Any]:
        """An entry of Rekor's kind dsse 0.0.1, the only one of its tree."""
        pem = certificate.public_bytes(serialization.Encoding.PEM)
        payload = hashlib.sha256(base64.b64decode(found["payload"])).hexdigest()
        spec = {
            "envelopeHash": {"algorithm": "sha256", "value": hashlib.sha256(json.dumps(found).encode()).hexdigest()},
            "payloadHash": {"algorithm": "sha256", "value": payload},
            "signatures": [{"signature": found["signatures"][0]["sig"], "verifier": b64(pem)}],
        }
        body = rfc8785.dumps({"apiVersion": "0.0.1", "kind": "dsse", "spec": spec})
        root = hashlib.sha256(b"\0" + body).digest()
        note = f"{_ORIGIN}\n1\n{b64(root)}\n"
        mark = b64(_log_id(self.log_key)[:4] + self.log_key.sign(note.encode(), _SHA256))
        at, log_id = int(self.at.timestamp()) + 1, _log_id(self.log_key)
        promise = rfc8785.dumps({"body": b64(body), "integratedTime": at, "logID": log_id.hex(), "logIndex": 0})
        return {
            "logIndex": "0",
            "logId": {"keyId": b64(log_id)},
            "kindVersion": {"kind": "dsse", "version": "0.0.1"},
            "integratedTime": str(at),
            "inclusionPromise": {"signedEntryTimestamp": b64(self.log_key.sign(promise, _SHA256))},
            "inclusionProof": {
                "logIndex": "0",
                "rootHash": b64(root),
                "treeSize": "1",
                "hashes": [],
                "checkpoint": {"envelope": f"{note}\n\u2014 {_ORIGIN.split(maxsplit=1)[0]} {mark}\n"},
            },
            "canonicalizedBody": b64(body),
        }
