"""An envelope is read in one way or not at all, and its signatures are over type and payload with their lengths."""

import base64
import json

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from hypothesis import given
from hypothesis import strategies as st
from securesystemslib.dsse import Envelope as ForeignEnvelope
from support.provenance import encoded, envelope

from attestors.dsse import EnvelopeError, Signature, decode_base64, pae, parse_envelope


def test_the_encoding_is_that_of_the_specification() -> None:
    """protocol.md, "Test Vectors", with its signature: raw r and s there, DER here."""
    encoding = pae("http://example.com/HelloWorld", b"hello world")
    assert encoding == b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    raw = base64.b64decode("A3JqsQGtVsJ2O2xqrI5IcnXip5GToJ3F+FnZ+O88SjtR6rDAajabZKciJTfUiHqJPcIAriEGAHTVeCUjW2JIZA==")
    x = 46950820868899156662930047687818585632848591499744589407958293238635476079160
    y = 5640078356564379163099075877009565129882514886557779369047442380624545832820
    key = ec.EllipticCurvePublicNumbers(x, y, ec.SECP256R1()).public_key()
    der = encode_dss_signature(int.from_bytes(raw[:32]), int.from_bytes(raw[32:]))
    key.verify(der, encoding, ec.ECDSA(hashes.SHA256()))


@given(st.text(max_size=40), st.binary(max_size=200))
def test_the_encoding_is_that_of_another_implementation(payload_type: str, payload: bytes) -> None:
    assert pae(payload_type, payload) == ForeignEnvelope(payload, payload_type, {}).pae()


@given(st.tuples(st.text(max_size=8), st.binary(max_size=24)), st.tuples(st.text(max_size=8), st.binary(max_size=24)))
def test_no_two_payloads_or_types_have_the_same_encoding(one: tuple[str, bytes], other: tuple[str, bytes]) -> None:
    assert (pae(*one) == pae(*other)) == (one == other)


@pytest.mark.parametrize("split", [1, 2, 11])
def test_bytes_that_move_from_payload_to_type_change_the_encoding(split: int) -> None:
    whole = "a 5 hello 3 ab"
    assert pae(whole[:split], whole[split:].encode()) != pae(whole, b"")


@given(st.binary(max_size=100))
def test_both_alphabets_give_the_same_bytes(data: bytes) -> None:
    assert decode_base64(base64.b64encode(data).decode(), "it") == data
    assert decode_base64(base64.urlsafe_b64encode(data).decode(), "it") == data


@given(st.text(alphabet="ABab01+/-_= \n", max_size=12))
def test_only_what_both_decoders_of_rfc_4648_would_write_is_read(text: str) -> None:
    try:
        found = decode_base64(text, "it")
    except EnvelopeError:
        return
    assert text in {base64.b64encode(found).decode(), base64.urlsafe_b64encode(found).decode()}


def test_an_envelope_is_read_whole() -> None:
    found = parse_envelope(encoded(envelope(b"[]", keyids=["one"])))
    assert (found.payload, found.payload_type) == (b"[]", "application/vnd.in-toto+json")
    assert found.signed == pae("application/vnd.in-toto+json", b"[]")
    assert [one.keyid for one in found.signatures] == ["one"]


@pytest.mark.parametrize("keyid", [None, "", "absent"])
def test_a_keyid_that_is_unset_is_as_good_as_an_empty_one(keyid: str | None) -> None:
    document = envelope(b"[]") | {"signatures": [{"sig": "QQ=="} | ({} if keyid == "absent" else {"keyid": keyid})]}
    assert parse_envelope(encoded(document)).signatures == (Signature(keyid="", sig=b"A"),)


@pytest.mark.parametrize("member", ["payload", "payloadType", "signatures"])
def test_every_member_is_required(member: str) -> None:
    document = envelope(b"[]")
    assert parse_envelope(encoded(document))
    del document[member]
    with pytest.raises(EnvelopeError):
        parse_envelope(encoded(document))


def test_the_payload_is_in_no_representation() -> None:
    found = parse_envelope(json.dumps(envelope(b"what is built in secret")).encode())
    assert "secret" not in repr(found)
