"""What everyone may read, how the listeners bear strangers, and what they tell the platform."""

import asyncio
import json
import ssl
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import aiohttp
import pytest
import structlog
from support.http_broker import BROKER, ISSUER, LOCALHOST, HttpBroker, details, http_broker
from support.pki import CA, snapshot
from support.processes import until

from attestors.contract import AttestationRequest, FactKey, Facts
from broker.credentials.keyring import KeyRing
from broker.edges.http_app import Endpoints
from broker.errors import Invalid
from broker.guard.keys import parse_key_set


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[HttpBroker]:
    async with http_broker(tmp_path) as running:
        yield running


async def raw(broker: HttpBroker, sent: bytes, context: ssl.SSLContext | None = None) -> bytes:
    """What the server says to these bytes until it closes the connection."""
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", broker.server.port, ssl=context or broker.client_context(broker.svid())
    )
    writer.write(sent)
    try:
        async with asyncio.timeout(20):
            return await reader.read()
    finally:
        writer.close()


async def plain(broker: HttpBroker, path: str, method: str = "GET") -> tuple[int, str]:
    """From the operations listener."""
    url = f"http://127.0.0.1:{broker.operations.port}{path}"
    async with aiohttp.ClientSession() as session, session.request(method, url) as response:
        return response.status, await response.text()


# -- documents -------------------------------------------------------------------------------------------------------


async def test_metadata_names_the_issuer_and_only_what_is_offered(broker: HttpBroker) -> None:
    answer = await broker.get("/.well-known/oauth-authorization-server")
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.headers["Cache-Control"] == "public, max-age=3600"
    algorithms = [f"{family}{size}" for family in ("ES", "PS", "RS") for size in (256, 384, 512)]
    authenticated = {
        f"{name}_endpoint_auth_{what}": value
        for name in ("token", "introspection", "revocation")
        for what, value in (
            ("methods_supported", ["tls_client_auth", "spiffe_x509", "spiffe_jwt"]),
            ("signing_alg_values_supported", algorithms),
        )
    }
    assert answer.body == authenticated | {
        "issuer": ISSUER,
        "token_endpoint": f"{ISSUER}/oauth2/token",
        "introspection_endpoint": f"{ISSUER}/oauth2/introspect",
        "revocation_endpoint": f"{ISSUER}/oauth2/revoke",
        "jwks_uri": f"{ISSUER}/.well-known/jwks.json",
        "grant_types_supported": ["client_credentials", "urn:ietf:params:oauth:grant-type:token-exchange"],
        "response_types_supported": ["none"],
        "tls_client_certificate_bound_access_tokens": True,
        "dpop_signing_alg_values_supported": ["ES256"],
        "authorization_details_types_supported": ["action"],
    }


async def test_an_issuer_with_a_path_is_found_where_rfc_8414_puts_it(tmp_path: Path) -> None:
    issuer = "https://acme.test/tenants/a"
    async with http_broker(tmp_path, issuer=issuer) as broker:
        answer = await broker.get("/.well-known/oauth-authorization-server/tenants/a")
        assert answer.body["issuer"] == issuer
        assert (await broker.get("/tenants/a/.well-known/jwks.json")).status == 200
        assert (await broker.send(broker.credentials(), svid=broker.svid())).status == 404
        sent = await broker.send(broker.credentials(), svid=broker.svid(), path="/tenants/a/oauth2/token")
        assert sent.status == 200


@pytest.mark.parametrize(
    "issuer",
    [
        "http://broker.acme.test",
        "https://broker.acme.test/",
        "https://broker.acme.test/a/",
        "https://broker.acme.test?x=1",
        "https://broker.acme.test#x",
        "https://Broker.acme.test",
        "https://broker.acme.test:443",
        "https://user@broker.acme.test",
        "spiffe://acme.test/broker",
        "broker.acme.test",
        "",
    ],
)
def test_what_is_no_issuer_is_refused_before_anything_is_served(issuer: str) -> None:
    with pytest.raises(Invalid):
        Endpoints.of(issuer)
    assert Endpoints.of("https://broker.acme.test:8443").token == "https://broker.acme.test:8443/oauth2/token"


