"""Logging in at an OIDC issuer from a terminal: RFC 8252, with an ID token for one request as its result.

Authorization code with PKCE (RFC 7636, S256). The person logs in with a browser, which comes back to a port of this
machine's loopback address that is open for as long as that takes. `nonce` is the digest of the request that the person
is to act on, and the issuer is asked to have them authenticate now, not to remember that they did.
"""

import asyncio
import base64
import hashlib
import hmac
import secrets
import ssl
import webbrowser
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import parse_qsl, urlencode, urlsplit

import aiohttp
from aiohttp import web

from broker.action import parse_json
from broker.errors import Invalid, Reason, Refused, Unavailable
from broker.identity.oidc_issuer import FETCH_TIMEOUT_S, HEADERS, Metadata, discover, read_answer, tls_to_issuer
from broker.identity.person import check_issuer

LOGIN_S: Final = 300.0  # for the person; the broker takes no older `auth_time` unless it is configured to
SCOPES: Final = ("openid", "email")
CALLBACK: Final = "/callback"
_LOOPBACK: Final = "127.0.0.1"  # RFC 8252 section 8.3: the address, not the name "localhost"
_PAGE_HEADERS: Final = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoginSettings:
    """Where people log in. client_id: ours there, a public client with loopback redirects; the broker's `audience`.

    ca_file: PEM of the CAs that the issuer's TLS certificate leads to; None for the system's. scopes: what is asked
    for; some issuers tell groups only when asked. Raises: Invalid.
    """

    issuer: str
    client_id: str
    ca_file: str | None = None
    scopes: tuple[str, ...] = SCOPES

    def __post_init__(self) -> None:
        check_issuer(self.issuer)
        if not self.client_id or "openid" not in self.scopes:
            raise Invalid("a login needs a client id, and `openid` among its scopes")


async def login(
    settings: LoginSettings,
    nonce: str,
    *,
    tell: Callable[[str], object],
    browser: Callable[[str], object] | None = webbrowser.open,
    seconds: float = LOGIN_S,
) -> str:
    """An ID token about `nonce` of whoever logs in. Secret: it acts for them on that request while it is fresh.

    tell: is told the URL to open. browser: opens it, in a thread; None where the person does. seconds: for them.

    Raises: Refused(UNAUTHENTICATED) when they do not log in, or not in time; Unavailable when the issuer is out of
    reach or cannot be believed; OSError when `ca_file` cannot be read.
    Not checked: the token. Whom it is for, about and by whom it is signed is the broker's to verify.
    """
    tls = tls_to_issuer(settings.ca_file)
    try:
        async with asyncio.timeout(FETCH_TIMEOUT_S):
            metadata = await discover(settings.issuer, tls)
    except TimeoutError:
        raise _unusable(f"{settings.issuer} does not answer within {FETCH_TIMEOUT_S:g} s: try again later") from None
    if not metadata.authorization_endpoint or not metadata.token_endpoint:
        raise _unusable(f"{settings.issuer} offers no login by authorization code")
    callback, verifier = _Callback(issuer=settings.issuer), secrets.token_urlsafe(48)
    async with callback.listening() as redirect_uri:
        url = _authorization_url(metadata, settings, redirect_uri, nonce, callback.state, verifier)
        tell(url)
        try:
            async with asyncio.timeout(seconds):
                if browser is not None:
                    await asyncio.to_thread(browser, url)  # one in the terminal ends when the person ends it
                code = await callback.code
        except TimeoutError:
            raise Refused(Reason.UNAUTHENTICATED, f"nobody logged in within {seconds:g} s: try again") from None
    form = {
        "grant_type": "authorization_code",
        "code": code,
        "redirect_uri": redirect_uri,
        "client_id": settings.client_id,
        "code_verifier": verifier,
    }
    return await _redeem(metadata.token_endpoint, form, tls)


