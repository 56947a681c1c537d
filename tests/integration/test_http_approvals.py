"""People approve over HTTPS with an ID token of a real issuer, at a broker that they know by its SPIFFE ID."""

import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import structlog
from aiohttp import web
from cryptography.hazmat.primitives.serialization import Encoding
from support.approving import REPOSITORY, digest_of, publish
from support.approving_people import BROKER_ID, Place, approving_people
from support.oidc import JWKS, Signer
from support.pki import CA, snapshot
from support.whole_broker import AGENT, BROKER

from broker.client.person import MAX_ANSWER, PersonClient, trust_of_file
from broker.edges.http_approvals import MAX_BODY, PATH
from broker.errors import ApprovalRequired, BrokerError, Invalid, Reason, Refused, Unavailable
from broker.identity.spiffe_id import SpiffeId
from broker.identity.tls_context import server_context
from broker.ledger.records import Approved, CountedRefusals, Refusal


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    async with approving_people(tmp_path) as running:
        yield running


async def refusal(call: Any) -> Reason:
    with pytest.raises(BrokerError) as refused:
        await call
    return refused.value.reason


# -- use -------------------------------------------------------------------------------------------------------------


async def test_two_people_who_looked_and_approved_let_the_request_through_once(place: Place) -> None:
    client, digest = place.client(), place.desk.digest
    for sub in ("ada", "eve"):
        token = place.token(sub=sub)
        shown = await client.show(digest, token)
        assert (shown.action, shown.principal, shown.request_digest) == (publish(), AGENT, digest)
        assert REPOSITORY in shown.text
        assert not shown.is_used
        given = await client.approve(shown, token, reason="looked at it", valid_for_s=60)
        assert given.by.startswith(f"{place.oidc.issuer}/subject/")
        assert given.expires_at - given.approved_at == timedelta(seconds=60)
    seen = await client.show(digest, place.token())
    assert [one.reason for one in seen.approvals] == ["looked at it"] * 2
    assert (await place.desk.ask()).token
    assert (await client.show(digest, place.token())).is_used


async def test_who_approved_what_with_which_token_is_in_the_ledger_and_no_token_is(place: Place) -> None:
    token = place.token()
    client = place.client()
    with structlog.testing.capture_logs() as logs:
        await client.approve(await client.show(place.desk.digest, token), token, reason="fine")
        assert await refusal(client.show(digest_of(publish("staging")), token)) is Reason.UNAUTHENTICATED
    records = await place.desk.parts.records()
    (given,) = [one for one in records if isinstance(one, Approved)]
    assert (given.by, given.method) == (f"{place.oidc.issuer}/subject/dS0xNw", "id-token")
    assert given.evidence_sha256
    signature = token.rpartition(".")[2]
    written = b"".join(file.read_bytes() for file in place.folder.iterdir() if file.name.startswith("ledger"))
    assert given.by.encode() in written
    assert signature.encode() not in written
    assert signature not in str(logs)


async def test_an_approval_that_is_taken_back_counts_for_nothing(place: Place) -> None:
    client, digest = place.client(), place.desk.digest
    for sub in ("ada", "eve"):
        token = place.token(sub=sub)
        await client.approve(await client.show(digest, token), token)
    await client.withdraw(digest, place.token(sub="eve"), reason="a mistake")
    with pytest.raises(ApprovalRequired):
        await place.desk.ask()
    assert await refusal(client.withdraw(digest, place.token(sub="eve"))) is Reason.DENIED


async def test_the_same_person_twice_counts_once(place: Place) -> None:
    client = place.client()
    for _ in range(2):
        token = place.token()
        await client.approve(await client.show(place.desk.digest, token), token)
    with pytest.raises(ApprovalRequired):
        await place.desk.ask()


# -- who -------------------------------------------------------------------------------------------------------------


async def test_a_person_whom_no_policy_allows_sees_and_approves_nothing_and_it_is_written_down(place: Place) -> None:
    shown = await place.client().show(place.desk.digest, place.token())
    place.oidc.person = {"sub": "visitor", "groups": ["staff"]}
    client = place.client()
    assert await refusal(client.show(place.desk.digest, place.token())) is Reason.DENIED
    assert await refusal(client.approve(shown, place.token())) is Reason.DENIED
    refused = [one for one in await place.desk.parts.records() if isinstance(one, Refusal) and one.edge == "id-token"]
    assert [(one.stage, one.reason) for one in refused] == [("show", "denied"), ("approve", "denied")]


