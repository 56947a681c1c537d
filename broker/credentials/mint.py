"""Two steps from a grant to a token, as a CA would: only a checked, recorded draft is ever signed, and once.

draft = mint.draft(grant, ...)      spends the grant; everything is fixed, nothing is signed
await ledger.record_intent(...)     exchange.py: durable before the key is used
token = mint.sign(draft, key)
"""

import hashlib
import secrets
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

import msgspec

from broker.credentials import action_token, jose, signing_grant
from broker.credentials.action_token import Attestation, Claims, Confirmation
from broker.credentials.keys import SigningKey
from broker.decision.decide import Grant
from broker.errors import Invalid, Reason, Refused

# What every verifier of ours takes (jose.MAX_TOKEN), less header, signature and base64's third.
MAX_PAYLOAD: Final = (jose.MAX_TOKEN - 512) * 3 // 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A token that is fixed and not signed. `payload` holds exactly `claims`."""

    claims: Claims
    payload: bytes
    kid: str
    typ: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One kind of token. longest: of its life. single: good once in the world, whatever policy says."""

    credential: str
    typ: str
    longest: timedelta
    single: bool


ACTION_TOKEN: Final = Kind(
    credential="action_token", typ=action_token.TYPE, longest=action_token.MAX_LIFETIME, single=False
)
SIGNING_GRANT: Final = Kind(
    credential="signing_grant", typ=signing_grant.TYPE, longest=signing_grant.LONGEST, single=True
)


def new_id(now: datetime) -> str:
    """An id for a credential. The time comes first: the ledger's index then grows at one end."""
    return f"{int(now.timestamp()):08x}{secrets.token_hex(12)}"


def draft(
    grant: Grant, confirmation: Confirmation, *, issuer: str, kid: str, now: datetime, kind: Kind = ACTION_TOKEN
) -> Draft:
    """Spends `grant` on one token's claims.

    Raises: Refused(ALREADY_USED) when the grant was spent before, Refused(EXPIRED) when nothing of its time is left,
    Invalid when the token would be too large to be verified.
    """
    grant.spend()
    issued = int(now.timestamp())  # rounded down, as is the end: never longer
    expires = min(int(grant.expires_at.timestamp()), issued + int(kind.longest.total_seconds()))
    if expires <= issued:
        raise Refused(Reason.EXPIRED, "what the token would hang on ends within this second")
    claims = Claims(
        iss=issuer,
        sub=str(grant.principal),
        aud=grant.action.audience,
        exp=expires,
        iat=issued,
        jti=new_id(now),
        client_id=str(grant.principal),
        scope=grant.action.name,
        authorization_details=(action_token.detail_of(grant.action),),
        cnf=confirmation,
        action_digest=grant.action.digest.hex(),
        use="single" if kind.single else grant.use,
        attestation=_attestation(grant),
    )
    payload = action_token.encode(claims)
    if len(payload) > MAX_PAYLOAD:
        raise Invalid(
            f"the token's claims would be larger than {MAX_PAYLOAD} bytes: shorten the URIs or the parameters"
        )
    return Draft(claims=claims, payload=payload, kid=kid, typ=kind.typ)


def _attestation(grant: Grant) -> Attestation:
    provenance = grant.provenance_digest
    return Attestation(
        environment=f"sha256:{grant.environment_digest.hex()}",
        provenance=None if provenance is None else f"sha256:{provenance.hex()}",
        policy=grant.policy_revision,
    )


def sign(made: Draft, key: SigningKey) -> str:
    """The token. Call it only after the intent is durable. Raises: ValueError when the draft is for another key."""
    if made.kid != key.kid:
        raise ValueError("the draft names another key")
    header = msgspec.json.encode({"alg": "ES256", "typ": made.typ, "kid": key.kid})
    return jose.sign(header, made.payload, key.private)


def fingerprint(token: str) -> str:
    """What the ledger keeps of a credential: hex SHA-256 of its bytes."""
    return hashlib.sha256(token.encode()).hexdigest()
