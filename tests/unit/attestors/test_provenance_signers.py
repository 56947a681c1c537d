"""Only who is trusted for a builder signs in its name, by whichever tool; a keyid says nothing.

The envelopes here are securesystemslib's, which is what in-toto and TUF sign with.
"""

import base64
import time
from datetime import timedelta
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from securesystemslib.dsse import Envelope as ForeignEnvelope
from securesystemslib.signer import CryptoSigner, SSlibKey
from support.pki import CA, seeded_rsa_key, snapshot
from support.provenance import (
    ARTIFACT,
    BUILD_AGENT,
    BUILDER,
    KEY,
    NOW,
    STRANGER,
    SVID_BUILDER,
    authority,
    b64,
    builders,
    bundle,
    checks,
    encoded,
    envelope,
    predicate,
    sign,
    spki_pem,
    statement,
    svid_bundle,
    trust,
)
from support.timestamps import Tsa

from attestors.contract import AttestationFailed, Facts
from attestors.dsse import STATEMENT_TYPE, pae
from attestors.provenance import appraise
from attestors.provenance_evidence import parse_evidence
from attestors.provenance_signers import SignerChecks, find_signers
from attestors.provenance_trust import BuilderTrust, ProvenanceTrust
from attestors.signature_keys import SigningKey, read_key
from broker.identity.svid_check import SvidCheck

RSA, OTHER_RSA = (rsa.generate_private_key(65537, 2048) for _ in range(2))


def signer(private: Any, scheme: str = "") -> CryptoSigner:
    """One of securesystemslib's; scheme: as it names them, "" for its own default."""
    public = SSlibKey.from_crypto(private.public_key(), scheme=scheme or None)
    return CryptoSigner(private, public)


FOREIGN = {
    "ecdsa-p256": signer(ec.generate_private_key(ec.SECP256R1())),
    "ecdsa-p384": signer(ec.generate_private_key(ec.SECP384R1())),
    "ed25519": signer(ed25519.Ed25519PrivateKey.generate()),
    "rsa-pss-sha256": signer(RSA, "rsassa-pss-sha256"),
    "rsa-pkcs1v15-sha256": signer(RSA, "rsa-pkcs1v15-sha256"),
}


def foreign_envelope(*signers: CryptoSigner, document: Any = None) -> dict[str, Any]:
    found = ForeignEnvelope(encoded(statement() if document is None else document), STATEMENT_TYPE, {})
    for one in signers:
        found.sign(one)
    return found.to_dict()


def key_of(one: CryptoSigner) -> SigningKey:
    return SigningKey(one._private_key.public_key())


