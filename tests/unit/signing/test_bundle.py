"""The form of bundles: as Sigstore's own models read it, and one reading for each text."""

import base64
import hashlib
import json
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st
from sigstore_models.bundle.v1 import Bundle as SigstoreBundle
from support.signed import BLOB, spki, statement

from attestors.dsse import STATEMENT_TYPE
from broker.errors import Invalid
from broker.signing.bundle import (
    MAX_TIMESTAMPS,
    MEDIA_TYPE,
    Material,
    blob_bundle,
    key_hint,
    read_bundle,
    statement_bundle,
)

CERTIFIED = Material(certificate=b"a certificate", timestamp=b"a timestamp")
NAMED = Material(public_key=spki(ec.generate_private_key(ec.SECP256R1()).public_key()))
SHA256 = hashlib.sha256(BLOB).digest()


def test_a_blobs_bundle_reads_as_sigstore_reads_it() -> None:
    text = blob_bundle(CERTIFIED, hash_name="sha256", digest=SHA256, signature=b"signature")
    theirs, ours = SigstoreBundle.from_json(text), read_bundle(text.encode())
    assert theirs.media_type == MEDIA_TYPE
    assert theirs.message_signature is not None
    assert theirs.verification_material.certificate is not None
    assert ours.signature == b"signature"
    assert (ours.hash_name, ours.digest, ours.envelope) == ("sha256", SHA256, None)
    assert (ours.certificate, ours.hint, ours.timestamps) == (b"a certificate", "", (b"a timestamp",))


def test_a_statements_bundle_reads_as_sigstore_reads_it() -> None:
    text = statement_bundle(CERTIFIED, statement=statement(), signature=b"signature")
    theirs, ours = SigstoreBundle.from_json(text), read_bundle(text.encode())
    assert theirs.dsse_envelope is not None
    assert theirs.dsse_envelope.payload_type == STATEMENT_TYPE
    assert ours.envelope is not None
    assert (ours.envelope.payload, ours.signature, ours.digest) == (statement(), b"signature", b"")


@pytest.mark.parametrize(("hash_name", "theirs"), [("sha256", "SHA2_256"), ("sha384", "SHA2_384")])
def test_a_digest_says_by_which_hash(hash_name: str, theirs: str) -> None:
    digest = hashlib.new(hash_name, BLOB).digest()
    text = blob_bundle(NAMED, hash_name=hash_name, digest=digest, signature=b"s")
    message = json.loads(text)["messageSignature"]["messageDigest"]
    assert message == {"algorithm": theirs, "digest": base64.b64encode(digest).decode()}
    with pytest.raises(ValueError, match="not one of"):
        blob_bundle(NAMED, hash_name=hash_name, digest=digest[:-1], signature=b"s")


def test_a_named_key_is_hinted_at_as_cosign_does_and_not_by_a_keyid() -> None:
    hint = base64.b64encode(hashlib.sha256(NAMED.public_key).digest()).decode()
    whole = json.loads(statement_bundle(NAMED, statement=statement(), signature=b"s"))
    assert key_hint(NAMED.public_key) == hint
    assert whole["verificationMaterial"] == {"publicKey": {"hint": hint}, "tlogEntries": []}
    assert whole["dsseEnvelope"]["signatures"] == [{"sig": base64.b64encode(b"s").decode()}]
    assert read_bundle(json.dumps(whole).encode()).hint == hint


@pytest.mark.parametrize("material", [{}, {"certificate": b"c", "public_key": b"k"}, {"timestamp": b"t"}])
def test_a_bundle_names_one_thing_to_verify_with(material: dict[str, bytes]) -> None:
    with pytest.raises(ValueError, match="either a certificate or a public key"):
        Material(**material)


@given(
    certificate=st.binary(min_size=1, max_size=64),
    timestamp=st.binary(max_size=64),
    signature=st.binary(min_size=1, max_size=64),
    payload=st.binary(max_size=64),
)
def test_what_is_written_is_read(certificate: bytes, timestamp: bytes, signature: bytes, payload: bytes) -> None:
    material = Material(certificate=certificate, timestamp=timestamp)
    found = read_bundle(statement_bundle(material, statement=payload, signature=signature).encode())
    assert found.certificate == certificate
    assert found.timestamps == ((timestamp,) if timestamp else ())
    assert found.signature == signature
    assert found.envelope is not None
    assert found.envelope.payload == payload


@given(raw=st.one_of(st.binary(max_size=200), st.text(max_size=200).map(str.encode)))
def test_anything_else_is_malformed(raw: bytes) -> None:
    with pytest.raises(Invalid):
        read_bundle(raw)


JSON_VALUES: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
SOUND = json.loads(blob_bundle(CERTIFIED, hash_name="sha256", digest=SHA256, signature=b"signature"))
PLACES = [
    ("mediaType",),
    ("verificationMaterial",),
    ("verificationMaterial", "certificate"),
    ("verificationMaterial", "certificate", "rawBytes"),
    ("verificationMaterial", "timestampVerificationData"),
    ("verificationMaterial", "timestampVerificationData", "rfc3161Timestamps"),
    ("messageSignature",),
    ("messageSignature", "messageDigest"),
    ("messageSignature", "messageDigest", "algorithm"),
    ("messageSignature", "signature"),
]


@given(place=st.sampled_from(PLACES), value=JSON_VALUES)
def test_a_member_of_another_type_is_malformed_and_never_a_fault(place: tuple[str, ...], value: Any) -> None:
    whole = json.loads(json.dumps(SOUND))
    where = whole
    for name in place[:-1]:
        where = where[name]
    where[place[-1]] = value
    try:
        found = read_bundle(json.dumps(whole).encode())
    except Invalid:
        return
    assert len(found.timestamps) <= MAX_TIMESTAMPS


def test_a_bundle_larger_than_any_is_not_read() -> None:
    with pytest.raises(Invalid, match="larger than"):
        read_bundle(json.dumps(SOUND).encode() + b" " * (512 * 1024))
