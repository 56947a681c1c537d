"""ID tokens: which person an issuer saw authenticate just now, for this one request.

Source: OpenID Connect Core 1.0 sections 2 and 3.1.3.7 ("C" below), RFC 7515, RFC 7519. The `nonce` is the digest of the
request that the person acts on, so a token is good for that request and for no other. Until then it is a bearer token:
who holds it can act on that request as that person, for as long as `auth_time` is fresh.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from attestors.contract import FactKey, Facts
from broker.errors import Invalid, Reason, Refused
from broker.identity.identify import Identified
from broker.identity.oidc_issuer import OidcIssuer
from broker.identity.others_jws import audiences, fitting, signed_by_one_of, take_apart, text_claim, time_claim
from broker.identity.person import PersonId

MAX_GROUPS: Final = 256
MAX_TEXT: Final = 255  # characters of a group or an e-mail address
PERSON: Final = "person"  # the attribute of Cedar's context
# Clocks of two machines that run NTP differ by well under this. Only beginnings get it: what is over is over.
LEEWAY: Final = timedelta(seconds=5)
_WHAT: Final = "ID token"


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
        read = take_apart(token, _WHAT)
        _check_type(read.header)
        claims = read.claims
        issuer = self._issuer_of(claims)
        settings = issuer.settings
        _check_audience(claims, settings.audience)
        _check_nonce(claims, nonce)
        auth_time, issued_at, expires_at = _check_times(claims, settings.max_auth_age, now)
        verified = VerifiedPerson(
            person=PersonId(issuer=settings.issuer, subject=text_claim(claims, "sub", _WHAT)),
            groups=_groups(claims, settings.groups_claim),
            email=_email(claims),
            auth_time=auth_time,
            issued_at=issued_at,
            expires_at=min(expires_at, auth_time + settings.max_auth_age),
            token_sha256=read.sha256,
        )
        keys = fitting(read.alg, await issuer.keys(read.kid, now))
        if not signed_by_one_of(token, read.alg, keys):
            raise Refused(Reason.UNAUTHENTICATED, f"no key of {settings.issuer} that kid and alg allow signed this")
        return verified

    async def identify(self, token: str, nonce: str, now: datetime) -> Identified:
        """The same as who is asking, for the exchange. Raises: as `verify`."""
        return (await self.verify(token, nonce, now)).identified()

    def _issuer_of(self, claims: Mapping[str, Any]) -> OidcIssuer:
        """C 3.1.3.7, 2: the issuer exactly as configured. The claim only chooses whose keys have to prove it."""
        found = self._issuers.get(text_claim(claims, "iss", _WHAT))
        if found is None:
            raise Refused(Reason.UNAUTHENTICATED, "ID token is of an issuer that is not configured")
        return found


def _check_type(header: Mapping[str, Any]) -> None:
    """Raises: Invalid."""
    kind = header.get("typ", "JWT")
    if not isinstance(kind, str) or kind.upper() != "JWT":  # RFC 8725 section 3.11: not some other kind of token
        raise Invalid("ID token typ is not JWT")


def _check_audience(claims: Mapping[str, Any], audience: str) -> None:
    """C 3.1.3.7, 3 to 5: we are the only audience, or the party that it was issued to. Raises: Refused, Invalid."""
    found = audiences(claims, _WHAT)
    if audience not in found:
        raise Refused(Reason.WRONG_AUDIENCE, "ID token is not for us: log in with the configured client id")
    if claims.get("azp", audience) != audience or ("azp" not in claims and set(found) != {audience}):
        raise Refused(Reason.WRONG_AUDIENCE, "ID token was issued to another party (azp), or to several")


def _check_nonce(claims: Mapping[str, Any], nonce: str) -> None:
    """C 3.1.3.7, 11. Raises: Refused, Invalid."""
    if not nonce or text_claim(claims, "nonce", _WHAT) != nonce:
        raise Refused(Reason.UNAUTHENTICATED, "ID token is about another request (nonce): log in for this one")


def _check_times(
    claims: Mapping[str, Any], max_auth_age: timedelta, now: datetime
) -> tuple[datetime, datetime, datetime]:
    """auth_time, iat and exp (C 3.1.3.7, 9, 10 and 13). Raises: Refused, Invalid."""
    auth_time, issued_at, expires_at = (time_claim(claims, name, _WHAT) for name in ("auth_time", "iat", "exp"))
    if now >= expires_at:
        raise Refused(Reason.EXPIRED, "ID token has expired: log in again")
    if now - auth_time > max_auth_age:
        raise Refused(Reason.EXPIRED, f"authentication is older than {max_auth_age}: log in again, with the password")
    beginnings = [auth_time, issued_at] + ([time_claim(claims, "nbf", _WHAT)] if "nbf" in claims else [])
    if max(beginnings) > now + LEEWAY:
        raise Refused(Reason.UNAUTHENTICATED, "ID token is of the future: compare the clocks")
    return auth_time, issued_at, expires_at


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
    return text_claim(claims, "email", _WHAT)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MAX_TEXT and value.isprintable()
