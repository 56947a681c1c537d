"""Stock cosign, by the trusted root that we export, after the certificates have ended; and our own verifier beside it.

Issue "Signing grants": it accepts our bundles, and rejects each tampered sibling.
"""

import asyncio
import base64
import copy
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from support.cli import cli
from support.pki import ISSUER, WORKLOAD
from support.processes import PATIENCE_S
from support.signed import PROVENANCE, digests, spki, statement
from support.sigstore_tools import Cosign, cosign, timestamp_authority
from support.spire import wait_for
from support.timestamps import Tsa

from attestors.dsse import STATEMENT_TYPE, pae
from broker.identity.spiffe_id import SpiffeId
from broker.signing.authority import Authority
from broker.signing.bundle import Material, blob_bundle, statement_bundle
from broker.signing.ca_key import signer_at
from broker.signing.content import BACKDATED, CertificateContent
from broker.signing.file_key import FileSigner
from broker.signing.profile import to_be_signed
from broker.signing.read_trusted_root import read_trusted_root
from broker.signing.timestamp import TimestampAuthority
from broker.signing.verify import NotVerified, verify_bundle, verify_with_key

pytestmark = pytest.mark.cosign

BLOB, OTHER = b"the artifact that was granted\n", b"another artifact\n"
LIVES = timedelta(seconds=4)
KIND = {"blob": "verify-blob", "statement": "verify-blob-attestation"}
Json = dict[str, Any]


@dataclass(kw_only=True)
class Signed:
    """Everything that the tests look at. bundles: by name."""

    folder: Path
    bundles: dict[str, Json] = field(default_factory=dict)

    def write(self, name: str, content: str | bytes | Json) -> Path:
        file = self.folder / name
        text = json.dumps(content) if isinstance(content, dict) else content
        file.write_bytes(text.encode() if isinstance(text, str) else text)
        return file

    def cosign(self, kind: str, bundle: Json, *, blob: str = "blob", root: str = "root.json", **said: str) -> Cosign:
        """By a certificate. said: identity, issuer."""
        return cosign(
            self.folder,
            KIND[kind],
            "--bundle",
            self.write("checked.json", bundle),
            "--trusted-root",
            root,
            "--insecure-ignore-tlog",
            "--insecure-ignore-sct",
            "--use-signed-timestamps",
            "--certificate-identity",
            said.get("identity", WORKLOAD),
            "--certificate-oidc-issuer",
            said.get("issuer", ISSUER),
            *(["--type", "slsaprovenance1"] if kind == "statement" else []),
            blob,
        )


class Maker:
    """Signs as the broker does: a one-time key, certified, stamped, and gone."""

    def __init__(self, authority: Authority, stamps: TimestampAuthority) -> None:
        self._authority = authority
        self._stamps = stamps
        self.ends = datetime.min.replace(tzinfo=UTC)

    async def blob(self, blob: bytes = BLOB) -> Json:
        signer, certificate = await self._certified(blob)
        signature = await signer.sign_message(blob)
        material = Material(certificate=certificate, timestamp=await self._stamps.stamp(signature))
        digest = hashlib.sha256(blob).digest()
        return json.loads(blob_bundle(material, hash_name="sha256", digest=digest, signature=signature))

    async def statement(self, said: bytes) -> Json:
        signer, certificate = await self._certified(BLOB)
        signature = await signer.sign_message(pae(STATEMENT_TYPE, said))
        material = Material(certificate=certificate, timestamp=await self._stamps.stamp(signature))
        return json.loads(statement_bundle(material, statement=said, signature=signature))

    async def _certified(self, blob: bytes) -> tuple[FileSigner, bytes]:
        signer = FileSigner.from_key(ec.generate_private_key(ec.SECP256R1()), "")
        now = datetime.now(UTC)
        content = CertificateContent(
            spiffe_id=SpiffeId.parse(WORKLOAD),
            issuer=ISSUER,
            public_key=signer.public_key,
            not_before=now - BACKDATED,
            not_after=now + LIVES,
            grant_id="grant-1",
            action_digest=hashlib.sha256(b"action").digest(),
            artifacts=({"sha256": hashlib.sha256(blob).hexdigest(), "sha512": hashlib.sha512(blob).hexdigest()},),
            policy_revision="policy-1",
            provenance=PROVENANCE,
        )
        self.ends = max(self.ends, content.not_after)
        return signer, await self._authority.issue(to_be_signed(content, self._authority.issuing))


