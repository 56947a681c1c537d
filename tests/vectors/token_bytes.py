"""Tokens that are refused for what they are, whoever shows them, wherever."""

import json

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from support.issuer import AUDIENCE, ISSUER, x5t
from support.pki import base64url
from vectors.token_parts import (
    CALLER,
    ISSUED,
    SIGNER,
    SOUND,
    SOUND_KEY,
    THIEF,
    changed,
    es384,
    hs256,
    json_serialization,
    non_canonical,
    parts,
    signature,
    token,
    twice,
    unsecured,
)

ORDER_N = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551  # of P-256, SEC 2 section 2.4.2


def jose_defects() -> dict[str, str]:
    """Tokens that are no compact ES256 JWS of ours, by defect; each is malformed."""
    detail = SIGNER.claims()["authorization_details"][0]
    inner = json.dumps(SIGNER.claims()).replace('"amount": 30', '"amount": 3, "amount": 30').encode()
    header, claims, sign = SIGNER.header, SIGNER.claims, SIGNER.sign
    return {
        "empty": "",
        "alg-none": unsecured(SOUND),
        "alg-none-with-signature": sign(header(alg="none"), claims()),
        "alg-hs256-keyed-with-public-key-set": hs256(SOUND),
        "alg-es384": es384(),
        "alg-lower-case": sign(header(alg="es256"), claims()),
        "alg-missing": sign(header(alg=None), claims()),
        "typ-jwt": sign(header(typ="JWT"), claims()),
        "typ-missing": sign(header(typ=None), claims()),
        "typ-dpop": sign(header(typ="dpop+jwt"), claims()),
        "kid-missing": sign(header(kid=None), claims()),
        "kid-number": sign(header(kid=7), claims()),
        "crit-unknown": sign(header(crit=["exp"], exp=1), claims()),
        "crit-null": sign(json.dumps(header() | {"crit": None}).encode(), claims()),
        "crit-empty": sign(header(crit=[]), claims()),
        "b64-false": sign(header(b64=False, crit=["b64"]), claims()),
        "b64-false-without-crit": sign(header(b64=False), claims()),
        "header-duplicate-alg": sign(twice(header(), "alg", "none"), claims()),
        "header-duplicate-kid": sign(twice(header(), "kid", "another"), claims()),
        "header-not-json": sign(b"alg=ES256", claims()),
        "header-utf-16": sign(json.dumps(header()).encode("utf-16"), claims()),
        "header-list": sign(b"[]", claims()),
        "payload-duplicate-aud": sign(header(), twice(claims(), "aud", "spiffe://acme.test/other")),
        "payload-duplicate-exp": sign(header(), twice(claims(), "exp", ISSUED + 9999)),
        "payload-duplicate-cnf": sign(header(), twice(claims(), "cnf", THIEF.cnf)),
        "payload-duplicate-unknown-claim": sign(header(), twice(claims(x=1), "x", 2)),
        "payload-duplicate-in-parameters": sign(header(), inner),
        "payload-not-json": sign(header(), b"claims"),
        "payload-trailing-garbage": sign(header(), json.dumps(claims()).encode() + b"{}"),
        "payload-aud-list": sign(header(), claims(aud=[AUDIENCE])),
        "payload-aud-missing": sign(header(), claims(aud=None)),
        "payload-exp-text": sign(header(), claims(exp=str(ISSUED + 60))),
        "payload-exp-huge": sign(header(), json.dumps(claims()).replace(str(ISSUED + 60), "1e400").encode()),
        "payload-exp-missing": sign(header(), claims(exp=None)),
        "payload-jti-missing": sign(header(), claims(jti=None)),
        "payload-use-unknown": sign(header(), claims(use="forever")),
        "payload-use-missing": sign(header(), claims(use=None)),
        "cnf-missing": sign(header(), claims(cnf=None)),
        "cnf-empty": sign(header(), claims(cnf={})),
        "cnf-two-keys": sign(header(), claims(cnf=x5t() | CALLER.cnf)),
        "cnf-null-key": sign(header(), json.dumps(claims(cnf={"jkt": None})).encode()),
        "cnf-embedded-jwk": sign(header(), claims(cnf={"jwk": CALLER.header()["jwk"]})),
        "details-none": sign(header(), claims(authorization_details=[])),
        "details-two": sign(header(), claims(authorization_details=[detail, detail])),
        "details-two-actions": sign(
            header(), claims(authorization_details=[detail | {"actions": ["orders.refund"] * 2}])
        ),
        "details-other-type": sign(header(), claims(authorization_details=[detail | {"type": "payment"}])),
        "padding": SOUND + "=",
        "padding-in-payload": parts(SOUND, payload=SOUND.split(".")[1] + "=="),
        "whitespace-before": " " + SOUND,
        "whitespace-after": SOUND + "\n",
        "whitespace-inside": parts(SOUND, payload=SOUND.split(".")[1][:40] + "\n" + SOUND.split(".")[1][40:]),
        "standard-base64-alphabet": parts(SOUND, payload="ab+/" + SOUND.split(".")[1]),
        "non-ascii": parts(SOUND, payload="\u0430" + SOUND.split(".")[1]),
        "non-canonical-base64": non_canonical(SOUND),
        "json-serialization": json_serialization(SOUND),
        "four-parts": SOUND + ".AAAA",
        "two-parts": SOUND.rpartition(".")[0],
        "signature-missing": parts(SOUND, signature=""),
        "signature-der": parts(
            SOUND, signature=base64url(SIGNER.key.sign(b"x", ec.ECDSA(hashes.SHA256(), deterministic_signing=True)))
        ),
        "signature-one-byte-more": signature(lambda raw: raw + b"\0"),
        "oversize": SIGNER.token(note="x" * 17_000),
    }


