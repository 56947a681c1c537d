"""Sigstore bundles, version 0.3: a signature and all that others need to verify it, in one JSON text.

Source: https://github.com/sigstore/protobuf-specs/blob/main/protos/sigstore_bundle.proto, in protobuf's JSON form.
Ours have no transparency log entries: cosign wants `--insecure-ignore-tlog --insecure-ignore-sct
--use-signed-timestamps` and our trusted root. A bundle without a timestamp stops verifying when its certificate ends.
With `--key` cosign 3.1 verifies ECDSA P-256 and (statements) Ed25519; with P-384 it hashes by SHA-256 and with RSA it
wants PKCS #1 v1.5, so those are for `action-broker verify`.

Nothing here signs or verifies; what is written was made by others, and what is read is not yet believed.
"""

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from attestors.dsse import STATEMENT_TYPE, Envelope, EnvelopeError, decode_base64, parse_document, read_envelope
from attestors.rfc3161 import MAX_RESPONSE
from broker.errors import Invalid

MEDIA_TYPE: Final = "application/vnd.dev.sigstore.bundle.v0.3+json"
MAX_TIMESTAMPS: Final = 4
"""Each is verified with each authority."""
MAX_CERTIFICATE: Final = 16 * 1024
MAX_SIGNATURE: Final = 2048  # bytes: twice what an RSA key of 8192 bits makes

HASHES: Final = MappingProxyType({"sha256": "SHA2_256", "sha384": "SHA2_384", "sha512": "SHA2_512"})
"""Our names of hashes → sigstore_common.proto's."""
_NAMES: Final = {theirs: ours for ours, theirs in HASHES.items()}
_MATERIAL: Final = ("certificate", "publicKey", "x509CertificateChain")


@dataclass(frozen=True, slots=True, kw_only=True)
class Material:
    """What a signature is verified with.

    certificate: the leaf's DER, or b"" where a named key signed. public_key: that key's SubjectPublicKeyInfo in DER.
    timestamp: a DER TimeStampResp over the signature; b"" for none. Raises: ValueError unless one of the first two is.
    """

    certificate: bytes = b""
    public_key: bytes = b""
    timestamp: bytes = b""

    def __post_init__(self) -> None:
        if bool(self.certificate) == bool(self.public_key):
            raise ValueError("a bundle names either a certificate or a public key")

    def to_json(self) -> dict[str, Any]:
        """The member "verificationMaterial"."""
        found: dict[str, Any] = (
            {"certificate": {"rawBytes": _text(self.certificate)}}
            if self.certificate
            else {"publicKey": {"hint": key_hint(self.public_key)}}
        )
        found["tlogEntries"] = []  # none; there are readers that want to be told
        if self.timestamp:
            found["timestampVerificationData"] = {"rfc3161Timestamps": [{"signedTimestamp": _text(self.timestamp)}]}
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """What a bundle says, before anyone has verified it. One of digest and envelope is there.

    signature: of the blob, or the envelope's only one. certificate: DER; b"" where there is a hint. hash_name: as
    hashlib's. timestamps: DER TimeStampResps.
    """

    signature: bytes
    certificate: bytes
    hint: str
    timestamps: tuple[bytes, ...]
    hash_name: str = ""
    digest: bytes = b""
    envelope: Envelope | None = None


def key_hint(public_key: bytes) -> str:
    """What names a key in a bundle: SHA-256 of its SubjectPublicKeyInfo (DER), in base64, as cosign does it."""
    return _text(hashlib.sha256(public_key).digest())


def blob_bundle(material: Material, *, hash_name: str, digest: bytes, signature: bytes) -> str:
    """A signature over an artifact. hash_name: what its algorithm hashes with, of `HASHES`; digest: by that hash."""
    if len(digest) != hashlib.new(hash_name).digest_size:
        raise ValueError(f"the digest is not one of {hash_name}")
    message = {
        "messageDigest": {"algorithm": HASHES[hash_name], "digest": _text(digest)},
        "signature": _text(signature),
    }
    return _write(material, {"messageSignature": message})


def statement_bundle(material: Material, *, statement: bytes, signature: bytes) -> str:
    """A signature over `attestors.dsse.pae(STATEMENT_TYPE, statement)`. statement: an in-toto Statement, JSON."""
    # Without keyid: cosign takes only one of its own making, and the key is named by the bundle's hint.
    envelope = {"payload": _text(statement), "payloadType": STATEMENT_TYPE, "signatures": [{"sig": _text(signature)}]}
    return _write(material, {"dsseEnvelope": envelope})


