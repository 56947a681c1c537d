"""Fuzz target: provenance. Run: `PYTHONPATH=.:tests python -m fuzz.fuzz_envelope -max_total_time=60`."""

import json
import sys

from support.provenance import ARTIFACT, BUILDER, MAX_AGE, NOW, b64, bundle, checks, encoded, envelope, statement, trust

from attestors.contract import AttestationFailed, Facts
from attestors.dsse import STATEMENT_TYPE, EnvelopeError, parse_envelope
from attestors.provenance import appraise

TRUST, CHECKS = trust(), checks()
ENVELOPE = encoded(envelope())
PAYLOAD = encoded(statement())
BUNDLE = encoded(bundle())


def one_input(data: bytes) -> None:
    """Refused, or signed by a trusted key, about this artifact and within its age."""
    _read(data)
    _judge(data, signed=data in {ENVELOPE, BUNDLE})
    unsigned = {"payload": b64(data), "payloadType": STATEMENT_TYPE, "signatures": [{"sig": b64(data[:80])}]}
    _judge(json.dumps(unsigned).encode(), signed=False)
    material = {"certificate": {"rawBytes": b64(data)}, "timestampVerificationData": {"rfc3161Timestamps": [{}]}}
    _judge(json.dumps(bundle(unsigned, verificationMaterial=material)).encode(), signed=False)
    _judge(encoded(envelope(data)), signed=True)


def _judge(evidence: bytes, *, signed: bool) -> Facts | None:
    try:
        facts = appraise(evidence, [ARTIFACT], TRUST, CHECKS, NOW)
    except AttestationFailed:
        return None
    # An edited envelope may still hold the sound signature over the sound payload: JSON has many spellings.
    assert signed or _still_sound(evidence), "nobody signed this"
    assert facts.values["builder"] == BUILDER
    assert facts.values["signer"] == "key:release"
    assert facts.expires_at is not None
    assert NOW < facts.expires_at <= NOW + MAX_AGE * 2
    return facts


def _still_sound(evidence: bytes) -> bool:
    found = json.loads(evidence)
    return parse_envelope(encoded(found.get("dsseEnvelope", found))).payload == PAYLOAD


def _read(data: bytes) -> None:
    try:
        found = parse_envelope(data)
    except EnvelopeError:
        return
    assert 1 <= len(found.signatures) <= 8
    assert found.signed.startswith(b"DSSEv1 ")


if __name__ == "__main__":
    import atheris

    atheris.instrument_all()
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
