"""Fuzz target: DPoP proofs. Run: `PYTHONPATH=.:tests python -m fuzz.fuzz_dpop -max_total_time=60`."""

import json
import sys

from support.issuer import NOW, URL, Prover
from support.pki import base64url

from broker.credentials import dpop
from broker.errors import Reason, Refused

CALLER = Prover("fuzz")
TOKEN = "the.access.token"
HEADER = json.dumps(CALLER.header()).encode()
PAYLOAD = json.dumps(CALLER.claims(TOKEN)).encode()


def one_input(data: bytes) -> None:
    """Refused as no proof, or made by the key that it names, for this request and token."""
    text = data.decode(errors="surrogateescape")
    unsigned = base64url(bytes(64))
    _verify(text, signed=False)
    _verify(f"{base64url(data)}.{base64url(PAYLOAD)}.{unsigned}", signed=False)
    _verify(f"{base64url(HEADER)}.{base64url(data)}.{unsigned}", signed=False)
    _verify(CALLER.sign(data, PAYLOAD), signed=True)
    _verify(CALLER.sign(HEADER, data), signed=True)


def _verify(proof: str, *, signed: bool) -> None:
    try:
        found = dpop.verify_proof(proof, method="POST", url=URL, now=NOW, token=TOKEN)
    except Refused as error:
        if error.reason is not Reason.INVALID_PROOF:
            raise
        return
    assert signed, "nobody signed this"
    assert found.jkt == CALLER.jkt
    assert abs((found.issued_at - NOW).total_seconds()) <= 60
    assert 8 <= len(found.jti) <= 256


if __name__ == "__main__":
    import atheris

    atheris.instrument_all()
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
