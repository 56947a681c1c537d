"""Webhooks of ticket systems, over real HTTP: forged, replayed, for a ticket that nobody knows, and good ones."""

import asyncio
import hashlib
import hmac
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from multidict import CIMultiDict
from support.http_broker import LOCALHOST, Answer, HttpBroker, http_broker
from support.tickets import TicketServer, ticket, ticket_server
from support.watched_tickets import Watched, watching

from attestors.json_pointer import Pointer
from broker.edges.http_answers import answer_everything, finish_prepared
from broker.edges.http_hooks import MAX_AGE, MAX_BODY, Proof, TicketHook, TicketHooks
from broker.edges.http_server import HttpServer
from broker.ledger.records import CountedRefusals

SECRET, OTHER = b"the secret of the desk, long enough", b"a secret that nobody here has set"
BEARER = {"scheme": "bearer", "header": "Authorization"}
SIGNED = {"delivery_header": "X-Delivery", "timestamp_header": "X-Timestamp"}


@dataclass
class Hooks:
    """A broker with a webhook, and tickets 1 and 2 that are watched."""

    broker: HttpBroker
    server: TicketServer
    watched: Watched
    port: int
    secrets: list[bytes] = field(default_factory=lambda: [SECRET])

    async def post(
        self, body: Any = None, headers: Mapping[str, str] | Sequence[tuple[str, str]] = (), system: str = "desk"
    ) -> Answer:
        data = body if isinstance(body, bytes | type(None)) else json.dumps(body).encode()
        url = f"http://{LOCALHOST}:{self.port}/hooks/tickets/{system}"
        async with (
            aiohttp.ClientSession() as session,
            session.post(url, data=data, headers=CIMultiDict(headers)) as answer,
        ):
            return Answer(answer.status, answer.headers, await answer.text())

    def signed(self, body: bytes, *before: str, secret: bytes = SECRET, **headers: str) -> dict[str, str]:
        """headers: with `_` for `-`. before: what is signed before the body."""
        code = hmac.new(secret, b".".join([*(one.encode() for one in before), body]), hashlib.sha256).hexdigest()
        return {"X-Hub-Signature-256": f"sha256={code}"} | {k.replace("_", "-"): v for k, v in headers.items()}

    async def told(self, ticket_id: str = "1", **headers: Any) -> Answer:
        body = json.dumps({"issue": {"id": ticket_id}}).encode()
        return await self.post(body, self.signed(body, **headers))

    async def stamped(self, delivery: str, when: float, body: bytes = b'{"issue": {"id": "1"}}') -> Answer:
        at = str(int(when))
        return await self.post(body, self.signed(body, delivery, at, X_Delivery=delivery, X_Timestamp=at))

    async def counted(self) -> dict[str, int]:
        """What the ledger says of refusals, which is closed for it."""
        counts: dict[str, int] = {}
        for record in await self.broker.records():
            if isinstance(record, CountedRefusals):
                for reason, count in record.counts.items():
                    counts[str(reason)] = counts.get(str(reason), 0) + count
        return counts


@asynccontextmanager
async def hooked(folder: Path, **proof: Any) -> AsyncIterator[Hooks]:
    async with (
        http_broker(folder) as broker,
        ticket_server(_1=ticket(), _2=ticket()) as server,
        watching(server) as watched,
    ):
        app = web.Application(middlewares=[answer_everything()])
        app.on_response_prepare.append(finish_prepared)
        found: list[Hooks] = []
        hook = TicketHook(
            system="desk",
            proof=Proof(secrets=lambda: found[0].secrets, **proof),
            id=Pointer.parse("/issue/id"),
            tell=lambda ticket_id: watched.attestor.tell("desk", ticket_id),
        )
        TicketHooks([hook], broker.exchange, broker.metrics, broker.now).add_to(app)
        edge = HttpServer(app, (LOCALHOST, 0), None)
        await edge.start()
        found.append(Hooks(broker, server, watched, edge.port))
        await watched.attest("1", "2")
        server.asked.clear()
        try:
            yield found[0]
        finally:
            await edge.close()


@pytest.fixture
async def hooks(tmp_path: Path) -> AsyncIterator[Hooks]:
    async with hooked(tmp_path) as found:
        yield found


async def test_a_signed_webhook_tells_the_ticket_that_it_names_and_nobody_is_asked_for_it(hooks: Hooks) -> None:
    answer = await hooks.told("1")
    assert (answer.status, list(answer.body)) == (202, ["correlation_id"])
    await hooks.watched.hears("1")
    assert not hooks.server.asked, "whoever decides again looks; a webhook causes no question by itself"
    text = hooks.broker.metrics.render().decode()
    assert 'action_broker_requests_total{method="TellTicket",outcome="told"} 1.0' in text


@pytest.mark.parametrize("body", [{"issue": {"id": 1}}, {"issue": {"id": "1", "state": "open", "tables": ["all"]}}])
async def test_nothing_in_a_webhook_is_believed_but_which_ticket_it_is_about(hooks: Hooks, body: Any) -> None:
    data = json.dumps(body).encode()
    assert (await hooks.post(data, hooks.signed(data))).status == 202
    await hooks.watched.hears("1")
    hooks.server.tickets["1"] = ticket("closed")
    assert (await hooks.post(data, hooks.signed(data))).status == 202
    await hooks.watched.hears("1")


