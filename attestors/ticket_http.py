"""Asking a ticket system over HTTP: one GET for one ticket, at the configured address and nowhere else.

What comes is believed because of where it comes from: over TLS from the configured name (or from this very machine),
without redirects, within a size and a time. A caller chooses the id alone, and nothing in an id can be more than a part
of one path segment or of one value in a query.
"""

import asyncio
import re
import ssl
from collections.abc import Callable, Mapping
from types import MappingProxyType, TracebackType
from typing import Final, Self

import aiohttp
import yarl

from attestors.contract import AttestationUnavailable
from attestors.ticket_reads import Page, SystemAway, Version
from attestors.ticket_url import check_headers, check_template, fill

MAX_BODY: Final = 256 * 1024  # bytes; a ticket with its fields has 2 to 20 KiB, and its history need not be asked for

# What is compressed could be small on the wire and large here. A cache on the way has to ask the system itself
# (RFC 9111 section 5.2.1.4).
_HEADERS: Final = {"Accept": "application/json", "Accept-Encoding": "identity", "Cache-Control": "no-cache"}
_MISSING: Final = frozenset({404, 410})
_ETAG: Final = re.compile(r'(?:W/)?"[\x21\x23-\x7e]{0,254}"')  # RFC 9110 section 8.8.3, within a bound


class HttpTickets:
    """One ticket system. Use as an async context manager: it keeps connections.

    template: see `check_template`. headers: see `check_headers`. authorization: the value of that header, as it is
    now; "" for none. ca_file: PEM, who may vouch for the server; None for the system's. timeout_s: for one question.
    Raises: ValueError, OSError.
    """

    def __init__(
        self,
        template: str,
        authorization: Callable[[], str] = lambda: "",
        *,
        headers: Mapping[str, str] = MappingProxyType({}),
        ca_file: str | None = None,
        timeout_s: float = 1.5,
    ) -> None:
        self._template = check_template(template)
        self._headers = {**_HEADERS, **check_headers(headers)}
        self._authorization = authorization
        self._tls = ssl.create_default_context(cafile=ca_file) if template.startswith("https:") else True
        self._timeout_s = timeout_s
        self._last, self._generation = "", 0
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=self._tls),
            timeout=aiohttp.ClientTimeout(total=None),  # bounded as a whole, below
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

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._template!r})"  # credentials are secret

    def url(self, ticket_id: str) -> str:
        """Where this ticket is asked for."""
        return fill(self._template, ticket_id)

    async def get(self, ticket_id: str, known: Version | None = None) -> Page | None:
        """What the system says of a ticket now. None: there is no such ticket. known: what we have already.

        Raises: SystemAway where nothing was learned of it; AttestationUnavailable where its answer cannot be taken.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._ask(ticket_id, known)
        except TimeoutError as error:
            raise SystemAway(f"no answer within {self._timeout_s:g} s") from error
        except aiohttp.ClientConnectorError as error:
            raise SystemAway(f"{type(error).__name__}: {error}") from error
        except (aiohttp.ClientError, OSError) as error:
            raise SystemAway(type(error).__name__) from error  # others' texts may quote what was sent

    async def _ask(self, ticket_id: str, known: Version | None) -> Page | None:
        if self._session is None:
            raise RuntimeError("HttpTickets is used inside `async with`")
        headers, generation = self._with_authorization()
        if known is not None and known.generation == generation:  # another user may see another ticket
            headers["If-None-Match"] = known.etag
        url = yarl.URL(self.url(ticket_id), encoded=True)  # sent as it is written
        async with self._session.get(url, headers=headers, allow_redirects=False) as answer:
            if answer.status in _MISSING:
                return None
            if answer.status == 304 and "If-None-Match" in headers:
                return Page(body=None, version=known)
            if answer.status != 200:
                raise SystemAway(f"status {answer.status}, where 200 is needed (redirects are not followed)")
            etag = answer.headers.get("ETag", "")
            version = Version(etag=etag, generation=generation) if _ETAG.fullmatch(etag) else None
            return Page(body=await _body(answer), version=version)

    def _with_authorization(self) -> tuple[dict[str, str], int]:
        now = self._authorization()
        if now != self._last:
            self._last, self._generation = now, self._generation + 1
        return {**self._headers, **({"Authorization": now} if now else {})}, self._generation


async def _body(answer: aiohttp.ClientResponse) -> bytes:
    """Raises: AttestationUnavailable."""
    if answer.headers.get("Content-Encoding", "identity") != "identity":
        raise AttestationUnavailable("the answer is compressed, which was not asked for")
    body = b""
    async for chunk in answer.content.iter_any():
        body += chunk
        if len(body) > MAX_BODY:
            raise AttestationUnavailable(f"the ticket is larger than {MAX_BODY} bytes: ask for fewer fields")
    return body
