"""The embedded trust domain's state: authority, entries, federated bundles, and who waits for changes of them."""

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from broker.dev.authority import Authority
from broker.dev.entries import Entries
from broker.errors import Invalid
from broker.identity.spiffe_id import SpiffeId, TrustDomain
from broker.identity.trust import (
    OwnSvid,
    TrustBundle,
    TrustSnapshot,
    parse_jwt_authorities,
    parse_x509_authorities,
)

# RFC 6761: names that can never be a real organisation's.
_UNREAL = (".test", ".example", ".localhost", ".invalid")
_TOKENS = 4096  # JWT-SVIDs kept for the next to ask the same
_SHORTEST_WAIT_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Lifetimes:
    """Of SVIDs. At half of it a new one is made: X.509-SVIDs are pushed, JWT-SVIDs wait to be asked for."""

    x509_svid: timedelta = timedelta(hours=1)
    jwt_svid: timedelta = timedelta(minutes=5)


@dataclass(frozen=True, slots=True)
class _FederatedBundle:
    x509: bytes
    jwks: bytes


class Domain:
    """One trust domain. clock: read at each use; aware UTC.

    Raises: Invalid when its name could be a real one: nothing that this vouches for may be taken for more than a trial.
    """

    def __init__(self, trust_domain: TrustDomain, clock: Callable[[], datetime], lifetimes: Lifetimes) -> None:
        if not trust_domain.name.endswith(_UNREAL) and trust_domain.name != "localhost":
            raise Invalid(f"an embedded trust domain's name ends in one of {', '.join(_UNREAL)}, such as dev.test")
        self.trust_domain = trust_domain
        self.clock = clock
        self.authority = Authority(trust_domain, clock())
        self.entries = Entries(trust_domain, self._changed)
        self._lifetimes = lifetimes
        self._svids: dict[SpiffeId, tuple[OwnSvid, datetime]] = {}
        self._tokens: OrderedDict[tuple[SpiffeId, tuple[str, ...]], tuple[str, datetime]] = OrderedDict()
        self._federated: dict[TrustDomain, _FederatedBundle] = {}
        self._revision = 1
        self._event = asyncio.Event()

    def x509_svid(self, spiffe_id: SpiffeId) -> OwnSvid:
        """The same one until half its life is over."""
        now = self.clock()
        known = self._svids.get(spiffe_id)
        if known is not None and now < known[1]:
            return known[0]
        life = self._lifetimes.x509_svid
        self._svids = {one: kept for one, kept in self._svids.items() if now < kept[0].not_after}
        self._svids[spiffe_id] = (self.authority.x509_svid(spiffe_id, now, life), now + life / 2)
        return self._svids[spiffe_id][0]

    def jwt_svid(self, spiffe_id: SpiffeId, audience: Sequence[str]) -> str:
        """The same one for the same audience until half its life is over, as SPIRE's agent does."""
        now = self.clock()
        key = (spiffe_id, tuple(sorted(set(audience))))
        known = self._tokens.get(key)
        if known is not None and now < known[1]:
            return known[0]
        life = self._lifetimes.jwt_svid
        token = self.authority.jwt_svid(spiffe_id, key[1], now, life)
        self._tokens[key] = (token, now + life / 2)
        self._tokens.move_to_end(key)
        if len(self._tokens) > _TOKENS:
            self._tokens.popitem(last=False)
        return token

    def rotate(self) -> None:
        """Makes every SVID anew, without waiting for half its life."""
        self._svids.clear()
        self._tokens.clear()
        self._changed()

    def federate(self, trust_domain: TrustDomain, x509: bytes, jwks: bytes) -> None:
        """Takes another domain's bundle: concatenated DER and a JWK Set. Raises: Invalid when they cannot be read."""
        if trust_domain == self.trust_domain:
            raise Invalid("a trust domain does not federate with itself")
        parse_x509_authorities(x509)
        parse_jwt_authorities(jwks)
        self._federated[trust_domain] = _FederatedBundle(x509, jwks)
        self._changed()

    def unfederate(self, trust_domain: TrustDomain) -> None:
        """Forgets another domain's bundle."""
        if self._federated.pop(trust_domain, None) is not None:
            self._changed()

    def federated_x509(self) -> Mapping[str, bytes]:
        """Without our own, by the trust domain's SPIFFE ID."""
        return {str(name): bundle.x509 for name, bundle in self._federated.items()}

    def x509_bundles(self) -> Mapping[str, bytes]:
        """With our own."""
        return {str(self.trust_domain): self.authority.x509_bundle, **self.federated_x509()}

    def jwt_bundles(self) -> Mapping[str, bytes]:
        """With our own: JWK Sets."""
        federated = {str(name): bundle.jwks for name, bundle in self._federated.items()}
        return {str(self.trust_domain): self.authority.jwks, **federated}

    def snapshot(self, own: OwnSvid | None = None) -> TrustSnapshot:
        """What is trusted here, for the verification that our own servers do."""
        x509, jwks = self.x509_bundles(), self.jwt_bundles()
        bundles = {
            name: TrustBundle(
                trust_domain=name,
                x509_authorities=parse_x509_authorities(x509[str(name)]),
                jwt_authorities=parse_jwt_authorities(jwks[str(name)]),
            )
            for name in (self.trust_domain, *self._federated)
        }
        self._revision += 1
        return TrustSnapshot(own=own, bundles=bundles, revision=self._revision)

    def mark(self) -> asyncio.Event:
        """Take it before you look at the state, then wait for it: no change in between is missed."""
        return self._event

    async def wait(self, mark: asyncio.Event, spiffe_ids: Sequence[SpiffeId]) -> None:
        """Returns at the next change after `mark`, or when an SVID of these IDs is due."""
        now = self.clock()
        due = [(self._svids[one][1] - now).total_seconds() for one in spiffe_ids if one in self._svids]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(_SHORTEST_WAIT_S, min(due)) if due else None):
                await mark.wait()

    def _changed(self) -> None:
        self._event.set()
        self._event = asyncio.Event()
