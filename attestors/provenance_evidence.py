"""What a caller presents as provenance: an envelope and, beside it, what helps to verify its signatures.

Either a bare DSSE envelope, or a Sigstore bundle (https://github.com/sigstore/protobuf-specs, sigstore_bundle.proto)
with an envelope in it. Nothing of it is verified here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from attestors.dsse import Envelope, EnvelopeError, decode_base64, parse_document, read_envelope

BUNDLE_TYPES: Final = (
    "application/vnd.dev.sigstore.bundle.v0.3+json",
    "application/vnd.dev.sigstore.bundle+json;version=0.3",
    "application/vnd.dev.sigstore.bundle+json;version=0.2",
    "application/vnd.dev.sigstore.bundle+json;version=0.1",
)
MAX_CERTIFICATES: Final = 5  # a leaf and four intermediates
MAX_TIMESTAMPS: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """One thing presented.

    chain: DER, leaf first, of whoever is said to have signed. timestamps: RFC 3161 responses, DER. bundle: the whole
    as it came where it is a Sigstore bundle with an entry in a transparency log, else None.
    """

    envelope: Envelope
    chain: tuple[bytes, ...] = field(default=(), repr=False)
    timestamps: tuple[bytes, ...] = field(default=(), repr=False)
    bundle: bytes | None = field(default=None, repr=False)


def parse_evidence(raw: bytes) -> Evidence:
    """Reads either form. Raises: EnvelopeError; for what is over the size limit before anything in it is read."""
    document = parse_document(raw, "the provenance")
    if "mediaType" not in document:
        return Evidence(envelope=read_envelope(document))
    if document["mediaType"] not in BUNDLE_TYPES:
        raise EnvelopeError("the provenance is no Sigstore bundle of version 0.1 to 0.3")
    envelope = read_envelope(_member(document, "dsseEnvelope"))
    if len(envelope.signatures) != 1:  # sigstore_bundle.proto: the envelope of a bundle has exactly one
        raise EnvelopeError("the envelope of a Sigstore bundle does not have exactly one signature")
    material = _member(document, "verificationMaterial")
    return Evidence(
        envelope=envelope,
        chain=_chain(material),
        timestamps=_timestamps(material),
        bundle=raw if material.get("tlogEntries") else None,
    )


def _member(found: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = found.get(name)
    if not isinstance(value, dict):
        raise EnvelopeError(f"the bundle has no {name}")
    return value


def _chain(material: Mapping[str, Any]) -> tuple[bytes, ...]:
    if material.get("certificate"):  # version 0.3: the leaf alone
        return (decode_base64(_member(material, "certificate").get("rawBytes"), "a certificate"),)
    if not material.get("x509CertificateChain"):
        return ()
    found = _objects(_member(material, "x509CertificateChain"), "certificates", MAX_CERTIFICATES)
    return tuple(decode_base64(one.get("rawBytes"), "a certificate") for one in found)


def _timestamps(material: Mapping[str, Any]) -> tuple[bytes, ...]:
    if not material.get("timestampVerificationData"):
        return ()
    found = _objects(_member(material, "timestampVerificationData"), "rfc3161Timestamps", MAX_TIMESTAMPS)
    return tuple(decode_base64(one.get("signedTimestamp"), "a timestamp") for one in found)


def _objects(found: Mapping[str, Any], name: str, most: int) -> list[Mapping[str, Any]]:
    values = found.get(name) or []
    if not isinstance(values, list) or len(values) > most or not all(isinstance(one, dict) for one in values):
        raise EnvelopeError(f"the bundle's {name} are not a list of at most {most}")
    return values
