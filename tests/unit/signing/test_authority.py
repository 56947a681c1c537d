"""The CA's key signs what was linted, once, and what it gives is looked at before it leaves."""

import asyncio
import hashlib
import json
import subprocess
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID
from support.certificates import ISSUER, NOW, content, make_authority, make_folder

from broker.errors import Reason, Unavailable
from broker.signing.authority import Authority
from broker.signing.ca_extend import Plan, extend, organization_of
from broker.signing.ca_folder import CaError, CaFolder, KeyInFile
from broker.signing.ca_key import signer_at
from broker.signing.file_key import FileSigner
from broker.signing.profile import Issuing, NotInProfile, to_be_signed
from broker.signing.signer import Algorithm, PublicKey, UnusableKey


class OtherKey:
    """A token that says it has the CA's key, and signs with another; or that is gone."""

    name = "other"
    algorithm = Algorithm.ECDSA_P256

    def __init__(self, public_key: PublicKey, *, gone: bool = False) -> None:
        self.public_key = public_key
        self._other = FileSigner.from_key(ec.generate_private_key(ec.SECP256R1()), "other")
        self._gone = gone

    async def sign_digest(self, digest: bytes) -> bytes:
        if self._gone:
            raise Unavailable(Reason.SIGNER_UNAVAILABLE, "the token is gone")
        return await self._other.sign_digest(digest)

    async def sign_message(self, message: bytes) -> bytes:
        return await self.sign_digest(hashlib.sha256(message).digest())


def rotate(path: Path, now: Any, **plan: Any) -> CaFolder:
    folder = CaFolder.open(path)
    wanted = {"organization": organization_of(folder), "use_from": now} | plan
    return asyncio.run(extend(folder, Plan(**wanted), signer_at, now))


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return make_authority(tmp_path / "ca")


async def test_what_is_issued_is_signed_by_the_ca_over_exactly_what_was_linted(authority: Authority) -> None:
    wanted = content()
    tbs = to_be_signed(wanted, authority.issuing)
    leaf = x509.load_der_x509_certificate(await authority.issue(tbs))
    assert leaf.tbs_certificate_bytes == tbs.content
    assert leaf.public_key() == wanted.public_key
    issuing, root = map(x509.load_der_x509_certificate, authority.chain)
    leaf.verify_directly_issued_by(issuing)
    issuing.verify_directly_issued_by(root)
    root.verify_directly_issued_by(root)


async def test_openssl_verifies_the_chain_for_code_signing_and_not_after_its_end(
    authority: Authority, tmp_path: Path
) -> None:
    leaf = await authority.issue(to_be_signed(content(), authority.issuing))
    names = ("leaf", "issuing", "root")
    for name, encoded in zip(names, (leaf, *authority.chain), strict=True):
        pem = x509.load_der_x509_certificate(encoded).public_bytes(Encoding.PEM)
        (tmp_path / name).write_bytes(pem)

    def verifies(at: int) -> bool:
        command = ["openssl", "verify", "-x509_strict", "-purpose", "any", "-attime", str(at)]
        chain = ["-CAfile", tmp_path / "root", "-untrusted", tmp_path / "issuing", tmp_path / "leaf"]
        return subprocess.run([*command, *chain], capture_output=True, check=False).returncode == 0

    now = int(NOW.timestamp())
    assert [verifies(at) for at in (now - 11, now, now + 119, now + 121)] == [False, True, True, False]


async def test_a_linted_certificate_is_signed_once(authority: Authority) -> None:
    tbs = to_be_signed(content(), authority.issuing)
    assert await authority.issue(tbs)
    with pytest.raises(ValueError, match="signed before"):
        await authority.issue(tbs)


