"""Fuzz target: ID tokens, and the key sets they are verified by.

Run: `PYTHONPATH=.:tests python -m fuzz.fuzz_id_token -max_total_time=60`.
"""

import base64
import json
import sys
from collections.abc import Coroutine
from datetime import timedelta
from typing import Any

from support.pki import NOW, JwtAuthority, jwks, jws, seeded_ec_key

from broker.errors import Refused, Unavailable
from broker.identity import oidc_issuer
from broker.identity.id_token import IdTokens, VerifiedPerson
from broker.identity.oidc_issuer import IssuerSettings, OidcIssuer, OidcKey, parse_keys
from broker.identity.others_jws import ALGORITHMS

ISSUER = "https://login.acme.test"
CLIENT_ID = "action-broker"
NONCE = "ab" * 32
SIGNER = JwtAuthority(kid="k", key=seeded_ec_key("id-token"))
KEYS = jwks(SIGNER.jwk(use="sig"))
HEADER = json.dumps({"alg": "ES256", "kid": "k", "typ": "JWT"}).encode()
_AT = int(NOW.timestamp())
PAYLOAD = json.dumps(
    {
        "iss": ISSUER,
        "aud": CLIENT_ID,
        "nonce": NONCE,
        "iat": _AT,
        "exp": _AT + 600,
        "auth_time": _AT,
        "sub": "u-17",
        "groups": ["release-managers"],
        "email": "ada@acme.test",
        "email_verified": True,
    }
).encode()


def tokens() -> IdTokens:
    """Of an issuer whose keys were fetched just now, so that nothing is asked of it."""
    issuer = OidcIssuer(IssuerSettings(issuer=ISSUER, audience=CLIENT_ID))
    issuer._kept = oidc_issuer._KeySet(fetched_at=NOW, by_kid=parse_keys(KEYS))
    return IdTokens({ISSUER: issuer})


TOKENS = tokens()


def one_input(data: bytes) -> None:
    """As a token, as a header or claims truly signed, so that what lies behind is reached, and as a key set."""
    verified(data.decode(errors="surrogateescape"), signed=False)
    verified(jws(data, PAYLOAD, SIGNER.raw_signature), signed=True)
    verified(jws(HEADER, data, SIGNER.raw_signature), signed=True)
    verified(jws(spliced(HEADER, data), PAYLOAD, SIGNER.raw_signature), signed=True)
    verified(jws(HEADER, spliced(PAYLOAD, data), SIGNER.raw_signature), signed=True)
    verified(jws(spliced(HEADER, data), PAYLOAD, lambda _: data), signed=False)
    for keys in (data, spliced(KEYS, data)):
        try:
            found = parse_keys(keys)
        except Unavailable:
            continue
        assert all(isinstance(one.key, OidcKey) for several in found.values() for one in several)


def spliced(text: bytes, data: bytes) -> bytes:
    """`text` with a part of it replaced: two bytes of `data` say which part, the others by what."""
    first, last = sorted(at % (len(text) + 1) for at in (data + b"\0\0")[:2])
    return text[:first] + data[2:] + text[last:]


def verified(token: str, *, signed: bool) -> VerifiedPerson | None:
    try:
        found = at_once(TOKENS.verify(token, NONCE, NOW))
    except Refused:
        return None
    assert signed, "accepted without a signature of the issuer"
    header = json.loads(part_of(token, 0))
    assert header["alg"] in ALGORITHMS
    claims = json.loads(part_of(token, 1))
    assert (claims["iss"], claims["nonce"]) == (ISSUER, NONCE)
    assert CLIENT_ID in (claims["aud"], *claims["aud"])
    assert (found.person.issuer, found.person.subject) == (ISSUER, claims["sub"])
    assert NOW < found.expires_at <= found.auth_time + timedelta(seconds=300)
    assert not found.email or claims["email_verified"] is True
    return found


def part_of(token: str, number: int) -> bytes:
    """The decoded part of a token that was accepted."""
    part = token.split(".")[number]
    return base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))


def at_once(call: Coroutine[Any, Any, VerifiedPerson]) -> VerifiedPerson:
    """What it returns, without an event loop: it has nothing to wait for."""
    try:
        call.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("it waits for something")


if __name__ == "__main__":
    import atheris

    atheris.instrument_all()
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
