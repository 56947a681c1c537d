"""ID tokens: which person an issuer saw authenticate just now, for this one request.

Source: OpenID Connect Core 1.0 sections 2 and 3.1.3.7 ("C" below), RFC 7515, RFC 7519. The `nonce` is the digest of the
request that the person acts on, so a token is good for that request and for no other. Until then it is a bearer token:
who holds it can act on that request as that person, for as long as `auth_time` is fresh.
"""

import base64
import binascii
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from attestors.contract import FactKey, Facts
from broker.errors import Invalid, Reason, Refused
from broker.identity.identify import Identified
from broker.identity.oidc_issuer import IssuerKey, OidcIssuer
from broker.identity.person import PersonId
from broker.identity.trust import parse_json_object

MAX_TOKEN: Final = 16 * 1024  # bytes; WIRE.md: longer assertions are refused unread
MAX_GROUPS: Final = 256
MAX_TEXT: Final = 255  # characters of a group or an e-mail address
PERSON: Final = "person"  # the attribute of Cedar's context
# Clocks of two machines that run NTP differ by well under this. Only beginnings get it: what is over is over.
LEEWAY: Final = timedelta(seconds=5)

# RFC 7518 section 3.4 ties a curve to each algorithm (P-521 to ES512).
_CURVES: Final[Mapping[str, type[ec.EllipticCurve]]] = {
    "ES256": ec.SECP256R1,
    "ES384": ec.SECP384R1,
    "ES512": ec.SECP521R1,
}
_RSA: Final = frozenset({"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"})
_EDDSA: Final = "EdDSA"
ALGORITHMS: Final = frozenset(_CURVES) | _RSA | {_EDDSA}
_COMPACT: Final = re.compile(r"([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)")  # RFC 7515 section 3.1
_LAST_SECOND: Final = int(datetime(9999, 12, 31, tzinfo=UTC).timestamp())
_jws = jwt.PyJWS(algorithms=sorted(ALGORITHMS))


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifiedPerson:
    """A person whom a configured issuer saw authenticate.

    groups: sorted, none twice. email: "" unless the issuer says that it verified it. expires_at: the token's end, or
    when `auth_time` is no longer fresh, whichever is first. token_sha256: of what was signed, as sent.
    """

    person: PersonId
    groups: tuple[str, ...]
    email: str
    auth_time: datetime
    issued_at: datetime
    expires_at: datetime
    token_sha256: bytes

    def identified(self) -> Identified:
        """The same as who is asking, with what the issuer says of them as the facts of `person`."""
        return Identified(
            principal=self.person,
            transport="id-token",
            expires_at=self.expires_at,
            assertion_sha256=self.token_sha256,
            issued_at=self.issued_at,
            known={
                PERSON: Facts(
                    attestor=PERSON,
                    key=FactKey(f"{PERSON}:{self.person}"),
                    values={"groups": list(self.groups), "email": self.email},
                    attested_at=self.issued_at,
                    expires_at=self.expires_at,
                )
            },
        )


