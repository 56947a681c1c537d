"""JWT-SVIDs by JWT-SVID.md, each MUST both ways, and the ways in which JOSE has been attacked.

Invariant 5 of the design: an identity is verified against its own trust domain's bundle only, on every request.
"""

import hashlib
import hmac
import json
from datetime import UTC, timedelta
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from support.jwt_svids import RSA_KEY, SIGNER, SIGNERS, TRUST, reason, trust_in, verify
from support.pki import (
    ALGORITHMS,
    ISSUER,
    NOW,
    WORKLOAD,
    JwtAuthority,
    base64url,
    jws,
    seeded_ec_key,
    usual_claims,
)

from broker.errors import Reason
from broker.identity.jwt_svid import LEEWAY
from broker.identity.trust import TrustSnapshot

# --- what must be accepted


def test_a_verified_token_tells_who_and_to_whom_and_until_when() -> None:
    token = SIGNER.token()
    found = verify(token)
    assert str(found.spiffe_id) == WORKLOAD
    assert found.audience == (ISSUER,)
    assert (found.issued_at, found.expires_at) == (NOW, NOW + timedelta(minutes=5))
    assert found.token_sha256 == hashlib.sha256(token.rpartition(".")[0].encode()).digest()


@pytest.mark.parametrize("alg", ALGORITHMS)
def test_each_of_the_nine_algorithms_is_accepted_with_and_without_kid(alg: str) -> None:
    signer = SIGNERS[alg]
    assert verify(signer.token())
    assert verify(signer.token(header={"alg": alg}))
    assert verify(signer.token(header={"alg": alg}), trust_in(signer.jwk()))


@pytest.mark.parametrize("typ", [{}, {"typ": "JWT"}, {"typ": "JOSE"}])
def test_typ_may_be_jwt_or_jose_or_absent(typ: dict[str, str]) -> None:
    assert verify(SIGNER.token(header={"alg": "ES256", "kid": SIGNER.kid} | typ))


@pytest.mark.parametrize(
    "changes",
    [
        {"aud": ISSUER},
        {"aud": ["https://elsewhere.test", ISSUER, "x"]},
        {"aud": [ISSUER, ISSUER]},
        {"iat": None},
        {"iat": int(NOW.timestamp()) + 3600},  # RFC 7519 section 4.1.6 asks nothing of it; strict.py does
        {"exp": NOW.timestamp() + 0.5},
        {"exp": int(NOW.timestamp()) + 10**9},  # no upper limit in the standard; strict.py has one
        {"nbf": int(NOW.timestamp())},
        {"jti": "a", "scope": ["x"], "https://acme.test/claim": {"nested": None}},
        {"sub": "spiffe://acme.test"},  # a path is a MUST for X.509-SVIDs only; strict.py asks for one
        {"iss": "https://issuer.acme.test"},
    ],
    ids=repr,
)
def test_what_the_standard_allows_is_accepted(changes: dict[str, Any]) -> None:
    assert verify(SIGNER.token(**changes)).spiffe_id.trust_domain.name == "acme.test"


def test_all_audiences_are_told_so_that_policy_can_ask_for_one() -> None:
    assert verify(SIGNER.token(aud=["a", ISSUER])).audience == ("a", ISSUER)


def test_unknown_keys_beside_good_ones_change_nothing() -> None:
    unknown = [SIGNER.jwk(kty="OKP", kid="new"), SIGNER.jwk(use="wit-svid", kid="w"), {"kty": "future"}]
    trust = trust_in(*unknown, SIGNER.jwk())
    assert verify(SIGNER.token(), trust)
    assert verify(SIGNER.token(header={"alg": "ES256"}), trust)


def test_without_kid_every_fitting_key_is_tried() -> None:
    others = [JwtAuthority(kid=str(number), key=seeded_ec_key(str(number))) for number in range(5)]
    trust = trust_in(*(item.jwk() for item in others), SIGNER.jwk(), SIGNERS["RS256"].jwk())
    assert verify(SIGNER.token(header={"alg": "ES256"}), trust)


# --- the signature, and whose it is


