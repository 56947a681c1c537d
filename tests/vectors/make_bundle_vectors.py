"""Writes tests/vectors/bundle/**: bundles with one defect each, and the sound ones they differ from.

Run it from the root: `PYTHONPATH=.:tests python -m vectors.make_bundle_vectors`. Keys are new each time, and so are the
bytes; what each vector is to show stays.

setup.json: the trusted root, `now` (after every certificate has ended), the artifact (base64) and public keys (PEM). A
vector: `bundle` (its JSON) or `text` (where it is no JSON, or none with unique names); `key`: the named key that it is
verified with; `expect`: "verified" or the Fault; `control`: the sound vector that differs in nothing but the defect.
"""

import asyncio
import base64
import copy
import hashlib
import json
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from support.pki import NOW
from support.signed import BLOB, Ca, spki, statement
from support.timestamps import Tsa

from attestors.dsse import STATEMENT_TYPE, pae
from broker.signing.bundle import Material, blob_bundle, statement_bundle
from broker.signing.file_key import FileSigner

FOLDER = Path(__file__).parent / "bundle"
OTHER = b"another artifact\n"
Json = dict[str, Any]


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _flip(text: str) -> str:
    data = bytearray(base64.b64decode(text))
    data[-5] ^= 1
    return _b64(bytes(data))


def _at(bundle: Json, path: str) -> tuple[Any, str | int]:
    """The container and key of a dotted path: `verificationMaterial.certificate`, `a.0.b`."""
    *above, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    found: Any = bundle
    for part in above:
        found = found[part]
    return found, last


def changed(bundle: Json, path: str, change: Any) -> Json:
    """A copy with another value there. change: the value, a function of the old one, or None to take it away."""
    found = copy.deepcopy(bundle)
    where, last = _at(found, path)
    if change is None:
        del where[last]
    else:
        where[last] = change(where[last]) if callable(change) else change
    return found


CERTIFICATE = "verificationMaterial.certificate.rawBytes"
STAMPS = "verificationMaterial.timestampVerificationData.rfc3161Timestamps"
STAMP = f"{STAMPS}.0.signedTimestamp"
SIGNATURE = "messageSignature.signature"
DIGEST = "messageSignature.messageDigest"
ENVELOPE_SIGNATURE = "dsseEnvelope.signatures.0.sig"


def _value(bundle: Json, path: str) -> Any:
    where, last = _at(bundle, path)
    return where[last]


def _in_certificate(old: bytes, new: bytes) -> Callable[[str], str]:
    def change(text: str) -> str:
        der = base64.b64decode(text)
        assert old in der
        return _b64(der.replace(old, new))

    return change


def form_defects(blob: Json) -> dict[str, tuple[str, Json | str]]:
    """What is no such bundle, whoever signed. All fail as `bundle`."""
    text = json.dumps(blob)
    defects: dict[str, Json | str] = {
        "no-json": text[:-1],
        "a-list": "[]",
        "a-name-twice": text[:-1] + ', "mediaType": "x"}',
        "another-media-type": changed(blob, "mediaType", "application/vnd.dev.sigstore.bundle.v0.2+json"),
        "no-media-type": changed(blob, "mediaType", None),
        "no-material": changed(blob, "verificationMaterial", None),
        "certificate-and-key": changed(blob, "verificationMaterial", lambda old: old | {"publicKey": {"hint": "x"}}),
        "a-certificate-chain": changed(
            blob,
            "verificationMaterial",
            lambda old: {"x509CertificateChain": {"certificates": [old["certificate"]]}},
        ),
        "two-contents": blob | {"dsseEnvelope": {"payload": "", "payloadType": "x", "signatures": [{"sig": ""}]}},
        "no-content": changed(blob, "messageSignature", None),
        "an-empty-signature": changed(blob, SIGNATURE, ""),
        "a-signature-longer-than-any": changed(blob, SIGNATURE, _b64(bytes(2049))),
        "base64-without-padding": changed(blob, f"{DIGEST}.digest", lambda old: old.rstrip("=")),
        "base64-with-white-space": changed(blob, SIGNATURE, lambda old: old[:8] + "\n" + old[8:]),
        "base64-of-two-alphabets": changed(blob, SIGNATURE, lambda old: "+-" + old[2:]),
        "an-unknown-hash": changed(blob, f"{DIGEST}.algorithm", "SHA1"),
        "a-digest-of-another-hash": changed(blob, f"{DIGEST}.algorithm", "SHA2_384"),
        "an-empty-certificate": changed(blob, CERTIFICATE, ""),
        "five-timestamps": changed(blob, STAMPS, lambda old: old * 5),
        "timestamps-not-a-list": changed(blob, STAMPS, {}),
    }
    return {name: ("bundle", item) for name, item in defects.items()}


