"""Sound tokens: where they are accepted, and where their place, time, hands or act is wrong."""

import hashlib
import json
from typing import Any

from support.issuer import AUDIENCE, LEAF, REFUND
from vectors.token_parts import (
    CALLER,
    ISSUED,
    SIGNER,
    SOUND,
    SOUND_KEY,
    THIEF,
    Vector,
    certificate,
    proof,
    proved,
    token,
    vector,
)

from broker.action import Action

OTHER = Action(REFUND.name, "https://orders.acme.test/v1/orders/18", AUDIENCE, REFUND.parameters)
REUSED, REUSED_KEY = token(use="ttl"), token(use="ttl", cnf=CALLER.cnf)


def accepted() -> dict[str, Vector]:
    """The positive controls."""
    pretty = json.dumps(SIGNER.claims(), indent=1).encode()
    return {
        "bound-to-certificate": vector("accepted", certificate(SOUND)),
        "bound-to-key": vector("accepted", proved(SOUND_KEY, proof(SOUND_KEY))),
        "reused-ttl": vector("accepted", certificate(REUSED), certificate(REUSED)),
        "reused-ttl-fresh-proofs": vector(
            "accepted", proved(REUSED_KEY, proof(REUSED_KEY)), proved(REUSED_KEY, proof(REUSED_KEY, 2))
        ),
        "last-second-of-leeway": vector("accepted", certificate(token(iat=ISSUED - 64, exp=ISSUED - 4))),
        "clock-ahead-within-leeway": vector("accepted", certificate(token(iat=ISSUED + 5, exp=ISSUED + 65))),
        "longest-lifetime": vector("accepted", certificate(token(exp=ISSUED + 300))),
        "payload-in-another-layout": vector("accepted", certificate(SIGNER.sign(SIGNER.header(), pretty))),
        "unknown-claim-and-header": vector(
            "accepted", certificate(SIGNER.sign(SIGNER.header(x="y"), SIGNER.claims(extra={"a": [1, 2]})))
        ),
        "no-parameters": vector(
            "accepted",
            certificate(SIGNER.token(Action("orders.list", "https://orders.acme.test/v1", AUDIENCE))),
            action=Action("orders.list", "https://orders.acme.test/v1", AUDIENCE),
        ),
    }


def wrong_here() -> dict[str, Vector]:
    """Sound tokens, at the wrong place, time, hands or act."""
    on_certificate, on_key = "bound-to-certificate", "bound-to-key"
    billing = Action(REFUND.name, REFUND.resource, "spiffe://acme.test/service/billing", REFUND.parameters)

    def acts(**changes: Any) -> Action:
        parts = {"name": REFUND.name, "resource": REFUND.resource, "parameters": REFUND.parameters} | changes
        return Action(audience=AUDIENCE, **parts)

    found = {
        "expired": vector(
            "expired", certificate(token(iat=ISSUED - 65, exp=ISSUED - 5)), control="last-second-of-leeway"
        ),
        "expired-long-ago": vector("expired", certificate(token(iat=1, exp=61)), control=on_certificate),
        "audience-other": vector("wrong_audience", certificate(SIGNER.token(billing)), control=on_certificate),
        "certificate-other": vector("key_mismatch", certificate(SOUND, b"another leaf"), control=on_certificate),
        "certificate-missing": vector("key_mismatch", {"token": SOUND}, control=on_certificate),
        "certificate-hash-in-hex": vector(
            "key_mismatch",
            certificate(token(cnf={"x5t#S256": hashlib.sha256(LEAF).hexdigest()})),
            control=on_certificate,
        ),
        "key-other": vector(
            "key_mismatch", proved(SOUND_KEY, THIEF.proof(SOUND_KEY, jti="proof-0001")), control=on_key
        ),
        "key-proof-missing": vector("key_mismatch", {"token": SOUND_KEY}, control=on_key),
        "key-bound-shown-with-certificate": vector("key_mismatch", certificate(SOUND_KEY), control=on_key),
        "certificate-bound-shown-with-proof": vector(
            "key_mismatch", proved(SOUND, proof(SOUND)), control=on_certificate
        ),
        "act-other-resource": vector("out_of_scope", certificate(SOUND), action=OTHER, control=on_certificate),
        "digest-of-another-act": vector(
            "out_of_scope", certificate(token(action_digest=OTHER.digest.hex())), control=on_certificate
        ),
        "digest-upper-case": vector(
            "out_of_scope", certificate(token(action_digest=REFUND.digest.hex().upper())), control=on_certificate
        ),
        "digest-agrees-detail-does-not": vector(
            "out_of_scope", certificate(SIGNER.token(OTHER, action_digest=REFUND.digest.hex())), control=on_certificate
        ),
        "replayed-once": vector("already_used", certificate(SOUND), certificate(SOUND), control="reused-ttl"),
        "replayed-once-with-fresh-proof": vector(
            "already_used",
            proved(SOUND_KEY, proof(SOUND_KEY)),
            proved(SOUND_KEY, proof(SOUND_KEY, 2)),
            control="reused-ttl-fresh-proofs",
        ),
        "replayed-proof": vector(
            "proof_replayed",
            proved(REUSED_KEY, proof(REUSED_KEY)),
            proved(REUSED_KEY, proof(REUSED_KEY)),
            control="reused-ttl-fresh-proofs",
        ),
        "single-use-without-a-broker-to-ask": vector(
            "scope_stale", certificate(token(use="single")), control=on_certificate
        ),
    }
    for defect, action in {
        "act-other-name": acts(name="orders.refunds"),
        "act-other-amount": acts(parameters={"amount": 31, "currency": "EUR"}),
        "act-amount-as-text": acts(parameters={"amount": "30", "currency": "EUR"}),
        "act-parameter-more": acts(parameters={**REFUND.parameters, "to": "me"}),
        "act-parameter-less": acts(parameters={"amount": 30}),
        "act-resource-deeper": acts(resource=f"{REFUND.resource}/lines/1"),
        "act-resource-shorter": acts(resource="https://orders.acme.test/v1/orders"),
    }.items():
        found[defect] = vector("out_of_scope", certificate(SOUND), action=action, control=on_certificate)
    return found
