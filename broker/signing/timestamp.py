"""Asking a timestamp authority (RFC 3161 over HTTP) that a signature exists now.

An answer is believed only after it verified: granted, over SHA-256 of this signature, with our nonce, signed by the
configured authority. So the connection need not be secret or authentic, and many authorities offer plain HTTP.
"""

import ssl
from collections.abc import Sequence
from datetime import datetime
from types import TracebackType
from typing import Final, Self
from urllib.parse import urlsplit

import aiohttp
from rfc3161_client import HashAlgorithm, TimestampRequestBuilder

from attestors.rfc3161 import MAX_RESPONSE, TimestampError, TimestampRoot, verify_timestamp
from broker.errors import Reason, Unavailable

TIMEOUT_S: Final = 5.0

# RFC 3161 section 3.4. What is compressed could be small on the wire and large here.
_HEADERS: Final = {
    "Content-Type": "application/timestamp-query",
    "Accept": "application/timestamp-reply",
    "Accept-Encoding": "identity",
}
# 201 is what Sigstore's own authority answers by an option of its own.
_GOOD: Final = frozenset({200, 201})


class TimestampAuthority:
    """One authority, by URL. Use as an async context manager: it keeps connections.

    url: http or https. roots: the authority's chains, more than one while it changes its key. timeout_s: for the whole
    exchange. ca_file: PEM, who may vouch for an https server; None for the system's. Raises: ValueError for another URL
    or no roots.
    """

    def __init__(
        self, url: str, roots: Sequence[TimestampRoot], timeout_s: float = TIMEOUT_S, *, ca_file: str | None = None
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.hostname or parts.username is not None:
            raise ValueError("a timestamp authority has an http or https URL without user name")
        if not roots:
            raise ValueError("a timestamp authority is believed by its certificates: name its chain")
        self.url = url
        self.roots = tuple(roots)
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)
        self._tls = ssl.create_default_context(cafile=ca_file) if parts.scheme == "https" else True
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=self._tls),
            timeout=self._timeout,
            headers=_HEADERS,
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        return self

    async def __aexit__(
        self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def stamp(self, signature: bytes, *, within: tuple[datetime, datetime] | None = None) -> bytes:
        """A DER TimeStampResp over these bytes, verified.

        within: the first and last second of the certificate, where there is one: a time outside them, by an authority
        whose clock is wrong, would make a bundle that never verifies.

        Raises: Unavailable(timestamp_unavailable) when there is no such answer within the timeout.
        """
        query = TimestampRequestBuilder().data(signature).hash_algorithm(HashAlgorithm.SHA256).build()
        response = await self._post(query.as_bytes())
        try:
            time = verify_timestamp(response, signature, self.roots, nonce=query.nonce)
        except TimestampError as error:
            raise self._unavailable(str(error)) from error
        if within is not None and not within[0] <= time <= within[1]:
            raise self._unavailable(f"it says {time:%Y-%m-%d %H:%M:%S} UTC, when the certificate is not valid")
        return response

    async def _post(self, query: bytes) -> bytes:
        if self._session is None:
            raise RuntimeError("a TimestampAuthority is used inside `async with`")
        try:
            async with self._session.post(self.url, data=query, allow_redirects=False) as response:
                if response.status not in _GOOD:
                    raise self._unavailable(f"status {response.status}")
                body = b""
                async for chunk in response.content.iter_any():
                    body += chunk
                    if len(body) > MAX_RESPONSE:
                        raise self._unavailable(f"an answer of more than {MAX_RESPONSE} bytes")
                return body
        except TimeoutError as error:
            raise self._unavailable(f"no answer within {self._timeout.total} s") from error
        except aiohttp.ClientError as error:
            raise self._unavailable(f"{type(error).__name__}: {error}") from error

    def _unavailable(self, why: str) -> Unavailable:
        return Unavailable(Reason.TIMESTAMP_UNAVAILABLE, f"timestamp authority {self.url}: {why}")
