"""RFC 9449 section 4.3, point by point; each defect beside the sound proof."""

from datetime import timedelta
from typing import Any

import pytest
from support.issuer import NOW, URL, Issuer, Prover
from support.pki import base64url

from broker.credentials import dpop
from broker.errors import Reason, Refused

CALLER, THIEF = Prover(), Prover("thief")
TOKEN = Issuer().token()
PUBLIC = CALLER.header()["jwk"]


def check(proof: str, *, url: str | tuple[str, ...] = URL, token: str | None = TOKEN, now: Any = NOW) -> dpop.Proof:
    return dpop.verify_proof(proof, method="POST", url=url, now=now, token=token)


def refused(proof: str, **arguments: Any) -> None:
    with pytest.raises(Refused) as caught:
        check(proof, **arguments)
    assert caught.value.reason is Reason.INVALID_PROOF
    assert check(CALLER.proof(TOKEN)).jkt == CALLER.jkt


def test_a_sound_proof_names_the_key_that_made_it() -> None:
    found = check(CALLER.proof(TOKEN, nonce="n", jti="a-unique-id"))
    assert (found.jkt, found.jti, found.nonce, found.issued_at) == (CALLER.jkt, "a-unique-id", "n", NOW)


@pytest.mark.parametrize("text", ["", "a.b", "a.b.c", CALLER.proof(TOKEN) + ".x", CALLER.proof(TOKEN) + "="])
def test_point_2_it_is_one_well_formed_jwt(text: str) -> None:
    """Point 1, exactly one header field, is the reader's: test_guard_grpc.py and test_guard_http.py."""
    refused(text)


@pytest.mark.parametrize("claim", ["jti", "htm", "htu", "iat"])
def test_point_3_each_required_claim_is_there(claim: str) -> None:
    refused(CALLER.proof(TOKEN, **{claim: None}))


@pytest.mark.parametrize("typ", [None, "JWT", "at+jwt", "DPOP+JWT"])
def test_point_4_its_type_is_dpop_jwt(typ: str | None) -> None:
    refused(CALLER.sign(CALLER.header(typ=typ), CALLER.claims(TOKEN)))


@pytest.mark.parametrize("alg", [None, "none", "HS256", "ES384", "RS256", "es256"])
def test_point_5_its_algorithm_is_the_asymmetric_one_that_we_take(alg: str | None) -> None:
    refused(CALLER.sign(CALLER.header(alg=alg), CALLER.claims(TOKEN)))


def test_point_6_its_signature_verifies_with_the_key_inside() -> None:
    refused(CALLER.sign(CALLER.header(jwk=THIEF.header()["jwk"]), CALLER.claims(TOKEN)))
    refused(CALLER.sign(CALLER.header(jwk=None), CALLER.claims(TOKEN)))


def test_point_7_the_key_inside_is_not_the_private_one() -> None:
    private = base64url(CALLER.key.private_numbers().private_value.to_bytes(32))
    refused(CALLER.sign(CALLER.header(jwk=PUBLIC | {"d": private}), CALLER.claims(TOKEN)))


@pytest.mark.parametrize("method", ["GET", "post", "POST ", ""])
def test_point_8_it_is_for_this_method(method: str) -> None:
    refused(CALLER.proof(TOKEN, htm=method))


@pytest.mark.parametrize("url", [URL + "?a=1", URL + "#a", URL + "/", URL[:-1], URL.upper(), "", "https://evil.test/"])
def test_point_9_it_is_for_this_url_without_query_and_fragment(url: str) -> None:
    refused(CALLER.proof(TOKEN, htu=url))


def test_point_9_of_several_names_of_ours_any_counts_and_no_part_of_one() -> None:
    names = ("https://orders.internal.test/x", URL)
    assert check(CALLER.proof(TOKEN), url=names)
    refused(CALLER.proof(TOKEN, htu=URL[:-3]), url=names)
    refused(CALLER.proof(TOKEN, htu="https://"), url=URL)
    refused(CALLER.proof(TOKEN), url=())


def test_point_10_its_nonce_is_told_so_that_it_can_be_checked() -> None:
    """Who issued a nonce checks it: test_nonce.py."""
    assert check(CALLER.proof(TOKEN)).nonce is None
    assert check(CALLER.proof(TOKEN, nonce="abc")).nonce == "abc"


@pytest.mark.parametrize("age", [60, 0, -5])
def test_point_11_it_was_made_just_now_by_clocks_that_nearly_agree(age: int) -> None:
    assert check(CALLER.proof(TOKEN, iat=int(NOW.timestamp()) - age)).issued_at == NOW - timedelta(seconds=age)


@pytest.mark.parametrize("age", [61, -6, 10**15, -(10**18)])
def test_point_11_an_old_or_future_proof_is_refused(age: int) -> None:
    refused(CALLER.proof(TOKEN, iat=int(NOW.timestamp()) - age))


def test_point_12_it_is_for_the_token_beside_it() -> None:
    other = Issuer().token(jti="another")
    refused(CALLER.proof(other))
    refused(CALLER.proof(None))
    assert check(CALLER.proof(None), token=None)


def test_its_jti_is_long_enough_to_be_unique_and_short_enough_to_be_kept() -> None:
    for length in (8, 256):
        assert check(CALLER.proof(TOKEN, jti="j" * length)).jti == "j" * length
    for length in (0, 7, 257):
        refused(CALLER.proof(TOKEN, jti="j" * length))


def test_our_own_proofs_are_sound_and_never_the_same() -> None:
    key = dpop.ProofKey()
    made = [key.prove("POST", URL, NOW, nonce="n", token=TOKEN) for _ in range(3)]
    assert {check(proof).jkt for proof in made} == {key.jkt}
    assert len({check(proof).jti for proof in made}) == 3


def test_an_access_token_hash_is_that_of_rfc_9449() -> None:
    """The token and its `ath` of RFC 9449 sections 7.1 (figures 12 and 13)."""
    token = "Kz~8mXK1EalYznwH-LC-1fBAo.4Ljp~zsPE_NeO.gxU"
    assert dpop.access_token_hash(token) == "fUHyO2r2Z3DZ53EsNrWBb0xWXoaNy59IiKCAqksmQEo"