def test_a_verified_token_tells_which_key_vouched_whatever_its_kid() -> None:
    spki = SIGNER.key.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    vouched = hashlib.sha256(spki).digest()
    assert verify(SIGNER.token()).authority_sha256 == vouched
    assert verify(SIGNER.token(header={"alg": "ES256"})).authority_sha256 == vouched
    assert (
        verify(SIGNER.token(), trust_in(JwtAuthority(kid=SIGNER.kid).jwk(), SIGNER.jwk())).authority_sha256 == vouched
    )
    assert verify(SIGNERS["RS256"].token()).authority_sha256 != vouched


def test_a_token_signed_by_nobody_we_trust_is_refused() -> None:
    stranger = JwtAuthority(kid=SIGNER.kid)
    assert reason(stranger.token()) is Reason.UNAUTHENTICATED
    assert reason(stranger.token(header={"alg": "ES256"})) is Reason.UNAUTHENTICATED
    assert reason(SIGNER.token(header={"alg": "ES256", "kid": "unknown"})) is Reason.UNAUTHENTICATED


def test_a_kid_names_the_only_key_that_counts() -> None:
    other = JwtAuthority(kid="other")
    trust = trust_in(SIGNER.jwk(), other.jwk())
    assert verify(other.token(), trust)
    assert reason(other.token(header={"alg": "ES256", "kid": SIGNER.kid}), trust) is Reason.UNAUTHENTICATED


def test_a_key_of_another_domain_cannot_speak_for_ours_even_when_we_federate_with_it() -> None:
    foreign = JwtAuthority(kid="foreign")
    trust = TrustSnapshot(
        own=None, bundles={**TRUST.bundles, **trust_in(foreign.jwk(), domain="other.test").bundles}, revision=2
    )
    assert verify(foreign.token(sub="spiffe://other.test/x"), trust).spiffe_id.trust_domain.name == "other.test"
    for header in ({"alg": "ES256"}, {"alg": "ES256", "kid": "foreign"}):
        assert reason(foreign.token(header=header), trust) is Reason.UNAUTHENTICATED
    assert reason(SIGNER.token(sub="spiffe://other.test/x"), trust) is Reason.UNAUTHENTICATED


def test_a_domain_without_a_bundle_or_with_an_empty_one_is_refused() -> None:
    assert reason(SIGNER.token(sub="spiffe://other.test/x")) is Reason.UNAUTHENTICATED
    assert reason(SIGNER.token(), trust_in()) is Reason.UNAUTHENTICATED
    assert reason(SIGNER.token(header={"alg": "ES256"}), trust_in()) is Reason.UNAUTHENTICATED


def test_an_x509_authority_signs_no_tokens() -> None:
    trust = trust_in(SIGNER.jwk(use="x509-svid"))
    assert reason(SIGNER.token(), trust) is Reason.UNAUTHENTICATED
    assert reason(SIGNER.token(header={"alg": "ES256"}), trust) is Reason.UNAUTHENTICATED


def test_a_changed_byte_anywhere_is_refused() -> None:
    header, payload, signature = SIGNER.token().split(".")
    other_payload = base64url(json.dumps(usual_claims(sub="spiffe://acme.test/admin")).encode())
    assert reason(f"{header}.{other_payload}.{signature}") is Reason.UNAUTHENTICATED
    flipped = ("B" if signature[0] == "A" else "A") + signature[1:]
    assert reason(f"{header}.{payload}.{flipped}") is Reason.UNAUTHENTICATED
    assert reason(f"{header}.{payload}.{signature[:-4]}") is Reason.UNAUTHENTICATED
    assert reason(f"{header}.{payload}.{base64url(bytes(64))}") is Reason.UNAUTHENTICATED


def test_the_second_form_of_a_signature_makes_no_second_assertion() -> None:
    """(r, n - s) verifies wherever (r, s) does: a digest over the signature would see two assertions."""
    order = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
    token = SIGNER.token()
    signed, _, signature = token.rpartition(".")
    raw = SIGNER.raw_signature(signed.encode())
    assert base64url(raw) == signature
    twin = f"{signed}.{base64url(raw[:32] + (order - int.from_bytes(raw[32:])).to_bytes(32))}"
    assert twin != token
    assert verify(twin).token_sha256 == verify(token).token_sha256
    assert verify(SIGNER.token(iat=int(NOW.timestamp()) - 1)).token_sha256 != verify(token).token_sha256


