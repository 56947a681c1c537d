"""A PKI in the shape of SPIRE's, with any defect on request: authorities, intermediates, X.509-SVIDs and JWT-SVIDs.

What is made without further arguments is valid at `NOW`. With a `seed`, the same calls give the same bytes.
"""

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from broker.identity.spiffe_id import SpiffeId, TrustDomain
from broker.identity.trust import OwnSvid, TrustBundle, TrustSnapshot

NOW = datetime(2031, 5, 6, 7, 8, 9, tzinfo=UTC)
WORKLOAD = "spiffe://acme.test/build/agent"
ISSUER = "https://broker.acme.test"
BOTH = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH)
CURVES = {"ES256": ec.SECP256R1(), "ES384": ec.SECP384R1(), "ES512": ec.SECP521R1()}
ALGORITHMS = tuple(f"{family}{size}" for family in ("RS", "ES", "PS") for size in (256, 384, 512))
_HASHES = {"256": hashes.SHA256(), "384": hashes.SHA384(), "512": hashes.SHA512()}
_FLAGS = (
    "digital_signature",
    "content_commitment",
    "key_encipherment",
    "data_encipherment",
    "key_agreement",
    "key_cert_sign",
    "crl_sign",
    "encipher_only",
    "decipher_only",
)


def usage(*flags: str) -> x509.KeyUsage:
    """A key usage with these flags alone, named as in cryptography."""
    return x509.KeyUsage(**{flag: flag in flags for flag in _FLAGS})


def name(text: str) -> x509.Name:
    """A subject with this common name; empty text makes an empty subject."""
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)] if text else [])


def der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.DER)


def seeded_ec_key(seed: str, curve: ec.EllipticCurve | None = None) -> ec.EllipticCurvePrivateKey:
    """The same key for the same seed. For tests only: who knows the seed has the key."""
    number = int.from_bytes(hashlib.shake_256(seed.encode()).digest(64))
    return ec.derive_private_key(number % 2**240 + 1, curve or ec.SECP256R1())


