"""Security events, pushed over TLS by a transmitter with a key and a key set of its own: RFC 8935 on the wire."""

import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import structlog
from multidict import CIMultiDict
from support.http_broker import Ready
from support.oidc import JWKS, OidcServer, Signer, oidc_server
from support.pki import der
from support.security_events import REVOKED, SECRET, VERIFICATION, Transmitting, complex_subject, opaque
from support.sessions import OTHER_AGENT, Scored, scored
from support.whole_broker import AGENT, ISSUER

from broker.edges.http_app import build_app
from broker.edges.http_events import CONTENT_TYPE, PATH, EventEndpoint
from broker.edges.http_server import HttpServer
from broker.edges.metrics import Metrics
from broker.errors import Reason
from broker.identity.event_keys import keys_at
from broker.identity.event_refused import Err
from broker.identity.others_jws import MAX_TOKEN
from broker.identity.security_event import Transmitter, TransmitterSettings
from broker.identity.server_tls import ServerTls
from broker.ledger.scope_records import SecurityEvent


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def err(self) -> str:
        return str(json.loads(self.body)["err"])


@dataclass
class Place:
    """The parts, for tests to turn."""

    desk: Scored
    keys: OidcServer
    server: HttpServer
    metrics: Metrics

    def tls(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False  # an SVID names no host
        context.load_verify_locations(cadata=der(self.desk.parts.authority.root.certificate))
        return context

    def token(self, level: str = "HIGH", **how: object) -> str:
        return self.desk.transmitting.token(self.desk.now(), level, **how)

    async def push(
        self, body: str | bytes, *, shown: str | None = SECRET, path: str = PATH, method: str = "POST", **headers: str
    ) -> Answer:
        """As a transmitter does it. shown: its secret. Names of headers with _ for -."""
        sent = CIMultiDict({"Content-Type": CONTENT_TYPE, "Accept": "application/json"})
        if shown is not None:
            sent["Authorization"] = f"Bearer {shown}"
        sent.update({name.replace("_", "-"): value for name, value in headers.items()})
        data = body.encode() if isinstance(body, str) else body
        async with (
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=self.tls())) as session,
            session.request(method, f"https://127.0.0.1:{self.server.port}{path}", data=data, headers=sent) as answer,
        ):
            return Answer(answer.status, answer.headers, await answer.read())


@contextlib.asynccontextmanager
async def listening(folder: Path, **settings: Any) -> AsyncIterator[Place]:
    """A broker that listens, and a transmitter that is configured with these settings."""
    async with oidc_server(folder / "transmitter") as keys:
        by = Transmitting(issuer=keys.issuer, audience=ISSUER, signer=keys.signer)
        transmitter = Transmitter(
            settings=TransmitterSettings(issuer=by.issuer, audience=ISSUER, **settings),
            keys=keys_at(keys.issuer + JWKS, by.issuer, str(keys.ca_file)),
            secrets=lambda: (b"the-old-one", SECRET.encode()),
        )
        async with scored(folder, transmitting=by, transmitter=transmitter) as desk:
            exchange, metrics = desk.parts.exchange, Metrics()
            app = build_app(exchange, metrics, Ready(), desk.now)
            EventEndpoint(desk.receiver, exchange, metrics, desk.now).add_to(app)
            server = HttpServer(app, ("127.0.0.1", 0), ServerTls(desk.parts.trust).http_context())
            await server.start()
            try:
                yield Place(desk, keys, server, metrics)
            finally:
                await server.close()


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    async with listening(tmp_path) as found:
        yield found


async def test_a_pushed_event_refuses_the_session_at_once_and_is_answered_202_with_nothing(place: Place) -> None:
    assert (await place.push(place.token("LOW"))).status == 202
    assert await place.desk.why_not() == ""
    answer = await place.push(place.token("HIGH"))
    assert (answer.status, answer.body, answer.headers["Cache-Control"]) == (202, b"", "no-store")
    assert await place.desk.why_not() == Reason.SESSION_RISK
    assert (await place.push(place.token(kind=VERIFICATION, subject=opaque("stream-7")))).status == 202
    event, *_ = await place.desk.records(SecurityEvent)
    assert event.issuer == place.keys.issuer


async def test_what_was_taken_is_taken_again_and_does_nothing(place: Place) -> None:
    """RFC 8935 section 2.2: the answer is as if it had not been seen before, since transmitters send again."""
    low = place.token("LOW")
    assert (await place.push(low)).status == 202
    assert (await place.push(place.token("HIGH"))).status == 202
    for answer in await asyncio.gather(*(place.push(low) for _ in range(5))):
        assert (answer.status, answer.body) == (202, b"")
    assert await place.desk.level() == "HIGH"
    assert len(await place.desk.records(SecurityEvent)) == 2


async def test_of_the_same_event_at_once_one_counts(place: Place) -> None:
    token = place.token("LOW")
    answers = await asyncio.gather(*(place.push(token) for _ in range(10)))
    assert {answer.status for answer in answers} == {202}
    assert len(await place.desk.records(SecurityEvent)) == 1


