"""A CSR gives a key and proof of its possession for this grant: every file in tests/vectors/csr, and real tools'."""

import base64
import json
import subprocess
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from vectors.make_csr_vectors import FOLDER, NONCE, build

from broker.errors import Reason, Refused
from broker.signing import csr
from broker.signing.signer import PublicKey

VECTORS = {file.stem: json.loads(file.read_text()) for file in FOLDER.glob("*.json")}
SOUND = sorted(name for name, vector in VECTORS.items() if vector["expect"] == "accepted")
NEGATIVES = sorted(VECTORS.keys() - set(SOUND))


def key_of(name: str) -> PublicKey:
    return csr.verified_key(base64.b64decode(VECTORS[name]["csr"]), VECTORS[name]["nonce"])


def test_the_files_are_what_the_program_makes() -> None:
    assert build() == VECTORS


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_request_gives_its_key(name: str) -> None:
    found = key_of(name).public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    assert found in base64.b64decode(VECTORS[name]["csr"])


@pytest.mark.parametrize("name", NEGATIVES)
def test_a_defect_is_refused_for_its_own_reason_and_the_sound_one_is_not(name: str) -> None:
    assert key_of("sound")
    with pytest.raises(Refused) as error:
        key_of(name)
    assert error.value.reason == Reason(VECTORS[name]["expect"]), error.value.detail


def test_a_request_for_one_grant_is_none_for_the_next() -> None:
    made = base64.b64decode(VECTORS["sound"]["csr"])
    assert csr.verified_key(made, NONCE)
    for nonce in ("", "x", NONCE + "x", "é" * 22):
        with pytest.raises(Refused) as error:
            csr.verified_key(made, nonce)
        assert error.value.reason == Reason.PROOF_REPLAYED
        assert NONCE not in str(error.value)


def test_what_is_too_large_is_not_read() -> None:
    with pytest.raises(Refused, match="larger"):
        csr.verified_key(b"\x30" * (csr.MAX_CSR + 1), NONCE)


def test_every_flipped_bit_of_a_sound_request_is_refused() -> None:
    made = base64.b64decode(VECTORS["sound"]["csr"])
    for place in range(len(made)):
        flipped = made[:place] + bytes((made[place] ^ 0x01,)) + made[place + 1 :]
        with pytest.raises(Refused):
            csr.verified_key(flipped, NONCE)


@pytest.mark.parametrize(
    "kind", ["EC -pkeyopt ec_paramgen_curve:P-256", "RSA -pkeyopt rsa_keygen_bits:2048", "ED25519"]
)
def test_openssl_makes_what_is_accepted(kind: str, tmp_path: Path) -> None:
    config = tmp_path / "csr.cnf"
    config.write_text(
        "[req]\nprompt = no\ndistinguished_name = name\nattributes = more\n"
        f"[name]\nCN = whatever\n[more]\nchallengePassword = {NONCE}\n"
    )
    key, made = tmp_path / "key.pem", tmp_path / "csr.der"
    subprocess.run(["openssl", "genpkey", "-algorithm", *kind.split(), "-out", key], check=True, capture_output=True)
    asked = ["openssl", "req", "-new", "-config", config, "-key", key, "-outform", "DER", "-out", made]
    subprocess.run(asked, check=True, capture_output=True)
    assert csr.verified_key(made.read_bytes(), NONCE)


def test_the_key_alone_is_taken_from_a_request_with_names() -> None:
    made = base64.b64decode(VECTORS["sound-with-a-name"]["csr"])
    assert "root of everything" in x509.load_der_x509_csr(made).subject.rfc4514_string()
    assert isinstance(csr.verified_key(made, NONCE), ec.EllipticCurvePublicKey)