async def test_a_forged_webhook_is_refused_and_counted_and_nothing_is_told(hooks: Hooks) -> None:
    body = b'{"issue": {"id": "1"}}'
    good = hooks.signed(body)["X-Hub-Signature-256"]
    forged: list[Any] = [
        {},
        hooks.signed(body, secret=OTHER),
        hooks.signed(b'{"issue": {"id": "2"}}'),
        hooks.signed(body + b" "),
        {"X-Hub-Signature-256": good[:-1]},
        {"X-Hub-Signature-256": good + "0"},
        {"X-Hub-Signature-256": good.replace("sha256", "sha1")},
        {"X-Hub-Signature-256": "sha256="},
        {"X-Hub-Signature-256": ""},
        {"X-Hub-Signature": good},
        {"Authorization": f"Bearer {SECRET.decode()}"},
        [("X-Hub-Signature-256", good), ("X-Hub-Signature-256", good)],
        [
            ("X-Hub-Signature-256", hooks.signed(body, secret=OTHER)["X-Hub-Signature-256"]),
            ("X-Hub-Signature-256", good),
        ],
    ]
    for headers in forged:
        answer = await hooks.post(body, headers)
        assert (answer.status, answer.body["reason"]) == (401, "unauthenticated"), headers
        assert answer.headers["WWW-Authenticate"] == "HMAC"
        assert "issue" not in answer.text
    assert hooks.watched.told == []
    assert (await hooks.post(body, {"X-Hub-Signature-256": good.upper().replace("SHA256", "sha256")})).status == 202
    await hooks.watched.hears("1")
    assert (await hooks.counted())["unauthenticated"] == len(forged)


async def test_an_empty_secret_signs_nothing(hooks: Hooks) -> None:
    body = b'{"issue": {"id": "1"}}'
    assert (await hooks.post(body, hooks.signed(body, secret=b""))).status == 401
    assert (await hooks.post(body, hooks.signed(body))).status == 202


async def test_a_webhook_about_a_ticket_on_which_nothing_rests_looks_like_any_other(hooks: Hooks) -> None:
    known = await hooks.told("1")
    await hooks.watched.hears("1")
    for ticket_id in ("99", "../1", "", "x" * 1000, "\N{SNOWMAN}", "1\x00", "other:1"):
        answer = await hooks.told(ticket_id)
        assert (answer.status, answer.body.keys()) == (known.status, known.body.keys())
    assert hooks.watched.told == []
    assert not hooks.server.asked


async def test_a_replayed_webhook_causes_a_look_again_and_no_more(hooks: Hooks) -> None:
    body = b'{"issue": {"id": "1"}}'
    headers = hooks.signed(body)
    for _ in range(2):
        assert (await hooks.post(body, headers)).status == 202
        await hooks.watched.hears("1")


async def test_a_flood_of_replays_is_told_a_few_times_a_second(hooks: Hooks) -> None:
    loop = asyncio.get_running_loop()
    begun = loop.time()
    answers = await asyncio.gather(*(hooks.told("1") for _ in range(100)))
    assert {one.status for one in answers} == {202}
    assert 1 <= len(hooks.watched.told) <= 1 + (loop.time() - begun) / 0.1


async def test_the_next_secret_counts_beside_the_old_one_and_then_alone(hooks: Hooks) -> None:
    body = b'{"issue": {"id": "1"}}'
    for secrets, old, new in (([SECRET], 202, 401), ([SECRET, OTHER], 202, 202), ([OTHER], 401, 202)):
        hooks.secrets[:] = secrets
        assert (await hooks.post(body, hooks.signed(body))).status == old
        assert (await hooks.post(body, hooks.signed(body, secret=OTHER))).status == new


# -- deliveries and times ---------------------------------------------------------------------------------------------


async def test_a_signed_delivery_counts_once_and_within_its_time(tmp_path: Path) -> None:
    async with hooked(tmp_path, **SIGNED) as hooks:
        now = hooks.broker.now().timestamp()
        for _ in range(3):
            assert (await hooks.stamped("d-1", now)).status == 202
        await hooks.watched.hears("1")
        assert (await hooks.stamped("d-2", now)).status == 202
        await hooks.watched.hears("1")
        slack, beyond = MAX_AGE.total_seconds() - 10, MAX_AGE.total_seconds() + 10
        for seconds, status in ((-slack, 202), (slack, 202), (-beyond, 401), (beyond, 401)):
            assert (await hooks.stamped(f"at{seconds:.0f}", now + seconds)).status == status
        hooks.broker.ahead = timedelta(hours=1)
        assert (await hooks.stamped("d-1", now)).status == 401
        assert (await hooks.stamped("d-3", hooks.broker.now().timestamp())).status == 202


