"""The embedded trust domain's keys and what they sign. They are born with it and die with it; nothing is written."""

import hashlib
import json
from collections.abc import Sequence
from datetime import datetime, timedelta

import jwt
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from jwt.algorithms import ECAlgorithm

from broker.identity.spiffe_id import SpiffeId, TrustDomain
from broker.identity.trust import OwnSvid

_AUTHORITY_LIFE = timedelta(days=365)  # no rotation: restart the trust domain, which makes new keys
_BACKDATED = timedelta(seconds=10)  # as SPIRE does, for verifiers whose clock is a little behind
_BOTH_SIDES = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])


class Authority:
    """One X.509 authority and one JWT key, both P-256.

    x509_bundle: DER. jwks: a JWK Set as SPIRE's Workload API gives it.
    """

    def __init__(self, trust_domain: TrustDomain, now: datetime) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name("SPIFFE", f"{trust_domain.name}, for development")
        self._certificate = self._sign(
            subject=self._name,
            uri=str(trust_domain),
            public_key=self._key.public_key(),
            ca=True,
            now=now,
            ttl=_AUTHORITY_LIFE,
        )
        self.x509_bundle = self._certificate.public_bytes(Encoding.DER)
        self._jwt_key = ec.generate_private_key(ec.SECP256R1())
        spki = self._jwt_key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        self._kid = hashlib.sha256(spki).hexdigest()[:32]
        jwk = ECAlgorithm.to_jwk(self._jwt_key.public_key(), as_dict=True)
        self.jwks = json.dumps({"keys": [{**jwk, "kid": self._kid}]}).encode()

    def x509_svid(self, spiffe_id: SpiffeId, now: datetime, ttl: timedelta) -> OwnSvid:
        """An X.509-SVID with a new key, signed by the authority itself, without intermediates."""
        key = ec.generate_private_key(ec.SECP256R1())
        leaf = self._sign(
            subject=_name("ACTION BROKER DEV", None),
            uri=str(spiffe_id),
            public_key=key.public_key(),
            ca=False,
            now=now,
            ttl=ttl,
        )
        return OwnSvid(
            spiffe_id=spiffe_id,
            chain=(leaf.public_bytes(Encoding.DER),),
            private_key_pkcs8=key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption()),
            not_after=leaf.not_valid_after_utc,
        )

    def jwt_svid(self, spiffe_id: SpiffeId, audience: Sequence[str], now: datetime, ttl: timedelta) -> str:
        """A JWT-SVID (SPIFFE JWT-SVID.md section 3)."""
        issued_at = int(now.timestamp())
        claims = {
            "sub": str(spiffe_id),
            "aud": list(audience),
            "iat": issued_at,
            "exp": issued_at + int(ttl.total_seconds()),
        }
        return jwt.encode(claims, self._jwt_key, algorithm="ES256", headers={"kid": self._kid})

    def _sign(
        self,
        *,
        subject: x509.Name,
        uri: str,
        public_key: ec.EllipticCurvePublicKey,
        ca: bool,
        now: datetime,
        ttl: timedelta,
    ) -> x509.Certificate:
        """Extensions as X509-SVID.md sections 3 and 4 want them."""
        now = now.replace(microsecond=0)
        usage = x509.KeyUsage(
            digital_signature=not ca,
            content_commitment=False,
            key_encipherment=False,
            data_encipherment=False,
            key_agreement=False,
            key_cert_sign=ca,
            crl_sign=ca,
            encipher_only=False,
            decipher_only=False,
        )
        signer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _BACKDATED)
            .not_valid_after(now + ttl)
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
            .add_extension(signer, critical=False)
            .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)]), critical=False)
        )
        if not ca:
            builder = builder.add_extension(_BOTH_SIDES, critical=False)
        return builder.sign(self._key, hashes.SHA256())


def _name(organization: str, common_name: str | None) -> x509.Name:
    parts = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, organization)]
    if common_name is not None:
        parts.append(x509.NameAttribute(NameOID.COMMON_NAME, common_name[:64]))  # RFC 5280, ub-common-name
    return x509.Name(parts)
