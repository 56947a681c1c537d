"""What nobody foresaw ends the call it happened in, with a number to look it up by, and nothing else."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from structlog.testing import capture_logs
from support.exchanging import Exchanging, exchanging
from support.scope import ScopeAround
from support.whole_broker import AGENT, Wire, act, request

from broker._proto.actionbroker.v1 import broker_pb2
from broker.acts import Means
from broker.approval_text import Texts
from broker.approvals import Approvals
from broker.edges.grpc_approvals import ApprovalsService
from broker.edges.grpc_peer import Identifier
from broker.edges.grpc_scope import ScopeService
from broker.edges.grpc_server import ActionBrokerService, GrpcServer
from broker.edges.grpc_sessions import SessionCalls
from broker.edges.metrics import Metrics
from broker.identity.unix_front import UnixFront
from broker.ledger.session_store import Sessions
from broker.operate import Operators
from broker.scoring import Scoring
from broker.sign import Signing

SECRET = "not for callers"


class Broken(Exception):
    """What no part raises on purpose."""


@pytest.fixture
async def found(tmp_path: Path) -> AsyncIterator[Exchanging]:
    """An exchange whose word from SPIRE breaks in ways of its own, when told to."""
    async with exchanging(tmp_path) as made:
        yield made


@pytest.fixture
async def wire(found: Exchanging, tmp_path: Path) -> AsyncIterator[Wire]:
    """A connection to its gRPC edge, over a Unix socket."""
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    front = UnixFront(tmp_path / "s", private / "grpc")
    identifier, metrics = Identifier(found.exchange, front.peer), Metrics()
    around = ScopeAround(found.exchange, found.now)
    service = ActionBrokerService(
        found.exchange,
        around.recheck({}),
        Operators(found.exchange),
        Signing(found.exchange, Means(issuer=found.exchange.issuer)),
        identifier=identifier,
        metrics=metrics,
        clock=found.now,
    )
    desk = ApprovalsService(
        Approvals(found.exchange, Texts()), found.exchange, identifier=identifier, metrics=metrics, clock=found.now
    )
    sessions = SessionCalls(Scoring(found.exchange, Sessions(found.exchange.ledger.submit)), identifier)
    scope = ScopeService(
        found.exchange,
        around.feed,
        {},
        sessions,
        around.revocation(identifier),
        identifier=identifier,
        metrics=metrics,
        clock=found.now,
    )
    server = GrpcServer(service, desk, scope, max_concurrent=100, max_connection_age_s=600)
    server.listen_unix(str(private / "grpc"))
    await server.start()
    await front.start()
    async with Wire(f"unix:{tmp_path / 's'}") as made:
        yield made
    await front.close()
    await server.close(0)


def breaks() -> None:
    raise Broken(SECRET)


async def test_a_call_that_breaks_is_internal_and_the_next_one_is_answered(found: Exchanging, wire: Wire) -> None:
    assert await wire.token()
    found.asked.append(breaks)
    with capture_logs() as logs:
        said = await wire.ask("RequestActionToken", request())
    assert (said.code, said.reason) == (grpc.StatusCode.INTERNAL, "")
    assert SECRET not in said.details
    assert said.correlation_id in {log.get("correlation_id") for log in logs if log["event"] == "request_failed"}
    found.asked.clear()
    assert await wire.token()


async def test_a_stream_that_breaks_ends_instead_of_hanging(found: Exchanging, wire: Wire) -> None:
    stream: Any = wire.stub.StreamActionTokens(timeout=10)
    nonce = dict(await stream.initial_metadata())["dpop-nonce"]

    async def say(message_id: int, nonce: str) -> None:
        proof = wire.proof("StreamActionTokens", nonce=nonce)
        await stream.write(
            broker_pb2.StreamActionTokensRequest(action=act(), spiffe_id=AGENT, dpop=proof, message_id=message_id)
        )

    await say(1, nonce)
    answer = await stream.read()
    assert answer.result.token.access_token
    found.asked.append(breaks)
    with capture_logs() as logs:
        await say(2, answer.dpop_nonce)
        assert await stream.code() is grpc.StatusCode.INTERNAL
    assert SECRET not in await stream.details()
    assert [log for log in logs if log["event"] == "request_failed"]
    found.asked.clear()
    assert await wire.token()