async def test_a_delivery_or_a_time_that_is_not_signed_is_refused(tmp_path: Path) -> None:
    """Else whoever holds one webhook could use up the names of those to come."""
    async with hooked(tmp_path, **SIGNED) as hooks:
        body, at = b'{"issue": {"id": "1"}}', str(int(hooks.broker.now().timestamp()))
        good = hooks.signed(body, "d-1", at, X_Delivery="d-1", X_Timestamp=at)
        wrong = [
            hooks.signed(body, X_Delivery="d-1", X_Timestamp=at),
            good | {"X-Delivery": "d-2"},
            good | {"X-Timestamp": str(int(at) + 1)},
            {name: value for name, value in good.items() if name != "X-Delivery"},
            {name: value for name, value in good.items() if name != "X-Timestamp"},
            hooks.signed(body, "d-1", "", X_Delivery="d-1", X_Timestamp=""),
            hooks.signed(body, "d-1", "1e9", X_Delivery="d-1", X_Timestamp="1e9"),
            hooks.signed(body, "d-1", "9" * 400, X_Delivery="d-1", X_Timestamp="9" * 400),
            hooks.signed(body, "d" * 129, at, X_Delivery="d" * 129, X_Timestamp=at),
        ]
        for headers in wrong:
            assert (await hooks.post(body, headers)).status == 401, headers
        assert hooks.watched.told == []
        assert (await hooks.post(body, good)).status == 202
        await hooks.watched.hears("1")


# -- bearer ----------------------------------------------------------------------------------------------------------


async def test_a_bearer_secret_is_shown_as_it_is(tmp_path: Path) -> None:
    async with hooked(tmp_path, **BEARER) as hooks:
        body, shown = b'{"issue": {"id": "1"}}', SECRET.decode()
        wrong = ["", "Bearer", "Bearer ", f"Basic {shown}", f"Bearer {shown}x", f"Bearer {shown[:-1]}", OTHER.decode()]
        for value in wrong:
            answer = await hooks.post(body, {"Authorization": value})
            assert (answer.status, answer.headers["WWW-Authenticate"]) == (401, "Bearer"), value
        assert (await hooks.post(body)).status == 401
        assert (await hooks.post(body, hooks.signed(body))).status == 401
        assert hooks.watched.told == []
        for value in (f"Bearer {shown}", f"bearer {shown}"):
            assert (await hooks.post(body, {"Authorization": value})).status == 202
            await hooks.watched.hears("1")


async def test_a_bearer_secret_may_have_a_header_of_its_own(tmp_path: Path) -> None:
    async with hooked(tmp_path, scheme="bearer", header="X-Gitlab-Token") as hooks:
        body = b'{"issue": {"id": "1"}}'
        assert (await hooks.post(body, {"Authorization": f"Bearer {SECRET.decode()}"})).status == 401
        assert (await hooks.post(body, {"X-Gitlab-Token": OTHER.decode()})).status == 401
        assert (await hooks.post(body, {"X-Gitlab-Token": SECRET.decode()})).status == 202
        await hooks.watched.hears("1")


# -- bodies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"[]", b"<html>", b"\xff", b"{}", b'{"issue": null}', b'{"issue": {"id": null}}'),
        *(b'{"issue": {"id": true}}', b'{"issue": {"id": ["1"]}}', b'{"issue": {"id": 1.5}}'),
        b'{"issue": {"id": "1"}, "issue": {"id": "2"}}',
    ],
)
async def test_a_signed_webhook_that_names_no_ticket_is_malformed(hooks: Hooks, body: bytes) -> None:
    answer = await hooks.post(body, hooks.signed(body))
    assert (answer.status, answer.body["reason"]) == (400, "malformed")
    assert (await hooks.told("1")).status == 202
    await hooks.watched.hears("1")


async def test_who_has_signed_is_looked_at_before_what_is_said(hooks: Hooks) -> None:
    assert (await hooks.post(b"<html>", hooks.signed(b"<html>", secret=OTHER))).status == 401
    assert (await hooks.post(b"<html>", hooks.signed(b"<html>"))).status == 400


async def test_a_body_may_not_be_large_or_compressed(hooks: Hooks) -> None:
    fits = json.dumps({"issue": {"id": "1"}, "text": ""}).encode()
    fits = fits[:-2] + b"x" * (MAX_BODY - len(fits)) + fits[-2:]
    assert (await hooks.post(fits, hooks.signed(fits))).status == 202
    await hooks.watched.hears("1")
    too_large = fits[:-2] + b"x" + fits[-2:]
    assert (await hooks.post(too_large, hooks.signed(too_large))).status == 413
    assert (await hooks.post(fits, {**hooks.signed(fits), "Content-Encoding": "gzip"})).status in {400, 415}
    assert hooks.watched.told == []


async def test_other_systems_paths_and_methods_are_not_there(hooks: Hooks) -> None:
    body = b'{"issue": {"id": "1"}}'
    for system in ("other", "", "desk/", "desk/1", "DESK"):
        assert (await hooks.post(body, hooks.signed(body), system=system)).status == 404
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"http://{LOCALHOST}:{hooks.port}/hooks/tickets/desk") as answer,
    ):
        assert answer.status == 405
    assert hooks.watched.told == []
