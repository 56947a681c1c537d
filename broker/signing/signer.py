"""What signs: a key with a name, behind two verbs. Where the key is (a file, an HSM) is its own affair.

Every signature is verified with the public key before it leaves a signer: what a faulty or exchanged token returns
goes nowhere.
"""

import hashlib
from enum import StrEnum
from typing import Final, Protocol

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa, utils
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from broker.errors import Invalid, Reason, Unavailable

SMALLEST_RSA: Final = 2048  # bits: NIST SP 800-131A rev. 2
LARGEST_RSA: Final = 8192  # above it one signature takes seconds

PublicKey = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey | rsa.RSAPublicKey
_Hash = hashes.SHA256 | hashes.SHA384


class UnusableKey(ValueError):
    """A key that signs nothing here, or that we may not use; the message says what to do. Found when it is loaded."""


class Algorithm(StrEnum):
    """How a key signs. Each key has exactly one."""

    ECDSA_P256 = "ecdsa-p256-sha256"
    ECDSA_P384 = "ecdsa-p384-sha384"
    ED25519 = "ed25519"
    RSA_PSS = "rsa-pss-sha256"

    @property
    def hash_name(self) -> str | None:
        """The hash whose digest is signed, as hashlib names it; None where the message itself is (Ed25519)."""
        return {self.ECDSA_P384: "sha384", self.ED25519: None}.get(self, "sha256")


class Signer(Protocol):
    """A key that signs. ECDSA signatures are DER (RFC 3279 section 2.2.3), RSA-PSS has a salt as long as the hash."""

    @property
    def name(self) -> str:
        """What the operator calls it: the word after "key:"."""

    @property
    def algorithm(self) -> Algorithm:
        """How it signs."""

    @property
    def public_key(self) -> PublicKey:
        """What its signatures verify with."""

    async def sign_digest(self, digest: bytes) -> bytes:
        """Signs a digest made with `algorithm.hash_name`.

        Raises: Invalid for a digest of another length, and for Ed25519, which signs messages only.
        Unavailable with SIGNER_UNAVAILABLE where the key cannot be reached; then no signature was given to anybody.
        """

    async def sign_message(self, message: bytes) -> bytes:
        """Signs the bytes, hashed where the algorithm hashes. Raises: Unavailable as above."""


def algorithm_of(key: object) -> Algorithm:
    """How a key signs, by what it is. Raises: UnusableKey for every other key, and for RSA of a wrong size."""
    match key:
        case ec.EllipticCurvePublicKey(curve=ec.SECP256R1()):
            return Algorithm.ECDSA_P256
        case ec.EllipticCurvePublicKey(curve=ec.SECP384R1()):
            return Algorithm.ECDSA_P384
        case ed25519.Ed25519PublicKey():
            return Algorithm.ED25519
        case rsa.RSAPublicKey() if SMALLEST_RSA <= key.key_size <= LARGEST_RSA:
            return Algorithm.RSA_PSS
        case rsa.RSAPublicKey():
            raise UnusableKey(f"an RSA key has {SMALLEST_RSA} to {LARGEST_RSA} bits, this one {key.key_size}")
        case _:
            raise UnusableKey("a key that signs is ECDSA P-256 or P-384, Ed25519, or RSA")


def spki_of(key: PublicKeyTypes) -> bytes:
    """The key's SubjectPublicKeyInfo in DER: by it two keys are the same."""
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def digest_of(algorithm: Algorithm, message: bytes) -> bytes | None:
    """What `sign_digest` would take for the message; None for Ed25519."""
    name = algorithm.hash_name
    return None if name is None else hashlib.new(name, message).digest()


def check_digest(algorithm: Algorithm, digest: bytes) -> None:
    """Raises: Invalid when the algorithm cannot sign this as a digest."""
    if algorithm.hash_name is None:
        raise Invalid("an Ed25519 key signs statements, not digests: ask for a statement, or name an ECDSA or RSA key")
    if len(digest) != (expected := hash_of(algorithm).digest_size):
        raise Invalid(f"{algorithm} signs a digest of {expected} bytes, not of {len(digest)}")


def hash_of(algorithm: Algorithm) -> _Hash:
    """The same hash as `hash_name`, as `cryptography` has it. Not for Ed25519."""
    return hashes.SHA384() if algorithm.hash_name == "sha384" else hashes.SHA256()


def pss(algorithm: Algorithm) -> padding.PSS:
    """Salt as long as the hash (RFC 4055 section 3.1, RFC 8017 section 9.1)."""
    return padding.PSS(padding.MGF1(hash_of(algorithm)), padding.PSS.DIGEST_LENGTH)


def require_valid(algorithm: Algorithm, key: PublicKey, signature: bytes, signed: bytes) -> None:
    """The last look before a signature leaves. `signed`: the digest; for Ed25519 the message.

    Raises: Unavailable when it does not verify: then the token has another key than it had, or is broken.
    """
    try:
        match key:
            case ec.EllipticCurvePublicKey():
                key.verify(signature, signed, ec.ECDSA(utils.Prehashed(hash_of(algorithm))))
            case rsa.RSAPublicKey():
                key.verify(signature, signed, pss(algorithm), utils.Prehashed(hash_of(algorithm)))
            case ed25519.Ed25519PublicKey():
                key.verify(signature, signed)
    except InvalidSignature:
        detail = "a signature did not verify with its own public key: the token's key was exchanged, or it is broken"
        raise Unavailable(Reason.SIGNER_UNAVAILABLE, detail) from None