async def test_tokens_that_do_not_hold_are_counted_and_not_written(place: Place) -> None:
    client, digest = place.client(), place.desk.digest
    shown = await client.show(digest, place.token())
    old = int((place.desk.now() - timedelta(seconds=301)).timestamp())
    for token, expected in (
        (place.token("cd" * 32), Reason.UNAUTHENTICATED),
        (place.token(auth_time=old), Reason.EXPIRED),
        (place.token(aud="shop"), Reason.WRONG_AUDIENCE),
        (place.token(iss="https://evil.test"), Reason.UNAUTHENTICATED),
        (Signer().token(place.oidc.claims(digest)), Reason.UNAUTHENTICATED),
        ("", Reason.MALFORMED),
    ):
        for call in (client.show(digest, token), client.approve(shown, token), client.withdraw(digest, token)):
            assert await refusal(call) is expected
    await client.show(digest, place.token())
    records = await place.desk.parts.records()
    assert not [one for one in records if isinstance(one, Refusal) and one.edge == "id-token"]
    assert [one for one in records if isinstance(one, CountedRefusals)]


async def test_an_issuer_that_is_away_is_a_no_that_may_be_asked_again(place: Place) -> None:
    place.oidc.says(JWKS, b"", status=500)
    with pytest.raises(Unavailable) as refused:
        await place.client().show(place.desk.digest, place.token())
    assert (refused.value.reason, refused.value.retry_after_ms) == (Reason.IDENTITY_UNAVAILABLE, 5000)


# -- bytes -----------------------------------------------------------------------------------------------------------


async def test_every_answer_is_json_for_nobody_to_keep(place: Place) -> None:
    asked = {"request_digest": place.desk.digest, "id_token": place.token()}
    status, headers, body = await place.post(f"{PATH}/show", asked)
    assert (status, headers["Content-Type"], headers["Cache-Control"]) == (200, "application/json", "no-store")
    assert body["request_digest"] == place.desk.digest
    status, headers, body = await place.post(f"{PATH}/show", asked | {"id_token": "x"})
    assert (status, headers["Content-Type"]) == (400, "application/problem+json")
    assert headers["Cache-Control"] == "no-store"
    assert body == {
        "type": "about:blank",
        "title": "Bad Request",
        "status": 400,
        "reason": "malformed",
        "correlation_id": headers["x-correlation-id"],
    }
    status, headers, body = await place.post(f"{PATH}/show", asked | {"id_token": place.token("cd" * 32)})
    assert (status, body["reason"]) == (401, "unauthenticated")
    assert headers["WWW-Authenticate"] == 'Bearer error="invalid_token"'


async def test_what_is_no_small_json_object_of_these_names_is_malformed(place: Place) -> None:
    asked = {"request_digest": place.desk.digest, "id_token": place.token()}
    text = json.dumps(asked)
    for path, body in (
        ("show", b""),
        ("show", b"[]"),
        ("show", b"\xff"),
        ("show", f'{text[:-1]}, "id_token": "x"}}'.encode()),
        ("show", asked | {"reason": "x"}),
        ("show", asked | {"request_digest": 7}),
        ("show", {"request_digest": place.desk.digest}),
        ("show", asked | {"request_digest": place.desk.digest.upper()}),
        ("withdraw", asked | {"valid_for_s": 7}),
        ("withdraw", asked | {"reason": "a\nb"}),
        ("approve", asked | {"valid_for_s": "7"}),
        ("approve", asked | {"valid_for_s": -1}),
        ("approve", asked | {"valid_for_s": 86401}),
        ("approve", asked | {"reason": "x" * 501}),
        ("approve", asked | {"reason": 7}),
    ):
        status, _, answer = await place.post(f"{PATH}/{path}", body)
        assert (status, answer["reason"]) == (400, "malformed"), (path, body)
    assert (await place.post(f"{PATH}/approve", asked | {"reason": "x" * 500, "valid_for_s": 86400}))[0] == 200


