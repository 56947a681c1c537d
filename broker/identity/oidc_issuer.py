"""An OIDC issuer: what it says of itself, and the keys that it signs with now.

Source: OpenID Connect Discovery 1.0 sections 3 and 4 ("D" below), Core 1.0 section 10.1, RFC 7517. Everything comes
over TLS from the configured name, without redirects, within a size and a time; what comes is believed because of that,
so the issuer in it has to be letter for letter the configured one.
"""

import asyncio
import ssl
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from types import MappingProxyType
from typing import Any, Final
from urllib.parse import urlsplit

import aiohttp
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm
from jwt.exceptions import InvalidKeyError

from broker.errors import BrokerError, Invalid, Reason, Refused, Unavailable
from broker.identity.person import check_issuer
from broker.identity.trust import parse_json_object

MAX_DOCUMENT: Final = 256 * 1024  # bytes; large issuers' metadata and key sets have about 10 KiB
MAX_KEYS: Final = 64
FETCH_TIMEOUT_S: Final = 4.0  # for both documents; a request has 10 s in all
KEEP: Final = timedelta(seconds=300)  # a key that the issuer withdraws counts for no longer than this
REFETCH: Final = timedelta(seconds=60)  # between two fetches that unknown key ids cause, since anybody can make one up
RETRY: Final = timedelta(seconds=5)  # after a fetch that failed, before the next one
MIN_RSA_BITS: Final = 2048  # RFC 7518 section 3.3: MUST
MAX_RSA_BITS: Final = 8192  # beyond it a signature costs milliseconds to check

OidcKey = rsa.RSAPublicKey | ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey
# RFC 7518 section 6 and RFC 8037 section 2: what a public key is made of.
_PUBLIC: Final = {"RSA": ("n", "e"), "EC": ("crv", "x", "y"), "OKP": ("crv", "x")}
_SECRET: Final = frozenset({"d", "p", "q", "dp", "dq", "qi", "oth", "k"})
_MAKERS: Final[Mapping[str, Any]] = {"RSA": RSAAlgorithm, "EC": ECAlgorithm, "OKP": OKPAlgorithm}
# What is compressed could be small on the wire and large here.
HEADERS: Final = {"Accept": "application/json", "Accept-Encoding": "identity"}


@dataclass(frozen=True, slots=True, kw_only=True)
class IssuerSettings:
    """One issuer that we take people's word from, as an operator configures it.

    audience: our client id there. max_auth_age: how long ago a person may have authenticated. ca_file: PEM of the CAs
    that its TLS certificate leads to; None for the system's. groups_claim: which claim lists a person's groups; ""
    for none.

    Raises: Invalid when a part cannot be.
    """

    issuer: str
    audience: str
    max_auth_age: timedelta = timedelta(seconds=300)
    ca_file: str | None = None
    groups_claim: str = "groups"

    def __post_init__(self) -> None:
        check_issuer(self.issuer)
        if not self.audience:
            raise Invalid(f"{self.issuer}: audience (our client id there) must not be empty")
        if not timedelta(seconds=1) <= self.max_auth_age <= timedelta(hours=1):
            raise Invalid(f"{self.issuer}: max_auth_age_s is 1 to 3600")


@dataclass(frozen=True, slots=True, kw_only=True)
class Metadata:
    """What an issuer says of itself. Other than `issuer`, "" where it says nothing of that."""

    issuer: str
    jwks_uri: str
    authorization_endpoint: str = ""
    token_endpoint: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class IssuerKey:
    """A public key of an issuer. alg: the one algorithm that it is for, "" where the issuer does not say."""

    key: OidcKey
    alg: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class _KeySet:
    fetched_at: datetime
    by_kid: Mapping[str, tuple[IssuerKey, ...]]