async def test_what_is_not_taken_is_answered_400_with_a_code_and_the_same_words_for_everybody(place: Place) -> None:
    by = place.desk.transmitting
    stranger = Transmitting(issuer=by.issuer, audience=ISSUER, signer=Signer("ES256", kid=by.signer.kid))
    token = place.token()
    for body, shown, err in (
        ("no token", SECRET, Err.INVALID_REQUEST),
        (b"\xff\xfe", SECRET, Err.INVALID_REQUEST),
        ("", SECRET, Err.INVALID_REQUEST),
        (place.token(exp=9), SECRET, Err.INVALID_REQUEST),
        (place.token(header={"kid": "made-up"}), SECRET, Err.INVALID_KEY),
        (place.token(iss="https://evil.test"), SECRET, Err.INVALID_ISSUER),
        (place.token(aud="https://shop.test"), SECRET, Err.INVALID_AUDIENCE),
        (stranger.token(place.desk.now()), SECRET, Err.AUTHENTICATION_FAILED),
        (token, "guessed-secret-of-theirs", Err.AUTHENTICATION_FAILED),
        (token, None, Err.AUTHENTICATION_FAILED),
        (place.token(kind=VERIFICATION, event={"state": "x"}), SECRET, Err.INVALID_STATE),
    ):
        answer = await place.push(body, shown=shown)
        assert (answer.status, answer.err) == (400, err)
        assert answer.headers["Content-Type"] == "application/json"
        assert answer.headers["Content-Language"] == "en"
        assert json.loads(answer.body).keys() == {"err", "description"}
        assert len(answer.headers["x-correlation-id"]) == 32
    assert await place.desk.level() is None
    assert (await place.push(token)).status == 202, "the control"
    assert not [one for one in await place.desk.records(SecurityEvent) if one.effect != "scored"]


async def test_a_transmitter_that_may_not_speak_of_somebody_is_told_so(tmp_path: Path) -> None:
    async with listening(tmp_path, principals=(OTHER_AGENT,)) as place:
        answer = await place.push(place.token(subject=complex_subject("s-1", AGENT)))
        assert (answer.status, answer.err) == (400, Err.ACCESS_DENIED)
        assert (await place.push(place.token(subject=complex_subject("s-1", OTHER_AGENT)))).status == 202


async def test_another_method_content_type_encoding_or_size_is_refused(place: Place) -> None:
    token = place.token()
    for headers in (
        {"Content_Type": "application/json"},
        {"Content_Type": "application/jwt"},
        {"Content_Type": "text/plain"},
        {"Content_Encoding": "gzip"},
    ):
        assert (await place.push(token, **headers)).status == 415
    assert (await place.push(token, Content_Type=f"{CONTENT_TYPE}; charset=utf-8")).status == 202
    assert (await place.push("a" * (MAX_TOKEN + 1))).status == 413
    assert (await place.push("a" * MAX_TOKEN)).status == 400
    assert (await place.push(token, method="GET")).status == 405
    assert (await place.push(token, path="/ssf")).status == 404


async def test_a_secret_that_is_shown_twice_or_another_way_is_none(place: Place) -> None:
    token = place.token()
    for value in (f"Basic {SECRET}", SECRET, f"Bearer {SECRET}, Bearer {SECRET}", "Bearer"):
        answer = await place.push(token, shown=None, Authorization=value)
        assert (answer.status, answer.err) == (400, Err.AUTHENTICATION_FAILED)
    assert (await place.push(token, shown="the-old-one")).status == 202, "while it changes both are good"


async def test_two_authorization_headers_are_none(place: Place) -> None:
    token = place.token()
    head = (
        f"POST {PATH} HTTP/1.1\r\nHost: b\r\nContent-Type: {CONTENT_TYPE}\r\nContent-Length: {len(token)}\r\n"
        f"Authorization: Bearer {SECRET}\r\nAuthorization: Bearer x\r\nConnection: close\r\n\r\n"
    )
    answer = await raw(place, head.encode() + token.encode())
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert await place.desk.level() is None


async def raw(place: Place, sent: bytes) -> bytes:
    """What comes back on a connection of its own until it ends."""
    reader, writer = await asyncio.open_connection("127.0.0.1", place.server.port, ssl=place.tls())
    try:
        writer.write(sent)
        return await asyncio.wait_for(reader.read(), 10)
    finally:
        writer.close()
        with contextlib.suppress(OSError, ssl.SSLError):
            await writer.wait_closed()


async def test_a_body_that_does_not_end_is_not_waited_for(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("broker.edges.http_events.BODY_TIMEOUT_S", 0.1)
    head = f"POST {PATH} HTTP/1.1\r\nHost: b\r\nContent-Type: {CONTENT_TYPE}\r\nContent-Length: 99\r\n\r\n"
    assert (await raw(place, head.encode() + b"ey")).startswith(b"HTTP/1.1 408 ")


async def test_keys_that_cannot_be_had_are_for_the_transmitter_to_wait_for(place: Place) -> None:
    place.keys.says(JWKS, b"", status=500)
    token = place.token()
    answer = await place.push(token)
    assert (answer.status, answer.headers["Retry-After"]) == (503, "5")
    assert await place.desk.level() is None


async def test_without_the_ledger_the_event_is_sent_again_later(place: Place) -> None:
    await place.desk.parts.exchange.ledger.close()
    assert (await place.push(place.token())).status == 503


async def test_no_token_and_no_secret_is_in_the_log_and_each_event_is_in_the_metrics(place: Place) -> None:
    token = place.token(kind=REVOKED)
    with structlog.testing.capture_logs() as logs:
        await place.push(token)
        await place.push(token, shown="wrong-secret-of-theirs")
    assert await place.desk.level() == "HIGH"
    for secret in (token, token.rpartition(".")[2], SECRET, "wrong-secret-of-theirs"):
        assert secret not in str(logs)
    text = place.metrics.render().decode()
    assert 'action_broker_requests_total{method="TakeEvent",outcome="taken"} 1.0' in text
    assert 'action_broker_requests_total{method="TakeEvent",outcome="unauthenticated"} 1.0' in text