async def test_another_content_type_encoding_size_method_or_a_query_is_refused(place: Place) -> None:
    asked = {"request_digest": place.desk.digest, "id_token": place.token()}
    path = f"{PATH}/show"
    for headers in (
        {"Content_Type": "application/x-www-form-urlencoded"},
        {"Content_Type": "text/plain"},
        {"Content_Type": "application/json; charset=latin-1"},
        {"Content_Encoding": "gzip"},
    ):
        assert (await place.post(path, asked, **headers))[0] == 415
    assert (await place.post(path, b" " * (MAX_BODY + 1)))[0] == 413
    assert (await place.post(f"{path}?id_token=x", asked))[0] == 400
    assert (await place.post(path, b"", method="GET"))[0] == 405
    assert (await place.post(f"{PATH}/pending", asked))[0] == 404
    assert (await place.post(path, asked, Content_Type="application/json; charset=utf-8"))[0] == 200


async def test_a_body_that_does_not_end_is_not_waited_for(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("broker.edges.http_approvals.BODY_TIMEOUT_S", 0.1)
    reader, writer = await asyncio.open_connection("127.0.0.1", place.server.port, ssl=place.tls())
    head = f"POST {PATH}/show HTTP/1.1\r\nHost: b\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n"
    writer.write(head.encode() + b"{")
    answer = await asyncio.wait_for(reader.read(), 5)  # and then the connection ends
    assert answer.startswith(b"HTTP/1.1 408 ")
    writer.close()
    with contextlib.suppress(OSError, ssl.SSLError):
        await writer.wait_closed()


# -- the person's side -----------------------------------------------------------------------------------------------


async def test_a_person_needs_the_trust_bundle_alone(place: Place, tmp_path: Path) -> None:
    file = tmp_path / "bundle.pem"
    file.write_bytes(place.desk.parts.authority.root.certificate.public_bytes(Encoding.PEM))
    client = place.client(snapshot=lambda: trust_of_file(file, BROKER_ID))
    assert (await client.show(place.desk.digest, place.token())).action == publish()
    file.write_bytes(b"no certificate")
    with pytest.raises(Invalid):
        trust_of_file(file, BROKER_ID)


async def test_no_token_is_sent_to_who_is_not_the_broker(place: Place) -> None:
    stranger = CA("acme.test", now=datetime.now(UTC))
    for changes in (
        {"broker_id": SpiffeId.parse("spiffe://acme.test/another")},
        {"broker_id": SpiffeId.parse("spiffe://other.test/action-broker")},
        {"snapshot": lambda: snapshot(stranger.bundle())},
        {"snapshot": lambda: snapshot(replace(stranger.bundle(), x509_authorities=()))},
    ):
        with pytest.raises(Unavailable) as refused:
            await place.client(**changes).show(place.desk.digest, place.token())
        assert refused.value.reason is Reason.BROKER_UNREACHABLE
    assert place.oidc.fetched.total() == 0  # so nobody was asked about a token either
    await place.client().show(place.desk.digest, place.token())


@pytest.mark.parametrize("url", ["http://127.0.0.1", "https://", "https://u@b.test", "https://b.test?x=1", "b.test"])
def test_the_broker_is_at_an_https_url(url: str) -> None:
    PersonClient("https://b.test:8444/", broker_id=BROKER_ID, snapshot=snapshot)
    with pytest.raises(Invalid):
        PersonClient(url, broker_id=BROKER_ID, snapshot=snapshot)


Say = Callable[[dict[str, Any]], web.StreamResponse]


@contextlib.asynccontextmanager
async def lying(place: Place, say: Say) -> AsyncIterator[PersonClient]:
    """A client of a broker that shows what `say` makes of the truth."""
    _, _, truth = await place.post(f"{PATH}/show", {"request_digest": place.desk.digest, "id_token": place.token()})

    async def answer(_: web.Request) -> web.StreamResponse:
        return say(json.loads(json.dumps(truth)))

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    own = place.desk.parts.authority.svid(BROKER).own()
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=server_context(replace(place.trust, own=own)))
    await site.start()
    try:
        yield PersonClient(
            f"https://127.0.0.1:{runner.addresses[0][1]}", broker_id=BROKER_ID, snapshot=lambda: place.trust
        )
    finally:
        await runner.cleanup()