def _authority(folder: Path, tsa_chain: bytes) -> Authority:
    """A CA by our own commands, and its trusted root beside it."""
    assert cli("ca", "init", folder / "ca", "--issuer", ISSUER).code == 0
    (folder / "tsa.pem").write_bytes(tsa_chain)
    exported = cli("ca", "trusted-root", folder / "ca", "--tsa-chain", folder / "tsa.pem")
    assert exported.code == 0, exported.err
    (folder / "root.json").write_text(exported.out)
    return Authority.open(folder / "ca", signer_at, datetime.now(UTC))


async def _make(signed: Signed) -> None:
    folder = signed.folder
    (folder / "elsewhere").mkdir()
    with timestamp_authority() as server:
        ours, theirs = (_authority(where, server.pem) for where in (folder, folder / "elsewhere"))
        async with TimestampAuthority(server.url, [server.root]) as stamps:
            maker = Maker(ours, stamps)
            signed.bundles = {
                "blob": await maker.blob(),
                "another of the same": await maker.blob(),
                "of another artifact": await maker.blob(OTHER),
                "by another CA": await Maker(theirs, stamps).blob(),
                "statement": await maker.statement(statement(BLOB)),
                "statement about another artifact": await maker.statement(statement(OTHER)),
            }
            now, signature = datetime.now(UTC), _signature_of(signed.bundles["blob"])
            _add(signed, "stamped by a stranger", Tsa.made(now).stamp(signature, now.replace(microsecond=0)))
            wait_for(lambda: datetime.now(UTC) > maker.ends + timedelta(seconds=1), PATIENCE_S)
            _add(signed, "stamped after the end", await stamps.stamp(signature))


def _add(signed: Signed, name: str, stamp: bytes) -> None:
    """The blob's bundle with another timestamp."""
    bundle = copy.deepcopy(signed.bundles["blob"])
    _stamps(bundle)[0]["signedTimestamp"] = _encoded(stamp)
    signed.bundles[name] = bundle


def _signature_of(bundle: Json) -> bytes:
    return _decoded(bundle["messageSignature"]["signature"])


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Signed]:
    found = Signed(folder=tmp_path_factory.mktemp("cosign"))
    asyncio.run(_make(found))
    found.write("blob", BLOB)
    found.write("other", OTHER)
    root = json.loads((found.folder / "root.json").read_text())
    found.write("root-without-tsa.json", root | {"timestampAuthorities": []})
    found.write("root-without-ca.json", root | {"certificateAuthorities": []})
    return found


def _encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _decoded(text: str) -> bytes:
    return base64.b64decode(text)


def _flipped(text: str, at: int = -5) -> str:
    data = bytearray(_decoded(text))
    data[at] ^= 1
    return _encoded(bytes(data))


def _stamps(bundle: Json) -> list[Json]:
    found: list[Json] = bundle["verificationMaterial"]["timestampVerificationData"]["rfc3161Timestamps"]
    return found


def _ours(signed: Signed, bundle: Json, blob: bytes = BLOB) -> None:
    root = read_trusted_root((signed.folder / "root.json").read_bytes())
    verify_bundle(json.dumps(bundle), digests(blob), root, datetime.now(UTC), identity=WORKLOAD, issuer=ISSUER)


@pytest.mark.parametrize("kind", ["blob", "statement"])
def test_cosign_accepts_our_bundle_after_its_certificate_has_ended(signed: Signed, kind: str) -> None:
    bundle = signed.bundles[kind]
    leaf = x509.load_der_x509_certificate(_decoded(bundle["verificationMaterial"]["certificate"]["rawBytes"]))
    assert leaf.not_valid_after_utc < datetime.now(UTC)
    ran = signed.cosign(kind, bundle)
    assert ran.code == 0, ran.err
    _ours(signed, bundle)


def _signature(bundle: Json, signed: Signed) -> None:
    content = bundle.get("messageSignature") or bundle["dsseEnvelope"]["signatures"][0]
    name = "signature" if "signature" in content else "sig"
    content[name] = _flipped(content[name])


def _signature_of_another(bundle: Json, signed: Signed) -> None:
    other = signed.bundles["another of the same"]["messageSignature"]["signature"]
    if "messageSignature" in bundle:
        bundle["messageSignature"]["signature"] = other
    else:
        bundle["dsseEnvelope"]["signatures"][0]["sig"] = other


