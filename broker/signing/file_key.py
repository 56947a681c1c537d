"""A signing key in a file, in PKCS#8 PEM. For development: who can read the file can sign without the broker."""

from pathlib import Path
from typing import Final, Self

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa, utils
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from broker.signing.secret_file import read_secret
from broker.signing.signer import (
    Algorithm,
    PublicKey,
    UnusableKey,
    algorithm_of,
    check_digest,
    digest_of,
    hash_of,
    pss,
    require_valid,
)

MAX_PEM: Final = 64 * 1024
_LABEL: Final = b"-----BEGIN PRIVATE KEY-----"  # RFC 7468 section 10: PKCS#8, not encrypted

PrivateKey = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey


class FileSigner:
    """Signs with a key in memory. Signatures are made where they are awaited: P-256 takes 20 µs, RSA 4096 some ms."""

    __slots__ = ("_private", "algorithm", "name", "public_key")

    def __init__(self, private: PrivateKey, name: str) -> None:
        """Raises: UnusableKey for a key that signs nothing here."""
        self._private = private
        self.public_key: PublicKey = private.public_key()
        self.algorithm: Algorithm = algorithm_of(self.public_key)
        self.name = name

    def __repr__(self) -> str:
        return f"FileSigner(name={self.name!r}, algorithm={self.algorithm.value!r})"

    @classmethod
    def load(cls, path: Path, name: str) -> Self:
        """From a file that only we (and our group) can read. Raises: UnusableKey."""
        pem = read_secret(path, MAX_PEM)
        if not pem.lstrip().startswith(_LABEL):
            raise UnusableKey(
                f"{path} is no unencrypted PKCS#8 PEM key: convert it with "
                f"`openssl pkcs8 -topk8 -nocrypt -in {path} -out <new file>`"
            )
        try:
            private = load_pem_private_key(pem, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            raise UnusableKey(f"{path} is damaged, or has a key of a kind that is not known") from None
        return cls.from_key(private, name)

    @classmethod
    def from_key(cls, private: object, name: str) -> Self:
        """From a key in memory. Raises: UnusableKey."""
        if isinstance(private, ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey):
            return cls(private, name)
        raise UnusableKey("a key that signs is ECDSA P-256 or P-384, Ed25519, or RSA")

    async def sign_digest(self, digest: bytes) -> bytes:
        """See Signer."""
        check_digest(self.algorithm, digest)
        return self._sign(digest)

    async def sign_message(self, message: bytes) -> bytes:
        """See Signer."""
        digest = digest_of(self.algorithm, message)
        return self._sign(message if digest is None else digest)

    def _sign(self, signed: bytes) -> bytes:
        match self._private:
            case ec.EllipticCurvePrivateKey():
                signature = self._private.sign(signed, ec.ECDSA(utils.Prehashed(hash_of(self.algorithm))))
            case rsa.RSAPrivateKey():
                hashed = utils.Prehashed(hash_of(self.algorithm))
                signature = self._private.sign(signed, pss(self.algorithm), hashed)
            case ed25519.Ed25519PrivateKey():
                signature = self._private.sign(signed)
        require_valid(self.algorithm, self.public_key, signature, signed)
        return signature