@pytest.mark.parametrize(
    "change",
    [
        {"principal": "spiffe://acme.test/another"},
        {"request_id": "request-number-two"},
        {"action_digest": "00" * 32},
        {"action": {"name": "release.publish"}},
        {"text": 7},
        {"state": None},
        {"approvals": [{"by": "x"}]},
    ],
)
async def test_a_request_whose_digest_is_not_that_of_its_fields_is_not_shown(
    place: Place, change: dict[str, Any]
) -> None:
    async with lying(place, web.json_response) as honest:
        assert (await honest.show(place.desk.digest, place.token())).action == publish()
    async with lying(place, lambda truth: web.json_response(truth | change)) as client:
        assert await refusal(client.show(place.desk.digest, place.token())) is Reason.BROKER_UNREACHABLE


@pytest.mark.parametrize(
    ("member", "value"),
    [("name", "release.delete"), ("resource", f"{REPOSITORY}/x"), ("parameters", {"environment": "staging"})],
)
async def test_an_action_that_was_changed_on_the_way_is_not_shown(place: Place, member: str, value: Any) -> None:
    async with lying(
        place, lambda truth: web.json_response(truth | {"action": truth["action"] | {member: value}})
    ) as it:
        assert await refusal(it.show(place.desk.digest, place.token())) is Reason.BROKER_UNREACHABLE


async def test_another_request_than_was_asked_for_is_not_shown(place: Place) -> None:
    async with lying(place, web.json_response) as client:
        other = digest_of(publish("staging"))
        assert await refusal(client.show(other, place.token(other))) is Reason.BROKER_UNREACHABLE


async def test_a_request_that_was_made_up_after_it_was_looked_at_is_not_approved(place: Place) -> None:
    client, token = place.client(), place.token()
    shown = await client.show(place.desk.digest, token)
    forged = replace(shown, action=publish("staging"))
    assert await refusal(client.approve(forged, token)) is Reason.BROKER_UNREACHABLE
    assert (await client.approve(shown, token)).reason == ""


async def test_an_answer_that_is_huge_redirects_or_is_no_json_is_not_used(place: Place) -> None:
    for say in (
        lambda _: web.Response(body=b" " * (MAX_ANSWER + 1)),
        lambda _: web.Response(status=302, headers={"Location": "/elsewhere"}),
        lambda _: web.Response(text="<html>", status=502),
        lambda _: web.Response(text='{"a":1,"a":1}'),
        lambda _: web.Response(text="[" * 5000),
    ):
        async with lying(place, say) as client:
            assert await refusal(client.show(place.desk.digest, place.token())) is Reason.BROKER_UNREACHABLE


async def test_a_reason_that_this_version_does_not_know_is_still_a_no(place: Place) -> None:
    body = {"reason": "something-new", "correlation_id": "c-1", "status": 403}
    async with lying(place, lambda _: web.json_response(body, status=403, headers={"Retry-After": "9" * 50})) as client:
        with pytest.raises(Refused) as refused:
            await client.show(place.desk.digest, place.token())
    assert refused.value.reason is Reason.DENIED
    assert "c-1" in refused.value.detail


async def test_a_broker_that_is_away_or_silent_is_told_in_time(place: Place) -> None:
    async def hold(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        held.append(writer)

    held: list[asyncio.StreamWriter] = []
    silent = await asyncio.start_server(hold, "127.0.0.1", 0)
    port = silent.sockets[0].getsockname()[1]
    client = PersonClient(
        f"https://127.0.0.1:{port}", broker_id=BROKER_ID, snapshot=lambda: place.trust, deadline_s=0.2
    )
    assert await refusal(client.show(place.desk.digest, place.token())) is Reason.BROKER_UNREACHABLE
    silent.close()
    for writer in held:
        writer.close()
    await silent.wait_closed()
    assert await refusal(client.show(place.desk.digest, place.token())) is Reason.BROKER_UNREACHABLE
