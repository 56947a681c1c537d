"""`ca init|rotate|show|trusted-root`, as operators run them, with keys in files and in a token.

What cosign says of the certificates and of the trusted root is in test_cosign.py.
"""

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from support.certificates import AGENT, ISSUER, content
from support.cli import Ran, cli
from support.softhsm import SoftHsm

from broker.signing.authority import Authority
from broker.signing.ca_folder import CaFolder
from broker.signing.ca_key import signer_at
from broker.signing.content import validity
from broker.signing.pkcs11 import Token
from broker.signing.profile import to_be_signed


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What `ca init` writes."""
    ran = cli("ca", "init", tmp_path / "ca", "--issuer", ISSUER)
    assert ran.code == 0, ran.err
    return tmp_path / "ca"


def states(folder: Path) -> dict[str, str]:
    ran = cli("ca", "show", folder, "--json")
    assert ran.code == 0
    return {row["name"]: row["state"] for row in ran.value}


def issue(authority: Authority, **changes: Any) -> x509.Certificate:
    """A certificate of now."""
    now = datetime.now(UTC)
    begin, end = validity(now, until=now + timedelta(minutes=2))
    wanted = content(not_before=begin, not_after=end, **changes)
    return x509.load_der_x509_certificate(asyncio.run(authority.issue(to_be_signed(wanted, authority.issuing))))


def test_init_makes_a_ca_that_signs_and_is_written_over_by_nothing(folder: Path) -> None:
    assert states(folder) == {"root-1": "root", "issuing-1": "signs"}
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    again = cli("ca", "init", folder, "--issuer", ISSUER)
    assert (again.code, "not empty" in again.err) == (2, True)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    leaf = issue(Authority.open(folder, signer_at, datetime.now(UTC)))
    assert leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value.get_values_for_type(
        x509.UniformResourceIdentifier
    ) == [str(AGENT)]


def test_after_rotate_old_and_new_overlap_in_the_trusted_root(folder: Path) -> None:
    soon = cli("ca", "rotate", folder)
    assert soon.code == 0
    assert states(folder) == {"root-1": "root", "issuing-1": "signs", "issuing-2": "next"}
    at_once = cli("ca", "rotate", folder, "--root", "--sign-in-hours", "0", "--issuing-days", "30", "--json")
    assert [row["state"] for row in at_once.value] == ["root", "signs"]
    assert states(folder) == {
        "root-1": "root", "issuing-1": "replaced", "issuing-2": "replaced", "root-2": "root", "issuing-3": "signs",
    }  # fmt: skip
    ran = cli("ca", "trusted-root", folder)
    assert len(ran.value["certificateAuthorities"]) == 3
    assert cli("ca", "trusted-root", folder, "--json").value == ran.value


def test_no_command_prints_a_private_key(folder: Path) -> None:
    secrets = [file.read_text().splitlines()[1] for file in folder.glob("*.key.pem")]
    commands = (("show", folder), ("rotate", folder), ("trusted-root", folder), ("show", folder, "--json"))
    said = "".join(ran.out + ran.err for ran in (cli("ca", *command) for command in commands))
    assert len(secrets) == 2
    assert not any(secret in said for secret in secrets)


def refused(*arguments: object) -> Ran:
    ran = cli("ca", *arguments)
    assert (ran.code, ran.out) == (2, "")
    assert "Traceback" not in ran.err
    return ran


def test_every_mistake_is_a_sentence_that_says_what_to_do(folder: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    for issuer in ("http://broker.acme.test", "broker", "https://", "https://a\nb"):
        assert "https" in refused("init", new, "--issuer", issuer).err
    assert "--organization" in refused("init", new, "--issuer", ISSUER, "--organization", "a\nb").err
    assert "--label" in refused("init", new, "--issuer", ISSUER, "--module", "/lib/x.so").err
    assert "--module" in refused("init", new, "--issuer", ISSUER, "--label", "ca").err
    assert not new.exists()
    for command in ("show", "rotate", "trusted-root"):
        assert "ca init" in refused(command, new).err
    chain = tmp_path / "chain.pem"
    chain.write_text("hello")
    assert "timestamp authority" in refused("trusted-root", folder, "--tsa-chain", chain).err
    (folder / "root-1.key.pem").unlink()
    assert "root-1.key.pem" in refused("rotate", folder).err
    assert "--root" in refused("rotate", folder, "--root-label", "x").err
    assert cli("ca", "rotate", folder, "--root").code == 0  # the offline root is not needed for a new one
    (folder / "ca.json").write_text("{")
    assert "damaged" in refused("show", folder).err


@pytest.mark.softhsm
def test_keys_in_a_token_sign_and_none_is_in_the_folder(tmp_path: Path) -> None:
    with SoftHsm(tmp_path / "hsm") as hsm:
        for kind, label in (("p384", "root"), ("p256", "one"), ("p384", "two"), ("rsa2048", "rsa")):
            hsm.make_key(kind, label)
        folder = tmp_path / "ca"
        token = ("--module", hsm.module, "--token", hsm.label, "--pin-file", hsm.pin_file)
        wrong = cli("ca", "init", tmp_path / "wrong", "--issuer", ISSUER, *token, "--label", "rsa")
        assert (wrong.code, "P-256 or P-384" in wrong.err) == (2, True)
        missing = cli("ca", "init", tmp_path / "missing", "--issuer", ISSUER, *token, "--label", "three")
        assert (missing.code, "three" in missing.err) == (2, True)
        made = cli("ca", "init", folder, "--issuer", ISSUER, *token, "--label", "one", "--root-label", "root")
        assert made.code == 0, made.err
        assert list(folder.glob("*.key.pem")) == []
        assert hsm.pin not in "".join(file.read_text() for file in folder.iterdir()) + made.out + made.err
        same = cli("ca", "rotate", folder, "--label", "one")
        assert (same.code, "another CA's" in same.err) == (2, True)
        unnamed = cli("ca", "rotate", folder)
        assert (unnamed.code, "--label" in unnamed.err) == (2, True)
        assert cli("ca", "rotate", folder, "--label", "two", "--sign-in-hours", "0").code == 0
        assert states(folder) == {"root-1": "root", "issuing-1": "replaced", "issuing-2": "signs"}
        found = CaFolder.open(folder)
        assert found.issuing[1].key.label == "two"  # type: ignore[union-attr]
        with Token(hsm.module, hsm.label, hsm.pin_file) as opened:
            issued = issue(Authority.open(folder, lambda _, name: opened.signer("two", name), datetime.now(UTC)))
        issued.verify_directly_issued_by(found.certificates["issuing-2"])
        assert isinstance(issued.signature_hash_algorithm, hashes.SHA384)
        hsm.take_away()
        gone = cli("ca", "rotate", folder, "--label", "two")
        assert gone.code in {2, 4}
        assert "Traceback" not in gone.err
