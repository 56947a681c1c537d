"""JWT-SVIDs with one defect each. Sections are of JWT-SVID.md ("J").

All keys come from a seed and all signatures are deterministic, so the same vectors are made each time.
"""

import functools
import hmac
import itertools
import json
from collections.abc import Iterator
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from support.pki import (
    ISSUER,
    NOW,
    WORKLOAD,
    JwtAuthority,
    base64url,
    jws,
    seeded_ec_key,
    seeded_rsa_key,
    usual_claims,
)

SEED = "action broker test vectors"
SECOND = int(NOW.timestamp())
ADMIN = "spiffe://acme.test/admin"
HEADER = {"alg": "ES256", "kid": "es256", "typ": "JWT"}
Named = Iterator[tuple[str, dict[str, Any]]]

ES256 = JwtAuthority(kid="es256", key=seeded_ec_key(f"{SEED}/es256"))
ES384 = JwtAuthority(alg="ES384", kid="es384", key=seeded_ec_key(f"{SEED}/es384", ec.SECP384R1()))
RS256 = JwtAuthority(alg="RS256", kid="rs256", key=seeded_rsa_key(f"{SEED}/rs256", 2048))
WEAK = JwtAuthority(alg="RS256", kid="weak", key=seeded_rsa_key(f"{SEED}/weak", 1024))
FOREIGN = JwtAuthority(kid="foreign", key=seeded_ec_key(f"{SEED}/foreign"))
STRANGER = JwtAuthority(kid="es256", key=seeded_ec_key(f"{SEED}/stranger"))
RETIRED = JwtAuthority(kid="retired", key=seeded_ec_key(f"{SEED}/retired"))
BUNDLES = {
    "acme.test": {
        "keys": [
            *(item.jwk() for item in (ES256, ES384, RS256, WEAK)),
            RETIRED.jwk(use="x509-svid"),
            {"kty": "OKP", "crv": "Ed25519", "kid": "ed", "use": "jwt-svid", "x": "AA"},
        ]
    },
    "other.test": {"keys": [FOREIGN.jwk()]},
    "empty.test": {"keys": []},
}


def jwt_vectors() -> Named:
    """Each with its name."""
    parts = (controls, algorithms, signatures, headers, claims, values, serializations)
    return itertools.chain.from_iterable(part() for part in parts)


def vector(
    token: str, why: str, *, expect: str = "unauthenticated", control: str = "control-es256", **more: Any
) -> dict[str, Any]:
    found = {"expect": expect, "why": why, "control": control, "now": NOW.isoformat(), "audience": ISSUER}
    return found | {"bundles": BUNDLES, "token": token} | more


def controls() -> Named:
    foreign = "spiffe://other.test/x"
    for label, token, why, spiffe_id in (
        ("es256", ES256.token(), "signed by a key of its own trust domain", WORKLOAD),
        ("es384", ES384.token(), "J 2.1", WORKLOAD),
        ("rs256", RS256.token(), "J 2.1", WORKLOAD),
        ("without-kid", ES256.token(header={"alg": "ES256"}), "J 2.2, 2.3: kid and typ are optional", WORKLOAD),
        ("typ-jose", ES256.token(header=HEADER | {"typ": "JOSE"}), "J 2.3", WORKLOAD),
        ("more-audiences", ES256.token(aud=["https://a.test", ISSUER]), "J 3.2: ours is among them", WORKLOAD),
        ("nbf", ES256.token(nbf=SECOND), "valid from now on", WORKLOAD),
        ("federated", FOREIGN.token(sub=foreign), "by the federated domain's own key", foreign),
    ):
        yield f"control-{label}", vector(token, why, expect="accepted", control="", spiffe_id=spiffe_id)


