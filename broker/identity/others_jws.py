"""Tokens that others sign: a JWS in compact serialization (RFC 7515 section 3.1), taken apart strictly.

What is taken apart is not believed: whose keys have to prove it is for the caller to say. PyJWT checks the signature
over the very bytes that were read here. Kinds of token have files of their own.
"""

import base64
import binascii
import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from broker.errors import Invalid, Reason, Refused
from broker.identity.oidc_issuer import IssuerKey
from broker.identity.trust import parse_json_object

MAX_TOKEN: Final = 16 * 1024  # bytes; WIRE.md: longer assertions are refused unread

# RFC 7518 section 3.4 ties a curve to each algorithm (P-521 to ES512).
_CURVES: Final[Mapping[str, type[ec.EllipticCurve]]] = {
    "ES256": ec.SECP256R1,
    "ES384": ec.SECP384R1,
    "ES512": ec.SECP521R1,
}
_RSA: Final = frozenset({"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"})
_EDDSA: Final = "EdDSA"
ALGORITHMS: Final = frozenset(_CURVES) | _RSA | {_EDDSA}
_COMPACT: Final = re.compile(r"([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)")
_LAST_SECOND: Final = int(datetime(9999, 12, 31, tzinfo=UTC).timestamp())
_jws = jwt.PyJWS(algorithms=sorted(ALGORITHMS))


@dataclass(frozen=True, slots=True, kw_only=True)
class Unproven:
    """What a token says of itself, before anybody vouched for it. alg: one of `ALGORITHMS`. kid: None without one.

    sha256: of header and payload as they were sent, not of the signature after them: an ECDSA signature has a second
    valid form that anyone can compute.
    """

    alg: str
    kid: str | None
    header: Mapping[str, Any]
    claims: Mapping[str, Any]
    sha256: bytes


def take_apart(token: str, what: str) -> Unproven:
    """A small JWS with a JSON object in it. what: the kind of token, for messages.

    `jku`, `jwk`, `x5u` and `x5c` are never looked at. Raises: Invalid; Refused(UNAUTHENTICATED) for another algorithm.
    Not checked: `typ`, any claim, the signature.
    """
    if len(token) > MAX_TOKEN:
        raise Invalid(f"{what} is larger than {MAX_TOKEN} bytes")
    parts = _COMPACT.fullmatch(token)
    if not parts:
        raise Invalid(f"{what} is not a JWS in compact serialization: encrypted ones are not taken")
    header = parse_json_object(_decode(parts[1], what), f"{what} header")
    alg, kid = header.get("alg"), header.get("kid")
    if not isinstance(alg, str) or alg not in ALGORITHMS:
        raise Refused(Reason.UNAUTHENTICATED, f"{what} alg is none of RS, PS and ES with 256, 384 or 512, and EdDSA")
    if not {"crit", "b64"}.isdisjoint(header):  # RFC 7515 section 4.1.11, RFC 7797: they change how a JWS is read
        raise Invalid(f"{what} has critical header parameters, and we understand none")
    if "kid" in header and not isinstance(kid, str):
        raise Invalid(f"{what} kid is not a string")
    return Unproven(
        alg=alg,
        kid=kid,
        header=header,
        claims=parse_json_object(_decode(parts[2], what), f"{what} payload"),
        sha256=hashlib.sha256(token.rpartition(".")[0].encode()).digest(),
    )


def _decode(part: str, what: str) -> bytes:
    """Base64url without padding (RFC 7515 section 2), in its one canonical spelling. Raises: Invalid."""
    try:
        found = base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))
    except (binascii.Error, ValueError) as error:
        raise Invalid(f"{what} is not base64url") from error
    if base64.urlsafe_b64encode(found).rstrip(b"=") != part.encode():
        raise Invalid(f"{what} is base64url with stray bits")
    return found


def fitting(alg: str, keys: Iterable[IssuerKey]) -> tuple[IssuerKey, ...]:
    """Those of the keys that are for the algorithm, whatever a header says. Ed25519 is the one curve of EdDSA here."""
    return tuple(key for key in keys if _fits(alg, key))


def _fits(alg: str, one: IssuerKey) -> bool:
    if one.alg not in {"", alg}:
        return False
    if isinstance(one.key, rsa.RSAPublicKey):
        return alg in _RSA
    if isinstance(one.key, ec.EllipticCurvePublicKey):
        return alg in _CURVES and isinstance(one.key.curve, _CURVES[alg])
    return alg == _EDDSA


def signed_by_one_of(token: str, alg: str, keys: Iterable[IssuerKey]) -> bool:
    """Whether one of these keys, which fit the algorithm, signed the token that was taken apart."""
    return any(_signed(token, alg, key) for key in keys)


def _signed(token: str, alg: str, one: IssuerKey) -> bool:
    try:
        _jws.decode(token, one.key, algorithms=[alg])
    except jwt.PyJWTError:
        return False
    return True


def time_claim(claims: Mapping[str, Any], name: str, what: str) -> datetime:
    """A NumericDate (RFC 7519 section 2), fractions allowed. Raises: Invalid."""
    value = claims.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Invalid(f"{what} has no {name}, or it is not a number")
    if not 0 <= value <= _LAST_SECOND:  # infinity is not, and no JSON that gets here has NaN
        raise Invalid(f"{what} {name} is no time")
    return datetime.fromtimestamp(value, tz=UTC)


def text_claim(claims: Mapping[str, Any], name: str, what: str) -> str:
    """A string. Raises: Invalid."""
    found = claims.get(name)
    if not isinstance(found, str):
        raise Invalid(f"{what} has no {name}, or it is not a string")
    return found


def audiences(claims: Mapping[str, Any], what: str) -> tuple[str, ...]:
    """`aud`, whether it is one or a list (RFC 7519 section 4.1.3). Raises: Invalid."""
    found = claims.get("aud")
    if isinstance(found, str):
        return (found,)
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise Invalid(f"{what} has no aud of one or more strings")
    return tuple(found)
