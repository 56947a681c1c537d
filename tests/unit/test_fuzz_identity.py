"""The fuzz targets of tests/fuzz, briefly: random bytes and the vectors as corpus, so that they cannot rot."""

import base64
from itertools import pairwise

import pytest
from fuzz import fuzz_id_token, fuzz_jwt_svid, fuzz_spiffe_id, fuzz_x509_svid
from hypothesis import given
from hypothesis import strategies as st
from vectors.make_svid_vectors import build

# What cryptography says on reading a stranger's certificate. It is only said: the verifier then refuses it.
HOSTILE = pytest.mark.filterwarnings(
    "ignore:Parsed a serial number", "ignore:Attribute's length", "ignore:The parsed certificate"
)


def corpus(kind: str) -> list[dict[str, object]]:
    return [vector for path, vector in build().items() if path.startswith(f"{kind}/")]


@given(st.binary(max_size=200) | st.text("/.-_aA0%:@?# \n\0é", max_size=60).map(str.encode))
def test_no_bytes_make_a_spiffe_id_that_is_none(data: bytes) -> None:
    fuzz_spiffe_id.one_input(data)


@pytest.mark.parametrize("vector", corpus("spiffe-id"), ids=lambda vector: str(vector["id"])[:40])
def test_no_known_defect_makes_a_spiffe_id_that_is_none(vector: dict[str, str]) -> None:
    fuzz_spiffe_id.one_input(vector["id"].encode())


leaves = ['"alg"', '"ES256"', '"kid"', '"k"', '"sub"', '"aud"', '"exp"', "1e999", "NaN", "null", "true", "0"]
json_like = st.recursive(
    st.sampled_from(leaves),
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda items: f"[{','.join(items)}]")
        | st.lists(inner, max_size=6).map(lambda items: "{" + ",".join(map(":".join, pairwise(items))) + "}")
    ),
)


@given(st.binary(max_size=200) | json_like.map(str.encode))
def test_no_bytes_make_a_jwt_svid_that_nobody_signed(data: bytes) -> None:
    fuzz_jwt_svid.one_input(data)


@pytest.mark.parametrize("vector", corpus("jwt"), ids=lambda vector: str(vector["token"])[-30:])
def test_no_known_defect_makes_a_jwt_svid_that_nobody_signed(vector: dict[str, str]) -> None:
    token = vector["token"].encode()
    fuzz_jwt_svid.one_input(token)
    for part in token.split(b"."):
        fuzz_jwt_svid.one_input(base64.urlsafe_b64decode(part + b"=" * (-len(part) % 4)) if part.isalnum() else part)


@HOSTILE
@given(st.binary(max_size=200))
def test_no_bytes_make_an_x509_svid_that_nobody_signed(data: bytes) -> None:
    fuzz_x509_svid.one_input(data)


@HOSTILE
@pytest.mark.parametrize("vector", corpus("x509"), ids=lambda vector: str(vector["why"])[:40])
def test_no_known_defect_makes_an_x509_svid_that_nobody_signed(vector: dict[str, list[str]]) -> None:
    fuzz_x509_svid.one_input(b"".join(base64.b64decode(item) for item in vector["chain"]))


def edited(sound: bytes) -> st.SearchStrategy[bytes]:
    """Sound bytes with a piece of them replaced."""
    at = st.integers(0, len(sound))
    return st.tuples(at, at, st.binary(max_size=4) | json_like.map(str.encode)).map(
        lambda edit: sound[: min(edit[:2])] + edit[2] + sound[max(edit[:2]) :]
    )


@given(
    st.binary(max_size=200)
    | json_like.map(str.encode)
    | edited(fuzz_id_token.HEADER)
    | edited(fuzz_id_token.PAYLOAD)
    | edited(fuzz_id_token.KEYS)
)
def test_no_bytes_make_an_id_token_that_the_issuer_did_not_sign(data: bytes) -> None:
    fuzz_id_token.one_input(data)


def test_the_id_token_that_is_edited_is_sound_and_none_of_its_parts_alone_is() -> None:
    parts = (fuzz_id_token.HEADER, fuzz_id_token.PAYLOAD, fuzz_id_token.SIGNER.raw_signature)
    sound = fuzz_id_token.jws(*parts)
    assert fuzz_id_token.verified(sound, signed=True)
    for wrong in (unsigned(sound), f"{sound}=", sound.replace(".", "..", 1), f" {sound}"):
        assert not fuzz_id_token.verified(wrong, signed=False)


def unsigned(token: str) -> str:
    head, body, _ = token.split(".")
    return f"{head}.{body}."
