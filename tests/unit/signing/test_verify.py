"""Which bundles count. Each file in tests/vectors/bundle: a defect is found for its reason, its control is sound."""

import base64
import hashlib
import json
from collections.abc import Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from hypothesis import given, settings
from hypothesis import strategies as st
from support.pki import ISSUER, NOW, WORKLOAD, der
from support.signed import BLOB, PROVENANCE, SOURCE, Ca, digests, statement
from vectors.make_bundle_vectors import FOLDER

from broker.errors import Invalid
from broker.signing.extensions import ATTRIBUTES
from broker.signing.read_trusted_root import TrustedRoot, read_trusted_root
from broker.signing.verify import BLOB as IS_BLOB
from broker.signing.verify import STATEMENT, Fault, NotVerified, VerifiedSignature, verify_bundle, verify_with_key

SETUP = json.loads((FOLDER / "setup.json").read_text())
ROOT = read_trusted_root(json.dumps(SETUP["trusted_root"]).encode())
LATER = datetime.fromisoformat(SETUP["now"])
ARTIFACT = digests(base64.b64decode(SETUP["artifact"]))
ACCEPTED = sorted((FOLDER / "accepted").glob("*.json"))
REFUSED = sorted((FOLDER / "refused").glob("*.json"))


def _verified(vector: Mapping[str, Any]) -> VerifiedSignature:
    bundle = vector["text"] if "text" in vector else json.dumps(vector["bundle"])
    if "key" not in vector:
        return verify_bundle(bundle, ARTIFACT, ROOT, LATER)
    key: Any = load_pem_public_key(SETUP["keys"][vector["key"]].encode())
    return verify_with_key(bundle, ARTIFACT, key, LATER, trusted_root=ROOT)


@pytest.mark.parametrize("file", ACCEPTED, ids=lambda file: file.stem)
def test_a_sound_bundle_is_verified(file: Path) -> None:
    found = _verified(json.loads(file.read_text()))
    assert found.kind == (STATEMENT if "statement" in file.stem else IS_BLOB)


@pytest.mark.parametrize("file", REFUSED, ids=lambda file: file.stem)
def test_a_defect_is_found_for_its_own_reason(file: Path) -> None:
    vector = json.loads(file.read_text())
    with pytest.raises(NotVerified) as error:
        _verified(vector)
    assert error.value.fault == vector["expect"], str(error.value)
    _verified(json.loads((FOLDER / "accepted" / f"{vector['control']}.json").read_text()))


def test_every_fault_has_a_vector() -> None:
    found = {json.loads(file.read_text())["expect"] for file in REFUSED}
    assert found | {Fault.IDENTITY} == set(Fault)  # identity: test_only_the_expected_workload_and_broker_count


async def _both() -> tuple[Ca, TrustedRoot]:
    ca = await Ca.made()
    return ca, read_trusted_root(ca.trusted_root())


async def test_it_tells_who_what_from_where_and_why() -> None:
    ca, root = await _both()
    bundle = json.dumps(await ca.blob_bundle(pod_uid="pod-1"))
    found = verify_bundle(bundle, digests(), root, NOW + timedelta(days=2), identity=WORKLOAD, issuer=ISSUER)
    assert found.time == NOW
    assert found.time_proven
    told = found.to_json()
    assert told["identity"] == WORKLOAD
    assert told["issuer"] == ISSUER
    assert told["build"]["source_repository_uri"] == SOURCE
    assert told["build"]["build_signer_uri"] == PROVENANCE["builder"]
    assert told["place"] == {"node": "spiffe://acme.test/node/1", "pod_uid": "pod-1"}
    assert told["decision"] == {
        "grant_id": "grant-1",
        "action_digest": f"sha256:{hashlib.sha256(b'action').hexdigest()}",
        "policy_revision": "policy-1",
    }
    assert told["artifact"] == digests()


async def test_it_tells_what_a_statement_is() -> None:
    ca, root = await _both()
    found = verify_bundle(json.dumps(await ca.statement_bundle()), digests(), root, NOW)
    assert found.to_json()["predicate_type"] == "https://slsa.dev/provenance/v1"


