"""The signing keys of one broker process through time: published, then used, then replaced, then forgotten."""

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import Final, Protocol

import msgspec
import structlog
from cryptography.hazmat.primitives.asymmetric import ec

from broker.credentials import jose, keys
from broker.credentials.keys import PublishedKey, SigningKey, VerifiedKey
from broker.errors import BrokerError, Reason, Refused, Unavailable
from broker.identity.trust import OwnSvid, TrustSnapshot

_log = structlog.get_logger(__name__)
_encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder(PublishedKey).decode
_PREDECESSORS: Final = 32
"""Keys of earlier processes that are served at most: each start leaves one, and a guard takes a set of 128."""


class KeyStore(Protocol):
    """Where published keys are kept, so that they outlive the process that used them."""

    async def publish_key(self, kid: str, record: bytes, serve_until: datetime, now: datetime) -> None:
        """Durable when it returns; a second record of the same `kid` replaces the first."""

    async def retire_keys(self, serve_until: datetime, keep: int) -> None:
        """No key that is there now is served after `serve_until`, and only the last `keep` of them until then."""

    async def published_keys(self, now: datetime) -> Sequence[bytes]:
        """All records whose `serve_until` has not passed."""


class KeyRing:
    """Owns the keys. `start` before serving, `maintain` every few seconds.

    Raises from every use: Unavailable(IDENTITY_UNAVAILABLE) when no key is ready.
    """

    def __init__(
        self,
        store: KeyStore,
        snapshot: Callable[[], TrustSnapshot],
        *,
        issuer: str,
        lifetime: timedelta = keys.KEY_LIFETIME,
        ahead: timedelta = keys.PUBLISH_AHEAD,
    ) -> None:
        if not 2 * ahead < lifetime <= keys.KEY_LIFETIME:
            raise ValueError("a signing key lives at most a day and longer than twice the time it is published ahead")
        self._store, self._snapshot, self._issuer = store, snapshot, issuer
        self._lifetime, self._ahead = lifetime, ahead
        self._mine: list[SigningKey] = []
        self._vouched_by: bytes = b""
        self._published: dict[str, VerifiedKey] = {}
        self._refused: frozenset[str] = frozenset()
        self._lock = asyncio.Lock()

    async def start(self, now: datetime) -> None:
        """Makes and publishes the first key. A guard that meets it fetches the key set: nobody knew it before.

        Who holds the store is alone with it, so nobody has the private halves of the keys that are there: they are
        served only until the last credential that one of them may have signed has ended.
        """
        await self._store.retire_keys(now + keys.LAST_CREDENTIAL, _PREDECESSORS)
        await self._publish(SigningKey.generate(now, self._lifetime), now)
        await self._refresh(now)

    def current(self, now: datetime) -> SigningKey:
        """The key to sign with: the youngest whose time has come. Raises: Unavailable."""
        usable = [key for key in self._mine if key.use_from <= now < key.use_until and key.kid in self._published]
        if not usable:
            raise Unavailable(Reason.IDENTITY_UNAVAILABLE, "no signing key is published")
        return usable[-1]

    def public(self, kid: str) -> ec.EllipticCurvePublicKey:
        """The public key of a token that we issued, this process or an earlier one. Raises: Refused."""
        found = self._published.get(kid)
        if found is None:
            raise Refused(Reason.UNAUTHENTICATED, "signed by a key that we do not publish")
        return jose.load_jwk(found.jwk)

    def key_set(self) -> bytes:
        """The JWK set to serve."""
        return keys.key_set(list(self._published.values()))

    async def maintain(self, now: datetime) -> None:
        """Makes the next key in time, vouches again when our SVID was renewed, forgets what has ended.

        Also puts back what somebody took out of the store, and after a pause or a jump of the clock, which no key was
        made for, makes one that is used at once, as `start` does.
        """
        async with self._lock:
            if not any(key.use_from <= now < key.use_until for key in self._mine):
                await self._publish(SigningKey.generate(now, self._lifetime), now)
            elif now >= max(key.use_until for key in self._mine) - 2 * self._ahead:
                # Its turn comes `ahead` from now; the old one stays good for as long again.
                await self._publish(SigningKey.generate(now + self._ahead, self._lifetime), now)
            if self._vouched_by != self._own().chain[0]:
                for key in self._mine:
                    await self._publish(key, now)
            self._mine = [key for key in self._mine if now < key.use_until]
            await self._refresh(now)
            missing = [key for key in self._mine if key.kid not in self._published and self._can_vouch(key, now)]
            for key in missing:
                await self._publish(key, now)
            if missing:
                await self._refresh(now)

    def _own(self) -> OwnSvid:
        own = self._snapshot().own
        if own is None:
            raise Unavailable(Reason.IDENTITY_UNAVAILABLE, "no X.509-SVID of our own yet: is there an entry for us?")
        return own

    async def _publish(self, key: SigningKey, now: datetime) -> None:
        own = self._own()
        record = keys.publish(key, self._issuer, own, now)
        await self._store.publish_key(key.kid, _encode(record), key.use_until + keys.LAST_CREDENTIAL, now)
        if key not in self._mine:
            self._mine.append(key)
        self._vouched_by = own.chain[0]

    def _can_vouch(self, key: SigningKey, now: datetime) -> bool:
        """Whether a record made now would verify; else, as while trust changes, making one every time helps nobody."""
        try:
            self._verified(keys.publish(key, self._issuer, self._own(), now), now)
        except BrokerError:
            return False
        return True

    def _verified(self, record: PublishedKey, now: datetime) -> VerifiedKey:
        return keys.verify_published(
            record, issuer=self._issuer, broker=self._own().spiffe_id, snapshot=self._snapshot(), now=now
        )

    async def _refresh(self, now: datetime) -> None:
        found: dict[str, VerifiedKey] = {}
        refused: set[str] = set()
        for record in await self._store.published_keys(now):
            try:
                key = self._verified(_decode(record), now)
            except (BrokerError, msgspec.DecodeError, ValueError) as error:
                # Somebody wrote to the store, or our trust domain's authorities changed: either way it is not served.
                digest = hashlib.sha256(record).hexdigest()  # the ledger's KeyPublished has it, beside the kid
                refused.add(digest)
                if digest not in self._refused:
                    _log.warning("published_key_refused", why=str(error), record_sha256=digest)
                continue
            if now < key.serve_until:
                found[key.kid] = key
        self._published, self._refused = found, frozenset(refused)