def _certificate_of_another(bundle: Json, signed: Signed) -> None:
    other = signed.bundles["another of the same"]["verificationMaterial"]["certificate"]
    bundle["verificationMaterial"]["certificate"] = other


def _certificate_changed(bundle: Json, signed: Signed) -> None:
    """One character of the SPIFFE ID."""
    inner = bundle["verificationMaterial"]["certificate"]
    changed = _decoded(inner["rawBytes"]).replace(b"/build/agent", b"/build/agenx", 1)
    inner["rawBytes"] = _encoded(changed)


def _certificate_missing(bundle: Json, signed: Signed) -> None:
    del bundle["verificationMaterial"]["certificate"]


def _timestamp_missing(bundle: Json, signed: Signed) -> None:
    del bundle["verificationMaterial"]["timestampVerificationData"]


def _timestamp_changed(bundle: Json, signed: Signed) -> None:
    stamp = _stamps(bundle)[0]
    stamp["signedTimestamp"] = _flipped(stamp["signedTimestamp"])


def _timestamp_of_another(bundle: Json, signed: Signed) -> None:
    _stamps(bundle)[:] = _stamps(signed.bundles["another of the same"])


def _timestamp_without_token(bundle: Json, signed: Signed) -> None:
    _stamps(bundle)[0]["signedTimestamp"] = _encoded(bytes.fromhex("30053003020102"))


def _media_type(bundle: Json, signed: Signed) -> None:
    bundle["mediaType"] = "application/vnd.dev.sigstore.bundle.v9.9+json"


def _both_contents(bundle: Json, signed: Signed) -> None:
    other = signed.bundles["statement" if "messageSignature" in bundle else "blob"]
    bundle.update({name: other[name] for name in ("messageSignature", "dsseEnvelope") if name in other})


EITHER = {
    "a bit of the signature": _signature,
    "the signature of another key": _signature_of_another,
    "the certificate of another signature": _certificate_of_another,
    "a name changed in the certificate": _certificate_changed,
    "no certificate": _certificate_missing,
    "no timestamp": _timestamp_missing,
    "a bit of the timestamp": _timestamp_changed,
    "the timestamp of another signature": _timestamp_of_another,
    "a refusal in place of the timestamp": _timestamp_without_token,
    "another media type": _media_type,
    "two contents": _both_contents,
}


@pytest.mark.parametrize("tamper", EITHER.values(), ids=EITHER)
@pytest.mark.parametrize("kind", ["blob", "statement"])
def test_a_tampered_sibling_is_rejected(signed: Signed, kind: str, tamper: Callable[[Json, Signed], None]) -> None:
    bundle = copy.deepcopy(signed.bundles[kind])
    tamper(bundle, signed)
    assert bundle != signed.bundles[kind]
    assert signed.cosign(kind, bundle).code != 0
    with pytest.raises(NotVerified):
        _ours(signed, bundle)


@pytest.mark.parametrize("name", ["stamped by a stranger", "by another CA", "stamped after the end"])
def test_a_sibling_that_others_vouch_for_is_rejected(signed: Signed, name: str) -> None:
    assert signed.cosign("blob", signed.bundles[name]).code != 0
    with pytest.raises(NotVerified):
        _ours(signed, signed.bundles[name])


def test_a_bundle_about_another_artifact_is_rejected(signed: Signed) -> None:
    other, swapped = signed.bundles["of another artifact"], copy.deepcopy(signed.bundles["blob"])
    swapped["messageSignature"]["messageDigest"] = other["messageSignature"]["messageDigest"]
    for blob, bundle in (("blob", other), ("other", signed.bundles["blob"]), ("other", swapped)):
        assert signed.cosign("blob", bundle, blob=blob).code != 0
        with pytest.raises(NotVerified):
            _ours(signed, bundle, BLOB if blob == "blob" else OTHER)
    assert signed.cosign("blob", other, blob="other").code == 0


def test_a_statement_is_about_its_subjects_alone(signed: Signed) -> None:
    payload, kind = copy.deepcopy(signed.bundles["statement"]), copy.deepcopy(signed.bundles["statement"])
    payload["dsseEnvelope"]["payload"] = _encoded(statement(OTHER))
    kind["dsseEnvelope"]["payloadType"] = "application/json"
    for blob, bundle in (("other", signed.bundles["statement"]), ("other", payload), ("blob", kind)):
        assert signed.cosign("statement", bundle, blob=blob).code != 0
        with pytest.raises(NotVerified):
            _ours(signed, bundle, BLOB if blob == "blob" else OTHER)


