"""JWT-SVIDs: which token speaks for which SPIFFE ID to whom, now.

Source: https://github.com/spiffe/spiffe/blob/main/standards/JWT-SVID.md ("J" below), RFC 7515 and RFC 7519. These are
the standards' rules and no more; what we want stricter of an assertion is in strict.py.

A JWT-SVID is a bearer token: whoever holds it can show it. It identifies a caller only beside a key proof.
"""

import base64
import binascii
import hashlib
import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from broker.errors import Invalid, Reason, Refused
from broker.identity.spiffe_id import SpiffeId
from broker.identity.trust import JwtKey, TrustBundle, TrustSnapshot, parse_json_object

MAX_TOKEN = 16 * 1024  # bytes; WIRE.md: longer assertions are refused unread
MIN_RSA_BITS = 2048  # RFC 7518 section 3.3: MUST be used
# Clocks of two machines that run NTP differ by well under this; without it a token used within its first moments is
# refused. Only the beginning gets it: what we mint never outlives `exp`, so a token past it is good for nothing.
LEEWAY = timedelta(seconds=5)

# J section 2.1, and the curve that RFC 7518 section 3.4 ties to each ES algorithm (P-521 with ES512).
_CURVES: dict[str, type[ec.EllipticCurve]] = {"ES256": ec.SECP256R1, "ES384": ec.SECP384R1, "ES512": ec.SECP521R1}
ALGORITHMS = frozenset(_CURVES) | {"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"}
# J section 2: "Any header not described here, registered or private, MUST NOT be included." That also shuts out `crit`,
# `b64`, `jwk`, `jku` and `x5c`, none of which may choose how a token is read or by which key.
_HEADERS = frozenset({"alg", "kid", "typ"})
_TYPES = ("JWT", "JOSE")  # J section 2.3; a tuple, since what is compared with them may be no string
_COMPACT = re.compile(r"([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)")  # RFC 7515 section 3.1
_LAST_SECOND = int(datetime(9999, 12, 31, tzinfo=UTC).timestamp())
_jws = jwt.PyJWS(algorithms=sorted(ALGORITHMS))


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifiedJwtSvid:
    """A workload that an authority of its own trust domain vouched for, to this audience among others.

    token_sha256: of what was signed (header and payload, as sent), not of the signature after it. An ECDSA signature
    has a second valid form that anyone can compute, so a digest over all of it would let a thief pass off the same
    assertion as a new one.
    authority_sha256: of the key that signed it (its SubjectPublicKeyInfo in DER), whatever its `kid`.
    """

    spiffe_id: SpiffeId
    audience: tuple[str, ...]
    expires_at: datetime
    issued_at: datetime | None
    token_sha256: bytes
    authority_sha256: bytes


def verify_jwt_svid(token: str, snapshot: TrustSnapshot, now: datetime, *, audience: str) -> VerifiedJwtSvid:
    """Who the token speaks for, to `audience`.

    Raises: Invalid when it is no JWT-SVID; Refused(unauthenticated) when no key of its own trust domain signed it or it
    is not valid yet; Refused(expired); Refused(wrong_audience) when `audience` is not among its own.
    Not checked: that the caller holds a key (see strict.py and DPoP), `jti`, private claims.
    """
    if len(token) > MAX_TOKEN:
        raise Invalid(f"JWT-SVID is larger than {MAX_TOKEN} bytes")
    parts = _COMPACT.fullmatch(token)
    if not parts:
        raise Invalid("JWT-SVID is not a JWS in compact serialization (J 5.1)")
    header = parse_json_object(_decode(parts[1]), "JWT-SVID header")
    alg, kid = _check_header(header)
    claims = parse_json_object(_decode(parts[2]), "JWT-SVID payload")
    spiffe_id, audiences = _subject(claims), _audiences(claims)
    expires_at, not_before, issued_at = (_time(claims, name) for name in ("exp", "nbf", "iat"))
    if expires_at is None:
        raise Invalid("JWT-SVID has no exp (J 3.3)")
    # The subject is only a claim until now: it chooses the bundle that has to prove it.
    authority = _check_signature(token, alg, kid, snapshot.bundle_for(spiffe_id.trust_domain))
    if now >= expires_at:
        raise Refused(Reason.EXPIRED, "JWT-SVID has expired: fetch a new one")
    if not_before is not None and now + LEEWAY < not_before:
        raise Refused(Reason.UNAUTHENTICATED, "JWT-SVID is not valid yet: compare the clocks")
    if not audience or audience not in audiences:
        raise Refused(Reason.WRONG_AUDIENCE, f"JWT-SVID is not for {audience!r}: fetch one with that audience")
    return VerifiedJwtSvid(
        spiffe_id=spiffe_id,
        audience=audiences,
        expires_at=expires_at,
        issued_at=issued_at,
        token_sha256=hashlib.sha256(token.rpartition(".")[0].encode()).digest(),
        authority_sha256=authority_digest(authority),
    )