def untrusted() -> dict[str, str]:
    """Well-formed tokens that are not to be believed, by defect; each is unauthenticated."""
    half = 32
    detail = SIGNER.claims()["authorization_details"][0]
    elsewhere = detail | {"locations": ["spiffe://acme.test/service/billing"]}
    return {
        "kid-unknown": SIGNER.sign(SIGNER.header(kid="another"), SIGNER.claims()),
        "kid-path": SIGNER.sign(SIGNER.header(kid="../../dev/null"), SIGNER.claims()),
        "signed-by-embedded-jwk": THIEF.sign(SIGNER.header(jwk=THIEF.header()["jwk"]), SIGNER.claims()),
        "signed-by-another-key-under-our-kid": THIEF.sign(SIGNER.header(), SIGNER.claims()),
        "signature-zero": signature(lambda _: bytes(64)),
        "signature-r-zero": signature(lambda raw: bytes(half) + raw[half:]),
        "signature-s-zero": signature(lambda raw: raw[:half] + bytes(half)),
        "signature-r-is-order": signature(lambda raw: ORDER_N.to_bytes(half) + raw[half:]),
        "signature-s-is-order": signature(lambda raw: raw[:half] + ORDER_N.to_bytes(half)),
        "signature-halves-swapped": signature(lambda raw: raw[half:] + raw[:half]),
        "signature-of-another-token": parts(SOUND, signature=SOUND_KEY.rpartition(".")[2]),
        "signature-bit-flipped": signature(lambda raw: raw[:-1] + bytes([raw[-1] ^ 1])),
        "payload-changed-exp": changed(SOUND, exp=ISSUED + 200),
        "payload-changed-cnf": changed(SOUND, cnf=THIEF.cnf),
        "header-changed": parts(SOUND, header=base64url(json.dumps(SIGNER.header()).encode() + b" ")),
        "issuer-other": token(iss="https://broker.evil.test"),
        "issuer-with-slash": token(iss=f"{ISSUER}/"),
        "issuer-upper-case": token(iss="https://BROKER.acme.test"),
        "iat-in-the-future": token(iat=ISSUED + 6, exp=ISSUED + 66),
        "lifetime-over-300-s": token(exp=ISSUED + 301),
        "lifetime-zero": token(exp=ISSUED, iat=ISSUED),
        "lifetime-negative": token(exp=ISSUED + 1, iat=ISSUED + 2),
        "scope-is-not-the-detail": token(scope="orders.read"),
        "aud-is-not-the-detail": token(authorization_details=[elsewhere]),
        "client-is-not-the-subject": token(client_id="spiffe://acme.test/other"),
    }