class FetchedKeys:
    """Somebody's public keys, which are fetched when they are needed and kept for `KEEP` at most.

    Whoever shows a token can make us fetch, so fetches are rare whatever comes: one at a time, one in `REFETCH` for
    key ids that we do not know, one in `RETRY` while nobody answers. A fetch goes on when who caused it goes away, and
    holds up nobody whose key is known.

    issuer: whose they are, for messages. fetch: gets the key set (RFC 7517), not bounded in time; raises Unavailable.
    """

    def __init__(self, issuer: str, fetch: Callable[[], Awaitable[bytes]]) -> None:
        self._issuer, self._get = issuer, fetch
        self._kept: _KeySet | None = None
        self._failed: tuple[datetime, BrokerError] | None = None
        self._fetching: asyncio.Task[_KeySet | BrokerError] | None = None

    async def keys(self, kid: str | None, now: datetime) -> tuple[IssuerKey, ...]:
        """The keys of that id. kid None: the only key; none where there are several (Core section 10.1).

        Raises: Unavailable(IDENTITY_UNAVAILABLE) when they are not known and cannot be had.
        """
        kept = await self._fresh(now, KEEP)
        if kid is not None and kid not in kept.by_kid:
            kept = await self._fresh(now, REFETCH)
        return keys_of(kept.by_kid, kid)

    async def _fresh(self, now: datetime, most: timedelta) -> _KeySet:
        if self._kept is not None and _younger(self._kept.fetched_at, now, most):
            return self._kept
        if self._fetching is None:
            if self._failed is not None and _younger(self._failed[0], now, RETRY):
                raise self._no_keys(self._failed[1])
            self._fetching = asyncio.create_task(self._fetch(now))
            self._fetching.add_done_callback(self._fetched)
        found = await asyncio.shield(self._fetching)
        if isinstance(found, BrokerError):
            raise self._no_keys(found) from found
        return found

    async def _fetch(self, now: datetime) -> _KeySet | BrokerError:
        """Keeps what the issuer says, or that it said nothing, until `RETRY` after that was known."""
        clock = asyncio.get_running_loop().time
        begin = clock()
        try:
            async with asyncio.timeout(FETCH_TIMEOUT_S):
                found = parse_keys(await self._get())
        except TimeoutError:
            why: BrokerError = Unavailable(Reason.IDENTITY_UNAVAILABLE, f"no answer within {FETCH_TIMEOUT_S:g} s")
        except BrokerError as error:
            why = error
        else:
            self._kept, self._failed = _KeySet(fetched_at=now, by_kid=found), None
            return self._kept
        self._failed = now + timedelta(seconds=clock() - begin), why
        return why

    def _fetched(self, _: "asyncio.Task[_KeySet | BrokerError]") -> None:
        self._fetching = None

    def _no_keys(self, why: BrokerError) -> Unavailable:
        detail = f"no keys of the issuer {self._issuer}: {why.detail}"
        return Unavailable(Reason.IDENTITY_UNAVAILABLE, detail, retry_after_ms=int(RETRY.total_seconds() * 1000))


class OidcIssuer(FetchedKeys):
    """An issuer, and its keys where it says that they are. Raises: OSError when `ca_file` cannot be read."""

    def __init__(self, settings: IssuerSettings) -> None:
        self.settings = settings
        tls = tls_to_issuer(settings.ca_file)

        async def fetch() -> bytes:
            return await get_document((await discover(settings.issuer, tls)).jwks_uri, tls)

        super().__init__(settings.issuer, fetch)


def keys_of(by_kid: Mapping[str, tuple[IssuerKey, ...]], kid: str | None) -> tuple[IssuerKey, ...]:
    """Those of that id. kid None: the only key; none where there are several (Core section 10.1)."""
    if kid is not None:
        return by_kid.get(kid, ())
    every = [key for keys in by_kid.values() for key in keys]
    return tuple(every) if len(every) == 1 else ()


def _younger(then: datetime, now: datetime, most: timedelta) -> bool:
    """Whether it is less than `most` ago. What the clock says is still to come, beyond `RETRY`, was before a reset."""
    return -RETRY <= now - then < most


def tls_to_issuer(ca_file: str | None) -> ssl.SSLContext:
    """TLS that checks a server's DNS name against `ca_file` (PEM) or the system's CAs. Raises: OSError."""
    context = ssl.create_default_context(cafile=ca_file)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


async def discover(issuer: str, tls: ssl.SSLContext, url: str = "") -> Metadata:
    """Asks an issuer for its metadata (D 4). Not bounded in time. url: where they are, "" for OpenID's place.

    Raises: Unavailable, also when it answers in the name of another issuer or its URLs are not https.
    """
    url = url or f"{issuer.removesuffix('/')}/.well-known/openid-configuration"  # D 4.1: without a slash at the end
    try:
        found = parse_json_object(await get_document(url, tls), "the issuer's metadata")
    except Refused as error:
        raise _unusable(url, error.detail) from error
    if found.get("issuer") != issuer:  # D 4.3: MUST be exactly the one that was asked
        raise _unusable(url, "it names another issuer: configure the name that it has in there")
    endpoints = {}
    for name in ("jwks_uri", "authorization_endpoint", "token_endpoint"):
        endpoint = found.get(name, "")
        if endpoint != "" or name == "jwks_uri":
            _check_https(endpoint, name, url)
        endpoints[name] = endpoint
    return Metadata(issuer=issuer, **endpoints)