def authority_digest(key: JwtKey) -> bytes:
    """SHA-256 of a JWT authority's SubjectPublicKeyInfo in DER."""
    return hashlib.sha256(
        key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    ).digest()


def _decode(part: str) -> bytes:
    """Base64url without padding (RFC 7515 section 2), in its one canonical spelling. Raises: Invalid."""
    try:
        found = base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))
    except (binascii.Error, ValueError) as error:
        raise Invalid("JWT-SVID is not base64url") from error
    if base64.urlsafe_b64encode(found).rstrip(b"=") != part.encode():
        raise Invalid("JWT-SVID is base64url with stray bits")
    return found


def _check_header(header: dict[str, Any]) -> tuple[str, str | None]:
    """The algorithm and the key ID, before anything else is believed (J section 4). Raises: Invalid, Refused."""
    if not header.keys() <= _HEADERS:
        raise Invalid("JWT-SVID header has a parameter other than alg, kid and typ (J 2)")
    alg, kid = header.get("alg"), header.get("kid")
    if not isinstance(alg, str) or alg not in ALGORITHMS:
        raise Refused(Reason.UNAUTHENTICATED, "JWT-SVID alg is none of RS, ES and PS with 256, 384 or 512 (J 2.1)")
    if "typ" in header and header["typ"] not in _TYPES:
        raise Invalid("JWT-SVID typ is neither JWT nor JOSE (J 2.3)")
    if "kid" in header and not isinstance(kid, str):
        raise Invalid("JWT-SVID kid is not a string (RFC 7515 section 4.1.4)")
    return alg, kid


def _subject(claims: dict[str, Any]) -> SpiffeId:
    if not isinstance(claims.get("sub"), str):
        raise Invalid("JWT-SVID has no sub (J 3.1)")
    return SpiffeId.parse(claims["sub"])


def _audiences(claims: dict[str, Any]) -> tuple[str, ...]:
    """One string or a list of them (RFC 7519 section 4.1.3), at least one (J 3.2). Raises: Invalid."""
    found = claims.get("aud")
    if isinstance(found, str):
        found = [found]
    if not isinstance(found, list) or not found or not all(isinstance(item, str) for item in found):
        raise Invalid("JWT-SVID has no aud of one or more strings (J 3.2)")
    return tuple(found)


def _time(claims: dict[str, Any], name: str) -> datetime | None:
    """A NumericDate (RFC 7519 section 2), fractions allowed; None where the claim is absent. Raises: Invalid."""
    if name not in claims:
        return None
    value = claims[name]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Invalid(f"JWT-SVID {name} is not a number")
    if not 0 <= value <= _LAST_SECOND:  # infinity is not, and no JSON that gets here has NaN
        raise Invalid(f"JWT-SVID {name} is no time")
    return datetime.fromtimestamp(value, tz=UTC)


def _check_signature(token: str, alg: str, kid: str | None, bundle: TrustBundle) -> JwtKey:
    """The key of the bundle that signed it: the one named, or, without `kid`, any of them (J 2.2 makes it optional).

    Only keys of the kind that the algorithm is for are tried, whatever the header says. Raises: Refused.
    """
    if kid is None:
        named = [key for keys in bundle.jwt_authorities.values() for key in keys]
    else:
        named = list(bundle.jwt_authorities.get(kid, ()))
    for key in named:
        if _fits(alg, key) and _signed(token, alg, key):
            return key
    raise Refused(
        Reason.UNAUTHENTICATED, f"no JWT authority of {bundle.trust_domain} that kid and alg allow signed this"
    )


def _fits(alg: str, key: JwtKey) -> bool:
    if isinstance(key, rsa.RSAPublicKey):
        return alg not in _CURVES and key.key_size >= MIN_RSA_BITS
    return alg in _CURVES and isinstance(key.curve, _CURVES[alg])


def _signed(token: str, alg: str, key: JwtKey) -> bool:
    try:
        _jws.decode(token, key, algorithms=[alg])
    except jwt.PyJWTError:
        return False
    return True
