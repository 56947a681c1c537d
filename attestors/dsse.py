"""DSSE envelopes: bytes of a stated type, and signatures over both.

Source: https://github.com/secure-systems-lab/dsse, protocol.md and envelope.md, version 1.0.2.

Base64 (RFC 4648) is accepted in the standard and in the URL-safe alphabet, as the protocol demands; wrong is whatever
two decoders could read apart: both alphabets in one field, white space, missing or surplus padding, bits left over.

Nothing here is verified: whoever takes a payload for true has verified a signature over `pae` first.
"""

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from attestors.strict_json import parse_object

MAX_ENVELOPE: Final = 512 * 1024
"""Bytes of an envelope, or of a bundle with one in it: a thousand dependencies have 200,000. More is not read."""
MAX_SIGNATURES: Final = 8
"""Each is tried with each key."""
MAX_PAYLOAD_TYPE: Final = 256
STATEMENT_TYPE: Final = "application/vnd.in-toto+json"

_TO_STANDARD = str.maketrans("-_", "+/")


class EnvelopeError(ValueError):
    """It is no envelope. The message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """keyid: a hint by whoever sent it, signed by nobody; "" for none. sig: in whatever form the key's kind has."""

    keyid: str
    sig: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Envelope:
    """What an envelope says, before anyone has verified it."""

    payload: bytes = field(repr=False)
    payload_type: str
    signatures: tuple[Signature, ...]

    @property
    def signed(self) -> bytes:
        """What its signatures are over."""
        return pae(self.payload_type, self.payload)


def pae(payload_type: str, payload: bytes) -> bytes:
    """The pre-authentication encoding: lengths first, so that no two pairs have the same."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def parse_envelope(raw: bytes) -> Envelope:
    """From the JSON envelope. Names that it does not know are ignored, as the specification demands.

    Raises: EnvelopeError; for one over `MAX_ENVELOPE` bytes before anything in it is read.
    """
    return read_envelope(parse_document(raw, "the envelope"))


def parse_document(raw: bytes, what: str) -> dict[str, Any]:
    """A JSON object of bounded size. Raises: EnvelopeError naming `what`."""
    if len(raw) > MAX_ENVELOPE:
        raise EnvelopeError(f"{what} is larger than {MAX_ENVELOPE} bytes")
    try:
        return parse_object(raw, what)
    except ValueError as error:
        raise EnvelopeError(str(error)) from error


def read_envelope(document: Mapping[str, Any]) -> Envelope:
    """From its JSON object. Raises: EnvelopeError."""
    payload_type, signatures = document.get("payloadType"), document.get("signatures")
    if not isinstance(payload_type, str) or not 1 <= len(payload_type) <= MAX_PAYLOAD_TYPE:
        raise EnvelopeError(f"the envelope has no payloadType of 1 to {MAX_PAYLOAD_TYPE} characters")
    if not isinstance(signatures, list) or not 1 <= len(signatures) <= MAX_SIGNATURES:
        raise EnvelopeError(f"the envelope does not have 1 to {MAX_SIGNATURES} signatures")
    return Envelope(
        payload=decode_base64(document.get("payload"), "the payload"),
        payload_type=payload_type,
        signatures=tuple(_read_signature(one) for one in signatures),
    )


def _read_signature(found: Any) -> Signature:
    if not isinstance(found, dict):
        raise EnvelopeError("a signature of the envelope is not a JSON object")
    keyid = found.get("keyid") or ""  # unset is as good as empty
    if not isinstance(keyid, str):
        raise EnvelopeError("a keyid of the envelope is not a string")
    return Signature(keyid=keyid, sig=decode_base64(found.get("sig"), "a signature"))


def decode_base64(text: object, what: str) -> bytes:
    """Strictly, in either alphabet. Raises: EnvelopeError naming `what`."""
    if not isinstance(text, str):
        raise EnvelopeError(f"{what} is not a string of base64")
    urlsafe = "-" in text or "_" in text
    if urlsafe and ("+" in text or "/" in text):
        raise EnvelopeError(f"{what} mixes the two alphabets of base64")
    standard = text.translate(_TO_STANDARD) if urlsafe else text
    try:
        found = base64.b64decode(standard, validate=True)
    except (binascii.Error, ValueError) as error:
        raise EnvelopeError(f"{what} is not base64 of RFC 4648, padded and without white space") from error
    if base64.b64encode(found).decode() != standard:
        raise EnvelopeError(f"{what} is base64 with bits or padding left over")
    return found