# --- alg


@pytest.mark.parametrize(
    "alg",
    ["none", "None", "NONE", "", "HS256", "HS384", "HS512", "ES256K", "EdDSA", "Ed25519", "es256", "ES256 ", "RS1"],
)
def test_an_algorithm_outside_the_nine_is_refused(alg: str) -> None:
    assert reason(SIGNER.token(header={"alg": alg, "kid": SIGNER.kid})) is Reason.UNAUTHENTICATED
    assert reason(jws({"alg": alg}, usual_claims(), lambda _: b"\0")) is Reason.UNAUTHENTICATED


@pytest.mark.parametrize("header", [{}, {"alg": None}, {"alg": ["ES256"]}, {"alg": 256}, {"kid": SIGNER.kid}])
def test_a_token_that_names_no_algorithm_is_refused(header: dict[str, Any]) -> None:
    assert reason(SIGNER.token(header=header)) is Reason.UNAUTHENTICATED


def test_an_unsigned_token_is_refused() -> None:
    unsigned = jws({"alg": "none"}, usual_claims(), lambda _: b"")
    assert unsigned.endswith(".")
    assert reason(unsigned) is Reason.MALFORMED


@pytest.mark.parametrize("alg", ["HS256", "HS384", "HS512"])
def test_a_public_key_is_no_shared_secret(alg: str) -> None:
    for key in (SIGNER.key, RSA_KEY):
        pem = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        digest = {"HS256": "sha256", "HS384": "sha384", "HS512": "sha512"}[alg]
        token = jws({"alg": alg}, usual_claims(), lambda data, k=pem, d=digest: hmac.digest(k, data, d))
        assert reason(token) is Reason.UNAUTHENTICATED


@pytest.mark.parametrize("alg", ALGORITHMS)
@pytest.mark.parametrize("owner", ALGORITHMS)
def test_a_key_of_one_kind_is_never_tried_for_an_algorithm_of_another(alg: str, owner: str) -> None:
    signer, key = SIGNERS[alg], SIGNERS[owner]
    trust = trust_in(key.jwk(kid=signer.kid))
    if key.key is signer.key:  # one RSA key serves all RS and PS
        assert verify(signer.token(), trust)
    else:
        assert reason(signer.token(), trust) is Reason.UNAUTHENTICATED
        assert reason(signer.token(header={"alg": alg}), trust) is Reason.UNAUTHENTICATED


def test_an_rsa_key_under_2048_bits_is_refused() -> None:
    weak = JwtAuthority(
        alg="RS256",
        kid="weak",
        key=rsa.generate_private_key(public_exponent=65537, key_size=1024),  # noqa: S505
    )
    trust = trust_in(weak.jwk(), SIGNERS["RS256"].jwk())
    assert reason(weak.token(), trust) is Reason.UNAUTHENTICATED
    assert reason(weak.token(header={"alg": "RS256"}), trust) is Reason.UNAUTHENTICATED
    assert verify(SIGNERS["RS256"].token(), trust)


# --- the claims


@pytest.mark.parametrize("claim", ["sub", "aud", "exp"])
def test_a_required_claim_cannot_be_left_out(claim: str) -> None:
    assert reason(SIGNER.token(**{claim: None})) is Reason.MALFORMED