@pytest.mark.parametrize(
    ("expected", "why"),
    [
        ({"identity": f"{WORKLOAD}/other"}, "not by the expected"),
        ({"identity": WORKLOAD.upper()}, "not by the expected"),
        ({"identity": ""}, "not by the expected"),
        ({"issuer": f"{ISSUER}/"}, "not by the expected"),
        ({"issuer": ""}, "not by the expected"),
    ],
)
async def test_only_the_expected_workload_and_broker_count(expected: dict[str, str], why: str) -> None:
    ca, root = await _both()
    bundle = json.dumps(await ca.blob_bundle())
    verify_bundle(bundle, digests(), root, NOW, identity=WORKLOAD, issuer=ISSUER)
    with pytest.raises(NotVerified, match=why) as error:
        verify_bundle(bundle, digests(), root, NOW, **expected)
    assert error.value.fault is Fault.IDENTITY


async def test_without_a_timestamp_a_bundle_ends_with_its_certificate() -> None:
    ca, root = await _both()
    bundle = json.dumps(await ca.blob_bundle(stamped=False))
    found = verify_bundle(bundle, digests(), root, NOW)
    assert not found.time_proven
    assert found.certificate_ends is not None
    verify_bundle(bundle, digests(), root, found.certificate_ends)
    for at in (found.certificate_ends + timedelta(seconds=1), NOW - timedelta(minutes=1)):
        with pytest.raises(NotVerified, match="no trusted timestamp proves an earlier time") as error:
            verify_bundle(bundle, digests(), root, at)
        assert error.value.fault is Fault.CERTIFICATE


async def test_a_timestamp_of_nobody_trusted_proves_nothing() -> None:
    """With no authority in the root it counts for nothing; with one that did not make it, the bundle is refused."""
    ca = await Ca.made()
    bundle = json.dumps(await ca.blob_bundle())
    without = read_trusted_root(ca.trusted_root(timestamps=False))
    assert not verify_bundle(bundle, digests(), without, NOW).time_proven
    with pytest.raises(NotVerified) as error:
        verify_bundle(bundle, digests(), without, NOW + timedelta(hours=1))
    assert error.value.fault is Fault.CERTIFICATE


async def test_a_ca_counts_within_its_time_in_the_root_alone() -> None:
    ca = await Ca.made()
    bundle = json.dumps(await ca.blob_bundle())
    stamp = "%Y-%m-%dT%H:%M:%SZ"
    before, at, after = (f"{NOW + timedelta(seconds=n):{stamp}}" for n in (-1, 0, 1))
    verify_bundle(bundle, digests(), read_trusted_root(ca.trusted_root(start=at, end=at)), NOW)
    for valid_for in ({"start": after}, {"start": "2020-01-01T00:00:00Z", "end": before}):
        with pytest.raises(NotVerified, match="no CA of the trusted root") as error:
            verify_bundle(bundle, digests(), read_trusted_root(ca.trusted_root(**valid_for)), NOW)
        assert error.value.fault is Fault.CERTIFICATE


async def test_a_certificate_for_several_artifacts_is_good_for_each_and_for_none_else() -> None:
    """A statement about all of them is signed with one grant."""
    ca, root = await _both()
    blobs = [b"first", b"second"]
    artifacts = tuple({name: digests(one)[name] for name in ("sha256", "sha512")} for one in blobs)
    subjects = [{"digest": dict(artifact)} for artifact in artifacts]
    bundle = json.dumps(await ca.statement_bundle(statement(subjects=subjects), artifacts=artifacts))
    for blob in blobs:
        verify_bundle(bundle, digests(blob), root, NOW)
    with pytest.raises(NotVerified) as error:
        verify_bundle(bundle, digests(b"third"), root, NOW)
    assert error.value.fault is Fault.ARTIFACT


async def test_a_certificate_that_was_given_for_no_artifact_is_good_for_none() -> None:
    """One by the same CA that says all but that."""
    ca, root = await _both()
    bundle = await ca.blob_bundle()
    inner = bundle["verificationMaterial"]["certificate"]
    given = x509.load_der_x509_certificate(base64.b64decode(inner["rawBytes"]))
    builder = (
        x509.CertificateBuilder()
        .subject_name(given.subject)
        .issuer_name(given.issuer)
        .public_key(given.public_key())
        .serial_number(given.serial_number)
        .not_valid_before(given.not_valid_before_utc)
        .not_valid_after(given.not_valid_after_utc)
    )

    def bundled(without: x509.ObjectIdentifier | None) -> str:
        made = builder
        for one in given.extensions:
            if one.oid != without:
                made = made.add_extension(one.value, one.critical)
        inner["rawBytes"] = base64.b64encode(der(made.sign(ca.signer._private, hashes.SHA384()))).decode()
        return json.dumps(bundle)

    verify_bundle(bundled(None), digests(), root, NOW)
    with pytest.raises(NotVerified, match="given for another artifact") as error:
        verify_bundle(bundled(ATTRIBUTES), digests(), root, NOW)
    assert error.value.fault is Fault.ARTIFACT