async def test_the_key_set_is_one_that_our_guard_reads_and_may_keep_for_five_minutes(broker: HttpBroker) -> None:
    answer = await broker.get("/.well-known/jwks.json")
    assert answer.headers["Cache-Control"] == "private, max-age=300"
    assert parse_key_set(answer.text.encode()).keys() == {broker.exchange.keyring.current(broker.now()).kid}
    tag = answer.headers["ETag"]
    for known, status in ((tag, 304), (f'"other", {tag}', 304), ("*", 304), ('"other"', 200)):
        again = await broker.get("/.well-known/jwks.json", headers={"If-None-Match": known})
        assert (again.status, again.headers["ETag"]) == (status, tag)


async def test_an_empty_key_set_is_not_handed_out_to_be_kept(broker: HttpBroker) -> None:
    broker.exchange.keyring = KeyRing(broker.exchange.ledger, lambda: broker.trust, issuer=ISSUER)
    answer = await broker.get("/.well-known/jwks.json")
    assert (answer.status, answer.headers["Cache-Control"]) == (503, "no-store")


# -- the platform ----------------------------------------------------------------------------------------------------


async def test_readiness_says_what_is_missing_and_health_does_not_depend_on_it(broker: HttpBroker) -> None:
    assert await plain(broker, "/readyz") == (200, '{"ready":true,"problems":[]}')
    broker.ready.found = ["the ledger's disk is full"]
    status, text = await plain(broker, "/readyz")
    assert (status, json.loads(text)["problems"]) == (503, ["the ledger's disk is full"])
    assert (await plain(broker, "/healthz"))[0] == 200
    assert "action_broker_ready 0.0" in (await plain(broker, "/metrics"))[1]
    broker.ready.found = []
    assert "action_broker_ready 1.0" in (await plain(broker, "/metrics"))[1]


async def test_on_the_tls_listener_a_stranger_learns_no_more_than_whether_we_are_ready(broker: HttpBroker) -> None:
    broker.ready.found = ["the ledger's disk is full"]
    stranger, foreign = CA("other.test", now=broker.now()), CA(now=broker.now())
    for who in (None, foreign.svid("spiffe://acme.test/prober"), stranger.svid("spiffe://other.test/prober")):
        if who is not None:  # whose TLS handshake is not even finished
            with pytest.raises((aiohttp.ClientError, OSError)):
                await broker.get("/metrics", svid=who)
            continue
        assert (await broker.get("/healthz")).status == 200
        ready = await broker.get("/readyz")
        assert (ready.status, ready.body) == (503, {"ready": False})
        assert (await broker.get("/metrics")).status == 403
    ours = broker.svid("spiffe://acme.test/prober")
    assert (await broker.get("/readyz", svid=ours)).body["problems"] == ["the ledger's disk is full"]
    assert "action_broker_ready 0.0" in (await broker.get("/metrics", svid=ours)).text


async def test_a_federated_caller_reads_no_metrics(broker: HttpBroker) -> None:
    partner = CA("partner.test", now=broker.now())
    theirs = partner.bundle()
    broker.trust = replace(
        broker.trust,
        bundles={**broker.trust.bundles, theirs.trust_domain: theirs},
        revision=broker.trust.revision + 1,
    )
    broker.tls.offer(broker.trust)
    assert (await broker.get("/metrics", svid=partner.svid("spiffe://partner.test/prober"))).status == 403
    assert (await broker.get("/metrics", svid=broker.svid("spiffe://acme.test/prober"))).status == 200


async def test_handshakes_that_do_not_end_count_towards_the_cap_and_only_for_their_time(tmp_path: Path) -> None:
    async with http_broker(tmp_path, max_connections=8, handshake_s=1.0) as broker:
        silent = [await asyncio.open_connection(LOCALHOST, broker.server.port) for _ in range(8)]
        await until(lambda: broker.server.connections == 8, "all counted")
        with pytest.raises((aiohttp.ClientError, OSError)):
            await broker.get("/healthz")
        for reader, writer in silent:
            assert await reader.read() == b""
            writer.close()
        await until(lambda: not broker.server.connections, "all gone")
        assert (await broker.get("/healthz")).status == 200


async def test_metrics_count_outcomes_and_name_nobody(broker: HttpBroker) -> None:
    await broker.send(broker.credentials(), svid=broker.svid())
    await broker.send(broker.credentials())
    _, text = await plain(broker, "/metrics")
    assert 'action_broker_requests_total{method="TokenEndpoint",outcome="issued"} 1.0' in text
    assert 'action_broker_requests_total{method="TokenEndpoint",outcome="unauthenticated"} 1.0' in text
    assert "spiffe://" not in text


