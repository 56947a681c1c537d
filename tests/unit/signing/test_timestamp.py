"""The client of a timestamp authority, against a real server on loopback that answers well or misbehaves."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta

import pytest
from aiohttp import web
from support.pki import NOW
from support.timestamps import Tsa

from attestors.rfc3161 import MAX_RESPONSE, TimestampRoot, verify_timestamp
from broker.errors import Reason, Unavailable
from broker.signing.timestamp import TimestampAuthority

SIGNATURE = b"a signature"
REPLY = "application/timestamp-reply"
TSA, STRANGER = Tsa.made(), Tsa.made()
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@contextlib.asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[str]:
    """Its URL."""
    app = web.Application()
    app.router.add_route("*", "/tsa", handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/tsa"
    finally:
        await runner.cleanup()


def answering(**changes: object) -> Handler:
    async def handler(request: web.Request) -> web.Response:
        return web.Response(body=TSA.answer(await request.read(), **changes), content_type=REPLY)

    return handler


async def asked(handler: Handler, *, timeout_s: float = 30.0, roots: tuple[TimestampRoot, ...] = (TSA.root,)) -> bytes:
    async with serving(handler) as url, TimestampAuthority(url, roots, timeout_s) as authority:
        return await authority.stamp(SIGNATURE)


async def refused(handler: Handler, why: str, **more: float) -> None:
    with pytest.raises(Unavailable, match=why) as error:
        await asked(handler, **more)
    assert error.value.reason is Reason.TIMESTAMP_UNAVAILABLE
    assert "timestamp authority http://127.0.0.1" in error.value.detail


async def test_a_stamp_is_over_this_signature_and_verifies() -> None:
    seen: list[web.Request] = []

    async def handler(request: web.Request) -> web.Response:
        seen.append(request)
        return await answering()(request)

    response = await asked(handler)
    assert verify_timestamp(response, SIGNATURE, [TSA.root]) == NOW
    assert seen[0].method == "POST"
    assert seen[0].headers["Content-Type"] == "application/timestamp-query"


async def test_an_authority_may_change_its_key_while_both_are_known() -> None:
    assert await asked(answering(), roots=(STRANGER.root, TSA.root))


async def test_created_is_an_answer_too() -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.Response(status=201, body=TSA.answer(await request.read()))

    assert await asked(handler)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"imprint": bytes(32)}, "mismatch between messages"),
        ({"hash_name": "sha512", "imprint": bytes(64)}, "mismatch between messages"),
        ({"hash_name": "sha1", "imprint": bytes(20)}, "unsupported hash"),
        ({"nonce": 1}, "nonce mismatch"),
        ({"nonce": None}, "nonce mismatch"),
        ({"status": 2}, "did not grant"),
        ({"at": NOW - timedelta(days=2)}, "was not valid then"),
    ],
    ids=["another-hash", "another-algorithm", "sha1", "another-nonce", "no-nonce", "rejection", "another-time"],
)
async def test_an_answer_to_something_else_is_no_timestamp(changes: dict[str, object], why: str) -> None:
    await refused(answering(**changes), why)


async def test_a_replayed_answer_is_no_timestamp() -> None:
    """The same signature, stamped before: the nonce is another one."""
    first: list[bytes] = []

    async def handler(request: web.Request) -> web.Response:
        first.append(TSA.answer(await request.read()))
        return web.Response(body=first[0])

    async with serving(handler) as url, TimestampAuthority(url, [TSA.root]) as authority:
        assert await authority.stamp(SIGNATURE) == first[0]
        with pytest.raises(Unavailable, match="nonce mismatch"):
            await authority.stamp(SIGNATURE)


async def test_an_authority_of_another_chain_is_not_believed() -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.Response(body=STRANGER.answer(await request.read()))

    await refused(handler, "not signed by a trusted authority")


@pytest.mark.parametrize("status", [204, 400, 404, 500, 503])
async def test_an_error_is_no_timestamp(status: int) -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.Response(status=status)

    await refused(handler, f"status {status}")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_is_not_followed(status: int) -> None:
    """Not even to a place that would answer well."""
    asked_there: list[str] = []

    async def there(request: web.Request) -> web.Response:
        asked_there.append(request.path)
        return await answering()(request)

    async with serving(there) as elsewhere:

        async def handler(request: web.Request) -> web.Response:
            return web.Response(status=status, headers={"Location": elsewhere})

        await refused(handler, f"status {status}")
    assert asked_there == []


@pytest.mark.parametrize("body", [b"", b"<html>", b"\x30\x80", bytes(100)], ids=["empty", "html", "endless", "zeros"])
async def test_what_is_no_answer_is_no_timestamp(body: bytes) -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.Response(body=body)

    await refused(handler, "cannot be read")


async def test_an_endless_answer_is_cut_off() -> None:
    sent = 0

    async def handler(request: web.Request) -> web.StreamResponse:
        nonlocal sent
        response = web.StreamResponse()
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            while sent < 256 * MAX_RESPONSE:
                await response.write(bytes(MAX_RESPONSE // 4))
                sent += MAX_RESPONSE // 4
        return response

    await refused(handler, f"more than {MAX_RESPONSE} bytes")
    assert sent < 256 * MAX_RESPONSE


async def test_a_compressed_answer_is_not_blown_up() -> None:
    async def handler(request: web.Request) -> web.Response:
        assert request.headers["Accept-Encoding"] == "identity"
        response = web.Response(body=TSA.answer(await request.read()))
        response.enable_compression(web.ContentCoding.gzip)
        return response

    await refused(handler, "cannot be read")


@pytest.mark.parametrize("begins", [False, True], ids=["no-answer", "half-an-answer"])
async def test_a_slow_authority_is_unavailable_in_time(begins: bool) -> None:  # noqa: FBT001
    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        if begins:
            await response.prepare(request)
            await response.write(b"\x30")
        await asyncio.Event().wait()  # until the server is shut down
        return response

    await refused(handler, "no answer within 0.2 s", timeout_s=0.2)


async def test_an_authority_that_is_down_is_unavailable() -> None:
    async with serving(answering()) as url:
        pass
    async with TimestampAuthority(url, [TSA.root]) as authority:
        with pytest.raises(Unavailable, match="ClientConnectorError") as error:
            await authority.stamp(SIGNATURE)
    assert error.value.reason is Reason.TIMESTAMP_UNAVAILABLE


async def test_an_authority_that_hangs_up_is_unavailable() -> None:
    async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    async with server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/tsa"
        async with TimestampAuthority(url, [TSA.root]) as authority:
            with pytest.raises(Unavailable) as error:
                await authority.stamp(SIGNATURE)
    assert error.value.reason is Reason.TIMESTAMP_UNAVAILABLE


async def test_a_time_outside_the_certificate_is_of_no_use() -> None:
    second = timedelta(seconds=1)
    async with serving(answering()) as url, TimestampAuthority(url, [TSA.root]) as authority:
        assert await authority.stamp(SIGNATURE, within=(NOW, NOW))
        for within in ((NOW - 2 * second, NOW - second), (NOW + second, NOW + 2 * second)):
            with pytest.raises(Unavailable, match="when the certificate is not valid"):
                await authority.stamp(SIGNATURE, within=within)


@pytest.mark.parametrize(
    "url", ["ftp://tsa.acme.test", "https://user:secret@tsa.acme.test", "https://", "/run/tsa.sock", ""]
)
def test_an_authority_has_a_url_of_the_web(url: str) -> None:
    with pytest.raises(ValueError, match="http or https URL without user name") as error:
        TimestampAuthority(url, [TSA.root])
    assert "secret" not in str(error.value)


def test_an_authority_has_a_chain() -> None:
    with pytest.raises(ValueError, match="name its chain"):
        TimestampAuthority("https://tsa.acme.test", [])
