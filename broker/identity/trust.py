"""What we trust at one moment: our own SVID and a bundle of authorities for each trust domain, never pooled.

Source: https://github.com/spiffe/spiffe/blob/main/standards/SPIFFE_Trust_Domain_and_Bundle.md ("TDB" below).
"""

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from types import MappingProxyType
from typing import Any

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from jwt.algorithms import ECAlgorithm, RSAAlgorithm
from jwt.exceptions import InvalidKeyError

from broker.action import parse_json
from broker.errors import Invalid, Reason, Refused
from broker.identity.spiffe_id import SpiffeId, TrustDomain

JwtKey = rsa.RSAPublicKey | ec.EllipticCurvePublicKey

_JWT_SVID = "jwt-svid"  # JWT-SVID.md section 6.2; case-sensitive by TDB section 4.2.2
_PUBLIC_MEMBERS = {"RSA": ("n", "e"), "EC": ("crv", "x", "y")}
_SEQUENCE = 0x30
_INDEFINITE = 0x80


@dataclass(frozen=True, slots=True, kw_only=True)
class TrustBundle:
    """The authorities of one trust domain. An empty one trusts nobody (TDB section 4.1.3).

    jwt_authorities: by `kid`; a tuple, since RFC 7517 section 4.5 lets keys of different types share one.
    fingerprint: SHA-256 over all of it, so two bundles are the same exactly when they trust the same; what was verified
    against one is remembered under it.
    """

    trust_domain: TrustDomain
    x509_authorities: tuple[x509.Certificate, ...] = field(default=(), compare=False)
    jwt_authorities: Mapping[str, tuple[JwtKey, ...]] = field(default_factory=dict, compare=False)
    fingerprint: bytes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        frozen = MappingProxyType(dict(self.jwt_authorities))
        object.__setattr__(self, "jwt_authorities", frozen)
        object.__setattr__(self, "fingerprint", _fingerprint(self.trust_domain, self.x509_authorities, frozen))


def _fingerprint(
    trust_domain: TrustDomain,
    x509_authorities: tuple[x509.Certificate, ...],
    jwt_authorities: Mapping[str, tuple[JwtKey, ...]],
) -> bytes:
    parts = [trust_domain.name.encode()]
    for certificate in x509_authorities:
        parts += [b"x509", certificate.public_bytes(serialization.Encoding.DER)]
    for kid, keys in jwt_authorities.items():
        for key in keys:
            spki = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
            parts += [b"jwt", kid.encode(errors="surrogatepass"), spki]
    # Base64 with a separator outside its alphabet: no two lists of parts give the same text.
    return hashlib.sha256(b",".join(base64.b64encode(part) for part in parts)).digest()


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnSvid:
    """Our own X.509-SVID, as the Workload API gave it. Its key stays out of repr.

    chain: DER, leaf first. private_key_pkcs8: DER. not_after: the leaf's.
    """

    spiffe_id: SpiffeId
    chain: tuple[bytes, ...] = field(repr=False)
    private_key_pkcs8: bytes = field(repr=False)
    not_after: datetime

    @property
    def bundle_trust_domain(self) -> TrustDomain:
        """Whose bundle verifies it: its own trust domain's, and no other's."""
        return self.spiffe_id.trust_domain


@dataclass(frozen=True, slots=True, kw_only=True)
class TrustSnapshot:
    """All we trust at one moment; a change makes a new snapshot with a higher `revision`.

    own: None until we have an SVID. bundles: our own trust domain's and each federated one's, kept apart.
    """

    own: OwnSvid | None
    bundles: Mapping[TrustDomain, TrustBundle]
    revision: int

    def __post_init__(self) -> None:
        for trust_domain, bundle in self.bundles.items():
            if bundle.trust_domain != trust_domain:
                raise ValueError(f"the bundle of {bundle.trust_domain} stands under {trust_domain}")
        object.__setattr__(self, "bundles", MappingProxyType(dict(self.bundles)))

    def bundle_for(self, trust_domain: TrustDomain) -> TrustBundle:
        """The bundle that this domain's SVIDs are verified against, and nothing else is.

        Raises: Refused(unauthenticated) where we have none: federate with the domain first.
        """
        bundle = self.bundles.get(trust_domain)
        if bundle is None:
            raise Refused(Reason.UNAUTHENTICATED, f"no trust bundle for {trust_domain}: federate with it first")
        return bundle