def judge(evidence: Any, trusted: ProvenanceTrust, **options: Any) -> Facts:
    return appraise(encoded(evidence), [ARTIFACT], trusted, options.get("checks", checks()), options.get("now", NOW))


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_another_tool_signed_is_accepted_and_one_bit_changed_is_not(kind: str) -> None:
    evidence = foreign_envelope(FOREIGN[kind])
    trusted = trust({BUILDER: BuilderTrust(keys={kind: key_of(FOREIGN[kind])})})
    assert judge(evidence, trusted).values["signer"] == f"key:{kind}"
    signature = evidence["signatures"][0]
    for position in (0, len(signature["sig"]) // 2):
        changed = list(signature["sig"])
        changed[position] = "A" if changed[position] != "A" else "B"
        with pytest.raises(AttestationFailed, match="no signature of anybody trusted"):
            judge(evidence | {"signatures": [signature | {"sig": "".join(changed)}]}, trusted)


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_key_of_the_same_kind_that_nobody_trusts_signs_for_nobody(kind: str) -> None:
    others = {
        "ecdsa-p256": STRANGER,
        "ecdsa-p384": ec.generate_private_key(ec.SECP384R1()),
        "ed25519": ed25519.Ed25519PrivateKey.generate(),
    }
    other = SigningKey(others.get(kind, OTHER_RSA).public_key())
    evidence = foreign_envelope(FOREIGN[kind])
    assert judge(evidence, trust({BUILDER: BuilderTrust(keys={"it": key_of(FOREIGN[kind])})}))
    with pytest.raises(AttestationFailed, match="no signature of anybody trusted"):
        judge(evidence, trust({BUILDER: BuilderTrust(keys={"it": other})}))


def test_a_keyid_chooses_nothing_and_excludes_nothing() -> None:
    """DSSE: it MUST NOT be used for security decisions."""
    trusted = trust({BUILDER: BuilderTrust(keys={"it": key_of(FOREIGN["ecdsa-p256"])})})
    evidence = foreign_envelope(FOREIGN["ecdsa-p256"])
    own = evidence["signatures"][0]
    for keyid in ("", "another", own["keyid"]):
        assert judge(evidence | {"signatures": [own | {"keyid": keyid}]}, trusted)
    forged = foreign_envelope(signer(STRANGER))
    forged["signatures"][0]["keyid"] = own["keyid"]
    with pytest.raises(AttestationFailed, match="no signature of anybody trusted"):
        judge(forged, trusted)


def test_one_key_counts_once_under_every_name_it_comes_by() -> None:
    """As a configured key and as the key of an SVID, it still is one signer."""
    svid = authority().svid(BUILD_AGENT)
    both = BuilderTrust(
        keys={"release": SigningKey(svid.key.public_key())}, spiffe_ids=frozenset({BUILD_AGENT}), threshold=2
    )
    alone = BuilderTrust(spiffe_ids=frozenset({BUILD_AGENT}))
    assert judge(svid_bundle(svid), trust({SVID_BUILDER: alone})).values["signer"] == BUILD_AGENT
    with pytest.raises(AttestationFailed, match="1 of 2 signers needed"):
        judge(svid_bundle(svid), trust({SVID_BUILDER: both}))
    with pytest.raises(ValueError, match="two names"):
        BuilderTrust(keys={name: SigningKey(KEY.public_key()) for name in ("a", "b")}, threshold=2)


def test_an_old_signature_is_no_younger_for_an_svid_of_another_builder_beside_it() -> None:
    """Undated provenance has the age of a certificate that signs for its own builder, never of somebody else's."""
    undated = statement(predicate=predicate(startedOn=None, finishedOn=None))
    fresh = authority().svid(BUILD_AGENT)
    payload = encoded(undated)
    old = envelope(payload, keys=[KEY])
    mine = b64(sign(fresh.key, pae(STATEMENT_TYPE, payload)))
    evidence = bundle(old | {"signatures": [{"sig": mine}]}, chain=fresh.chain)
    with pytest.raises(AttestationFailed, match="0 of 1 signers needed"):
        judge(evidence, trust())
    trusted = builders()
    trusted[BUILDER] = BuilderTrust(keys=trusted[BUILDER].keys, spiffe_ids=frozenset({BUILD_AGENT}))
    assert judge(evidence, trust(trusted)), "where it does sign for the builder, it says how old"


@pytest.mark.parametrize(
    ("key", "sound"),
    [
        (ec.generate_private_key(ec.SECP521R1()), ec.generate_private_key(ec.SECP384R1())),
        (ec.generate_private_key(ec.SECP256K1()), ec.generate_private_key(ec.SECP256R1())),
        (seeded_rsa_key("weak", 1024), RSA),
    ],
    ids=["P-521", "secp256k1", "RSA-1024"],
)
def test_keys_of_a_kind_that_does_not_count_are_refused_when_they_are_read(key: Any, sound: Any) -> None:
    assert read_key(spki_pem(sound).encode())
    with pytest.raises(ValueError, match="ECDSA P-256 or P-384, Ed25519, or RSA"):
        read_key(spki_pem(key).encode())


# -- X.509-SVIDs -----------------------------------------------------------------------------------------------------


ENDED = authority().svid(BUILD_AGENT, not_before=NOW - timedelta(hours=2), lifetime=-timedelta(hours=1))
"""It was valid from two hours to one hour ago."""
THEN = NOW - timedelta(minutes=90)
TSA = Tsa.made()


def stamped(response: bytes) -> Any:
    """What the ended SVID signed, with a timestamp beside it."""
    return svid_bundle(ENDED, timestamps=[response])


def signature_of(evidence: dict[str, Any]) -> bytes:
    return base64.b64decode(evidence["dsseEnvelope"]["signatures"][0]["sig"])


SIGNED = signature_of(svid_bundle(ENDED))


def test_an_svid_that_has_ended_counts_at_the_time_that_a_trusted_authority_stamped() -> None:
    trusted = trust(timestamp_roots=(TSA.root,))
    assert judge(stamped(TSA.stamp(SIGNED, THEN)), trusted).values["signer"] == BUILD_AGENT
    with pytest.raises(AttestationFailed, match="has expired"):
        judge(svid_bundle(ENDED), trusted)


@pytest.mark.parametrize(
    ("response", "why"),
    [
        (Tsa.made().stamp(SIGNED, THEN), "has expired"),
        (TSA.stamp(b"another signature", THEN), "has expired"),
        (TSA.stamp(SIGNED, NOW), "has expired"),
        (TSA.stamp(SIGNED, NOW - timedelta(hours=3)), "no X.509-SVID of a trusted domain"),
        (TSA.stamp(SIGNED, THEN, status=2), "has expired"),
        (b"no timestamp", "has expired"),
    ],
    ids=["of nobody trusted", "over something else", "too late", "too early", "not granted", "none at all"],
)
def test_a_timestamp_that_does_not_prove_it_helps_no_svid_that_has_ended(response: bytes, why: str) -> None:
    trusted = trust(timestamp_roots=(TSA.root,))
    assert judge(stamped(TSA.stamp(SIGNED, THEN)), trusted)
    with pytest.raises(AttestationFailed, match=why):
        judge(stamped(response), trusted)


def test_without_a_configured_authority_no_timestamp_counts() -> None:
    with pytest.raises(AttestationFailed, match="has expired"):
        judge(stamped(TSA.stamp(SIGNED, THEN)), trust())


def test_a_timestamp_of_today_makes_no_old_provenance_young() -> None:
    """Anybody can have an old signature stamped anew, so the age is counted from the certificate."""
    undated = statement(predicate=predicate(SVID_BUILDER, startedOn=None, finishedOn=None))
    evidence = svid_bundle(ENDED, undated)
    evidence = svid_bundle(ENDED, undated, timestamps=[TSA.stamp(signature_of(evidence), THEN)])
    trusted = trust(timestamp_roots=(TSA.root,))
    began = ENDED.leaf.not_valid_before_utc
    assert judge(evidence, trusted).expires_at == began + trusted.max_age
    with pytest.raises(AttestationFailed, match="older than"):
        judge(evidence, trust(timestamp_roots=(TSA.root,), max_age=timedelta(hours=1)))


def test_an_svid_is_verified_against_its_own_domains_bundle_of_this_moment() -> None:
    """Invariant 5. An authority that was taken out vouches for nothing, not even for the past."""
    evidence, bundles = svid_bundle(authority().svid(BUILD_AGENT)), [authority().bundle()]
    current = SignerChecks(x509_svid=SvidCheck(lambda: snapshot(*bundles)))
    assert judge(evidence, trust(), checks=current)
    bundles[:] = [CA("acme.test").bundle()]
    with pytest.raises(AttestationFailed, match=r"no X\.509-SVID of a trusted domain"):
        judge(evidence, trust(), checks=current)
    bundles[:] = [authority("evil.test").bundle()]
    with pytest.raises(AttestationFailed, match="no trust bundle"):
        judge(evidence, trust(), checks=current)


def test_an_svid_with_an_intermediate_needs_it_beside_it() -> None:
    svid = CA("acme.test", parent=authority()).svid(BUILD_AGENT)
    assert judge(svid_bundle(svid), trust())
    document = statement(predicate=predicate(SVID_BUILDER))
    with pytest.raises(AttestationFailed, match=r"no X\.509-SVID of a trusted domain"):
        judge(bundle(envelope(document, keys=[svid.key]), chain=svid.chain[:1]), trust())


def test_an_svid_is_looked_at_only_where_its_key_made_the_signature() -> None:
    """A stranger orders no path building with somebody else's certificate."""
    asked = []

    def ask(chain: tuple[bytes, ...], when: Any) -> str:
        asked.append(when)
        return BUILD_AGENT

    svid = authority().svid(BUILD_AGENT)
    document = statement(predicate=predicate(SVID_BUILDER))
    with pytest.raises(AttestationFailed, match="not the signer's"):
        judge(
            bundle(envelope(document, keys=[STRANGER]), chain=svid.chain), trust(), checks=SignerChecks(x509_svid=ask)
        )
    assert not asked
    assert judge(svid_bundle(svid), trust(), checks=SignerChecks(x509_svid=ask))
    assert asked == [NOW]


def test_a_payload_is_hashed_once_with_however_many_keys_and_signatures_it_is_tried() -> None:
    """Half a mebibyte, 64 keys and 8 signatures would be 200 MB to hash for one question."""
    keys = {f"key-{i}": SigningKey(ec.generate_private_key(ec.SECP256R1()).public_key()) for i in range(64)}
    trusted = trust({BUILDER: BuilderTrust(keys=keys)})

    def seconds(padding: int) -> float:
        found = envelope(b"x" * padding, keys=[STRANGER] * 8)
        evidence = parse_evidence(encoded(found))
        begun = time.thread_time()
        assert not find_signers(evidence, trusted, SignerChecks(), NOW)
        return time.thread_time() - begun

    small, large = (min(seconds(size) for _ in range(3)) for size in (10, 380_000))
    assert large < 2 * small + 0.01
    mine = trust({BUILDER: BuilderTrust(keys={**keys, "it": SigningKey(KEY.public_key())})})
    assert find_signers(parse_evidence(encoded(envelope(b"x" * 380_000))), mine, SignerChecks(), NOW)