async def blob_defects(ca: Ca, blob: Json) -> dict[str, tuple[str, Json]]:
    another, stranger = await ca.blob_bundle(), await (await Ca.made()).blob_bundle()
    signature = base64.b64decode(_value(blob, SIGNATURE))
    long_after = NOW + timedelta(hours=1)
    sha384 = _b64(hashlib.sha384(BLOB).digest())
    renamed = _in_certificate(b"/build/agent", b"/build/other")
    no_stamps = changed(blob, STAMPS, [])
    return {
        "a-bit-of-the-signature": ("timestamp", changed(blob, SIGNATURE, _flip)),
        "a-bit-of-the-stamped-signature": (
            "signature",
            changed(
                changed(blob, SIGNATURE, _flip),
                STAMP,
                _b64(ca.tsa.stamp(base64.b64decode(_flip(_value(blob, SIGNATURE))), NOW)),
            ),
        ),
        "another-certificate-of-the-same": ("signature", changed(blob, CERTIFICATE, _value(another, CERTIFICATE))),
        "another-ca": ("timestamp", stranger),
        "another-ca-stamped-well": (
            "certificate",
            changed(stranger, STAMP, _b64(ca.tsa.stamp(base64.b64decode(_value(stranger, SIGNATURE)), NOW))),
        ),
        "a-name-changed-in-the-certificate": ("certificate", changed(blob, CERTIFICATE, renamed)),
        "a-certificate-that-is-none": ("certificate", changed(blob, CERTIFICATE, _b64(b"no certificate"))),
        "the-ca-itself": ("certificate", changed(blob, CERTIFICATE, _b64(ca.issuing.public_bytes(Encoding.DER)))),
        "no-timestamp": ("certificate", no_stamps),
        "stamped-after-the-end": ("certificate", changed(blob, STAMP, _b64(ca.tsa.stamp(signature, long_after)))),
        "stamped-before-the-beginning": (
            "certificate",
            changed(blob, STAMP, _b64(ca.tsa.stamp(signature, NOW - timedelta(minutes=1)))),
        ),
        "stamped-by-a-stranger": ("timestamp", changed(blob, STAMP, _b64(Tsa.made().stamp(signature, NOW)))),
        "the-timestamp-of-another": ("timestamp", changed(blob, STAMP, _value(another, STAMP))),
        "a-bit-of-the-timestamp": ("timestamp", changed(blob, STAMP, _flip)),
        "another-artifact": ("artifact", await ca.blob_bundle(OTHER)),
        "the-digest-of-another": ("artifact", changed(blob, f"{DIGEST}.digest", _b64(hashlib.sha256(OTHER).digest()))),
        "certified-for-another": ("artifact", await ca.blob_bundle(artifacts=_artifact(OTHER))),
        "certified-with-another-sha512": (
            "artifact",
            await ca.blob_bundle(artifacts=_artifact(BLOB, sha512=hashlib.sha512(OTHER).hexdigest())),
        ),
        "the-hash-of-another-algorithm": (
            "signature",
            changed(blob, DIGEST, {"algorithm": "SHA2_384", "digest": sha384}),
        ),
    }


def _artifact(blob: bytes, **more: str) -> tuple[dict[str, str]]:
    return ({"sha256": hashlib.sha256(blob).hexdigest()} | more,)


async def statement_defects(ca: Ca, said: Json) -> dict[str, tuple[str, Json]]:
    sha256 = hashlib.sha256(BLOB).hexdigest()
    ours, theirs = ({"digest": {"sha256": hashlib.sha256(one).hexdigest()}} for one in (BLOB, OTHER))

    async def about(*subjects: Json, **changes: Any) -> Json:
        return await ca.statement_bundle(statement(subjects=list(subjects), **changes))

    return {
        "a-bit-of-the-signature": ("timestamp", changed(said, ENVELOPE_SIGNATURE, _flip)),
        "another-payload": ("signature", changed(said, "dsseEnvelope.payload", _b64(statement(predicateType="x")))),
        "another-payload-type": ("artifact", changed(said, "dsseEnvelope.payloadType", "application/json")),
        "two-signatures": ("bundle", changed(said, "dsseEnvelope.signatures", lambda old: old * 2)),
        "no-statement": ("artifact", await ca.statement_bundle(b"{}")),
        "an-old-statement": ("artifact", await about(ours, _type="https://in-toto.io/Statement/v0.1")),
        "no-subject": ("artifact", await about()),
        "another-subject": ("artifact", await about(theirs)),
        "a-subject-by-sha1-alone": ("artifact", await about({"digest": {"sha1": hashlib.sha1(BLOB).hexdigest()}})),  # noqa: S324
        "a-subject-with-another-sha512": (
            "artifact",
            await about({"digest": {"sha256": sha256, "sha512": hashlib.sha512(OTHER).hexdigest()}}),
        ),
        "a-subject-that-was-not-granted": ("artifact", await about(ours, theirs)),
        "a-digest-that-was-not-granted": (
            "artifact",
            await about({"digest": {"sha256": sha256, "sha512": hashlib.sha512(BLOB).hexdigest()}}),
        ),
        "certified-for-another": ("artifact", await ca.statement_bundle(artifacts=_artifact(OTHER))),
    }