def _authorization_url(
    metadata: Metadata, settings: LoginSettings, redirect_uri: str, nonce: str, state: str, verifier: str
) -> str:
    challenge = base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).rstrip(b"=").decode()
    query = urlencode(
        {
            "response_type": "code",
            "client_id": settings.client_id,
            "redirect_uri": redirect_uri,
            "scope": " ".join(settings.scopes),
            "state": state,
            "nonce": nonce,
            "code_challenge": challenge,
            "code_challenge_method": "S256",
            # OIDC Core section 3.1.2.1: `max_age` makes `auth_time` a required claim; with 0 it means the same as
            # `prompt=login`, and there are issuers that know only one of the two.
            "prompt": "login",
            "max_age": "0",
        }
    )
    parts = urlsplit(metadata.authorization_endpoint)
    return parts._replace(query=f"{parts.query}&{query}" if parts.query else query).geturl()


@dataclass(slots=True)
class _Callback:
    """Where the browser comes back to, once. Whoever else comes does not have our `state`, and changes nothing."""

    issuer: str
    state: str = field(default_factory=lambda: secrets.token_urlsafe(32))
    code: "asyncio.Future[str]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[str]:
        """On a free port of the loopback address. Gives the redirect URI."""
        app = web.Application(client_max_size=1024)
        app.router.add_route("*", CALLBACK, self.take)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        try:
            await web.TCPSite(runner, _LOOPBACK, 0).start()
            yield f"http://{_LOOPBACK}:{runner.addresses[0][1]}{CALLBACK}"
        finally:
            await runner.cleanup()

    async def take(self, request: web.Request) -> web.Response:
        """One visit."""
        pairs = parse_qsl(urlsplit(request.raw_path).query, keep_blank_values=True)
        answer = dict(pairs)
        ours = hmac.compare_digest(answer.get("state", "").encode(errors="replace"), self.state.encode())
        if request.method != "GET" or len(answer) != len(pairs) or not ours or self.code.done():
            return _page("This is not the login that was waited for.", 400)
        if answer.get("iss", self.issuer) != self.issuer:  # RFC 9207 section 2.4: another issuer's answer
            self.code.set_exception(Refused(Reason.UNAUTHENTICATED, "another issuer than the one asked has answered"))
        elif not answer.get("code"):
            said = answer.get("error", "")
            known = said if said.isascii() and said.replace("_", "").isalpha() and len(said) <= 64 else "an error"
            self.code.set_exception(Refused(Reason.UNAUTHENTICATED, f"the issuer let nobody in: {known}"))
        else:
            self.code.set_result(answer["code"])
            return _page("You are logged in. Go back to the terminal; this window can be closed.", 200)
        return _page("The login did not work. The terminal says why.", 400)


def _page(text: str, status: int) -> web.Response:
    return web.Response(text=text, status=status, headers=_PAGE_HEADERS)


async def _redeem(url: str, form: dict[str, str], tls: ssl.SSLContext) -> str:
    """The ID token for the code (OIDC Core section 3.1.3). Raises: Unavailable, Refused."""
    try:
        async with (
            asyncio.timeout(FETCH_TIMEOUT_S),
            aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(ssl=tls), cookie_jar=aiohttp.DummyCookieJar(), auto_decompress=False
            ) as session,
            session.post(url, data=form, headers=HEADERS, allow_redirects=False) as response,
        ):
            if response.status in {400, 401}:
                raise Refused(
                    Reason.UNAUTHENTICATED,
                    f"{url} does not take our login code: is {form['client_id']!r} a public client there?",
                )
            body = await read_answer(response, url)
    except TimeoutError:
        raise _unusable(f"{url} does not answer within {FETCH_TIMEOUT_S:g} s: try again later") from None
    except (aiohttp.ClientError, OSError) as error:
        raise _unusable(f"{url}: {type(error).__name__}: {error}") from error
    try:
        answer = parse_json(body, "the issuer's answer")
    except Invalid as error:
        raise _unusable(f"{url}: {error.detail}") from error
    token = answer.get("id_token") if isinstance(answer, dict) else None
    if not isinstance(token, str) or not token:
        raise _unusable(f"{url} gave no ID token: is the scope `openid` allowed for us there?")
    return token


def _unusable(detail: str) -> Unavailable:
    return Unavailable(Reason.IDENTITY_UNAVAILABLE, detail)