class IdTokens:
    """Verifies ID tokens of these issuers, by name, and of no other."""

    def __init__(self, issuers: Mapping[str, OidcIssuer]) -> None:
        for name, issuer in issuers.items():
            if name != issuer.settings.issuer:
                raise ValueError(f"{issuer.settings.issuer} stands under {name}")
        self._issuers = dict(issuers)

    async def verify(self, token: str, nonce: str, now: datetime) -> VerifiedPerson:
        """Who the token speaks for, about the request whose digest is `nonce`.

        Obligations, in this order, so that what costs something comes last: (1) a small JWS; (2) alg is one of
        `ALGORITHMS`; (3) a configured issuer; (4) for us; (5) for this request; (6) not over, not early, and the person
        authenticated within the configured time; (7) a subject, groups and e-mail that can be; (8) signed by a key of
        that issuer which is for that algorithm.

        Raises: Invalid; Refused(UNAUTHENTICATED, WRONG_AUDIENCE, EXPIRED); Unavailable(IDENTITY_UNAVAILABLE) when the
        issuer's keys cannot be had.
        Not checked: `at_hash` and `c_hash` (we take no access token or code beside it), `acr` and `amr`; whether the
        token was shown before (it may be, about the same request).
        """
        if len(token) > MAX_TOKEN:
            raise Invalid(f"ID token is larger than {MAX_TOKEN} bytes")
        parts = _COMPACT.fullmatch(token)
        if not parts:
            raise Invalid("ID token is not a JWS in compact serialization: encrypted ones are not taken")
        alg, kid = _check_header(parse_json_object(_decode(parts[1]), "ID token header"))
        claims = parse_json_object(_decode(parts[2]), "ID token payload")
        issuer = self._issuer_of(claims)
        settings = issuer.settings
        _check_audience(claims, settings.audience)
        _check_nonce(claims, nonce)
        auth_time, issued_at, expires_at = _check_times(claims, settings.max_auth_age, now)
        verified = VerifiedPerson(
            person=PersonId(issuer=settings.issuer, subject=_string(claims, "sub")),
            groups=_groups(claims, settings.groups_claim),
            email=_email(claims),
            auth_time=auth_time,
            issued_at=issued_at,
            expires_at=min(expires_at, auth_time + settings.max_auth_age),
            token_sha256=hashlib.sha256(token.rpartition(".")[0].encode()).digest(),
        )
        keys = await issuer.keys(kid, now)
        if not any(_fits(alg, key) and _signed(token, alg, key) for key in keys):
            raise Refused(Reason.UNAUTHENTICATED, f"no key of {settings.issuer} that kid and alg allow signed this")
        return verified

    async def identify(self, token: str, nonce: str, now: datetime) -> Identified:
        """The same as who is asking, for the exchange. Raises: as `verify`."""
        return (await self.verify(token, nonce, now)).identified()

    def _issuer_of(self, claims: Mapping[str, Any]) -> OidcIssuer:
        """C 3.1.3.7, 2: the issuer exactly as configured. The claim only chooses whose keys have to prove it."""
        found = self._issuers.get(_string(claims, "iss"))
        if found is None:
            raise Refused(Reason.UNAUTHENTICATED, "ID token is of an issuer that is not configured")
        return found


def _decode(part: str) -> bytes:
    """Base64url without padding (RFC 7515 section 2), in its one canonical spelling. Raises: Invalid."""
    try:
        found = base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))
    except (binascii.Error, ValueError) as error:
        raise Invalid("ID token is not base64url") from error
    if base64.urlsafe_b64encode(found).rstrip(b"=") != part.encode():
        raise Invalid("ID token is base64url with stray bits")
    return found


def _check_header(header: Mapping[str, Any]) -> tuple[str, str | None]:
    """The algorithm and the key id. `jku`, `jwk`, `x5u` and `x5c` are never looked at. Raises: Invalid, Refused."""
    alg, kid, kind = header.get("alg"), header.get("kid"), header.get("typ", "JWT")
    if not isinstance(alg, str) or alg not in ALGORITHMS:
        raise Refused(Reason.UNAUTHENTICATED, "ID token alg is none of RS, PS and ES with 256, 384 or 512, and EdDSA")
    if not {"crit", "b64"}.isdisjoint(header):  # RFC 7515 section 4.1.11, RFC 7797: they change how a JWS is read
        raise Invalid("ID token has critical header parameters, and we understand none")
    if not isinstance(kind, str) or kind.upper() != "JWT":  # RFC 8725 section 3.11: not some other kind of token
        raise Invalid("ID token typ is not JWT")
    if "kid" in header and not isinstance(kid, str):
        raise Invalid("ID token kid is not a string")
    return alg, kid


def _string(claims: Mapping[str, Any], name: str) -> str:
    found = claims.get(name)
    if not isinstance(found, str):
        raise Invalid(f"ID token has no {name}, or it is not a string")
    return found