def test_of_two_threads_one_alone_gets_what_is_to_be_signed(authority: Authority) -> None:
    for _ in range(50):
        tbs = to_be_signed(content(), authority.issuing)
        won: list[bytes] = []
        start = threading.Barrier(2)

        def spend(tbs: Any = tbs, won: list[bytes] = won, start: threading.Barrier = start) -> None:
            start.wait(10)
            try:
                won.append(tbs.spend())
            except ValueError:
                return

        threads = [threading.Thread(target=spend) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert len(won) == 1


async def test_what_was_linted_for_another_ca_is_not_signed_and_not_used_up(tmp_path: Path) -> None:
    folder = await asyncio.to_thread(make_folder, tmp_path / "a")
    await asyncio.to_thread(make_folder, tmp_path / "b")
    one, other = (Authority.open(tmp_path / name, signer_at, NOW) for name in "ab")
    tbs = to_be_signed(content(), one.issuing)
    with pytest.raises(ValueError, match="another CA"):
        await other.issue(tbs)
    assert await one.issue(tbs)
    assert folder.issuer == ISSUER


@pytest.mark.parametrize("gone", [False, True])
async def test_a_key_that_was_exchanged_or_is_gone_gives_no_certificate(authority: Authority, *, gone: bool) -> None:
    public = authority.issuing.certificate.public_key()
    assert isinstance(public, ec.EllipticCurvePublicKey)
    broken = Authority("issuing-1", authority.chain, authority.issuing, OtherKey(public, gone=gone))
    tbs = to_be_signed(content(), authority.issuing)
    with pytest.raises(Unavailable) as error:
        await broken.issue(tbs)
    assert error.value.reason == Reason.SIGNER_UNAVAILABLE
    with pytest.raises(ValueError, match="signed before"):  # it may have been signed: it is used up
        await authority.issue(tbs)


def test_a_key_that_is_not_the_certificates_is_not_taken(authority: Authority) -> None:
    other = FileSigner.from_key(ec.generate_private_key(ec.SECP256R1()), "other")
    with pytest.raises(CaError, match="not the one in its certificate"):
        Authority("issuing-1", authority.chain, authority.issuing, other)


def test_the_cas_are_fulcios_and_the_issuing_one_can_certify_no_ca(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "ca")
    issuing, root = folder.chain(folder.issuing[0])
    for certificate, length, curve in ((issuing, 0, ec.SECP256R1), (root, 1, ec.SECP384R1)):
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
        assert (constraints.critical, constraints.value.ca, constraints.value.path_length) == (True, True, length)
        usage = certificate.extensions.get_extension_for_class(x509.KeyUsage)
        assert (usage.critical, usage.value.key_cert_sign, usage.value.digital_signature) == (True, True, False)
        key = certificate.public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        assert isinstance(key.curve, curve)
        assert len(list(certificate.subject)) == 2
    purposes = issuing.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(purposes) == [ExtendedKeyUsageOID.CODE_SIGNING]
    with pytest.raises(x509.ExtensionNotFound):
        root.extensions.get_extension_for_class(x509.ExtendedKeyUsage)
    assert issuing.not_valid_after_utc <= root.not_valid_after_utc
    with pytest.raises(NotInProfile, match="P-256 or P-384"):
        Issuing.of(x509.load_pem_x509_certificate(_self_signed_ed25519(tmp_path)))


def _self_signed_ed25519(folder: Path) -> bytes:
    made = folder / "ed25519.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ed25519", "-nodes", "-subj", "/CN=x", "-keyout", "/dev/null"]
    subprocess.run([*command, "-out", made], check=True, capture_output=True)
    return made.read_bytes()


def test_the_folder_is_closed_to_others_and_what_is_open_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "ca"
    make_folder(path)
    modes = {file.name: file.stat().st_mode & 0o777 for file in path.iterdir()}
    assert path.stat().st_mode & 0o777 == 0o700
    assert {mode for name, mode in modes.items() if name.endswith(".key.pem")} == {0o600}
    assert not [name for name in modes if name.endswith(".new")]
    path.chmod(0o750)
    with pytest.raises(CaError, match="chmod 700"):
        rotate(path, NOW)
    path.chmod(0o700)
    (path / "issuing-1.key.pem").chmod(0o644)
    with pytest.raises(UnusableKey, match="chmod 600"):
        Authority.open(path, signer_at, NOW)
    (path / "issuing-1.key.pem").chmod(0o600)
    assert Authority.open(path, signer_at, NOW).name == "issuing-1"


def test_the_next_ca_signs_from_its_time_on_and_the_old_one_until_then(tmp_path: Path) -> None:
    path = tmp_path / "ca"
    make_folder(path)
    rotate(path, NOW, use_from=NOW + timedelta(hours=24))
    for hours, name in ((0, "issuing-1"), (23, "issuing-1"), (24, "issuing-2")):
        assert Authority.open(path, signer_at, NOW + timedelta(hours=hours)).name == name
    with pytest.raises(CaError, match="may sign now"):
        Authority.open(path, signer_at, NOW + timedelta(days=400))
    with pytest.raises(CaError, match="may sign now"):
        Authority.open(path, signer_at, NOW - timedelta(days=1))


