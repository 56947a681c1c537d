"""The signing grant: leave for one signature over artifacts that are named by their digests. A JWT for ourselves alone.

Its claims are those of an action token of a signing action (action_token.py), so it is bound to the caller's key
(`cnf`), and by the action digest to the artifacts, the purpose and the signer. Its type keeps it apart: no guard takes
it for an action token, and no action token is taken for it.
"""

import hashlib
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Final

from cryptography.hazmat.primitives.asymmetric import ec

from broker.credentials import action_token
from broker.credentials.action_token import VerifiedClaims
from broker.credentials.jose import b64url
from broker.errors import Reason, Refused

TYPE: Final = "signing-grant+jwt"
LONGEST: Final = timedelta(seconds=120)
_NONCE: Final = b"action-broker csr nonce v1\n"


def verify(
    grant: str, *, issuer: str, key_for: Callable[[str], ec.EllipticCurvePublicKey], now: datetime
) -> VerifiedClaims:
    """Checks what a signing grant says of itself, as `action_token.verify` does, and that it is one for us.

    Raises: Invalid (malformed), Refused(UNAUTHENTICATED, EXPIRED, WRONG_AUDIENCE).
    Not checked: who presents it, and whether it was spent; both are sign.py's.
    """
    claims = action_token.verify(grant, issuer=issuer, key_for=key_for, now=now, typ=TYPE)
    if claims.aud != issuer:
        raise Refused(Reason.WRONG_AUDIENCE, "a signing grant counts at its own broker alone")
    if claims.use != "single" or claims.exp - claims.iat > LONGEST.total_seconds():
        raise Refused(Reason.UNAUTHENTICATED, "the grant is none that we give")
    if now >= claims.expires_at:  # our own clock wrote it and reads it: no leeway
        raise Refused(Reason.EXPIRED, "the grant has expired: ask for a new one")
    return claims


def csr_nonce(grant: str) -> str:
    """The challengePassword of a request for a certificate under this grant: fresh with each grant, and as secret."""
    return b64url(hashlib.sha256(_NONCE + grant.encode()).digest()[:24])
