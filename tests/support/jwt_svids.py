"""A trust domain that signs JWT-SVIDs in each of the nine ways, and how ours takes them."""

from datetime import datetime
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from support.pki import (
    ALGORITHMS,
    ISSUER,
    NOW,
    WORKLOAD,
    JwtAuthority,
    jwks,
    snapshot,
)

from broker.errors import Reason, Refused
from broker.identity.jwt_svid import VerifiedJwtSvid, verify_jwt_svid
from broker.identity.spiffe_id import TrustDomain
from broker.identity.trust import TrustBundle, TrustSnapshot, parse_jwt_authorities

RSA_KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)
SIGNERS = {
    alg: JwtAuthority(alg=alg, kid=f"key-{alg}", key=None if alg.startswith("ES") else RSA_KEY) for alg in ALGORITHMS
}
SIGNER = SIGNERS["ES256"]


def trust_in(*keys: dict[str, Any], domain: str = "acme.test") -> TrustSnapshot:
    """As it arrives: through the JWK Set of the Workload API."""
    return snapshot(
        TrustBundle(trust_domain=TrustDomain.parse(domain), jwt_authorities=parse_jwt_authorities(jwks(*keys)))
    )


TRUST = trust_in(*(signer.jwk() for signer in SIGNERS.values()))


def verify(token: str, trust: TrustSnapshot = TRUST, now: datetime = NOW, audience: str = ISSUER) -> VerifiedJwtSvid:
    return verify_jwt_svid(token, trust, now, audience=audience)


def reason(token: str, trust: TrustSnapshot = TRUST, now: datetime = NOW, audience: str = ISSUER) -> Reason:
    """Why it is refused; a plain one from the same authority is not."""
    with pytest.raises(Refused) as error:
        verify(token, trust, now, audience)
    assert str(verify(SIGNER.token()).spiffe_id) == WORKLOAD
    return error.value.reason