def _check_audience(claims: Mapping[str, Any], audience: str) -> None:
    """C 3.1.3.7, 3 to 5: we are the only audience, or the party that it was issued to. Raises: Refused, Invalid."""
    found = claims.get("aud")
    if isinstance(found, str):
        found = [found]
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise Invalid("ID token has no aud of one or more strings")
    if audience not in found:
        raise Refused(Reason.WRONG_AUDIENCE, "ID token is not for us: log in with the configured client id")
    if claims.get("azp", audience) != audience or ("azp" not in claims and set(found) != {audience}):
        raise Refused(Reason.WRONG_AUDIENCE, "ID token was issued to another party (azp), or to several")


def _check_nonce(claims: Mapping[str, Any], nonce: str) -> None:
    """C 3.1.3.7, 11. Raises: Refused, Invalid."""
    if not nonce or _string(claims, "nonce") != nonce:
        raise Refused(Reason.UNAUTHENTICATED, "ID token is about another request (nonce): log in for this one")


def _check_times(
    claims: Mapping[str, Any], max_auth_age: timedelta, now: datetime
) -> tuple[datetime, datetime, datetime]:
    """auth_time, iat and exp (C 3.1.3.7, 9, 10 and 13). Raises: Refused, Invalid."""
    auth_time, issued_at, expires_at = (_time(claims, name) for name in ("auth_time", "iat", "exp"))
    if now >= expires_at:
        raise Refused(Reason.EXPIRED, "ID token has expired: log in again")
    if now - auth_time > max_auth_age:
        raise Refused(Reason.EXPIRED, f"authentication is older than {max_auth_age}: log in again, with the password")
    beginnings = [auth_time, issued_at] + ([_time(claims, "nbf")] if "nbf" in claims else [])
    if max(beginnings) > now + LEEWAY:
        raise Refused(Reason.UNAUTHENTICATED, "ID token is of the future: compare the clocks")
    return auth_time, issued_at, expires_at


def _time(claims: Mapping[str, Any], name: str) -> datetime:
    """A NumericDate (RFC 7519 section 2), fractions allowed. Raises: Invalid."""
    value = claims.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Invalid(f"ID token has no {name}, or it is not a number: ask the issuer for it (max_age)")
    if not 0 <= value <= _LAST_SECOND:  # infinity is not, and no JSON that gets here has NaN
        raise Invalid(f"ID token {name} is no time")
    return datetime.fromtimestamp(value, tz=UTC)


def _groups(claims: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """The person's groups; none where the issuer does not say, or nobody wants to know. Raises: Invalid."""
    found = claims.get(name, []) if name else []
    if not isinstance(found, list) or len(found) > MAX_GROUPS or not all(_is_text(one) for one in found):
        raise Invalid(f"ID token {name} is not a list of at most {MAX_GROUPS} names: have the issuer send fewer")
    return tuple(sorted(set(found)))


def _email(claims: Mapping[str, Any]) -> str:
    """C 5.1: only what the issuer verified; anybody can type an address. Raises: Invalid."""
    if claims.get("email_verified") is not True or "email" not in claims:
        return ""
    if not _is_text(claims["email"]):
        raise Invalid("ID token email is no address")
    return _string(claims, "email")


def _is_text(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MAX_TEXT and value.isprintable()


def _fits(alg: str, one: IssuerKey) -> bool:
    """Whether the key is for the algorithm, whatever the header says. Ed25519 is the one curve of EdDSA here."""
    if one.alg not in {"", alg}:
        return False
    if isinstance(one.key, rsa.RSAPublicKey):
        return alg in _RSA
    if isinstance(one.key, ec.EllipticCurvePublicKey):
        return alg in _CURVES and isinstance(one.key.curve, _CURVES[alg])
    return alg == _EDDSA


def _signed(token: str, alg: str, one: IssuerKey) -> bool:
    try:
        _jws.decode(token, one.key, algorithms=[alg])
    except jwt.PyJWTError:
        return False
    return True
