"""The form of JWT-SVIDs: what their header may say, and how they are written; two readers must read them alike."""

import json
from datetime import timedelta
from typing import Any

import pytest
from support.jwt_svids import SIGNER, reason, verify
from support.pki import (
    NOW,
    base64url,
    usual_claims,
)

from broker.errors import Invalid, Reason, Refused

# --- the header


@pytest.mark.parametrize(
    "more",
    [
        {"crit": ["exp"]},
        {"crit": []},
        {"crit": ["b64"], "b64": False},
        {"crit": ["b64"], "b64": True},
        {"b64": False},
        {"b64": True},
        {"jwk": SIGNER.jwk()},
        {"jku": "https://evil.test/jwks.json"},
        {"x5c": ["AAAA"]},
        {"x5u": "https://evil.test/"},
        {"x5t#S256": "AAAA"},
        {"cty": "JWT"},
        {"zip": "DEF"},
        {"enc": "A256GCM"},
        {"private": 1},
        {"typ": "jwt"},
        {"typ": "at+jwt"},
        {"typ": "dpop+jwt"},
        {"typ": "wit+jwt"},
        {"typ": "application/jwt"},
        {"typ": ""},
        {"typ": None},
        {"typ": ["JWT"]},
        {"kid": None},
        {"kid": 1},
        {"kid": ["key-ES256"]},
    ],
    ids=repr,
)
def test_a_header_beyond_alg_kid_and_typ_is_refused(more: dict[str, Any]) -> None:
    token = SIGNER.token(header={"alg": "ES256", "kid": SIGNER.kid, "typ": "JWT"} | more)
    assert reason(token) is Reason.MALFORMED


def test_a_detached_payload_is_refused() -> None:
    header, _, signature = SIGNER.token().split(".")
    assert reason(f"{header}..{signature}") is Reason.MALFORMED


@pytest.mark.parametrize(
    "header",
    [
        b'{"alg":"none","alg":"ES256"}',
        b'{"alg":"ES256","alg":"none"}',
        b'{"alg":"ES256","kid":"a","k\\u0069d":"key-ES256"}',
        b'{"alg":"ES256"',
        b"[]",
        b'"ES256"',
        b"null",
        b"\xff",
        b'\xef\xbb\xbf{"alg":"ES256"}',
        b'{"alg":"ES256","kid":NaN}',
        '{"alg":"ES256"}'.encode("utf-16-le"),
        b"[" * 5000,
    ],
    ids=lambda data: repr(data[:30]),
)
def test_a_header_that_two_parsers_could_read_differently_is_refused(header: bytes) -> None:
    assert reason(SIGNER.token(header=header)) is Reason.MALFORMED


# --- the serialization


def test_a_token_over_16_kib_is_refused_unread_and_one_of_16_kib_is_read() -> None:
    size = len(SIGNER.token(pad=""))
    room = (16 * 1024 - size) * 3 // 4
    token = SIGNER.token(pad="x" * (room - 2))
    assert 16 * 1024 - 8 < len(token) <= 16 * 1024
    assert verify(token)
    assert reason(SIGNER.token(pad="x" * (room + 8))) is Reason.MALFORMED
    with pytest.raises(Invalid, match="larger"):
        verify("." * 10_000_000)


def test_json_serialization_is_refused() -> None:
    header, payload, signature = SIGNER.token().split(".")
    flattened = {"protected": header, "payload": payload, "signature": signature}
    general = {"payload": payload, "signatures": [{"protected": header, "signature": signature}]}
    for document in (flattened, general):
        assert reason(json.dumps(document)) is Reason.MALFORMED


@pytest.mark.parametrize(
    "change",
    [
        lambda _: "",
        lambda _: ".",
        lambda _: "..",
        lambda t: t + ".",
        lambda t: "." + t,
        lambda t: t + ".AAAA",
        lambda t: t.rpartition(".")[0],
        lambda t: t + "=",
        lambda t: t + "\n",
        lambda t: " " + t,
        lambda t: "Bearer " + t,
        lambda t: t.replace(".", ".\n", 1),
        lambda t: t + "\0",
        lambda t: t + "é",
        lambda t: t + "\ud800",
        lambda t: t.replace("e", "+", 1),
        lambda t: t.replace("e", "/", 1),
        lambda t: t + "A",
        lambda t: "A" + t,
    ],
)
def test_what_is_no_compact_serialization_is_refused(change: Any) -> None:
    assert reason(change(SIGNER.token())) in {Reason.MALFORMED, Reason.UNAUTHENTICATED}


def test_stray_bits_of_base64url_make_no_second_spelling() -> None:
    """A 64-byte signature leaves four bits over in its last character: sixteen spellings, one of them canonical."""
    token = SIGNER.token()
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    last = alphabet.index(token[-1])
    assert last % 16 == 0
    for stray in range(1, 16):
        assert reason(token[:-1] + alphabet[last + stray]) is Reason.UNAUTHENTICATED


def test_stray_bits_are_refused_even_when_they_were_signed() -> None:
    header = base64url(b'{"alg":"ES256","kid":"key-ES256"}  ')  # 35 bytes: two bits over
    payload = base64url(json.dumps(usual_claims()).encode())
    for spelled in (header, header[:-1] + chr(ord(header[-1]) + 1)):
        signed = f"{spelled}.{payload}"
        token = f"{signed}.{base64url(SIGNER.raw_signature(signed.encode()))}"
        if spelled == header:
            assert verify(token)
        else:
            assert reason(token) is Reason.MALFORMED


def test_a_refusal_never_repeats_the_token() -> None:
    token = SIGNER.token()
    with pytest.raises(Refused) as error:
        verify(token, now=NOW + timedelta(days=1))
    for part in token.split("."):
        assert part not in str(error.value)