def seeded_rsa_key(seed: str, bits: int) -> rsa.RSAPrivateKey:
    """The same key for the same seed. For tests only."""
    stream = hashlib.shake_256(seed.encode()).digest(bits * 1024)
    candidates = (
        int.from_bytes(stream[at : at + bits // 16]) | 1 | 3 << (bits // 2 - 2)
        for at in range(0, len(stream), bits // 16)
    )
    found = (number for number in candidates if number % 65537 != 1 and _probably_prime(number))
    p, q = next(found), next(found)
    d = pow(65537, -1, (p - 1) * (q - 1))
    public = rsa.RSAPublicNumbers(e=65537, n=p * q)
    return rsa.RSAPrivateNumbers(
        p=p,
        q=q,
        d=d,
        dmp1=rsa.rsa_crt_dmp1(d, p),
        dmq1=rsa.rsa_crt_dmq1(d, q),
        iqmp=rsa.rsa_crt_iqmp(p, q),
        public_numbers=public,
    ).private_key()


def _probably_prime(number: int) -> bool:
    """Miller-Rabin with the first primes as bases: enough for numbers that nobody chose to deceive it."""
    small = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)
    if any(number % prime == 0 for prime in small):
        return False
    odd, twos = number - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    return all(
        (power := pow(base, odd, number)) == 1 or any(pow(power, 2**turn, number) == number - 1 for turn in range(twos))
        for base in small
    )


def alternative_names(uris: Iterable[str], dns: Iterable[str] = ()) -> x509.SubjectAlternativeName | None:
    names = [*map(x509.UniformResourceIdentifier, uris), *map(x509.DNSName, dns)]
    return x509.SubjectAlternativeName(names) if names else None


@dataclass(frozen=True, kw_only=True)
class Svid:
    """An X.509-SVID with its key. chain: DER, leaf first."""

    leaf: x509.Certificate
    key: Any
    chain: tuple[bytes, ...]

    @property
    def key_pkcs8(self) -> bytes:
        return self.key.private_bytes(
            serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )

    @property
    def key_pem(self) -> bytes:
        return self.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )

    @property
    def chain_pem(self) -> bytes:
        return b"".join(
            x509.load_der_x509_certificate(item).public_bytes(serialization.Encoding.PEM) for item in self.chain
        )

    def own(self) -> OwnSvid:
        """As what the Workload API would give to the process that has it."""
        uri = self.leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value.get_values_for_type(
            x509.UniformResourceIdentifier
        )[0]
        return OwnSvid(
            spiffe_id=SpiffeId.parse(uri),
            chain=self.chain,
            private_key_pkcs8=self.key_pkcs8,
            not_after=self.leaf.not_valid_after_utc,
        )


class CA:
    """A certificate authority: a root, or an intermediate under `parent`.

    uri: its SPIFFE ID; None for a CA that is no SVID. key_usage, basic_constraints: None leaves the extension out.
    `extra` are more extensions, each with whether it is critical. now: what its validity is counted from.
    """

    def __init__(
        self,
        trust_domain: str = "acme.test",
        *,
        parent: "CA | None" = None,
        common_name: str = "",
        now: datetime = NOW,
        seed: str | None = None,
        uri: str | None = "",
        key: Any = None,
        not_before: datetime | None = None,
        not_after: datetime | None = None,
        basic_constraints: x509.BasicConstraints | None = x509.BasicConstraints(ca=True, path_length=None),  # noqa: B008
        key_usage: x509.KeyUsage | None = usage("key_cert_sign", "crl_sign"),  # noqa: B008
        key_usage_critical: bool = True,
        purposes: Sequence[x509.ObjectIdentifier] = (),
        extra: Sequence[tuple[x509.ExtensionType, bool]] = (),
    ) -> None:
        self.trust_domain = TrustDomain.parse(trust_domain)
        self.parent, self.now, self.seed = parent, now, seed or (parent.seed if parent else None)
        self.serials = 0
        self.depth: int = parent.depth + 1 if parent else 0
        common_name = common_name or (f"intermediate {self.depth} of " if parent else "root of ") + trust_domain
        self.name = name(common_name)
        self.key = key or self._new_key(common_name)
        issuer = parent or self
        extensions: list[tuple[x509.ExtensionType | None, bool]] = [
            (basic_constraints, True),
            (key_usage, key_usage_critical),
            (alternative_names([str(self.trust_domain) if uri == "" else uri] if uri is not None else []), False),
            (x509.ExtendedKeyUsage(purposes) if purposes else None, False),
            (x509.SubjectKeyIdentifier.from_public_key(self.key.public_key()), False),
            *extra,
        ]
        self.certificate = issuer.sign(
            subject=self.name,
            public_key=self.key.public_key(),
            extensions=extensions,
            not_before=not_before or now - timedelta(days=1),
            not_after=not_after or now + timedelta(days=365),
        )

    def _new_key(self, label: str) -> ec.EllipticCurvePrivateKey:
        if self.seed is None:
            return ec.generate_private_key(ec.SECP256R1())
        return seeded_ec_key(f"{self.seed}/{self.trust_domain.name}/{label}")

    @property
    def chain(self) -> tuple[bytes, ...]:
        """Itself and the intermediates above it in DER, without the root."""
        return (der(self.certificate), *self.parent.chain) if self.parent else ()

    @property
    def root(self) -> "CA":
        return self.parent.root if self.parent else self

    def bundle(self, *jwt_keys: "JwtAuthority") -> TrustBundle:
        """The root's, with these JWT authorities."""
        return TrustBundle(
            trust_domain=self.trust_domain,
            x509_authorities=(self.root.certificate,),
            jwt_authorities={item.kid: (item.key.public_key(),) for item in jwt_keys},
        )

    def sign(
        self,
        *,
        subject: x509.Name,
        public_key: Any,
        extensions: Sequence[tuple[x509.ExtensionType | None, bool]],
        not_before: datetime,
        not_after: datetime,
    ) -> x509.Certificate:
        """A certificate with exactly these extensions (None: left out) and an authority key identifier."""
        self.serials += 1
        serial = x509.random_serial_number()
        if self.seed is not None:
            label = f"{self.seed}/{self.name.rfc4514_string()}/{self.serials}"
            serial = int.from_bytes(hashlib.sha256(label.encode()).digest()[:16]) + 1
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.name)
            .public_key(public_key)
            .serial_number(serial)
            .not_valid_before(not_before)
            .not_valid_after(not_after)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False)
        )
        for extension, critical in extensions:
            if extension is not None:
                builder = builder.add_extension(extension, critical=critical)
        deterministic = True if isinstance(self.key, ec.EllipticCurvePrivateKey) else None
        return builder.sign(self.key, hashes.SHA256(), ecdsa_deterministic=deterministic)

    def svid(
        self,
        uri: str = WORKLOAD,
        *,
        uris: Sequence[str] | None = None,
        dns: Sequence[str] = (),
        subject: str = "a workload",
        names_critical: bool = False,
        basic_constraints: x509.BasicConstraints | None = x509.BasicConstraints(ca=False, path_length=None),  # noqa: B008
        key_usage: x509.KeyUsage | None = usage("digital_signature"),  # noqa: B008
        key_usage_critical: bool = True,
        purposes: Sequence[x509.ObjectIdentifier] = BOTH,
        purposes_critical: bool = False,
        extra: Sequence[tuple[x509.ExtensionType, bool]] = (),
        lifetime: timedelta = timedelta(hours=1),
        not_before: datetime | None = None,
        key: Any = None,
    ) -> Svid:
        """An X.509-SVID; each argument is one thing that can be wrong with it. purposes: () leaves them out."""
        key = key or self._new_key(f"{uri}/{self.serials}")
        leaf = self.sign(
            subject=name(subject),
            public_key=key.public_key(),
            extensions=[
                (basic_constraints, True),
                (key_usage, key_usage_critical),
                (alternative_names([uri] if uris is None else uris, dns), names_critical),
                (x509.ExtendedKeyUsage(purposes) if purposes else None, purposes_critical),
                *extra,
            ],
            not_before=not_before or self.now - timedelta(seconds=10),
            not_after=self.now + lifetime,
        )
        return Svid(leaf=leaf, key=key, chain=(der(leaf), *self.chain))


