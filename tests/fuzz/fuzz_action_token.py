"""Fuzz target: action tokens. Run: `PYTHONPATH=.:tests python -m fuzz.fuzz_action_token -max_total_time=60`."""

import json
import sys
from typing import Any

from support.issuer import ISSUER, NOW, Issuer
from support.pki import base64url

from broker.credentials import action_token
from broker.errors import BrokerError, Reason, Refused

SIGNER = Issuer("fuzz")
KEYS = {SIGNER.kid: SIGNER.key.public_key()}
HEADER = json.dumps(SIGNER.header()).encode()
PAYLOAD = json.dumps(SIGNER.claims()).encode()


def one_input(data: bytes) -> None:
    """Refused, or signed by the issuer and read by another JSON parser as the same claims."""
    text = data.decode(errors="surrogateescape")
    _verify(text, b"")
    unsigned = base64url(bytes(64))
    _verify(f"{base64url(data)}.{base64url(PAYLOAD)}.{unsigned}", b"")
    _verify(f"{base64url(HEADER)}.{base64url(data)}.{unsigned}", b"")
    _verify(SIGNER.sign(data, PAYLOAD), PAYLOAD)
    _verify(SIGNER.sign(HEADER, data), data)


def _verify(token: str, signed: bytes) -> None:
    try:
        claims = action_token.verify(token, issuer=ISSUER, key_for=_key, now=NOW)
    except BrokerError:
        return
    assert signed, "nobody signed this"
    said = json.loads(signed, object_pairs_hook=_unique)
    assert (claims.iss, claims.sub, claims.jti) == (said["iss"], said["sub"], said["jti"])
    assert claims.aud == said["aud"] == said["authorization_details"][0]["locations"][0]
    assert 0 < said["exp"] - said["iat"] <= 300
    assert len({"jkt", "x5t#S256"} & set(said["cnf"])) == 1


def _key(kid: str) -> Any:
    if kid not in KEYS:
        raise Refused(Reason.UNAUTHENTICATED, "no such key")
    return KEYS[kid]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    assert len(dict(pairs)) == len(pairs), "a name twice"
    return dict(pairs)


if __name__ == "__main__":
    import atheris

    atheris.instrument_all()
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
