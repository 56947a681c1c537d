"""What stock cosign attests with a key is accepted, as it comes."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from support.provenance import ARTIFACT, BUILDER, CONTENT, NOW, predicate, statement, trust
from support.sigstore_tools import sigstore_tools

from attestors.contract import AttestationFailed, Facts
from attestors.provenance import appraise
from attestors.provenance_config import BuilderConfig, load_trust
from attestors.provenance_signers import SignerChecks
from attestors.provenance_trust import ProvenanceTrust

pytestmark = pytest.mark.cosign

OFFLINE = ("--use-signing-config=false", "--tlog-upload=false", "--yes")
KINDS = {
    "ecdsa-p256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "ecdsa-p384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "rsa": lambda: rsa.generate_private_key(65537, 2048),
    "ed25519": ed25519.Ed25519PrivateKey.generate,
}


def cosign(folder: Path, *arguments: str) -> None:
    """Runs it offline, with a home of its own. Keys are encrypted there, and only the environment gives a password."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("COSIGN_", "SIGSTORE_", "TUF_"))}
    ran = subprocess.run(
        [sigstore_tools() / "cosign", *arguments],
        cwd=folder,
        env={**ours, "HOME": str(folder), "COSIGN_PASSWORD": "throwaway"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


def imported(folder: Path, kind: str) -> ProvenanceTrust:
    """Gives cosign a key of this kind, and trusts it."""
    pem, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    (folder / "key.pem").write_bytes(KINDS[kind]().private_bytes(pem, form, serialization.NoEncryption()))
    cosign(folder, "import-key-pair", "--key", "key.pem", "--output-key-prefix", "it", "--yes")
    return load_trust({BUILDER: BuilderConfig(keys={"cosign": folder / "it.pub"})}, max_age=trust().max_age)


def attested(folder: Path, *what: str) -> bytes:
    (folder / "blob").write_bytes(CONTENT)
    cosign(folder, "attest-blob", "--key", "it.key", "--bundle", "out.json", *what, *OFFLINE, "blob")
    return (folder / "out.json").read_bytes()


def judge(evidence: bytes, trusted: ProvenanceTrust) -> Facts:
    return appraise(evidence, [ARTIFACT], trusted, SignerChecks(), NOW)


@pytest.mark.parametrize("kind", ["ecdsa-p256", "ecdsa-p384", "rsa"])
def test_a_statement_that_cosign_signed_is_accepted_and_an_edited_one_is_not(tmp_path: Path, kind: str) -> None:
    trusted = imported(tmp_path, kind)
    (tmp_path / "statement.json").write_text(json.dumps(statement()))
    evidence = attested(tmp_path, "--statement", "statement.json")
    assert judge(evidence, trusted).values["signer"] == "key:cosign"
    edited = json.loads(evidence)
    edited["dsseEnvelope"]["payload"] = json.loads(evidence)["dsseEnvelope"]["payload"][:-8] + "fX19fX0="
    with pytest.raises(AttestationFailed, match="no signature of anybody trusted"):
        judge(json.dumps(edited).encode(), trusted)


def test_the_statement_that_cosign_makes_of_a_predicate_is_of_an_older_version(tmp_path: Path) -> None:
    """Cosign 3.1 still writes Statement/v0.1 there: give it a whole statement."""
    trusted = imported(tmp_path, "ecdsa-p256")
    (tmp_path / "predicate.json").write_text(json.dumps(predicate()))
    evidence = attested(tmp_path, "--predicate", "predicate.json", "--type", "slsaprovenance1")
    with pytest.raises(AttestationFailed, match="_type is not"):
        judge(evidence, trusted)


def test_what_cosign_makes_with_an_ed25519_key_is_ed25519ph_and_refused(tmp_path: Path) -> None:
    """RFC 8032 section 5.1: another algorithm, which `cryptography` does not have."""
    trusted = imported(tmp_path, "ed25519")
    (tmp_path / "statement.json").write_text(json.dumps(statement()))
    with pytest.raises(AttestationFailed, match="no signature of anybody trusted"):
        judge(attested(tmp_path, "--statement", "statement.json"), trusted)
