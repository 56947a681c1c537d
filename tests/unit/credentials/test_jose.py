"""The one parser of our own JWS: one spelling, one algorithm, no extension. tests/vectors/token has more of it."""

import json

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st
from support.issuer import Issuer, Prover
from support.pki import base64url, seeded_ec_key

from broker.credentials import jose
from broker.credentials.dpop import ProofKey
from broker.errors import Invalid, Reason, Refused

SIGNER = Issuer()


@given(st.binary(max_size=64))
def test_base64url_goes_there_and_back(data: bytes) -> None:
    assert jose.b64url_decode(jose.b64url(data).encode()) == data


@given(st.binary(max_size=12))
def test_of_all_spellings_one_is_base64url(text: bytes) -> None:
    try:
        data = jose.b64url_decode(text)
    except Invalid:
        return
    assert jose.b64url(data).encode() == text


@pytest.mark.parametrize("text", [b"YQ==", b"YR", b"Y", b"+/+/", b"Y Q", b"YQ\n", b"Y\xc3\xa4", b"="])
def test_another_spelling_of_base64url_is_refused(text: bytes) -> None:
    assert jose.b64url_decode(b"YQ") == b"a"
    with pytest.raises(Invalid):
        jose.b64url_decode(text)


def test_a_token_as_text_and_as_bytes_is_the_same() -> None:
    token = SIGNER.token()
    assert jose.parse(token, typ="at+jwt") == jose.parse(token.encode(), typ="at+jwt")
    assert jose.parse(token, typ="at+jwt").signing_input.decode() == token.rpartition(".")[0]


def test_a_repeated_header_is_looked_at_as_strictly_as_a_new_one() -> None:
    bad = SIGNER.sign(SIGNER.header(alg="none"), b"{}")
    for _ in range(3):
        with pytest.raises(Invalid):
            jose.parse(bad, typ="at+jwt")
        with pytest.raises(Invalid):
            jose.parse(SIGNER.token(), typ="dpop+jwt")
        assert jose.parse(SIGNER.token(), typ="at+jwt")


def test_strangers_long_headers_are_not_remembered() -> None:
    before = jose._repeated_header.cache_info().currsize
    for number in range(20):
        assert jose.parse(SIGNER.sign(SIGNER.header(note=f"{number}{'x' * 600}"), b"{}"), typ="at+jwt")
    assert jose._repeated_header.cache_info().currsize == before


def test_a_signature_counts_for_the_bytes_and_the_key_that_made_it() -> None:
    jws = jose.parse(SIGNER.token(), typ="at+jwt")
    jose.verify(jws, SIGNER.key.public_key())
    with pytest.raises(Refused) as caught:
        jose.verify(jws, seeded_ec_key("another").public_key())
    assert caught.value.reason is Reason.UNAUTHENTICATED


def test_what_we_sign_we_verify() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    token = jose.sign(b'{"alg":"ES256","typ":"at+jwt","kid":"k"}', b'{"a":1}', key)
    jws = jose.parse(token, typ="at+jwt")
    jose.verify(jws, key.public_key())
    assert jws.payload == b'{"a":1}'
    with pytest.raises(Refused):
        jose.verify(jose.parse(token[:-4] + "AAAA", typ="at+jwt"), key.public_key())


@pytest.mark.parametrize(
    "change",
    [{"kty": "RSA"}, {"crv": "P-384"}, {"d": "AA"}, {"d": []}, {"x": "AA"}, {"x": ""}, {"y": None}, {"x": "ü" * 43}],
)
def test_only_a_public_point_on_p_256_is_a_key(change: dict[str, object]) -> None:
    jwk = jose.to_jwk(SIGNER.key.public_key())
    members = {"kty": "EC", "crv": "P-256", "x": jwk.x, "y": jwk.y}
    assert jose.load_jwk(jose.Jwk(**members)) == SIGNER.key.public_key()
    changed = members | ({"y": jwk.x} if change == {"y": None} else change)
    with pytest.raises(Invalid):
        jose.load_jwk(jose.Jwk(**changed))


def test_a_thumbprint_is_that_of_rfc_7638() -> None:
    """Section 3: the required members in lexicographic order, nothing else; x and y of RFC 7517 appendix A.1."""
    x, y = "MKBCTNIcKUSDii11ySs3526iDZ8AiTo7Tu6KPAqv7D4", "4Etl6SRW2YiLUrN5vfvVHuhp7x8PxltmWWlbbM4IFyM"
    assert jose.thumbprint(jose.Jwk(kty="EC", crv="P-256", x=x, y=y)) == "cn-I_WNMClehiVp51i_0VpOENW1upEerA8sEam5hn-s"


@given(
    st.lists(st.tuples(st.sampled_from(["a", "b", "aud"]), st.integers(0, 9)), max_size=5),
    st.sampled_from(["%s", '{"outer":[%s]}', '{"a":{"b":%s}}', ' {"x": %s} ']),
    st.sampled_from(["", "  "]),
)
def test_a_name_twice_is_found_at_any_depth_and_in_any_layout(
    pairs: list[tuple[str, int]], around: str, space: str
) -> None:
    text = "{" + ",".join(f'"{name}":{space}{value}' for name, value in pairs) + "}"
    payload = (around % text).encode()
    decoder = msgspec.json.Decoder(dict)
    if len({name for name, _ in pairs}) == len(pairs):
        assert jose.decode_unique(payload, decoder, "it") == json.loads(payload)
    else:
        with pytest.raises(Invalid):
            jose.decode_unique(payload, decoder, "it")


def test_a_proof_key_does_not_print_its_private_half() -> None:
    secret = base64url(Prover().key.private_numbers().private_value.to_bytes(32))
    shown = repr(ProofKey(Prover().key))
    assert Prover().jkt in shown
    assert secret not in shown
