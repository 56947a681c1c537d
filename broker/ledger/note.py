"""Signed notes (https://c2sp.org/signed-note@v1.0.0), Ed25519 only: text that a named key has signed.

    text, ending in a newline
    <empty line>
    — <key name> base64(key id || signature)

key id = SHA-256(key name || 0x0A || 0x01 || public key)[:4]. A verifier key is written `name+hex(key id)+base64(0x01 ||
public key)`, as Go's sumdb/note writes it, so that other people's tools verify our notes.
"""

import base64
import binascii
import hashlib
import re
from dataclasses import dataclass
from typing import Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

MAX_NOTE = 64 * 1024
MAX_SIGNATURES = 16  # the least a verifier must accept
_ED25519 = b"\x01"
_NAME = re.compile(r"[^\s+\x00-\x1f]{1,256}")
_KEY_ID = re.compile(r"[0-9a-f]{8}")


class NoteError(ValueError):
    """The note is malformed, or no signature by the expected key is good."""


def _key_id(name: str, public: bytes) -> bytes:
    return hashlib.sha256(name.encode() + b"\n" + _ED25519 + public).digest()[:4]


def _base64(text: str, what: str) -> bytes:
    try:
        found = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise NoteError(f"{what} is not base64") from error
    if base64.b64encode(found).decode() != text:  # one spelling only: trailing bits are not free
        raise NoteError(f"{what} is not canonical base64")
    return found


def check_name(name: str) -> str:
    """Returns `name` if it may name a key. Raises: NoteError."""
    if not _NAME.fullmatch(name):
        raise NoteError(
            "a key name is 1 to 256 characters without spaces, controls or '+', such as broker.acme.test/ledger"
        )
    return name


@dataclass(frozen=True, slots=True)
class VerifierKey:
    """Whose notes are believed: a name and an Ed25519 public key (32 bytes)."""

    name: str
    public: bytes

    def __str__(self) -> str:
        public = base64.b64encode(_ED25519 + self.public).decode()
        return f"{self.name}+{_key_id(self.name, self.public).hex()}+{public}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """From `name+keyid+base64`. Raises: NoteError."""
        name, _, rest = text.partition("+")
        key_id, _, encoded = rest.partition("+")
        check_name(name)
        key = _base64(encoded, "the verifier key")
        if len(key) != 33 or key[:1] != _ED25519:  # type byte and 32 bytes
            raise NoteError("the verifier key is not of type Ed25519")
        if not _KEY_ID.fullmatch(key_id) or bytes.fromhex(key_id) != _key_id(name, key[1:]):
            raise NoteError("the verifier key's id does not belong to its name and key: it was mistyped or changed")
        return cls(name, key[1:])


def sign(text: str, name: str, key: Ed25519PrivateKey) -> bytes:
    """The note. `text` ends in a newline. Raises: NoteError."""
    _check_text(text)
    signature = _key_id(name, key.public_key().public_bytes_raw()) + key.sign(text.encode())
    return f"{text}\n— {check_name(name)} {base64.b64encode(signature).decode()}\n".encode()


def _check_text(text: str) -> None:
    if not text.endswith("\n") or any(c < " " and c != "\n" for c in text):
        raise NoteError("a note's text ends in a newline and has no other control characters")


def verify(note: bytes, key: VerifierKey) -> str:
    """The note's text, signed by `key`.

    Signatures by others are ignored, as the specification demands; one with our name and id that is not good rejects
    the note. Raises: NoteError.
    """
    if len(note) > MAX_NOTE:
        raise NoteError(f"the note is larger than {MAX_NOTE} bytes")
    try:
        whole = note.decode()
    except UnicodeDecodeError as error:
        raise NoteError("the note is not UTF-8") from error
    text, blank, signatures = whole.rpartition("\n\n")
    if not blank or not signatures.endswith("\n"):
        raise NoteError("the note has no text, empty line and signature lines")
    text += "\n"
    _check_text(text)
    lines = signatures[:-1].split("\n")
    if len(lines) > MAX_SIGNATURES:
        raise NoteError(f"the note has more than {MAX_SIGNATURES} signatures")
    good = [_verify_line(line, text, key) for line in lines]  # every line, so that none is malformed
    if not any(good):
        raise NoteError(f"the note is not signed by {key.name} with the expected key")
    return text


def _verify_line(line: str, text: str, key: VerifierKey) -> bool:
    dash, _, rest = line.partition(" ")
    name, _, encoded = rest.partition(" ")
    if dash != "—" or not _NAME.fullmatch(name):
        raise NoteError("a signature line is not '— name base64'")
    signature = _base64(encoded, "a signature")
    if len(signature) < 5:  # key id and at least one byte
        raise NoteError("a signature is too short")
    if name != key.name or signature[:4] != _key_id(key.name, key.public):
        return False
    try:
        Ed25519PublicKey.from_public_bytes(key.public).verify(signature[4:], text.encode())
    except (InvalidSignature, ValueError) as error:
        raise NoteError(f"the signature by {key.name} is not good") from error
    return True
