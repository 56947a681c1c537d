"""Two steps from a grant to a token, as a CA would: only a checked, recorded draft is ever signed, and once.

draft = mint.draft(grant, ...)      spends the grant; everything is fixed, nothing is signed
await ledger.record_intent(...)     exchange.py: durable before the key is used
token = mint.sign(draft, key)
"""

import hashlib
import secrets
from dataclasses import dataclass
from datetime import datetime
from typing import Final

import msgspec

from broker.credentials import action_token, jose
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


def draft(grant: Grant, confirmation: Confirmation, *, issuer: str, kid: str, now: datetime) -> Draft:
    """Spends `grant` on one token's claims.

    Raises: Refused(ALREADY_USED) when the grant was spent before, Refused(EXPIRED) when nothing of its time is left,
    Invalid when the token would be too large to be verified.
    """
    grant.spend()
    issued, expires = int(now.timestamp()), int(grant.expires_at.timestamp())  # both rounded down: never longer
    if expires <= issued:
        raise Refused(Reason.EXPIRED, "what the token would hang on ends within this second")
    claims = Claims(
        iss=issuer,
        sub=str(grant.principal),
        aud=grant.action.audience,
        exp=expires,
        iat=issued,
        jti=f"{issued:08x}{secrets.token_hex(12)}",  # time first: the ledger's index then grows at one end
        client_id=str(grant.principal),
        scope=grant.action.name,
        authorization_details=(action_token.detail_of(grant.action),),
        cnf=confirmation,
        action_digest=grant.action.digest.hex(),
        use=grant.use,
        attestation=Attestation(environment=f"sha256:{grant.environment_digest.hex()}", policy=grant.policy_revision),
    )
    payload = action_token.encode(claims)
    if len(payload) > MAX_PAYLOAD:
        raise Invalid(
            f"the token's claims would be larger than {MAX_PAYLOAD} bytes: shorten the URIs or the parameters"
        )
    return Draft(claims=claims, payload=payload, kid=kid)


def sign(made: Draft, key: SigningKey) -> str:
    """The token. Call it only after the intent is durable. Raises: ValueError when the draft is for another key."""
    if made.kid != key.kid:
        raise ValueError("the draft names another key")
    header = msgspec.json.encode({"alg": "ES256", "typ": action_token.TYPE, "kid": key.kid})
    return jose.sign(header, made.payload, key.private)


def fingerprint(token: str) -> str:
    """What the ledger keeps of a credential: hex SHA-256 of its bytes."""
    return hashlib.sha256(token.encode()).hexdigest()