async def test_the_operations_listener_has_no_token_endpoint_and_the_other_may_have_no_operations(
    tmp_path: Path,
) -> None:
    async with http_broker(tmp_path, with_operations=False) as broker:
        assert (await plain(broker, "/oauth2/token", "POST"))[0] == 404
        for path in ("/healthz", "/readyz", "/metrics"):
            assert (await plain(broker, path))[0] == 200
            assert (await broker.get(path)).status == 404


# -- strangers -------------------------------------------------------------------------------------------------------


async def test_what_is_not_there_or_not_so_is_told_as_a_problem_with_a_correlation_id(broker: HttpBroker) -> None:
    missing = await broker.get("/nothing?access_token=secret")
    assert (missing.status, missing.headers["Content-Type"]) == (404, "application/problem+json")
    assert missing.body["correlation_id"] == missing.headers["X-Correlation-ID"]
    assert "secret" not in missing.text
    wrong = await broker.get("/metrics", method="DELETE")
    assert (wrong.status, wrong.body["title"], wrong.headers["Allow"]) == (405, "Method Not Allowed", "GET,HEAD")
    token = await broker.get("/oauth2/token")
    assert (token.status, token.body["error"], token.headers["Allow"]) == (405, "invalid_request", "POST")
    for answer in (missing, wrong, token):
        assert answer.headers["Server"] == "action-broker"
        assert answer.headers["Cache-Control"] == "no-store"


async def test_a_fault_of_ours_shows_nothing_of_itself_and_harms_no_other_request(broker: HttpBroker) -> None:
    broker.ready.found = None  # type: ignore[assignment]  # what a bug would do
    with structlog.testing.capture_logs() as logs:
        answer = await broker.get("/readyz")
    assert (answer.status, answer.body["title"]) == (500, "Internal Server Error")
    assert set(answer.body) == {"type", "title", "status", "correlation_id"}
    fault = next(entry for entry in logs if entry["event"] == "request_failed")
    assert fault["correlation_id"] == answer.body["correlation_id"]
    assert "TypeError" in fault["traceback"]
    assert "exc_info" not in fault
    broker.ahead = None  # type: ignore[assignment]  # the clock itself
    token = await broker.send(broker.credentials(), svid=broker.svid())
    broker.ahead = timedelta()
    assert (token.status, token.body["error"]) == (500, "server_error")
    assert (await broker.get("/healthz")).status == 200


@pytest.mark.parametrize(
    "sent",
    [
        b"secret nonsense\r\n\r\n",
        b"\x16\x03\x01secret\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX-Secret: " + b"y" * 10_000 + b"\r\n\r\n",
        b"GET /" + b"y" * 10_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\n" + b"".join(b"X-%d: 1\r\n" % n for n in range(100)) + b"\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nHost: secret\r\n\r\n",
        b"POST /oauth2/token HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        b"POST /oauth2/token HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\na",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Type: text/plain\r\nContent-Type: a/b\r\nContent-Length: 0\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\n DPoP: folded secret\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nDPoP : spaced\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX: secret\x00\r\n\r\n",
    ],
)
async def test_bytes_that_are_not_one_clear_request_are_refused_without_an_echo(
    broker: HttpBroker, sent: bytes
) -> None:
    with structlog.testing.capture_logs() as logs:
        answer = await raw(broker, sent)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith((b"HTTP/1.1 400 ", b"HTTP/1.0 400 "))
    problem = json.loads(body)
    assert problem["correlation_id"] in head.decode()
    assert b"secret" not in answer
    assert "secret" not in repr(logs)
    assert (await broker.get("/healthz")).status == 200


async def test_an_expectation_that_nobody_meets_is_refused_like_all_else(broker: HttpBroker) -> None:
    answer = await raw(broker, b"GET /healthz HTTP/1.1\r\nHost: x\r\nExpect: secrets\r\nConnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 417 ")
    assert b"X-Correlation-ID: " in answer or b"x-correlation-id: " in answer
    assert b"Server: action-broker" in answer


FORM = b"POST /oauth2/token HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-www-form-urlencoded\r\n"


async def test_a_body_that_says_it_is_too_large_is_not_waited_for(broker: HttpBroker) -> None:
    assert (await raw(broker, FORM + b"Content-Length: 1000000\r\n\r\n")).startswith(b"HTTP/1.1 413 ")


