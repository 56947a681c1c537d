"""Whose word on provenance counts: for each builder, who may sign in its name.

The builder's id stands in the statement, where whoever signs can write what he likes. So a signature counts for the
builders that its key, SVID or identity is configured for, and for no other.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from types import MappingProxyType
from typing import Protocol

from attestors.rfc3161 import TimestampRoot
from attestors.signature_keys import SigningKey


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class SigstoreIdentity:
    """Who a Sigstore certificate names: the OIDC issuer, and the subject alternative name. Both exactly."""

    issuer: str
    identity: str

    def __str__(self) -> str:
        return f"sigstore:{self.issuer}#{self.identity}"


@dataclass(frozen=True, slots=True, kw_only=True)
class BuilderTrust:
    """Who signs for one builder.

    keys: by name. spiffe_ids: exactly. threshold: how many of them all must have signed; one key counts once.
    """

    keys: Mapping[str, SigningKey] = field(default_factory=dict)
    spiffe_ids: frozenset[str] = frozenset()
    sigstore: frozenset[SigstoreIdentity] = frozenset()
    threshold: int = 1

    def __post_init__(self) -> None:
        if len({key.spki for key in self.keys.values()}) != len(self.keys):
            raise ValueError("a key has two names: it would count twice")
        if not 1 <= self.threshold <= len(self.keys) + len(self.spiffe_ids) + len(self.sigstore):
            raise ValueError("a builder needs at least as many signers as its threshold, and that is 1 or more")
        object.__setattr__(self, "keys", MappingProxyType(dict(self.keys)))


@dataclass(frozen=True, slots=True, kw_only=True)
class ProvenanceTrust:
    """All of it at one moment. builders: by builder id. max_age: since the build finished."""

    builders: Mapping[str, BuilderTrust]
    max_age: timedelta
    timestamp_roots: tuple[TimestampRoot, ...] = ()

    def __post_init__(self) -> None:
        if self.max_age <= timedelta(0):
            raise ValueError("provenance needs a maximum age above zero")
        object.__setattr__(self, "builders", MappingProxyType(dict(self.builders)))

    def all_keys(self) -> tuple[SigningKey, ...]:
        """Each key once, whoever it signs for."""
        return tuple({key.spki: key for builder in self.builders.values() for key in builder.keys.values()}.values())

    def all_identities(self) -> tuple[SigstoreIdentity, ...]:
        """Each Sigstore identity once."""
        return tuple(sorted({one for builder in self.builders.values() for one in builder.sigstore}))


class X509SvidCheck(Protocol):
    """Knows the bundles of the trust domains."""

    def __call__(self, chain: tuple[bytes, ...], at: datetime) -> str:
        """The SPIFFE ID that the chain speaks for. chain: DER, leaf first. at: when it has to have been valid.

        Raises: ValueError where it speaks for nobody; AttestationUnavailable where that cannot be said now.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class SigstoreSigned:
    """What a Sigstore bundle was found to say. not_before: when its certificate began. spki: that certificate's key."""

    identity: SigstoreIdentity
    payload: bytes = field(repr=False)
    payload_type: str
    not_before: datetime
    spki: bytes = field(repr=False)


class SigstoreCheck(Protocol):
    """Verifies Sigstore bundles, offline."""

    def __call__(self, bundle: bytes, identities: tuple[SigstoreIdentity, ...]) -> SigstoreSigned:
        """What one of the identities signed. Raises: ValueError where none of them did."""