@pytest.mark.parametrize(
    "changes",
    [
        {"sub": ""},
        {"sub": "build-agent"},
        {"sub": "https://acme.test/x"},
        {"sub": "spiffe://acme.test/../x"},
        {"sub": "spiffe://acme.test/x/"},
        {"sub": "spiffe://Acme.test/x"},
        {"sub": "spiffe://acme.test/x\n"},
        {"sub": "spiffe://acme.test/x\ud800"},
        {"sub": ["spiffe://acme.test/x"]},
        {"sub": 7},
        {"aud": []},
        {"aud": [ISSUER, 7]},
        {"aud": {ISSUER: True}},
        {"aud": 7},
        {"aud": [[ISSUER]]},
        {"exp": str(int(NOW.timestamp()) + 60)},
        {"exp": True},
        {"exp": [1]},
        {"exp": -1},
        {"exp": 10**20},
        {"exp": 10**400},
        {"exp": 1e300},
        {"nbf": "0"},
        {"nbf": False},
        {"iat": "0"},
        {"iat": {}},
    ],
    ids=lambda changes: repr(changes)[:40],
)
def test_a_claim_of_the_wrong_shape_is_malformed(changes: dict[str, Any]) -> None:
    assert reason(SIGNER.token(**changes)) is Reason.MALFORMED


@pytest.mark.parametrize(
    "payload",
    [
        f'{{"sub":"{WORKLOAD}","sub":"spiffe://acme.test/admin","aud":"{ISSUER}","exp":9999999999}}',
        f'{{"sub":"{WORKLOAD}","aud":"x","\\u0061ud":"{ISSUER}","exp":9999999999}}',
        f'{{"sub":"{WORKLOAD}","aud":"{ISSUER}","exp":1,"exp":9999999999}}',
        f'{{"sub":"{WORKLOAD}","aud":"{ISSUER}","exp":9999999999,"act":{{"a":1,"a":2}}}}',
        f'{{"sub":"{WORKLOAD}","aud":"{ISSUER}","exp":Infinity}}',
        f'{{"sub":"{WORKLOAD}","aud":"{ISSUER}","exp":NaN}}',
        f'{{"sub":"{WORKLOAD}","aud":"{ISSUER}","exp":1e999}}',
        f'{{"sub":"{WORKLOAD}","aud":"{ISSUER}","exp":{"9" * 5000}}}',
        f'{{"sub":"{WORKLOAD}","aud":"{ISSUER}","exp":9999999999}}{{}}',
        f'[{{"sub":"{WORKLOAD}","aud":"{ISSUER}","exp":9999999999}}]',
        "[" * 5000,
        "hello",
        "7",
    ],
    ids=lambda text: text[-40:],
)
def test_claims_that_two_parsers_could_read_differently_are_refused(payload: str) -> None:
    assert reason(SIGNER.token(payload.encode())) is Reason.MALFORMED


@pytest.mark.parametrize(
    "audience", [["https://elsewhere.test"], "https://elsewhere.test", ISSUER + "/", ISSUER.upper(), "", [""], ["*"]]
)
def test_a_token_for_others_is_refused(audience: str | list[str]) -> None:
    assert reason(SIGNER.token(aud=audience)) is Reason.WRONG_AUDIENCE


def test_an_empty_audience_of_ours_is_nobodys() -> None:
    assert reason(SIGNER.token(aud=[""]), audience="") is Reason.WRONG_AUDIENCE


# --- time


def test_a_token_ends_at_exp() -> None:
    token = SIGNER.token()
    end = NOW + timedelta(minutes=5)
    assert verify(token, now=end - timedelta(microseconds=1))
    for late in (end, end + timedelta(seconds=1), end + timedelta(days=1)):
        assert reason(token, now=late) is Reason.EXPIRED


def test_a_token_begins_at_nbf_less_a_clocks_difference() -> None:
    token = SIGNER.token(nbf=int(NOW.timestamp()))
    assert timedelta() < LEEWAY <= timedelta(seconds=5)
    assert verify(token, now=NOW - LEEWAY)
    assert reason(token, now=NOW - LEEWAY - timedelta(microseconds=1)) is Reason.UNAUTHENTICATED


def test_an_expired_token_of_a_stranger_is_a_strangers_first() -> None:
    assert reason(JwtAuthority(kid=SIGNER.kid).token(), now=NOW + timedelta(days=1)) is Reason.UNAUTHENTICATED


def test_times_are_aware() -> None:
    found = verify(SIGNER.token())
    assert found.expires_at.tzinfo is UTC
    assert found.issued_at is not None
    assert found.issued_at.tzinfo is UTC
