"""Fuzz target: JWT-SVIDs and the bundles they are verified by.

Run: `PYTHONPATH=.:tests python -m fuzz.fuzz_jwt_svid -max_total_time=60`.
"""

import json
import sys

from support.pki import ISSUER, NOW, JwtAuthority, jws, seeded_ec_key, snapshot, usual_claims

from broker.errors import Invalid, Refused
from broker.identity.jwt_svid import verify_jwt_svid
from broker.identity.spiffe_id import TrustDomain
from broker.identity.trust import TrustBundle, parse_jwt_authorities

SIGNER = JwtAuthority(kid="k", key=seeded_ec_key("fuzz"))
TRUST = snapshot(
    TrustBundle(trust_domain=TrustDomain(name="acme.test"), jwt_authorities={"k": (SIGNER.key.public_key(),)})
)
HEADER = json.dumps({"alg": "ES256", "kid": "k"}).encode()
PAYLOAD = json.dumps(usual_claims()).encode()


def one_input(data: bytes) -> None:
    """Bytes as a token, as a header or as claims truly signed, so that what lies behind is reached, and as a bundle."""
    verified(data.decode(errors="surrogateescape"), signed=False)
    verified(jws(data, PAYLOAD, SIGNER.raw_signature), signed=True)
    verified(jws(HEADER, data, SIGNER.raw_signature), signed=True)
    verified(jws(spliced(HEADER, data), PAYLOAD, SIGNER.raw_signature), signed=True)
    verified(jws(HEADER, spliced(PAYLOAD, data), SIGNER.raw_signature), signed=True)
    verified(jws(spliced(HEADER, data), PAYLOAD, lambda _: data), signed=False)
    try:
        parse_jwt_authorities(data)
    except Invalid:
        return


def spliced(text: bytes, data: bytes) -> bytes:
    """`text` with a part of it replaced: two bytes of `data` say which part, the others by what."""
    first, last = sorted(at % (len(text) + 1) for at in (data + b"\0\0")[:2])
    return text[:first] + data[2:] + text[last:]


def verified(token: str, *, signed: bool) -> None:
    try:
        found = verify_jwt_svid(token, TRUST, NOW, audience=ISSUER)
    except Refused:
        return
    assert signed, "accepted without a signature of ours"
    assert found.spiffe_id.trust_domain.name == "acme.test"
    assert ISSUER in found.audience
    assert found.expires_at > NOW


if __name__ == "__main__":
    import atheris

    atheris.instrument_all()
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
