"""The issuer's keys, as a guard keeps them: by `kid`, for at most 300 seconds, and not a moment on hope."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any, Final

import msgspec
from cryptography.hazmat.primitives.asymmetric import ec

from broker.credentials import jose
from broker.errors import BrokerError, Invalid, Reason, Refused, Unavailable

MAX_AGE: Final = 300.0  # seconds; below the 360 s that a key is published ahead of its first use (docs/staleness.md)
REFRESH_AFTER: Final = 150.0  # seconds; half of it, so that one missed fetch is no outage
RETRY_AFTER: Final = 5.0  # seconds between fetches, whatever kids strangers send
FETCH_TIMEOUT: Final = 5.0  # seconds
MAX_KEY_SET: Final = 64 * 1024  # bytes
MAX_KEYS: Final = 128

Fetch = Callable[[], Awaitable[bytes]]

# Counts time in which the machine slept, where the system has such a clock: a lid does not make a key younger.
boot_seconds: Final[Callable[[], float]] = partial(
    time.clock_gettime, getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
)


class UnknownKey(Refused):
    """No key of this `kid` in the set we have; a newer set may have it."""


class StaleKeys(Unavailable):
    """Our key set is too old to be believed."""


class _Key(msgspec.Struct, frozen=True, kw_only=True):
    """One JWK (RFC 7517 section 4). Members that would hold a private or a secret key are named to be refused."""

    kty: str
    kid: str | None = None
    crv: str | None = None
    x: str | None = None
    y: str | None = None
    use: str = "sig"
    alg: str = "ES256"
    d: Any = msgspec.UNSET
    p: Any = msgspec.UNSET
    q: Any = msgspec.UNSET
    k: Any = msgspec.UNSET


class _KeySet(msgspec.Struct, frozen=True):
    keys: list[_Key]


_decoder = msgspec.json.Decoder(_KeySet)


def parse_key_set(body: bytes) -> Mapping[str, ec.EllipticCurvePublicKey]:
    """The P-256 signature keys of a JWK set, by `kid`.

    Keys of another type, algorithm or use are left out, as RFC 7517 section 5 has it: they verify nothing of ours.

    Raises: Invalid for the whole set when it is too large, is not JSON or has a name twice, has a private or secret
    key in it, one `kid` twice, a signature key without `kid`, no point on the curve, or no key that we can use.
    """
    if len(body) > MAX_KEY_SET:
        raise Invalid(f"a key set of more than {MAX_KEY_SET} bytes")
    listed = jose.decode_unique(body, _decoder, "the key set").keys
    if len(listed) > MAX_KEYS:
        raise Invalid(f"a key set of more than {MAX_KEYS} keys")
    found: dict[str, ec.EllipticCurvePublicKey] = {}
    kids: set[str | None] = set()
    for key in listed:
        if any(secret is not msgspec.UNSET for secret in (key.d, key.p, key.q, key.k)):
            raise Invalid("the key set holds a private key: replace that key at once")
        if key.kid is not None and key.kid in kids:
            raise Invalid("the key set has one kid twice")
        kids.add(key.kid)
        if (key.kty, key.crv, key.use, key.alg) != ("EC", "P-256", "sig", "ES256"):
            continue
        if not key.kid or key.x is None or key.y is None:
            raise Invalid("the key set has a key without kid or coordinates")
        found[key.kid] = jose.load_jwk(jose.Jwk(kty="EC", crv="P-256", x=key.x, y=key.y))
    if not found:
        raise Invalid("the key set has no key for ES256 signatures")
    return found


class KeyCache:
    """Keeps a key set for at most `MAX_AGE`.

    fetch: gets the JWK set's bytes (`https_fetch` makes one). After `REFRESH_AFTER` a use starts a fetch beside it; a
    `kid` that is not in the set is worth one fetch, shared by all who wait; no two fetches are closer than
    `RETRY_AFTER`. A fetch that fails leaves the old set, until it is `MAX_AGE` old. A key that the issuer withdraws
    thus counts for at most `MAX_AGE` more.

    seconds: a clock that never goes back. Use it in one event loop; `await close()` ends a fetch under way.
    """

    def __init__(self, fetch: Fetch, *, seconds: Callable[[], float] = boot_seconds) -> None:
        self._fetch, self._seconds = fetch, seconds
        self._keys: Mapping[str, ec.EllipticCurvePublicKey] = {}
        self._fetched_at = float("-inf")  # when the fetch was begun: what it says may be that old
        self._tried_at = float("-inf")
        self._fetching: asyncio.Task[bool] | None = None
        self.last_error: str | None = None

    def key(self, kid: str) -> ec.EllipticCurvePublicKey:
        """The key of `kid`. Raises: UnknownKey, or StaleKeys when the set is too old or was never fetched."""
        age = self._seconds() - self._fetched_at
        if age >= MAX_AGE:
            raise StaleKeys(Reason.SCOPE_STALE, f"no fresh key set: {self.last_error or 'none was fetched yet'}")
        found = self._keys.get(kid)
        if found is None:
            raise UnknownKey(Reason.UNAUTHENTICATED, "no key of that kid")
        return found

    def refresh_if_due(self) -> None:
        """Starts a fetch, beside what is going on, when the set is half as old as it may be. Needs a running loop."""
        if self._seconds() - self._fetched_at >= REFRESH_AFTER:
            self._start()

    async def refetch(self) -> bool:
        """Fetches the set, or waits for the fetch under way. False where it failed, or the last one is too recent."""
        task = self._start()
        return await asyncio.shield(task) if task else False

    def _start(self) -> asyncio.Task[bool] | None:
        if self._fetching is None:
            if self._seconds() - self._tried_at < RETRY_AFTER:
                return None
            self._tried_at = self._seconds()
            self._fetching = asyncio.create_task(self._replace(self._tried_at), name="guard key set")
        return self._fetching

    async def _replace(self, started: float) -> bool:
        try:
            async with asyncio.timeout(FETCH_TIMEOUT):
                body = await self._fetch()
            self._keys, self._fetched_at, self.last_error = parse_key_set(body), started, None
        except BrokerError as error:
            self.last_error = error.detail
        except Exception as error:  # noqa: BLE001 - a fetch is the user's code; whatever it raises, there is no set
            self.last_error = f"fetching it failed: {type(error).__name__}: {error}"
        finally:
            self._fetching = None
        return self.last_error is None

    async def close(self) -> None:
        """Ends a fetch under way."""
        if self._fetching is not None:
            self._fetching.cancel()
            await asyncio.wait([self._fetching])
