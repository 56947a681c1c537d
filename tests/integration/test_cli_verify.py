"""`action-broker verify`, as users have it."""

import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from support.cli import Ran, cli
from support.pki import ISSUER, WORKLOAD
from support.signed import BLOB, SOURCE, Ca

BEFORE = timedelta(hours=1)


@dataclass(frozen=True)
class Files:
    """folder: artifact, other, root.json, bundle.json (signed an hour ago, stamped), unstamped.json (signed now)."""

    folder: Path

    def verify(self, *more: object, file: str = "artifact", bundle: str = "bundle.json") -> Ran:
        return cli("verify", self.folder / file, "--bundle", self.folder / bundle, *more)

    @property
    def root(self) -> tuple[object, ...]:
        return "--trusted-root", self.folder / "root.json"


@pytest.fixture
async def files(tmp_path: Path) -> Files:
    now = datetime.now(UTC).replace(microsecond=0)
    ca = await Ca.made(now - 2 * BEFORE)
    contents: dict[str, bytes | dict[str, Any]] = {
        "artifact": BLOB,
        "other": b"another artifact\n",
        "root.json": ca.trusted_root(),
        "bundle.json": await ca.blob_bundle(at=now - BEFORE),
        "unstamped.json": await ca.blob_bundle(at=now, stamped=False, lifetime=timedelta(minutes=5)),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return Files(tmp_path)


def test_it_tells_people_who_signed_what_and_why(files: Files) -> None:
    ran = files.verify(*files.root, "--identity", WORKLOAD, "--issuer", ISSUER)
    assert ran.code == 0, ran.err
    assert ran.err == ""
    for told in ("verified", WORKLOAD, ISSUER, SOURCE, "spiffe://acme.test/node/1", "grant-1", "policy-1", "proven by"):
        assert told in ran.out
    assert "--identity" not in ran.out
    assert "stops verifying" not in ran.out


def test_it_tells_scripts_the_same(files: Files) -> None:
    ran = files.verify(*files.root, "--json")
    assert ran.code == 0, ran.err
    told = ran.value
    assert told["verified"] is True
    assert (told["identity"], told["issuer"], told["time_proven"]) == (WORKLOAD, ISSUER, True)
    assert told["decision"]["grant_id"] == "grant-1"


def test_it_warns_of_what_was_not_asked_and_what_will_end(files: Files) -> None:
    ran = files.verify(*files.root, bundle="unstamped.json")
    assert ran.code == 0, ran.err
    assert "name the one that must have signed with --identity" in ran.out
    assert "this bundle stops verifying when its certificate ends" in ran.out


@pytest.mark.parametrize(
    ("more", "file", "fault"),
    [
        ((), "other", "artifact"),
        (("--identity", "spiffe://acme.test/another"), "artifact", "identity"),
        (("--issuer", "https://another.test"), "artifact", "identity"),
    ],
    ids=["another-artifact", "another-identity", "another-issuer"],
)
def test_a_signature_that_does_not_count_is_refused_with_its_reason(
    files: Files, more: tuple[str, ...], file: str, fault: str
) -> None:
    ran = files.verify(*files.root, *more, file=file)
    assert ran.code == 3
    assert ran.err.startswith(f"not verified ({fault}): ")
    assert "verified:" not in ran.out
    told = files.verify(*files.root, *more, "--json", file=file)
    assert (told.code, told.value["verified"], told.value["fault"]) == (3, False, fault)


def test_a_tampered_bundle_is_refused(files: Files) -> None:
    bundle = json.loads((files.folder / "bundle.json").read_text())
    bundle["messageSignature"]["signature"] = "AAAA"
    (files.folder / "bundle.json").write_text(json.dumps(bundle))
    assert files.verify(*files.root).code == 3


def test_it_wants_to_know_whom_to_believe(files: Files) -> None:
    ran = files.verify()
    assert ran.code == 2
    assert "--trusted-root" in ran.err


def test_a_key_says_no_identity(files: Files) -> None:
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    pem = files.folder / "key.pem"
    pem.write_bytes(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    assert files.verify("--key", pem, "--identity", WORKLOAD).code == 2
    ran = files.verify("--key", pem)
    assert ran.code == 3
    assert "without --key" in ran.err


def test_a_root_or_key_that_cannot_be_read_is_a_mistake_of_usage(files: Files) -> None:
    assert files.verify("--trusted-root", files.folder / "artifact").code == 2
    assert files.verify("--key", files.folder / "artifact").code == 2
    (files.folder / "large").write_bytes(bytes(1 << 21))
    assert "larger than" in files.verify(*files.root, bundle="large").err


def test_what_a_bundle_says_moves_no_cursor(files: Files) -> None:
    bundle = json.loads((files.folder / "bundle.json").read_text())
    bundle["mediaType"] = "\x1b[2J"
    (files.folder / "bundle.json").write_text(json.dumps(bundle))
    ran = files.verify(*files.root)
    assert ran.code == 3
    assert "\x1b[2J" not in ran.out + ran.err
