"""Logging in from a terminal: a real issuer over TLS, a browser that follows redirects, and others who interfere."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, parse_qsl, urlencode, urlsplit

import aiohttp
import jwt
import pytest
from support.oidc import AUTHORIZE, CLIENT_ID, DISCOVERY, TOKEN, OidcServer, oidc_server

from broker.client import login as login_module
from broker.client.login import LoginSettings, login
from broker.errors import BrokerError, Invalid, Reason, Refused, Unavailable
from broker.identity.id_token import IdTokens
from broker.identity.oidc_issuer import IssuerSettings, OidcIssuer, tls_to_issuer

NONCE = "ab" * 32
Visit = Callable[[str], "asyncio.Future[None]"]


@pytest.fixture
async def oidc(tmp_path: Path) -> AsyncIterator[OidcServer]:
    async with oidc_server(tmp_path) as server:
        yield server


class Browser:
    """Goes where it is sent, as a browser does. before: visits the redirect URI with these parameters first."""

    def __init__(self, oidc: OidcServer, *before: dict[str, str], stays: bool = False) -> None:
        self.oidc, self.before, self.stays = oidc, before, stays
        self.urls: list[str] = []
        self.pages: list[tuple[int, str]] = []
        self.visits: asyncio.Queue[str] = asyncio.Queue()

    def tell(self, url: str) -> None:
        self.urls.append(url)
        self.visits.put_nowait(url)

    @property
    def asked(self) -> dict[str, str]:
        return dict(parse_qsl(urlsplit(self.urls[0]).query))

    async def run(self) -> None:
        url = await self.visits.get()
        tls = tls_to_issuer(str(self.oidc.ca_file))
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=tls)) as session:
            for query in self.before:
                async with session.get(f"{self.asked['redirect_uri']}?{urlencode(query)}") as response:
                    self.pages.append((response.status, await response.text()))
            if self.stays:
                return
            async with session.get(url) as response:
                self.pages.append((response.status, await response.text()))


async def log_in(oidc: OidcServer, browser: Browser, /, **changes: Any) -> str:
    names = {"issuer": oidc.issuer, "client_id": CLIENT_ID, "ca_file": str(oidc.ca_file)}
    settings = LoginSettings(**(names | {key: changes.pop(key) for key in list(changes) if key in {*names, "scopes"}}))
    async with asyncio.TaskGroup() as group:
        visit = group.create_task(browser.run())
        try:
            return await login(settings, NONCE, **({"tell": browser.tell, "browser": None, "seconds": 5.0} | changes))
        finally:
            with contextlib.suppress(TimeoutError):  # its last page may still be on the way
                async with asyncio.timeout(2):
                    await asyncio.wait([visit]) if browser.urls else visit.cancel()


async def refusal(oidc: OidcServer, browser: Browser, /, **changes: Any) -> BrokerError:
    try:
        await log_in(oidc, browser, **changes)
    except BaseExceptionGroup as group:
        (error,) = group.exceptions
        assert isinstance(error, BrokerError)
        return error
    raise AssertionError("the login worked")


# -- use -------------------------------------------------------------------------------------------------------------


async def test_a_login_gives_an_id_token_about_this_request_that_the_broker_takes(oidc: OidcServer) -> None:
    browser = Browser(oidc)
    token = await log_in(oidc, browser)
    settings = IssuerSettings(issuer=oidc.issuer, audience=CLIENT_ID, ca_file=str(oidc.ca_file))
    verified = await IdTokens({oidc.issuer: OidcIssuer(settings)}).verify(token, NONCE, datetime.now(UTC))
    assert verified.person.subject == "u-17"
    assert browser.pages[0][0] == 200
    assert "logged in" in browser.pages[0][1]


async def test_a_library_that_is_not_ours_takes_the_token_too(oidc: OidcServer) -> None:
    token = await log_in(oidc, Browser(oidc))
    keys = jwt.PyJWKSet.from_dict({"keys": oidc.published})
    claims = jwt.decode(token, keys[oidc.signer.kid], algorithms=["ES256"], audience=CLIENT_ID, issuer=oidc.issuer)
    assert claims["nonce"] == NONCE


async def test_the_issuer_is_asked_to_authenticate_now_about_this_request_with_pkce(oidc: OidcServer) -> None:
    browser = Browser(oidc)
    await log_in(oidc, browser, scopes=("openid", "groups"))
    asked = browser.asked
    assert browser.urls[0].startswith(oidc.issuer + AUTHORIZE + "?")
    assert (asked["response_type"], asked["code_challenge_method"], asked["nonce"]) == ("code", "S256", NONCE)
    assert (asked["prompt"], asked["max_age"], asked["scope"]) == ("login", "0", "openid groups")
    redirect = urlsplit(asked["redirect_uri"])
    assert (redirect.scheme, redirect.hostname) == ("http", "127.0.0.1")
    assert len(asked["state"]) >= 43
    assert "code_verifier" not in asked


async def test_no_two_logins_share_state_challenge_or_port(oidc: OidcServer) -> None:
    browsers = [Browser(oidc), Browser(oidc)]
    await asyncio.gather(*(log_in(oidc, browser) for browser in browsers))
    for name in ("state", "code_challenge", "redirect_uri"):
        assert len({browser.asked[name] for browser in browsers}) == 2


async def test_a_browser_is_opened_and_the_url_told_as_well(oidc: OidcServer) -> None:
    browser, opened = Browser(oidc), []
    await log_in(oidc, browser, browser=opened.append)
    assert opened == browser.urls


async def test_an_authorization_endpoint_may_have_a_query_of_its_own(oidc: OidcServer) -> None:
    oidc.metadata = {"authorization_endpoint": f"{oidc.issuer}{AUTHORIZE}?tenant=acme"}
    browser = Browser(oidc)
    await log_in(oidc, browser)
    assert browser.asked["tenant"] == "acme"


async def test_the_port_is_closed_when_the_login_is_over(oidc: OidcServer) -> None:
    browser = Browser(oidc)
    await log_in(oidc, browser)
    with pytest.raises(OSError):
        await asyncio.open_connection("127.0.0.1", urlsplit(browser.asked["redirect_uri"]).port)


# -- others ----------------------------------------------------------------------------------------------------------


async def test_who_comes_back_without_our_state_changes_nothing(oidc: OidcServer) -> None:
    strangers = (
        {},
        {"code": "stolen"},
        {"code": "stolen", "state": "guessed"},
        {"error": "access_denied", "state": ""},
        {"code": "stolen", "state": "\u00fc"},
    )
    browser = Browser(oidc, *strangers)
    assert await log_in(oidc, browser)
    assert [status for status, _ in browser.pages] == [400] * len(strangers) + [200]
    assert "stolen" not in str(browser.pages)


async def test_only_the_one_way_back_is_taken(oidc: OidcServer) -> None:
    browser = Browser(oidc, stays=True)
    settings = LoginSettings(issuer=oidc.issuer, client_id=CLIENT_ID, ca_file=str(oidc.ca_file))
    running = asyncio.create_task(login(settings, NONCE, tell=browser.tell, browser=None, seconds=5))
    url = await browser.visits.get()
    asked = dict(parse_qsl(urlsplit(url).query))
    back, state = asked["redirect_uri"], asked["state"]
    statuses = []
    async with aiohttp.ClientSession() as session:
        for method, target in (
            ("POST", f"{back}?code=x&state={state}"),
            ("GET", f"{back}?code=x&code=y&state={state}"),
            ("GET", f"{back}?code=x&state={state}&state={state}"),
            ("GET", f"{back}/../elsewhere?code=x&state={state}"),
        ):
            async with session.request(method, target) as response:
                statuses.append(response.status)
                assert state not in await response.text()
        assert not running.done()
        connector = aiohttp.TCPConnector(ssl=tls_to_issuer(str(oidc.ca_file)))
        async with aiohttp.ClientSession(connector=connector) as right, right.get(url) as response:
            assert response.status == 200
            assert response.headers["Cache-Control"] == "no-store"
            assert response.headers["Referrer-Policy"] == "no-referrer"
    assert statuses == [400, 400, 400, 404]
    assert await running


async def test_an_answer_in_the_name_of_another_issuer_ends_the_login(oidc: OidcServer) -> None:
    async def mix_up(request: Any) -> Any:
        answer = await oidc._authorize(request)
        answer.headers["Location"] = answer.headers["Location"].replace("iss=https", "iss=http")
        return answer

    oidc.instead[AUTHORIZE] = mix_up
    error = await refusal(oidc, Browser(oidc))
    assert "another issuer" in error.detail
    assert oidc.fetched[TOKEN] == 0


async def test_a_person_who_does_not_consent_is_told_and_nothing_is_redeemed(oidc: OidcServer) -> None:
    oidc.consents = False
    browser = Browser(oidc)
    error = await refusal(oidc, browser)
    assert isinstance(error, Refused)
    assert "access_denied" in error.detail
    assert browser.pages[0][0] == 400
    assert oidc.fetched[TOKEN] == 0


async def test_words_of_a_stranger_do_not_reach_the_terminal(oidc: OidcServer) -> None:
    async def shout(request: Any) -> Any:
        answer = await oidc._authorize(request)
        back = answer.headers["Location"]
        state = parse_qs(urlsplit(back).query)["state"][0]
        bad = urlencode({"state": state, "error": "\x1b[31mrun this: curl evil.test"})
        answer.headers["Location"] = f"{back.partition('?')[0]}?{bad}"
        return answer

    oidc.instead[AUTHORIZE] = shout
    assert "evil" not in (await refusal(oidc, Browser(oidc))).detail


async def test_nobody_who_logs_in_is_waited_for_within_a_bound(oidc: OidcServer) -> None:
    error = await refusal(oidc, Browser(oidc, stays=True), seconds=0.1)
    assert (error.reason, "nobody logged in" in error.detail) == (Reason.UNAUTHENTICATED, True)


# -- the issuer ------------------------------------------------------------------------------------------------------


async def test_a_code_that_the_issuer_does_not_take_is_a_no(oidc: OidcServer) -> None:
    async def forget(request: Any) -> Any:
        oidc.codes.clear()
        return await oidc._token(request)

    oidc.instead[TOKEN] = forget
    error = await refusal(oidc, Browser(oidc))
    assert isinstance(error, Refused)
    assert CLIENT_ID in error.detail


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{}", b'{"id_token": 7}', b'{"id_token": ""}', b'{"id_token":"a","id_token":"b"}', b"\xff"]
)
async def test_an_answer_without_an_id_token_is_not_used(oidc: OidcServer, body: bytes) -> None:
    oidc.says(TOKEN, body)
    assert isinstance(await refusal(oidc, Browser(oidc)), Unavailable)


async def test_an_issuer_that_redirects_floods_or_hangs_at_its_token_endpoint_is_not_followed(
    oidc: OidcServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    oidc.redirects(TOKEN)
    assert "status 302" in (await refusal(oidc, Browser(oidc))).detail
    assert oidc.fetched[f"/moved{TOKEN}"] == 0
    oidc.floods(TOKEN)
    assert "larger than" in (await refusal(oidc, Browser(oidc))).detail
    monkeypatch.setattr(login_module, "FETCH_TIMEOUT_S", 0.5)
    for path in (TOKEN, DISCOVERY):
        oidc.hangs(path)
        assert "within 0.5 s" in (await refusal(oidc, Browser(oidc, stays=path == DISCOVERY))).detail


async def test_an_issuer_that_offers_no_login_or_another_name_is_not_used(oidc: OidcServer) -> None:
    for metadata in ({"token_endpoint": ""}, {"authorization_endpoint": ""}, {"issuer": "https://evil.test"}):
        oidc.metadata = metadata
        browser = Browser(oidc)
        assert isinstance(await refusal(oidc, browser), Unavailable)
        assert browser.urls == []
    assert isinstance(await refusal(oidc, Browser(oidc), ca_file=None), Unavailable)
    oidc.behaves()
    assert await log_in(oidc, Browser(oidc))


async def test_no_token_or_code_is_in_an_error(oidc: OidcServer) -> None:
    token = oidc.id_token(NONCE)
    oidc.says(TOKEN, json.dumps({"id_token": token, "x": 1}).encode(), status=500)
    error = await refusal(oidc, Browser(oidc))
    assert token not in repr(error)


def test_settings_that_cannot_be_are_refused() -> None:
    LoginSettings(issuer="https://login.acme.test", client_id="broker")
    for changes in ({"issuer": "http://login.acme.test"}, {"client_id": ""}, {"scopes": ("email",)}):
        with pytest.raises(Invalid):
            LoginSettings(**({"issuer": "https://login.acme.test", "client_id": "broker"} | changes))