async def test_a_named_keys_time_is_proven_only_by_a_trusted_authority() -> None:
    vector = json.loads((FOLDER / "accepted" / "p256-blob.json").read_text())
    key: Any = load_pem_public_key(SETUP["keys"]["p256"].encode())
    ca, root = await _both()
    bundle = vector["bundle"]
    signature = base64.b64decode(bundle["messageSignature"]["signature"])
    stamps = [{"signedTimestamp": base64.b64encode(ca.tsa.stamp(signature, NOW)).decode()}]
    bundle["verificationMaterial"]["timestampVerificationData"] = {"rfc3161Timestamps": stamps}
    text = json.dumps(bundle)
    assert verify_with_key(text, ARTIFACT, key, LATER, trusted_root=root).time == NOW
    assert not verify_with_key(text, ARTIFACT, key, LATER).time_proven
    with pytest.raises(NotVerified) as error:
        verify_with_key(text, ARTIFACT, key, LATER, trusted_root=ROOT)
    assert error.value.fault is Fault.TIMESTAMP


async def test_a_key_of_a_kind_that_signs_nothing_here_is_refused() -> None:
    vector = json.loads((FOLDER / "accepted" / "p256-blob.json").read_text())
    del vector["bundle"]["verificationMaterial"]["publicKey"]["hint"]
    key: Any = ec.generate_private_key(ec.SECP521R1()).public_key()
    with pytest.raises(NotVerified) as error:
        verify_with_key(json.dumps(vector["bundle"]), ARTIFACT, key, LATER)
    assert error.value.fault is Fault.SIGNATURE


def test_text_that_no_utf8_has_is_no_bundle() -> None:
    for bundle in ("\ud800", b"\xff", "", b" " * (1 << 20)):
        with pytest.raises(NotVerified) as error:
            verify_bundle(bundle, digests(BLOB), ROOT, LATER)
        assert error.value.fault is Fault.BUNDLE


ROOT_DEFECTS = {
    "no-json": "{",
    "another-media-type": {"mediaType": "application/json"},
    "authorities-not-a-list": {"certificateAuthorities": {}},
    "no-chain": {"certificateAuthorities": [{}]},
    "an-empty-chain": {"certificateAuthorities": [{"certChain": {"certificates": []}}]},
    "no-certificate": {"certificateAuthorities": [{"certChain": {"certificates": [{"rawBytes": "AAAA"}]}}]},
    "a-time-without-offset": {
        "certificateAuthorities": [
            SETUP["trusted_root"]["certificateAuthorities"][0] | {"validFor": {"start": "2020-01-01T00:00:00"}}
        ]
    },
    "a-time-that-is-none": {
        "certificateAuthorities": [SETUP["trusted_root"]["certificateAuthorities"][0] | {"validFor": {"start": 7}}]
    },
    "a-timestamp-authority-without-root": {
        "timestampAuthorities": [
            {
                "certChain": {
                    "certificates": SETUP["trusted_root"]["timestampAuthorities"][0]["certChain"]["certificates"][:1]
                }
            }
        ]
    },
}


@pytest.mark.parametrize("defect", ROOT_DEFECTS.values(), ids=ROOT_DEFECTS)
def test_a_trusted_root_that_cannot_be_read_is_refused_whole(defect: Any) -> None:
    whole = defect if isinstance(defect, str) else json.dumps(SETUP["trusted_root"] | defect)
    with pytest.raises(Invalid):
        read_trusted_root(whole.encode())


SOUND = (FOLDER / "accepted" / "blob.json").read_text()
BYTES = json.dumps(json.loads(SOUND)["bundle"]).encode()


@settings(max_examples=200, deadline=None)
@given(at=st.integers(0, len(BYTES) - 1), bit=st.integers(0, 7))
@pytest.mark.filterwarnings("ignore:Parsed a serial number:cryptography.utils.CryptographyDeprecationWarning")
def test_a_flipped_bit_changes_nothing_of_what_is_told_or_refuses(at: int, bit: int) -> None:
    """Not the other way round: a bit in a name that nobody reads, or in what no signature covers, may stay unseen."""
    changed = bytearray(BYTES)
    changed[at] ^= 1 << bit
    try:
        found = verify_bundle(bytes(changed), ARTIFACT, ROOT, LATER)
    except NotVerified:
        return
    assert found.to_json() == verify_bundle(BYTES, ARTIFACT, ROOT, LATER).to_json()
