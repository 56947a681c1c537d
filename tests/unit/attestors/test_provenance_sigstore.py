"""A Sigstore identity signs for a builder where both are named, by what its own log and authority vouch for."""

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from support.provenance import (
    ARTIFACT,
    BUILDER,
    NOW,
    SHA256,
    STRANGER,
    b64,
    encoded,
    envelope,
    predicate,
    statement,
    trust,
)
from support.sigstore_instance import IDENTITY, ISSUER, SigstoreInstance

from attestors.contract import AttestationFailed, Facts
from attestors.dsse import STATEMENT_TYPE
from attestors.provenance import appraise
from attestors.provenance_signers import SignerChecks
from attestors.provenance_trust import BuilderTrust, ProvenanceTrust, SigstoreIdentity, SigstoreSigned
from attestors.sigstore_identity import SigstoreVerifier

WHO = SigstoreIdentity(issuer=ISSUER, identity=IDENTITY)
UNDATED = statement(predicate=predicate(startedOn=None, finishedOn=None))
INSTANCE = SigstoreInstance()
SOUND = INSTANCE.signed(UNDATED)


@pytest.fixture(scope="module")
def checks(tmp_path_factory: pytest.TempPathFactory) -> SignerChecks:
    path = tmp_path_factory.mktemp("sigstore") / "trusted_root.json"
    path.write_text(json.dumps(INSTANCE.trusted_root()))
    return SignerChecks(sigstore=SigstoreVerifier(path))


def trusted(*identities: SigstoreIdentity, **options: Any) -> ProvenanceTrust:
    return trust({BUILDER: BuilderTrust(sigstore=frozenset(identities or (WHO,)))}, **options)


def judge(evidence: Any, checks: SignerChecks, trusts: ProvenanceTrust | None = None) -> Facts:
    return appraise(encoded(evidence), [ARTIFACT], trusts or trusted(), checks, NOW)


def changed(path: str, value: Any) -> dict[str, Any]:
    """The sound bundle with one member replaced, at a dotted path."""
    found = json.loads(json.dumps(SOUND))
    *way, last = path.split(".")
    at = found
    for step in way:
        at = at[int(step)] if isinstance(at, list) else at[step]
    at[last] = value
    return found


def test_what_a_configured_identity_signed_is_accepted_and_has_the_age_of_its_certificate(checks: SignerChecks) -> None:
    facts = judge(SOUND, checks)
    assert facts.values["signer"] == f"sigstore:{ISSUER}#{IDENTITY}"
    assert (facts.values["started_at"], facts.values["finished_at"]) == (-1, -1)
    assert facts.expires_at == INSTANCE.at + trusted().max_age
    with pytest.raises(AttestationFailed, match="older than"):
        judge(SOUND, checks, trusted(max_age=timedelta(minutes=5)))


@pytest.mark.parametrize(
    "other",
    [
        SigstoreIdentity(issuer=ISSUER, identity=IDENTITY + "x"),
        SigstoreIdentity(issuer=ISSUER, identity=IDENTITY[:-1]),
        SigstoreIdentity(issuer=ISSUER, identity=IDENTITY.replace("main", "evil")),
        SigstoreIdentity(issuer="https://token.evil.test", identity=IDENTITY),
    ],
)
def test_another_identity_or_the_same_of_another_issuer_signs_for_nobody(
    checks: SignerChecks, other: SigstoreIdentity
) -> None:
    assert judge(SOUND, checks, trusted(other, WHO))
    with pytest.raises(AttestationFailed, match="its certificate names none of them"):
        judge(SOUND, checks, trusted(other))


def test_an_identity_signs_for_its_own_builder_alone(checks: SignerChecks) -> None:
    other = INSTANCE.signed(statement(predicate=predicate("https://other.acme.test/v1")))
    both = {BUILDER: BuilderTrust(sigstore=frozenset({WHO}))}
    with pytest.raises(AttestationFailed, match="is not trusted"):
        judge(other, checks, trust(both))
    stranger = SigstoreIdentity(issuer=ISSUER, identity="another")
    both["https://other.acme.test/v1"] = BuilderTrust(sigstore=frozenset({stranger}))
    with pytest.raises(AttestationFailed, match="0 of 1 signers needed"):
        judge(other, checks, trust(both))