def algorithms() -> Named:
    unsigned = jws({"alg": "none"}, usual_claims(), lambda _: b"")
    yield "alg-none", vector(unsigned + base64url(b"\0"), "J 2.1")
    yield "alg-none-without-signature", vector(unsigned, "RFC 7515 3.1: three parts", expect="malformed")
    pem = RS256.key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    for size in (256, 384, 512):
        sign = functools.partial(_hmac, pem, f"sha{size}")
        token = jws({"alg": f"HS{size}", "kid": "rs256"}, usual_claims(), sign)
        why = "the public key as a shared secret"
        yield f"alg-hs{size}-with-the-public-key", vector(token, why, control="control-rs256")
    for label, header in (
        ("alg-eddsa", HEADER | {"alg": "EdDSA"}),
        ("alg-es256k", HEADER | {"alg": "ES256K"}),
        ("alg-in-lower-case", HEADER | {"alg": "es256"}),
        ("alg-is-a-list", HEADER | {"alg": ["ES256"]}),
        ("alg-missing", {"kid": "es256"}),
        ("alg-es256-for-an-rsa-key", HEADER | {"kid": "rs256"}),
    ):
        yield label, vector(ES256.token(header=header), "J 2.1")
    other_curve = jws(HEADER | {"kid": "es384"}, usual_claims(), functools.partial(ES384.raw_signature, alg="ES256"))
    yield "alg-es256-for-a-p384-key", vector(other_curve, "RFC 7518 3.4", control="control-es384")
    for_ec = RS256.token(header=HEADER | {"alg": "RS256"})
    yield "alg-rs256-for-an-ec-key", vector(for_ec, "J 2.1", control="control-rs256")
    yield "rsa-key-under-2048-bits", vector(WEAK.token(), "RFC 7518 3.3", control="control-rs256")


def signatures() -> Named:
    header, payload, signature = ES256.token().split(".")
    admin = base64url(json.dumps(usual_claims(sub=ADMIN)).encode())
    for label, token, why, control in (
        ("signed-by-a-stranger", STRANGER.token(), "who uses our kid is not us", "es256"),
        ("signed-by-a-stranger-without-kid", STRANGER.token(header={"alg": "ES256"}), "no key fits", "without-kid"),
        ("kid-unknown", ES256.token(header=HEADER | {"kid": "?"}), "names no key of the bundle", "es256"),
        ("kid-of-an-x509-authority", RETIRED.token(), "J 6.2: its use is not jwt-svid", "es256"),
        ("foreign-key", FOREIGN.token(), "its bundle is here, and not for this ID", "federated"),
        ("our-key-for-a-foreign-id", ES256.token(sub="spiffe://other.test/x"), "nor ours", "federated"),
        ("no-bundle-for-its-domain", ES256.token(sub="spiffe://lonely.test/x"), "not federated", "federated"),
        ("empty-bundle", ES256.token(sub="spiffe://empty.test/x"), "TDB 4.1.3: trusts nobody", "federated"),
        ("payload-replaced", f"{header}.{admin}.{signature}", "not what was signed", "es256"),
        ("signature-of-zeros", f"{header}.{payload}.{base64url(bytes(64))}", "CVE-2022-21449", "es256"),
        ("signature-cut-off", f"{header}.{payload}.{signature[:-4]}", "RFC 7518 3.4: 64 bytes", "es256"),
    ):
        yield label, vector(token, why, control=f"control-{control}")


def headers() -> Named:
    more: list[tuple[str, dict[str, Any]]] = [
        ("crit-unknown", {"crit": ["exp"]}),
        ("crit-empty", {"crit": []}),
        ("b64-false", {"crit": ["b64"], "b64": False}),
        ("key-in-the-header", {"jwk": STRANGER.jwk()}),
        ("key-address-in-the-header", {"jku": "https://evil.test/jwks.json"}),
        ("certificate-in-the-header", {"x5c": ["AAAA"]}),
        ("content-type-in-the-header", {"cty": "JWT"}),
        ("private-header", {"x-mine": 1}),
        ("typ-of-an-access-token", {"typ": "at+jwt"}),
        ("typ-of-a-key-proof", {"typ": "dpop+jwt"}),
        ("typ-in-lower-case", {"typ": "jwt"}),
        ("typ-is-null", {"typ": None}),
        ("typ-is-a-list", {"typ": ["JWT"]}),
        ("kid-is-a-number", {"kid": 1}),
    ]
    for label, change in more:
        token = ES256.token(header=HEADER | change)
        yield label, vector(token, "J 2: alg, kid, and typ JWT or JOSE", expect="malformed")
    for label, text in (
        ("duplicate-alg", '{"alg":"none","alg":"ES256","kid":"es256"}'),
        ("duplicate-kid-by-escape", '{"alg":"ES256","kid":"stranger","k\\u0069d":"es256"}'),
        ("header-is-a-list", "[]"),
        ("header-is-not-json", '{"alg":"ES256"'),
    ):
        yield label, vector(ES256.token(header=text.encode()), "two parsers may read two things", expect="malformed")


