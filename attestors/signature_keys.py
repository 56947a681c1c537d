"""Public keys that sign provenance, and what a signature of each kind is.

| key | signature | made so by |
| --- | --- | --- |
| ECDSA P-256 | DER, over SHA-256 | cosign, securesystemslib |
| ECDSA P-384 | DER, over SHA-384, or over SHA-256 | securesystemslib, cosign 3; older cosign |
| Ed25519 | RFC 8032 Ed25519, over the message itself; not Ed25519ph, as cosign 3 makes | securesystemslib |
| RSA, 2048 bits or more | SHA-256 in PSS with 32 bytes of salt, or in PKCS #1 v1.5 | securesystemslib; cosign |

Envelopes do not say which, so each way that a key's kind has is tried.
"""

import functools
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from cryptography.hazmat.primitives.serialization import load_pem_public_key

MIN_RSA_BITS: Final = 2048
MAX_RSA_BITS: Final = 8192  # verification takes a millisecond there, and any caller may ask for it

PublicKey = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey | rsa.RSAPublicKey

_Hash = hashes.SHA256 | hashes.SHA384
_SHA256, _SHA384 = hashes.SHA256(), hashes.SHA384()
_ECDSA: Final[Mapping[str, tuple[_Hash, ...]]] = {
    "secp256r1": (_SHA256,),
    "secp384r1": (_SHA384, _SHA256),
}
_RSA: Final = (padding.PSS(padding.MGF1(_SHA256), padding.PSS.DIGEST_LENGTH), padding.PKCS1v15())


class Message:
    """What signatures are said to be over; hashed once by each hash, with however many keys they are tried."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    @functools.cached_property
    def sha256(self) -> bytes:
        """Its digest."""
        return hashlib.sha256(self.content).digest()

    @functools.cached_property
    def sha384(self) -> bytes:
        """Likewise."""
        return hashlib.sha384(self.content).digest()

    def digest(self, by: _Hash) -> bytes:
        """One of those."""
        return self.sha384 if by is _SHA384 else self.sha256


@dataclass(frozen=True, slots=True)
class SigningKey:
    """A key of a kind in the table. spki: its SubjectPublicKeyInfo in DER; by it two keys are the same."""

    public_key: PublicKey = field(compare=False, repr=False)
    spki: bytes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        _require_kind(self.public_key)
        encoding, form = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        object.__setattr__(self, "spki", self.public_key.public_bytes(encoding, form))

    def signed(self, signature: bytes, message: Message) -> bool:
        """Whether it made this signature over this message."""
        key = self.public_key
        if isinstance(key, ed25519.Ed25519PublicKey):
            return _holds(key.verify, signature, message.content)
        if isinstance(key, rsa.RSAPublicKey):
            return any(_holds(key.verify, signature, message.sha256, one, Prehashed(_SHA256)) for one in _RSA)
        kinds = _ECDSA[key.curve.name]
        return any(_holds(key.verify, signature, message.digest(one), ec.ECDSA(Prehashed(one))) for one in kinds)


def read_key(pem: bytes) -> SigningKey:
    """From PEM ("BEGIN PUBLIC KEY"). Raises: ValueError saying what is wrong."""
    try:
        key = load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ValueError("no public key in PEM: export it, for example with `openssl pkey -pubout`") from error
    return SigningKey(key)  # type: ignore[arg-type]  # it looks itself


def _require_kind(key: object) -> None:
    if isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in _ECDSA:
        return
    if isinstance(key, rsa.RSAPublicKey) and MIN_RSA_BITS <= key.key_size <= MAX_RSA_BITS:
        return
    if isinstance(key, ed25519.Ed25519PublicKey):
        return
    raise ValueError(f"keys are ECDSA P-256 or P-384, Ed25519, or RSA of {MIN_RSA_BITS} to {MAX_RSA_BITS} bits")


def _holds(verify: Callable[..., None], *arguments: object) -> bool:
    try:
        verify(*arguments)
    except (InvalidSignature, ValueError):
        return False
    return True