def test_another_instance_vouches_for_nobody(checks: SignerChecks) -> None:
    with pytest.raises(AttestationFailed, match="not of a trusted Sigstore identity"):
        judge(SigstoreInstance().signed(UNDATED), checks)


@pytest.mark.parametrize("part", ["ct_key", "log_key"])
def test_a_log_that_is_not_the_trusted_one_vouches_for_nothing(checks: SignerChecks, part: str) -> None:
    own = {name: getattr(INSTANCE, name) for name in ("ca_key", "ct_key", "log_key")}
    strange = SigstoreInstance(**own | {part: STRANGER})
    with pytest.raises(AttestationFailed, match="not of a trusted Sigstore identity"):
        judge(strange.signed(UNDATED), checks)


ENTRY = "verificationMaterial.tlogEntries.0"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("dsseEnvelope.payload", b64(encoded(statement(subject=[{"digest": {"sha256": SHA256}}])))),
        ("dsseEnvelope.signatures.0.sig", b64(b"no signature")),
        ("verificationMaterial.certificate.rawBytes", b64(b"0")),
        (f"{ENTRY}.integratedTime", str(int(INSTANCE.at.timestamp()) + 700)),
        (f"{ENTRY}.inclusionPromise.signedEntryTimestamp", b64(b"no signature")),
        (f"{ENTRY}.inclusionProof.rootHash", b64(bytes(32))),
        (f"{ENTRY}.inclusionProof.checkpoint.envelope", "rekor\n1\nAA==\n\n"),
        (f"{ENTRY}.canonicalizedBody", b64(b"{}")),
        (f"{ENTRY}.kindVersion.kind", "hashedrekord"),
        ("verificationMaterial.tlogEntries", [{}]),
        ("verificationMaterial.tlogEntries", "all"),
        ("verificationMaterial.tlogEntries", []),
    ],
)
def test_a_bundle_that_was_changed_anywhere_is_refused(checks: SignerChecks, path: str, value: Any) -> None:
    assert judge(SOUND, checks)
    with pytest.raises(AttestationFailed, match="no signature of anybody trusted"):
        judge(changed(path, value), checks)


def test_a_signature_by_another_key_under_the_certificate_is_refused(checks: SignerChecks) -> None:
    with pytest.raises(AttestationFailed, match="no signature of anybody trusted"):
        judge(changed("dsseEnvelope", envelope(UNDATED, keys=[STRANGER])), checks)


def test_the_two_readers_of_a_bundle_have_to_have_read_the_same_payload() -> None:
    """Ours and the library's: what was verified is what is believed."""

    def other(bundle: bytes, identities: tuple[SigstoreIdentity, ...]) -> Any:
        payload = encoded(statement()) + b" "
        return SigstoreSigned(identity=WHO, payload=payload, payload_type=STATEMENT_TYPE, not_before=NOW, spki=b"")

    with pytest.raises(AttestationFailed, match="verified for another payload"):
        judge(SOUND, SignerChecks(sigstore=other))


def test_the_trusted_root_of_the_public_instance_comes_with_the_library(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Nothing is fetched, and no cache of a user is read or written."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    public = SignerChecks(sigstore=SigstoreVerifier(None))
    with pytest.raises(AttestationFailed, match="not of a trusted Sigstore identity"):
        judge(SOUND, public)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", "{}", '{"mediaType": "another"}'])
def test_a_trusted_root_that_cannot_be_used_is_refused_at_the_start(tmp_path: Path, text: str) -> None:
    path = tmp_path / "trusted_root.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="cannot be used"):
        SigstoreVerifier(path)
    with pytest.raises(ValueError, match="cannot be used"):
        SigstoreVerifier(tmp_path / "none.json")
    path.write_text(json.dumps(INSTANCE.trusted_root()))
    assert SigstoreVerifier(path)


def test_who_has_no_verifier_believes_no_bundle(checks: SignerChecks) -> None:
    assert judge(SOUND, checks)
    with pytest.raises(AttestationFailed, match="no signature of anybody trusted"):
        judge(SOUND, SignerChecks())