def test_a_statement_about_what_was_not_granted_is_ours_to_reject(signed: Signed) -> None:
    """The grant stands in an attribute of ours, which cosign does not read: so `Sign` compares before it signs."""
    bundle = signed.bundles["statement about another artifact"]
    with pytest.raises(NotVerified, match="another artifact"):
        _ours(signed, bundle, OTHER)


@pytest.mark.parametrize("kind", ["blob", "statement"])
def test_another_identity_issuer_or_root_is_rejected(signed: Signed, kind: str) -> None:
    bundle = signed.bundles[kind]
    assert signed.cosign(kind, bundle, identity=f"{WORKLOAD}/other").code != 0
    assert signed.cosign(kind, bundle, issuer=f"{ISSUER}/other").code != 0
    assert signed.cosign(kind, bundle, root="elsewhere/root.json").code != 0
    assert signed.cosign(kind, bundle, root="root-without-tsa.json").code != 0
    assert signed.cosign(kind, bundle, root="root-without-ca.json").code != 0
    assert signed.cosign(kind, bundle).code == 0


NAMED = {
    "p256": ("blob", lambda: ec.generate_private_key(ec.SECP256R1())),
    "p256-statement": ("statement", lambda: ec.generate_private_key(ec.SECP256R1())),
    "ed25519-statement": ("statement", ed25519.Ed25519PrivateKey.generate),
}
# With P-384 cosign hashes by SHA-256, and with RSA it wants PKCS #1 v1.5.
OURS_ALONE = {
    "p384": ("blob", lambda: ec.generate_private_key(ec.SECP384R1())),
    "p384-statement": ("statement", lambda: ec.generate_private_key(ec.SECP384R1())),
    "rsa-pss": ("blob", lambda: rsa.generate_private_key(65537, 2048)),
    "rsa-pss-statement": ("statement", lambda: rsa.generate_private_key(65537, 2048)),
}


async def _by_named_key(kind: str, key: Any) -> tuple[Json, FileSigner]:
    signer = FileSigner.from_key(key, "release")
    material = Material(public_key=spki(signer.public_key))
    if kind == "statement":
        signature = await signer.sign_message(pae(STATEMENT_TYPE, statement(BLOB)))
        return json.loads(statement_bundle(material, statement=statement(BLOB), signature=signature)), signer
    hash_name = signer.algorithm.hash_name or ""
    digest, signature = hashlib.new(hash_name, BLOB).digest(), await signer.sign_message(BLOB)
    return json.loads(blob_bundle(material, hash_name=hash_name, digest=digest, signature=signature)), signer


def _accepts(signed: Signed, kind: str, bundle: Json, key: Any) -> bool:
    """Whether cosign does, by the key."""
    pem = signed.write("key.pem", key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    more = ["--type", "slsaprovenance1"] if kind == "statement" else []
    file = signed.write("checked.json", bundle)
    ran = cosign(signed.folder, KIND[kind], "--bundle", file, "--key", pem, "--insecure-ignore-tlog", *more, "blob")
    return ran.code == 0


@pytest.mark.parametrize(("kind", "make"), NAMED.values(), ids=NAMED)
async def test_cosign_accepts_a_named_key_and_rejects_another(
    signed: Signed, kind: str, make: Callable[[], Any]
) -> None:
    bundle, signer = await _by_named_key(kind, make())
    changed = copy.deepcopy(bundle)
    _signature(changed, signed)
    assert _accepts(signed, kind, bundle, signer.public_key)
    assert not _accepts(signed, kind, changed, signer.public_key)
    assert not _accepts(signed, kind, bundle, make().public_key())


@pytest.mark.parametrize(("kind", "make"), OURS_ALONE.values(), ids=OURS_ALONE)
async def test_what_cosign_does_not_know_our_own_verifier_does(
    signed: Signed, kind: str, make: Callable[[], Any]
) -> None:
    bundle, signer = await _by_named_key(kind, make())
    assert not _accepts(signed, kind, bundle, signer.public_key)
    verify_with_key(json.dumps(bundle), digests(BLOB), signer.public_key, datetime.now(UTC))
    with pytest.raises(NotVerified):
        verify_with_key(json.dumps(bundle), digests(OTHER), signer.public_key, datetime.now(UTC))