def split_der(data: bytes) -> tuple[bytes, ...]:
    """The DER values (X.690 section 8.1) that the Workload API concatenates in one field. Empty data: none.

    Raises: Invalid when the lengths do not add up. Not checked: what is inside.
    """
    found = []
    while data:
        if len(data) < 2 or data[0] != _SEQUENCE:
            raise Invalid("not a concatenation of DER sequences")
        size, header = data[1], 2
        if size == _INDEFINITE:
            raise Invalid("DER has no indefinite length")
        if size & 0x80:  # long form: the low bits count the octets of the length
            header += size & 0x7F
            size = int.from_bytes(data[2:header])
        if size > len(data) - header:
            raise Invalid("DER is cut off")
        found.append(data[: header + size])
        data = data[header + size :]
    return tuple(found)


def parse_x509_authorities(der: bytes) -> tuple[x509.Certificate, ...]:
    """The authorities in an X.509 bundle from the Workload API: concatenated DER, possibly none.

    Raises: Invalid when one cannot be read. Not checked here but in each path validation: that they are CAs, and valid.
    """
    try:
        return tuple(x509.load_der_x509_certificate(item) for item in split_der(der))
    except (ValueError, x509.InvalidVersion) as error:
        raise Invalid("an X.509 bundle holds what is no certificate") from error


def parse_jwt_authorities(jwks: bytes) -> dict[str, tuple[JwtKey, ...]]:
    """The JWT-SVID keys, by `kid`, in a JWT bundle from the Workload API: a JWK Set (RFC 7517), possibly without keys.

    A key we cannot use is left out and the others count (TDB section 4.1.3): unknown `kty` or curve, a `use` other than
    `jwt-svid`, no `kid` (which JWT-SVID section 6.1 requires), malformed numbers.

    A key without any `use` counts. TDB section 4.2.2 wants it ignored in a SPIFFE bundle, but what the Workload API
    gives is no SPIFFE bundle: it is a standard JWK Set of JWT-SVID keys only (SPIFFE_Workload_API.md section 6.2.2),
    and SPIRE leaves `use` out of it.

    Raises: Invalid when it is no JWK Set.
    """
    document = parse_json_object(jwks, "a JWT bundle")
    keys = document.get("keys")
    if not isinstance(keys, list):
        raise Invalid("a JWT bundle has no list of keys")
    found: dict[str, tuple[JwtKey, ...]] = {}
    for jwk in keys:
        if not isinstance(jwk, dict) or jwk.get("use", _JWT_SVID) != _JWT_SVID or not isinstance(jwk.get("kid"), str):
            continue
        key = _public_key(jwk)
        if key is not None and jwk["kid"]:
            found[jwk["kid"]] = (*found.get(jwk["kid"], ()), key)
    return found


def _public_key(jwk: dict[str, Any]) -> JwtKey | None:
    """The key in a JWK, from its public members alone (RFC 7518 section 6), or None where it is none of ours."""
    members = _PUBLIC_MEMBERS.get(str(jwk.get("kty")))
    if members is None or not all(isinstance(jwk.get(name), str) for name in members):
        return None
    public = {"kty": jwk["kty"], **{name: jwk[name] for name in members}}
    try:
        key = (RSAAlgorithm if jwk["kty"] == "RSA" else ECAlgorithm).from_jwk(public)
    except (InvalidKeyError, ValueError, UnsupportedAlgorithm):
        return None
    return key if isinstance(key, JwtKey) else None


def parse_json_object(data: bytes, what: str) -> dict[str, Any]:
    """A JSON object from outside. Two readers of a duplicate name may read two things, so it is refused.

    Raises: Invalid naming `what`.
    """
    found = parse_json(data, what)
    if not isinstance(found, dict):
        raise Invalid(f"{what} is not a JSON object")
    return found