KEYS: dict[str, Callable[[], Any]] = {
    "p256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "p384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "rsa-pss": lambda: rsa.generate_private_key(65537, 2048),
    "ed25519": ed25519.Ed25519PrivateKey.generate,
}


async def named(signers: dict[str, FileSigner]) -> dict[str, Json]:
    """Sound bundles by named keys, `<key>-blob` and `<key>-statement`."""
    found = {}
    for name, signer in signers.items():
        material = Material(public_key=spki(signer.public_key))
        signature = await signer.sign_message(pae(STATEMENT_TYPE, statement()))
        found[f"{name}-statement"] = json.loads(statement_bundle(material, statement=statement(), signature=signature))
        if hash_name := signer.algorithm.hash_name:
            digest, signature = hashlib.new(hash_name, BLOB).digest(), await signer.sign_message(BLOB)
            whole = blob_bundle(material, hash_name=hash_name, digest=digest, signature=signature)
            found[f"{name}-blob"] = json.loads(whole)
    return found


def named_defects(sound: dict[str, Json]) -> dict[str, tuple[str, Json, str, str]]:
    """Fault, bundle, key, control."""
    blob, said = sound["p256-blob"], sound["p256-statement"]
    hint = "verificationMaterial.publicKey.hint"
    found = {
        "another-key": ("key", blob, "p384", "p256-blob"),
        "another-key-without-hint": ("signature", changed(blob, hint, ""), "p384", "p256-blob"),
        "the-hint-of-another": ("key", changed(blob, hint, _value(sound["p384-blob"], hint)), "p256", "p256-blob"),
        "the-digest-of-another": (
            "artifact",
            changed(blob, f"{DIGEST}.digest", _b64(hashlib.sha256(OTHER).digest())),
            "p256",
            "p256-blob",
        ),
        "ed25519-over-a-blob": (
            "signature",
            changed(blob, "verificationMaterial", sound["ed25519-statement"]["verificationMaterial"]),
            "ed25519",
            "ed25519-statement",
        ),
        "another-payload": ("signature", changed(said, "dsseEnvelope.payload", _b64(statement(a="b"))), "p256", ""),
    }
    for name, bundle in sound.items():
        path = SIGNATURE if name.endswith("-blob") else ENVELOPE_SIGNATURE
        key = name.rpartition("-")[0]
        found[f"{name}-a-bit-of-the-signature"] = ("signature", changed(bundle, path, _flip), key, name)
    return found


async def vectors() -> dict[str, Json]:
    """Every file by its name, without suffix."""
    ca = await Ca.made()
    blob, said = await ca.blob_bundle(), await ca.statement_bundle()
    signers = {name: FileSigner.from_key(make(), name) for name, make in KEYS.items()}
    sound = await named(signers)
    p384 = await ca.blob_bundle(curve=ec.SECP384R1())
    found: dict[str, Json] = {
        "setup": {
            "now": (NOW + timedelta(days=400)).isoformat(),  # the issuing CA has ended as well
            "artifact": _b64(BLOB),
            "trusted_root": json.loads(ca.trusted_root()),
            "keys": {name: _pem(signer) for name, signer in signers.items()},
        },
        "accepted/blob": {"expect": "verified", "bundle": blob},
        "accepted/statement": {"expect": "verified", "bundle": said},
        "accepted/blob-p384": {"expect": "verified", "bundle": p384},
        "accepted/blob-with-unknown-names": {"expect": "verified", "bundle": blob | {"x": 1}},
        "accepted/blob-stamped-by-two": {
            "expect": "verified",
            "bundle": changed(blob, STAMPS, lambda old: [{"signedTimestamp": _b64(b"unknown")}, *old]),
        },
    }
    for name, bundle in sound.items():
        found[f"accepted/{name}"] = {"expect": "verified", "bundle": bundle, "key": name.rpartition("-")[0]}
    for name, (fault, defect) in form_defects(blob).items():
        found[f"refused/form-{name}"] = _refused(fault, defect, "blob")
    for kind, defects in (("blob", await blob_defects(ca, blob)), ("statement", await statement_defects(ca, said))):
        for name, (fault, defect) in defects.items():
            found[f"refused/{kind}-{name}"] = _refused(fault, defect, kind)
    for name, (fault, defect, key, control) in named_defects(sound).items():
        found[f"refused/key-{name}"] = _refused(fault, defect, control or "p256-statement") | {"key": key}
    found["refused/key-a-certificate"] = _refused("key", blob, "blob") | {"key": "p256"}
    found["refused/blob-a-named-key"] = _refused("certificate", sound["p256-blob"], "p256-blob")
    return found


def _refused(fault: str, defect: Json | str, control: str) -> Json:
    return {"expect": fault, "control": control, ("text" if isinstance(defect, str) else "bundle"): defect}


def _pem(signer: FileSigner) -> str:
    return signer.public_key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def write(folder: Path) -> None:
    """Writes all of it anew."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, item in asyncio.run(vectors()).items():
        path = folder / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(item, indent=1) + "\n")


if __name__ == "__main__":
    write(FOLDER)