def _write(material: Material, content: Mapping[str, Any]) -> str:
    whole = {"mediaType": MEDIA_TYPE, "verificationMaterial": material.to_json(), **content}
    return json.dumps(whole, separators=(",", ":"))


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def read_bundle(raw: bytes) -> Bundle:
    """From its JSON text, of at most 512 KiB.

    Raises: Invalid for what is no such bundle, or says a thing in two ways. Log entries and names that we do not know
    are passed over: they can only add, and we believe none of it.
    """
    try:
        document = parse_document(raw, "the bundle")
        if document.get("mediaType") != MEDIA_TYPE:
            raise Invalid(f"the bundle's mediaType is not {MEDIA_TYPE}")
        material = _object(document, "verificationMaterial")
        certificate, hint = _verifier(material)
        timestamps = _timestamps(material)
        if ("messageSignature" in document) == ("dsseEnvelope" in document):
            raise Invalid("the bundle does not have one of messageSignature and dsseEnvelope")
        if "dsseEnvelope" in document:
            envelope = read_envelope(_object(document, "dsseEnvelope"))
            if len(envelope.signatures) != 1:
                raise Invalid("the bundle's envelope has more than one signature")
            signature = envelope.signatures[0].sig
            found = Bundle(
                signature=signature, certificate=certificate, hint=hint, timestamps=timestamps, envelope=envelope
            )
        else:
            found = _read_blob(_object(document, "messageSignature"), certificate, hint, timestamps)
    except EnvelopeError as error:
        raise Invalid(str(error)) from error
    if not 1 <= len(found.signature) <= MAX_SIGNATURE:
        raise Invalid(f"the bundle's signature does not have 1 to {MAX_SIGNATURE} bytes")
    return found


def _read_blob(message: Mapping[str, Any], certificate: bytes, hint: str, timestamps: tuple[bytes, ...]) -> Bundle:
    digest = _object(message, "messageDigest")
    hash_name = _NAMES.get(str(digest.get("algorithm")))
    if hash_name is None:
        raise Invalid(f"the bundle's digest is not of {', '.join(_NAMES)}")
    value = decode_base64(digest.get("digest"), "the bundle's digest")
    if len(value) != hashlib.new(hash_name).digest_size:
        raise Invalid(f"the bundle's digest is not as long as one of {hash_name}")
    signature = decode_base64(message.get("signature"), "the bundle's signature")
    return Bundle(
        signature=signature,
        certificate=certificate,
        hint=hint,
        timestamps=timestamps,
        hash_name=hash_name,
        digest=value,
    )


def _verifier(material: Mapping[str, Any]) -> tuple[bytes, str]:
    """The certificate, or the hint."""
    present = [name for name in _MATERIAL if name in material]
    if len(present) != 1:
        raise Invalid(f"the bundle does not have one of {', '.join(_MATERIAL)}")
    inner = _object(material, present[0])
    if present[0] == "publicKey":
        hint = inner.get("hint", "")
        if not isinstance(hint, str) or len(hint) > 256:
            raise Invalid("the bundle's hint is not a short string")
        return b"", hint
    if present[0] == "x509CertificateChain":
        # Version 0.3 has the leaf alone: who trusts a CA has its certificates, and a chain by the signer adds nothing.
        raise Invalid("the bundle has a certificate chain; version 0.3 has the leaf alone, as `certificate`")
    certificate = decode_base64(inner.get("rawBytes"), "the bundle's certificate")
    if not 1 <= len(certificate) <= MAX_CERTIFICATE:
        raise Invalid(f"the bundle's certificate does not have 1 to {MAX_CERTIFICATE} bytes")
    return certificate, ""


def _timestamps(material: Mapping[str, Any]) -> tuple[bytes, ...]:
    if "timestampVerificationData" not in material:
        return ()
    listed = _object(material, "timestampVerificationData").get("rfc3161Timestamps", [])
    if not isinstance(listed, list) or len(listed) > MAX_TIMESTAMPS or not all(isinstance(one, dict) for one in listed):
        raise Invalid(f"the bundle does not have at most {MAX_TIMESTAMPS} timestamps")
    found = tuple(decode_base64(one.get("signedTimestamp"), "a timestamp") for one in listed)
    if any(len(one) > MAX_RESPONSE for one in found):
        raise Invalid(f"a timestamp of the bundle is larger than {MAX_RESPONSE} bytes")
    return found


def _object(document: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = document.get(name)
    if not isinstance(found, dict):
        raise Invalid(f"the bundle's {name} is not a JSON object")
    return found
