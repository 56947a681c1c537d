"""Where a transmitter's public keys come from: a pinned URL, what it says of itself, or a file.

Source: OpenID Shared Signals Framework 1.0 section 7 (discovery), RFC 7517. What is fetched comes over TLS from a
configured name, without redirects, and is kept as an OIDC issuer's keys are (oidc_issuer.py).
"""

from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime
from pathlib import Path
from urllib.parse import urlsplit

from broker.errors import Unavailable
from broker.identity.oidc_issuer import (
    MAX_DOCUMENT,
    FetchedKeys,
    IssuerKey,
    discover,
    get_document,
    keys_of,
    parse_keys,
    tls_to_issuer,
)

Fetch = Callable[[], Awaitable[bytes]]


def keys_at(url: str, issuer: str, ca_file: str | None) -> FetchedKeys:
    """The keys at this https URL. Raises: OSError when `ca_file` cannot be read."""
    return FetchedKeys(issuer, fetch_at(url, ca_file))


def discovered_keys(issuer: str, ca_file: str | None) -> FetchedKeys:
    """The keys where the transmitter says that they are. Raises: OSError when `ca_file` cannot be read."""
    return FetchedKeys(issuer, fetch_discovered(issuer, ca_file))


def fetch_at(url: str, ca_file: str | None) -> Fetch:
    """Gets what stands there; that raises Unavailable. Raises: OSError when `ca_file` cannot be read."""
    tls = tls_to_issuer(ca_file)
    return lambda: get_document(url, tls)


def fetch_discovered(issuer: str, ca_file: str | None) -> Fetch:
    """Gets what stands where the transmitter says. Raises: as `fetch_at`."""
    tls = tls_to_issuer(ca_file)

    async def fetch() -> bytes:
        found = await discover(issuer, tls, configuration_url(issuer))
        return await get_document(found.jwks_uri, tls)

    return fetch


def configuration_url(issuer: str) -> str:
    """Where a transmitter describes itself (section 7.2.1): between the host and the path of its name."""
    parts = urlsplit(issuer)
    return f"https://{parts.netloc}/.well-known/ssf-configuration{parts.path.removesuffix('/')}"


class FileKeys:
    """The keys in a file, a JWK Set, until `reload` is called. Raises: ValueError, OSError where it cannot be used."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._by_kid: Mapping[str, tuple[IssuerKey, ...]] = {}
        self.reload()

    def reload(self) -> None:
        """Reads the file again. Blocks. Raises: as the class does; then what was read before stays."""
        with self._file.open("rb") as stream:
            content = stream.read(MAX_DOCUMENT + 1)
        if len(content) > MAX_DOCUMENT:
            raise ValueError(f"{self._file} is larger than {MAX_DOCUMENT} bytes: it is something else")
        try:
            found = parse_keys(content)
        except Unavailable as error:
            raise ValueError(f"{self._file}: {error.detail}") from error
        if not found:
            raise ValueError(f"{self._file} holds no public key that signs: it is a JWK Set (RFC 7517)")
        self._by_kid = found

    async def keys(self, kid: str | None, now: datetime) -> tuple[IssuerKey, ...]:  # noqa: ARG002 -- a file has no age
        """See KeySource."""
        return keys_of(self._by_kid, kid)
