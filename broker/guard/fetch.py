"""Getting the broker's key set over HTTPS: from a server that is proved to be the broker, and from nowhere else."""

import ssl
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final
from urllib.parse import SplitResult, urlsplit

import aiohttp

from broker.errors import Invalid, Reason, Unavailable
from broker.guard.keys import FETCH_TIMEOUT, MAX_KEY_SET, Fetch
from broker.identity.spiffe_id import SpiffeId
from broker.identity.tls_dial import SpiffeDialer
from broker.identity.trust import TrustSnapshot

_TIMEOUT: Final = aiohttp.ClientTimeout(total=FETCH_TIMEOUT - 1)  # so that its own error is seen, not the cache's
# What is compressed could be small on the wire and large here; a key set needs no compression.
_HEADERS: Final = {"Accept": "application/json", "Accept-Encoding": "identity"}


def spiffe_fetch(
    url: str,
    broker: SpiffeId,
    snapshot: Callable[[], TrustSnapshot],
    *,
    clock: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> Fetch:
    """Fetches `url` from the server whose SPIFFE ID is `broker`; its DNS names mean nothing here.

    snapshot: the newest one of a WorkloadApi: its bundle of the broker's trust domain is what we trust, its SVID is
    ours. What is fetched raises Unavailable when the server is another, redirects, or answers anything but 200.
    """
    parts = _https(url)

    async def fetch() -> bytes:
        dialer = SpiffeDialer(f"{parts.hostname}:{parts.port or 443}", broker, snapshot, clock)
        try:
            path = (await dialer.start()).removeprefix("unix:")
            try:
                # Plain text as far as the hop in this process, which does the TLS.
                return await _get(parts._replace(scheme="http").geturl(), aiohttp.UnixConnector(path))
            except aiohttp.ClientError as error:
                raise Unavailable(Reason.SCOPE_STALE, f"{url}: {dialer.last_error or error}") from error
        finally:
            await dialer.close()

    return fetch


def https_fetch(url: str, *, ca_file: str | None = None) -> Fetch:
    """Fetches `url` as the web does: the server's DNS name is checked against `ca_file` (PEM) or the system's CAs.

    For a broker behind an ordinary certificate. What is fetched raises Unavailable like that of `spiffe_fetch`.
    """
    _https(url)
    context = ssl.create_default_context(cafile=ca_file)

    async def fetch() -> bytes:
        try:
            return await _get(url, aiohttp.TCPConnector(ssl=context))
        except aiohttp.ClientError as error:
            raise Unavailable(Reason.SCOPE_STALE, f"{url}: {error}") from error

    return fetch


def _https(url: str) -> SplitResult:
    parts = urlsplit(url)
    if parts.scheme != "https" or not parts.hostname or parts.username is not None:
        raise Invalid("a key set is fetched from an https URL without user name")
    return parts


async def _get(url: str, connector: aiohttp.BaseConnector) -> bytes:
    async with (
        aiohttp.ClientSession(connector=connector, timeout=_TIMEOUT, auto_decompress=False) as session,
        session.get(url, headers=_HEADERS, allow_redirects=False) as response,
    ):
        if response.status != 200:
            raise Unavailable(Reason.SCOPE_STALE, f"{url}: status {response.status}")
        body = b""
        async for chunk in response.content.iter_any():
            body += chunk
            if len(body) > MAX_KEY_SET:
                raise Unavailable(Reason.SCOPE_STALE, f"{url}: a key set of more than {MAX_KEY_SET} bytes")
        return body
