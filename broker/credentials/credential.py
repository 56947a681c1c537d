"""A credential of ours of whichever type, as somebody shows it to have it looked at or ended."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from cryptography.hazmat.primitives.asymmetric import ec

from broker.credentials import action_token, jose, signing_grant
from broker.credentials.action_token import VerifiedClaims
from broker.credentials.mint import ACTION_TOKEN, SIGNING_GRANT, Kind
from broker.errors import Invalid


class OfAnotherType(Invalid):
    """A JWS, but of a type that is not given here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Credential:
    """One whose claims were verified."""

    kind: Kind
    claims: VerifiedClaims


def verify(text: str, *, issuer: str, key_for: Callable[[str], ec.EllipticCurvePublicKey], now: datetime) -> Credential:
    """Checks what a credential says of itself, as its own type's `verify` does, which says what is not checked.

    Raises: Invalid, OfAnotherType, Refused.
    """
    typ = jose.type_of(text)
    if typ == ACTION_TOKEN.typ:
        claims = action_token.verify(text, issuer=issuer, key_for=key_for, now=now)
        return Credential(kind=ACTION_TOKEN, claims=claims)
    if typ == SIGNING_GRANT.typ:
        claims = signing_grant.verify(text, issuer=issuer, key_for=key_for, now=now)
        return Credential(kind=SIGNING_GRANT, claims=claims)
    raise OfAnotherType("a token of a type that is not given here")