def snapshot(*bundles: TrustBundle, own: OwnSvid | None = None, revision: int = 1) -> TrustSnapshot:
    return TrustSnapshot(own=own, bundles={item.trust_domain: item for item in bundles}, revision=revision)


def base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def jws(header: bytes | Mapping[str, Any], payload: bytes | Mapping[str, Any], sign: Any) -> str:
    """A JWS of exactly these bytes; `sign` gets the signing input."""
    parts = [item if isinstance(item, bytes) else json.dumps(item).encode() for item in (header, payload)]
    signed = ".".join(map(base64url, parts))
    return f"{signed}.{base64url(sign(signed.encode()))}"


@dataclass(frozen=True, kw_only=True)
class JwtAuthority:
    """A key that signs JWT-SVIDs, in any of the nine algorithms; made for `alg` where no key is given."""

    alg: str = "ES256"
    kid: str = "authority-1"
    key: Any = field(default=None)

    def __post_init__(self) -> None:
        if self.key is None:
            made = (
                ec.generate_private_key(CURVES[self.alg])
                if self.alg in CURVES
                else rsa.generate_private_key(public_exponent=65537, key_size=2048)
            )
            object.__setattr__(self, "key", made)

    def raw_signature(self, data: bytes, alg: str | None = None) -> bytes:
        """RFC 7518 sections 3.3 to 3.5, over `data`."""
        alg = alg or self.alg
        digest = _HASHES[alg[2:]]
        if alg.startswith("ES"):
            r, s = decode_dss_signature(self.key.sign(data, ec.ECDSA(digest, deterministic_signing=True)))
            size = (self.key.curve.key_size + 7) // 8
            return r.to_bytes(size) + s.to_bytes(size)
        if alg.startswith("RS"):
            return self.key.sign(data, padding.PKCS1v15(), digest)
        return self.key.sign(data, padding.PSS(padding.MGF1(digest), padding.PSS.DIGEST_LENGTH), digest)

    def token(
        self,
        claims: bytes | Mapping[str, Any] | None = None,
        *,
        header: bytes | Mapping[str, Any] | None = None,
        now: datetime = NOW,
        **changes: Any,
    ) -> str:
        """A JWT-SVID. changes: claims instead of or beside the usual ones; None leaves one out."""
        if header is None:
            header = {"alg": self.alg, "kid": self.kid, "typ": "JWT"}
        return jws(header, claims if claims is not None else usual_claims(now, **changes), self.raw_signature)

    def jwk(self, **changes: Any) -> dict[str, Any]:
        """As it stands in a bundle. changes: None leaves a member out."""
        numbers = self.key.public_key().public_numbers()
        found: dict[str, Any] = {"kid": self.kid, "use": "jwt-svid"}
        if isinstance(numbers, ec.EllipticCurvePublicNumbers):
            size = (numbers.curve.key_size + 7) // 8
            curve = {"secp256r1": "P-256", "secp384r1": "P-384", "secp521r1": "P-521"}[numbers.curve.name]
            x, y = (base64url(value.to_bytes(size)) for value in (numbers.x, numbers.y))
            found |= {"kty": "EC", "crv": curve, "x": x, "y": y}
        else:
            n, e = (base64url(value.to_bytes((value.bit_length() + 7) // 8)) for value in (numbers.n, numbers.e))
            found |= {"kty": "RSA", "n": n, "e": e}
        return {key: value for key, value in (found | changes).items() if value is not None}


def usual_claims(now: datetime = NOW, **changes: Any) -> dict[str, Any]:
    issued = int(now.timestamp())
    claims = {"sub": WORKLOAD, "aud": [ISSUER], "iat": issued, "exp": issued + 300} | changes
    return {key: value for key, value in claims.items() if value is not None}


def jwks(*keys: Mapping[str, Any]) -> bytes:
    return json.dumps({"keys": list(keys)}).encode()
