"""DPoP proofs that prove nothing."""

import hashlib
from typing import Any

from support.issuer import URL
from support.pki import base64url
from vectors.token_parts import (
    CALLER,
    ISSUED,
    SOUND_KEY,
    THIEF,
    non_canonical,
    proof,
    signature,
    twice,
    unsecured,
)


def proof_defects() -> dict[str, str]:
    """Proofs beside SOUND_KEY that prove nothing, by defect; each is an invalid_dpop_proof."""
    header, sign = CALLER.header, CALLER.sign
    public = header()["jwk"]
    private = base64url(CALLER.key.private_numbers().private_value.to_bytes(32))

    def claims(**changes: Any) -> dict[str, Any]:
        return CALLER.claims(SOUND_KEY, **({"jti": "proof-0001"} | changes))

    sound = proof(SOUND_KEY)
    return {
        "wrong-ath": sign(header(), claims(ath=base64url(hashlib.sha256(b"another token").digest()))),
        "missing-ath": sign(header(), claims(ath=None)),
        "wrong-htm": sign(header(), claims(htm="GET")),
        "htm-lower-case": sign(header(), claims(htm="post")),
        "wrong-htu": sign(header(), claims(htu="https://orders.acme.test/acme.Orders/Cancel")),
        "htu-http": sign(header(), claims(htu=URL.replace("https", "http"))),
        "htu-with-query": sign(header(), claims(htu=URL + "?x=1")),
        "htu-longer": sign(header(), claims(htu=URL + "s")),
        "htu-list": sign(header(), claims(htu=[URL])),
        "too-old": sign(header(), claims(iat=ISSUED - 61)),
        "from-the-future": sign(header(), claims(iat=ISSUED + 6)),
        "iat-missing": sign(header(), claims(iat=None)),
        "iat-out-of-range": sign(header(), claims(iat=2**62)),
        "jti-missing": sign(header(), claims(jti=None)),
        "jti-short": sign(header(), claims(jti="1234567")),
        "jti-long": sign(header(), claims(jti="x" * 257)),
        "duplicate-htu": sign(header(), twice(claims(), "htu", "https://evil.test/")),
        "duplicate-jwk": sign(twice(header(), "jwk", THIEF.header()["jwk"]), claims()),
        "private-key-inside": sign(header(jwk=public | {"d": private}), claims()),
        "key-missing": sign(header(jwk=None), claims()),
        "key-of-another": sign(header(jwk=THIEF.header()["jwk"]), claims()),
        "key-not-on-the-curve": sign(header(jwk=public | {"y": public["x"]}), claims()),
        "key-p-384": sign(header(jwk=public | {"crv": "P-384"}), claims()),
        "key-rsa": sign(header(jwk={"kty": "RSA", "n": "AQAB", "e": "AQAB"}), claims()),
        "key-shared-secret": sign(header(jwk={"kty": "oct", "k": "c2VjcmV0"}), claims()),
        "key-coordinate-not-canonical": sign(header(jwk=public | {"x": public["x"] + "="}), claims()),
        "alg-none": unsecured(sound),
        "alg-hs256": sign(header(alg="HS256"), claims()),
        "typ-jwt": sign(header(typ="JWT"), claims()),
        "typ-at-jwt": sign(header(typ="at+jwt"), claims()),
        "crit": sign(header(crit=["exp"]), claims()),
        "signature-zero": signature(lambda _: bytes(64), sound),
        "non-canonical-base64": non_canonical(sound),
        "trailing-garbage": sound + ".x",
        "oversize": sign(header(), claims(note="x" * 17_000)),
        "the-token-itself": SOUND_KEY,
        "empty": "",
    }