def _check_https(endpoint: object, name: str, where: str) -> None:
    try:
        parts = urlsplit(endpoint) if isinstance(endpoint, str) else None
    except ValueError:
        parts = None
    if parts is None or parts.scheme != "https" or not parts.hostname or parts.username is not None or parts.fragment:
        raise _unusable(where, f"its {name} is no https URL")


def _unusable(url: str, why: str) -> Unavailable:
    return Unavailable(Reason.IDENTITY_UNAVAILABLE, f"{url}: {why}")


async def get_document(url: str, tls: ssl.SSLContext) -> bytes:
    """What stands at `url`, at most `MAX_DOCUMENT` bytes. Not bounded in time. Raises: Unavailable."""
    try:
        async with (
            aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(ssl=tls), cookie_jar=aiohttp.DummyCookieJar(), auto_decompress=False
            ) as session,
            session.get(url, headers=HEADERS, allow_redirects=False) as response,
        ):
            return await read_answer(response, url)
    except (aiohttp.ClientError, OSError) as error:
        raise _unusable(url, f"{type(error).__name__}: {error}") from error


async def read_answer(response: aiohttp.ClientResponse, url: str) -> bytes:
    """The body of a plain 200 of at most `MAX_DOCUMENT` bytes. Raises: Unavailable, with the body unread."""
    if response.status != 200:
        raise _unusable(url, f"status {response.status}, where 200 is needed (redirects are not followed)")
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise _unusable(url, "the answer is compressed, which was not asked for")
    body = b""
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > MAX_DOCUMENT:
            raise _unusable(url, f"the answer is larger than {MAX_DOCUMENT} bytes")
    return body


def parse_keys(jwks: bytes) -> Mapping[str, tuple[IssuerKey, ...]]:
    """The signing keys of a JWK Set, by `kid` ("" for one without).

    A key that we cannot use is left out and the others count: another `kty`, curve or size, a `use` other than `sig`.
    A set with a secret in it is refused whole: who publishes one key's private half may well publish another's.

    Raises: Unavailable when it is no JWK Set, or one of more than `MAX_KEYS`, or holds a secret.
    """
    try:
        keys = parse_json_object(jwks, "the issuer's key set").get("keys")
    except Refused as error:
        raise Unavailable(Reason.IDENTITY_UNAVAILABLE, error.detail) from error
    if not isinstance(keys, list) or len(keys) > MAX_KEYS:
        raise Unavailable(Reason.IDENTITY_UNAVAILABLE, f"the issuer's key set is no list of at most {MAX_KEYS} keys")
    if any(isinstance(jwk, dict) and not _SECRET.isdisjoint(jwk) for jwk in keys):
        raise Unavailable(Reason.IDENTITY_UNAVAILABLE, "the issuer publishes a private or symmetric key: it must not")
    found: dict[str, tuple[IssuerKey, ...]] = {}
    for jwk in keys:
        key = _key(jwk) if isinstance(jwk, dict) else None
        if key is not None:
            kid = jwk.get("kid", "")
            found[kid] = (*found.get(kid, ()), key)
    return MappingProxyType(found)


def _key(jwk: dict[str, Any]) -> IssuerKey | None:
    """The key in a JWK, from its public members alone, or None where it is none that signs ID tokens."""
    operations, alg = jwk.get("key_ops", ["verify"]), jwk.get("alg", "")
    if jwk.get("use", "sig") != "sig" or not isinstance(operations, list) or "verify" not in operations:
        return None
    kind = jwk.get("kty")
    members = _PUBLIC.get(kind, ()) if isinstance(kind, str) else ()
    strings = (alg, jwk.get("kid", ""), *(jwk.get(name) for name in members))
    if not members or not all(isinstance(value, str) for value in strings):
        return None
    try:
        key = _MAKERS[str(kind)].from_jwk({"kty": kind, **{name: jwk[name] for name in members}})
    except (InvalidKeyError, ValueError, UnsupportedAlgorithm):
        return None
    if isinstance(key, rsa.RSAPublicKey) and not MIN_RSA_BITS <= key.key_size <= MAX_RSA_BITS:
        return None
    return IssuerKey(key=key, alg=alg) if isinstance(key, OidcKey) else None
