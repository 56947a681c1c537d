"""The action token: claims to bytes and back (RFC 9068, RFC 9396, RFC 8705, RFC 9449). No policy in here.

    iss sub aud exp iat jti client_id scope  the usual ones; aud is one string, scope the action's name
    authorization_details                    exactly one, of type "action": what, on what, at whom, with what
    cnf                                      x5t#S256 (the caller's certificate) or jkt (the caller's key), never none
    action_digest                            hex SHA-256 of the action (broker/action.py)
    use                                      once (in each guard process) | single (in the world) | ttl
    attestation                              digests of the facts it was decided on, and the policy revision

A recorded deviation: RFC 9068 section 4 wants RS256 supported; these are ES256 only.
"""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal

import msgspec
from cryptography.hazmat.primitives.asymmetric import ec

from broker.action import Action
from broker.credentials import jose
from broker.errors import Invalid, Reason, Refused

TYPE: Final = "at+jwt"
LEEWAY: Final = timedelta(seconds=5)  # two clocks kept by NTP; DESIGN invariant 8 allows no more
MAX_LIFETIME: Final = timedelta(seconds=300)  # invariant 3

Use = Literal["once", "single", "ttl"]


class Confirmation(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, rename={"x5t_s256": "x5t#S256"}):
    """The key that may use a token: one certificate's hash (RFC 8705) or one key's (RFC 9449), base64url."""

    x5t_s256: str | None = None
    jkt: str | None = None

    def __post_init__(self) -> None:
        if (self.x5t_s256 is None) == (self.jkt is None):
            raise ValueError("cnf names exactly one key")


class Detail(msgspec.Struct, frozen=True, kw_only=True):
    """One RFC 9396 authorization detail."""

    type: Literal["action"] = msgspec.field(default="action")
    actions: tuple[str]
    identifier: str
    locations: tuple[str]
    parameters: dict[str, Any] = {}


class Attestation(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`sha256:` digests of the facts behind a token; provenance only where there was some."""

    environment: str
    policy: str
    provenance: str | None = None


class Claims(msgspec.Struct, frozen=True, kw_only=True):
    """The payload. Times are whole seconds since 1970."""

    iss: str
    sub: str
    aud: str
    exp: int
    iat: int
    jti: str
    client_id: str
    scope: str
    authorization_details: tuple[Detail]
    cnf: Confirmation
    action_digest: str
    use: Use
    attestation: Attestation

    @property
    def expires_at(self) -> datetime:
        """`exp` as a time."""
        return datetime.fromtimestamp(self.exp, UTC)

    def action(self) -> Action:
        """The action that the token is for. Raises: Invalid when its parts do not make one."""
        detail = self.authorization_details[0]
        return Action(detail.actions[0], detail.identifier, detail.locations[0], detail.parameters)


class VerifiedClaims(Claims, frozen=True, kw_only=True):
    """Claims whose signature, issuer, times and shape were checked. Only `verify` makes one.

    A NewType would say it more plainly; mypy 2.4 fails on a NewType of a msgspec Struct.
    """


# `type` is encoded although it is constant: RFC 9396 wants it there.
_encode = msgspec.json.Encoder().encode
_decoder = msgspec.json.Decoder(VerifiedClaims)


def encode(claims: Claims) -> bytes:
    """The payload's bytes, pinned by a test."""
    return _encode(claims)


def detail_of(action: Action) -> Detail:
    """An action as RFC 9396 writes it."""
    return Detail(
        actions=(action.name,),
        identifier=action.resource,
        locations=(action.audience,),
        parameters=dict(action.parameters),
    )


def verify(
    token: str,
    *,
    issuer: str,
    key_for: Callable[[str], ec.EllipticCurvePublicKey],
    now: datetime,
    typ: str = TYPE,
) -> VerifiedClaims:
    """Checks what a token says of itself.

    1. compact ES256 JWS of type at+jwt (or `typ`, for what is like it), one spelling, no extension
    2. signed by the issuer's key that `kid` names
    3. exactly the claims we mint, no name twice
    4. our issuer
    5. not expired, not from the future, no longer than any token may live
    6. scope, audience, client and authorization detail say the same

    key_for: gives the key of a `kid`, raises Refused where there is none.

    Raises: Invalid (malformed), Refused(UNAUTHENTICATED, EXPIRED).
    Not checked: that we are the audience, possession of `cnf`, that `action_digest` is that of the act at hand (the
    guard compares it with the request, which also catches a detail that contradicts it), use or refusal since.
    """
    jws = jose.parse(token, typ=typ)
    if jws.header.kid is None:
        raise Invalid("the token names no key")
    jose.verify(jws, key_for(jws.header.kid))
    claims = jose.decode_unique(jws.payload, _decoder, "the token")
    if claims.iss != issuer:
        raise Refused(Reason.UNAUTHENTICATED, "another issuer's token")
    seconds = now.timestamp()
    if seconds >= claims.exp + LEEWAY.total_seconds():
        raise Refused(Reason.EXPIRED, "the token has expired")
    if claims.iat > seconds + LEEWAY.total_seconds() or not 0 < claims.exp - claims.iat <= MAX_LIFETIME.total_seconds():
        raise Refused(Reason.UNAUTHENTICATED, "the token's times are impossible")
    detail = claims.authorization_details[0]
    if claims.aud != detail.locations[0] or claims.scope != detail.actions[0] or claims.client_id != claims.sub:
        raise Refused(Reason.UNAUTHENTICATED, "the token contradicts itself")
    return claims