def claims() -> Named:
    changes: list[tuple[str, dict[str, Any]]] = [
        ("no-sub", {"sub": None}),
        ("sub-is-no-spiffe-id", {"sub": "build-agent"}),
        ("sub-with-dot-segments", {"sub": "spiffe://acme.test/x/../admin"}),
        ("sub-with-newline", {"sub": WORKLOAD + "\n"}),
        ("sub-is-a-list", {"sub": [WORKLOAD]}),
        ("no-aud", {"aud": None}),
        ("aud-is-empty", {"aud": []}),
        ("aud-holds-a-number", {"aud": [ISSUER, 1]}),
        ("no-exp", {"exp": None}),
        ("exp-is-a-string", {"exp": str(SECOND + 60)}),
        ("exp-is-true", {"exp": True}),
        ("exp-beyond-time", {"exp": 10**20}),
        ("nbf-is-a-string", {"nbf": "0"}),
        ("iat-is-an-object", {"iat": {}}),
    ]
    for label, change in changes:
        yield label, vector(ES256.token(**change), "J 3, RFC 7519 4.1", expect="malformed")
    rest = f'"aud":"{ISSUER}","exp":{SECOND + 60}'
    for label, text in (
        ("duplicate-sub", f'{{"sub":"{ADMIN}","sub":"{WORKLOAD}",{rest}}}'),
        ("duplicate-exp", f'{{"sub":"{WORKLOAD}",{rest},"exp":9999999999}}'),
        ("exp-is-infinite", f'{{"sub":"{WORKLOAD}","aud":"{ISSUER}","exp":1e999}}'),
        ("exp-is-not-a-number", f'{{"sub":"{WORKLOAD}","aud":"{ISSUER}","exp":NaN}}'),
        ("payload-is-not-json", "hello"),
    ):
        yield label, vector(ES256.token(text.encode()), "I-JSON, RFC 7493", expect="malformed")


def values() -> Named:
    for label, audience in (
        ("for-another-audience", ["https://elsewhere.test"]),
        ("for-a-longer-audience", [f"{ISSUER}/"]),
        ("for-everyone", ["*"]),
    ):
        token = ES256.token(aud=audience)
        yield label, vector(token, "J 3.2", expect="wrong_audience", control="control-more-audiences")
    yield "expired", vector(ES256.token(exp=SECOND), "RFC 7519 4.1.4: on or after it, no more", expect="expired")
    yield "not-valid-yet", vector(ES256.token(nbf=SECOND + 6), "RFC 7519 4.1.5, leeway 5 s", control="control-nbf")


def serializations() -> Named:
    header, payload, signature = ES256.token().split(".")
    flattened = {"protected": header, "payload": payload, "signature": signature}
    general = {"payload": payload, "signatures": [{"protected": header, "signature": signature}]}
    for label, token in (
        ("json-serialization-flattened", json.dumps(flattened)),
        ("json-serialization-general", json.dumps(general)),
        ("two-parts", f"{header}.{payload}"),
        ("five-parts-of-jwe", f"{header}.{payload}.{signature}.AAAA.AAAA"),
        ("padded", f"{header}.{payload}.{signature}=="),
        ("newline-at-the-end", f"{header}.{payload}.{signature}\n"),
        ("scheme-before-it", f"Bearer {header}.{payload}.{signature}"),
        ("payload-detached", f"{header}..{signature}"),
        ("empty", ""),
    ):
        yield label, vector(token, "J 5.1: compact serialization only", expect="malformed")
    yield "over-16-kib", vector(ES256.token(pad="x" * 12_500), "refused unread", expect="malformed")


def _hmac(key: bytes, digest: str, data: bytes) -> bytes:
    return hmac.digest(key, data, digest)
