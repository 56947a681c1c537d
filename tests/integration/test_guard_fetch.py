"""The key set over HTTPS: from a server proved to be the broker, small, in time, without detours."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from support.issuer import Issuer
from support.pki import CA, Svid, der, snapshot

from broker.errors import BrokerError, Invalid, Reason, Unavailable
from broker.guard import KeyCache, https_fetch, spiffe_fetch
from broker.identity.spiffe_id import SpiffeId
from broker.identity.tls_context import server_context

BROKER = "spiffe://acme.test/broker"
ISSUER = Issuer()
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Serve = Callable[..., Awaitable[str]]


def now() -> datetime:
    return datetime.now(UTC)


async def key_set(_: web.Request) -> web.StreamResponse:
    return web.Response(body=ISSUER.jwks(), content_type="application/json")


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    async with contextlib.AsyncExitStack() as stack:

        async def start(context: ssl.SSLContext, handler: Handler = key_set) -> str:
            app = web.Application()
            app.router.add_get("/.well-known/jwks.json", handler)
            app.router.add_get("/elsewhere", key_set)
            runner = web.AppRunner(app, shutdown_timeout=0.1)
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
            return f"https://127.0.0.1:{runner.addresses[0][1]}/.well-known/jwks.json"

        yield start


class Domain:
    """A trust domain with a broker and a receiving service."""

    def __init__(self) -> None:
        self.ca = CA("acme.test", now=now())

    def trust(self, path: str) -> Any:
        return snapshot(self.ca.bundle(), own=self.ca.svid(f"spiffe://acme.test{path}").own())

    def fetch(self, url: str) -> Callable[[], Awaitable[bytes]]:
        trusted = self.trust("/service/orders")
        return spiffe_fetch(url, SpiffeId.parse(BROKER), lambda: trusted, clock=now)


async def refused(fetching: Awaitable[bytes], *told: str) -> None:
    with pytest.raises(Unavailable) as caught:
        await fetching
    assert caught.value.reason is Reason.SCOPE_STALE
    for word in told:
        assert word in caught.value.detail


async def test_the_key_set_comes_from_the_server_with_the_brokers_spiffe_id(serve: Serve) -> None:
    domain = Domain()
    fetch = domain.fetch(await serve(server_context(domain.trust("/broker"))))
    keys = KeyCache(fetch)
    assert await keys.refetch()
    assert keys.key(ISSUER.kid)


async def test_another_workload_of_the_same_domain_is_not_the_broker(serve: Serve) -> None:
    domain = Domain()
    fetch = domain.fetch(await serve(server_context(domain.trust("/service/billing"))))
    await refused(fetch(), "spiffe://acme.test/service/billing", BROKER)


async def test_another_root_says_nothing_of_our_domain(serve: Serve) -> None:
    fetch = Domain().fetch(await serve(server_context(Domain().trust("/broker"))))
    await refused(fetch())


async def test_a_detour_is_not_taken(serve: Serve) -> None:
    domain = Domain()

    async def redirect(_: web.Request) -> web.StreamResponse:
        raise web.HTTPFound("/elsewhere")

    fetch = domain.fetch(await serve(server_context(domain.trust("/broker")), redirect))
    await refused(fetch(), "status 302")


@pytest.mark.parametrize("status", [204, 404, 500, 503])
async def test_an_answer_that_is_no_key_set_is_none(serve: Serve, status: int) -> None:
    domain = Domain()

    async def answer(_: web.Request) -> web.StreamResponse:
        return web.Response(status=status)

    await refused(domain.fetch(await serve(server_context(domain.trust("/broker")), answer))(), f"status {status}")


async def test_an_endless_answer_is_cut_off(serve: Serve) -> None:
    domain = Domain()

    async def endless(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            for _ in range(10_000):
                await response.write(b" " * 4096)
        return response

    await refused(domain.fetch(await serve(server_context(domain.trust("/broker")), endless))(), "more than")


async def test_a_silent_server_is_not_waited_for(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    domain, never = Domain(), asyncio.Event()
    monkeypatch.setattr("broker.guard.keys.FETCH_TIMEOUT", 0.3)

    async def silent(_: web.Request) -> web.StreamResponse:
        await never.wait()
        return web.Response()

    keys = KeyCache(domain.fetch(await serve(server_context(domain.trust("/broker")), silent)))
    assert not await keys.refetch()
    assert "TimeoutError" in str(keys.last_error)
    never.set()


async def test_nobody_there_is_told_so() -> None:
    domain = Domain()
    await refused(domain.fetch("https://127.0.0.1:1/jwks.json")())


def files(folder: Path, ca: CA, svid: Svid) -> tuple[str, ssl.SSLContext]:
    root, chain, key = folder / "ca.pem", folder / "chain.pem", folder / "key.pem"
    root.write_text(ssl.DER_cert_to_PEM_cert(der(ca.certificate)))
    chain.write_bytes(svid.chain_pem)
    key.write_bytes(svid.key_pem)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(chain, key)
    return str(root), context


async def test_over_ordinary_https_the_dns_name_and_the_ca_count(serve: Serve, tmp_path: Path) -> None:
    ca = CA(now=now())
    root, context = files(tmp_path, ca, ca.svid(BROKER, dns=["localhost"]))
    url = (await serve(context)).replace("127.0.0.1", "localhost")
    assert await https_fetch(url, ca_file=root)() == ISSUER.jwks()
    await refused(https_fetch(url)())
    await refused(https_fetch(url.replace("localhost", "127.0.0.1"), ca_file=root)())


@pytest.mark.parametrize(
    "url", ["http://broker.acme.test/jwks.json", "https://", "file:///etc/keys", "https://u:p@b/x", ""]
)
def test_keys_come_over_https_only(url: str) -> None:
    assert https_fetch("https://broker.acme.test/jwks.json")
    with pytest.raises(Invalid):
        https_fetch(url)
    with pytest.raises(BrokerError):
        spiffe_fetch(url, SpiffeId.parse(BROKER), snapshot)
