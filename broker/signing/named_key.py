"""A key that stays, and the one kind of thing that it signs.

An artifact may be anything, also the very bytes that a signature over a statement is made of (DSSE's pre-authentication
encoding). So a key that signed both would put its name under statements that nobody looked at.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from broker.artifacts import SigningRequest
from broker.errors import Invalid
from broker.signing.signer import Signer, spki_of


class Signs(StrEnum):
    """What a named key signs: artifacts by their digests, or in-toto statements as DSSE."""

    ARTIFACTS = "artifacts"
    STATEMENTS = "statements"


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedKey:
    """A signer, and what it signs. Raises: ValueError for an Ed25519 key that is to sign artifacts."""

    signer: Signer
    signs: Signs = Signs.ARTIFACTS

    def __post_init__(self) -> None:
        if self.signs is Signs.ARTIFACTS and self.signer.algorithm.hash_name is None:
            raise ValueError('an Ed25519 key takes messages, not digests: set signs = "statements"')

    @classmethod
    def of(cls, signer: Signer, signs: Signs | None = None) -> "NamedKey":
        """signs: None for artifacts; for Ed25519, which cannot sign those, statements."""
        usual = Signs.STATEMENTS if signer.algorithm.hash_name is None else Signs.ARTIFACTS
        return cls(signer=signer, signs=signs or usual)

    def require(self, signing: SigningRequest) -> None:
        """Raises: Invalid where it can sign nothing of what is asked for."""
        if self.signs is Signs.ARTIFACTS:
            require_digest(signing, self.signer.algorithm.hash_name)

    def require_kind(self, *, statement: bool) -> None:
        """Raises: Invalid where it signs the other kind."""
        if statement is not (self.signs is Signs.STATEMENTS):
            asked = "a statement" if statement else "an artifact"
            raise Invalid(f"{asked} was asked for, and the key {self.signer.name} signs {self.signs} alone")


def require_one_kind(keys: Iterable[NamedKey]) -> None:
    """Raises: ValueError where one key has two names, and signs artifacts by one and statements by the other."""
    found: dict[bytes, NamedKey] = {}
    for key in keys:
        other = found.setdefault(spki_of(key.signer.public_key), key)
        if other.signs is not key.signs:
            names = f"{other.signer.name} and {key.signer.name}"
            raise ValueError(f"{names} are one key, which signs artifacts or statements: make another")


def require_digest(signing: SigningRequest, hash_name: str | None) -> None:
    """Raises: Invalid unless there is one artifact, named by the digest that a key with this hash signs."""
    if len(signing.artifacts) != 1:
        raise Invalid("one artifact is signed by its digest; several are signed as subjects of a statement")
    if hash_name not in signing.artifacts[0]:
        raise Invalid(f"this key signs a {hash_name} digest, and the action names none of the artifact")