async def test_a_slow_body_is_cut_off(broker: HttpBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("broker.edges.http_clients.BODY_TIMEOUT_S", 0.05)
    answer = await raw(broker, FORM + b"Content-Length: 100\r\n\r\ngrant_type=")
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"error":"invalid_request"' in answer


async def test_who_never_finishes_a_first_request_is_cut_off(tmp_path: Path) -> None:
    async with http_broker(tmp_path, first_request_s=0.1) as broker:
        for sent in (b"", b"GET / HTTP/1.1\r\nHost: x\r\nX-Slow: "):
            assert await raw(broker, sent) == b""
        await until(lambda: broker.server.connections == 0, "the connections are gone")


async def test_who_keeps_a_connection_without_using_it_is_cut_off(tmp_path: Path) -> None:
    async with http_broker(tmp_path, keepalive_s=0.1) as broker:
        for tail in (b"", b"GET / HTTP/1.1\r\nX-Slow: "):
            answer = await raw(broker, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n" + tail)
            assert answer.startswith(b"HTTP/1.1 200 ")
            assert answer.count(b"HTTP/1.1") == 1


async def test_more_connections_than_there_may_be_are_closed_at_once(tmp_path: Path) -> None:
    async with http_broker(tmp_path, max_connections=2) as broker:
        kept = [
            await asyncio.open_connection("127.0.0.1", broker.server.port, ssl=broker.client_context())
            for _ in range(2)
        ]
        await until(lambda: broker.server.connections == 2, "both are here")
        with pytest.raises((aiohttp.ClientError, ConnectionError)):
            await broker.get("/healthz")
        kept.pop()[1].close()
        await until(lambda: broker.server.connections == 1, "one has gone")
        assert (await broker.get("/healthz")).status == 200
        kept.pop()[1].close()


async def test_the_tls_listener_speaks_no_plain_http_and_no_old_tls(broker: HttpBroker) -> None:
    async with aiohttp.ClientSession() as session:
        with pytest.raises(aiohttp.ClientError):
            await session.get(f"http://127.0.0.1:{broker.server.port}/healthz")
    old = broker.client_context()
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises((ssl.SSLError, ConnectionError)):
        await raw(broker, b"GET /healthz HTTP/1.1\r\n\r\n", old)
    assert (await broker.get("/healthz")).status == 200


async def test_a_renewed_svid_serves_new_connections_and_leaves_open_ones_alone(broker: HttpBroker) -> None:
    async def connect() -> tuple[asyncio.StreamReader, asyncio.StreamWriter, bytes]:
        reader, writer = await asyncio.open_connection("127.0.0.1", broker.server.port, ssl=broker.client_context())
        return reader, writer, writer.get_extra_info("ssl_object").getpeercert(True)

    reader, writer, first = await connect()
    renewed = broker.authority.svid(BROKER).own()
    broker.tls.offer(snapshot(*broker.trust.bundles.values(), own=renewed, revision=2))
    _, other, second = await connect()
    assert second == renewed.chain[0] != first
    other.close()
    writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert (await reader.read()).startswith(b"HTTP/1.1 200 ")
    writer.close()


class Slow:
    """An attestor that looks when it is told to."""

    name = "process"

    def __init__(self) -> None:
        self.asked, self.may_look = asyncio.Event(), asyncio.Event()

    async def attest(self, request: AttestationRequest, now: datetime) -> Facts:
        self.asked.set()
        await self.may_look.wait()
        values = {"uid": 0, "gid": 0, "exe": "/bin/sh", "exe_sha256": "00", "cgroup": "/"}
        return Facts(attestor=self.name, key=FactKey(request.principal), values=values, attested_at=now)

    async def watch(self) -> AsyncIterator[FactKey]:
        await asyncio.Event().wait()
        yield FactKey("never")


async def test_a_request_in_progress_is_answered_before_the_listener_is_gone(tmp_path: Path) -> None:
    slow = Slow()
    async with http_broker(tmp_path, attestors={"process": slow}) as broker:
        asked = details(actions=["orders.export"], parameters={})
        request = broker.send(broker.credentials(authorization_details=asked), svid=broker.svid())
        waiting = asyncio.create_task(request)
        await slow.asked.wait()
        closing = asyncio.create_task(broker.server.close())
        await until(lambda: not broker.server.listening, "nobody else is let in")
        slow.may_look.set()
        assert (await waiting).status == 200
        await closing