def test_a_root_kept_offline_is_needed_to_rotate_and_not_to_sign(tmp_path: Path) -> None:
    path = tmp_path / "ca"
    make_folder(path)
    key = path / "root-1.key.pem"
    key.rename(tmp_path / "offline")
    assert Authority.open(path, signer_at, NOW)
    with pytest.raises(UnusableKey, match="cannot be read"):
        rotate(path, NOW)
    (tmp_path / "offline").rename(key)
    rotate(path, NOW)
    rotate(path, NOW, root=True)
    assert [entry.name for entry in CaFolder.open(path).authorities] == [
        "root-1", "issuing-1", "issuing-2", "root-2", "issuing-3",
    ]  # fmt: skip


def test_an_issuing_ca_never_outlives_its_root_and_an_ended_root_makes_none(tmp_path: Path) -> None:
    path = tmp_path / "ca"
    make_folder(path, root_lifetime=timedelta(days=30))
    folder = CaFolder.open(path)
    issuing, root = folder.chain(folder.issuing[0])
    assert issuing.not_valid_after_utc == root.not_valid_after_utc
    with pytest.raises(CaError, match="root has ended"):
        rotate(path, NOW + timedelta(days=31))
    assert rotate(path, NOW + timedelta(days=31), root=True)


def test_two_commands_at_once_do_not_mix_their_files(tmp_path: Path) -> None:
    path = tmp_path / "ca"
    first = make_folder(path)
    rotate(path, NOW)
    plan = Plan(organization="acme", use_from=NOW)
    with pytest.raises(CaError, match="changed meanwhile"):
        asyncio.run(extend(first, plan, signer_at, NOW))
    assert [entry.name for entry in CaFolder.open(path).issuing] == ["issuing-1", "issuing-2"]


def test_a_ca_with_an_old_key_is_not_made(tmp_path: Path) -> None:
    path = tmp_path / "ca"
    make_folder(path)
    old = KeyInFile(file=str(path / "issuing-1.key.pem"))
    with pytest.raises(CaError, match="another CA's"):
        rotate(path, NOW, issuing_key=old)
    with pytest.raises(CaError, match="not the root's"):
        rotate(path, NOW, issuing_key=KeyInFile(file=str(path / "root-1.key.pem")))


DAMAGE = {
    "no-json": lambda _: b"{",
    "another-format": lambda index: json.dumps(index | {"format": 2}).encode(),
    "one-more-member": lambda index: json.dumps(index | {"more": 1}).encode(),
    "a-name-that-leaves-the-folder": lambda index: json.dumps(index).replace("issuing-1", "../issuing-1").encode(),
    "a-name-with-a-line-end": lambda index: json.dumps(index).replace('"issuing-1"', '"issuing-1\\n"').encode(),
    "a-root-that-is-not-there": lambda index: json.dumps(index | {"authorities": index["authorities"][1:]}).encode(),
    "a-ca-twice": lambda index: json.dumps(index | {"authorities": index["authorities"] * 2}).encode(),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_index_is_not_taken(tmp_path: Path, name: str) -> None:
    path = tmp_path / "ca"
    make_folder(path)
    index = json.loads((path / "ca.json").read_bytes())
    assert CaFolder.open(path)
    (path / "ca.json").write_bytes(DAMAGE[name](index))
    with pytest.raises(CaError):
        CaFolder.open(path)


def test_a_certificate_that_its_root_did_not_sign_is_not_taken(tmp_path: Path) -> None:
    make_folder(tmp_path / "a")
    make_folder(tmp_path / "b")
    for name, why in (("issuing-1", "not signed by its root"), ("root-1", "not signed by its root")):
        ours = tmp_path / "a" / f"{name}.pem"
        kept = ours.read_bytes()
        ours.write_bytes((tmp_path / "b" / f"{name}.pem").read_bytes())
        with pytest.raises(CaError, match=why):
            CaFolder.open(tmp_path / "a")
        ours.write_bytes(b"hello")
        with pytest.raises(CaError, match="no certificate"):
            CaFolder.open(tmp_path / "a")
        ours.write_bytes(kept)
        assert CaFolder.open(tmp_path / "a")
