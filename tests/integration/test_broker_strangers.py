"""What strangers on this machine may hold or fill: never the places, the disk or the answers of known callers."""

import asyncio
import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import grpc
import pytest
from support.processes import Child, running, until
from support.trust_domain import TESTS
from support.whole_broker import AGENT, Whole, Wire, act, eventually, request, whole_broker

from broker._proto.actionbroker.v1 import broker_pb2
from broker.edges import places
from broker.errors import Reason
from broker.ledger.records import Refusal

UID = 1600
FEW = 64  # of max_concurrent_requests here, so that few strangers would do


@pytest.fixture(scope="module")
def whole() -> Iterator[Whole]:
    limits = {"requests_per_second": 10_000, "burst": 10_000}
    with whole_broker(limits=limits, grpc={"max_concurrent_requests": FEW}) as found:
        yield found


@contextmanager
def strangers(whole: Whole, kind: str, count: int) -> Iterator[Child]:
    """Open calls of processes that SPIRE knows nothing of, until the block ends. See support/strangers.py."""
    environment = {**os.environ, "PYTHONPATH": f"{TESTS}:{TESTS.parent}"}
    how = ["setpriv", "--reuid", str(UID), "--clear-groups"] if os.geteuid() == 0 else []
    asked = [sys.executable, "-m", "support.strangers", whole.broker.socket, kind, str(count)]
    with running(*how, *asked, env=environment) as child:
        yield child


async def served(whole: Whole) -> list[str]:
    """What a known caller gets over ten connections at once."""

    async def one() -> str:
        async with whole.wire() as wire:
            said = await wire.ask("RequestActionToken", request(), timeout=8)
            return said.reason or said.code.name

    return await asyncio.gather(*(one() for _ in range(10)))


@pytest.mark.parametrize("kind", ["stream", "unary", "health", "watch", "reflection"])
async def test_strangers_who_hold_all_they_can_take_no_place_of_a_known_caller(whole: Whole, kind: str) -> None:
    with strangers(whole, kind, 1500) as child:
        assert await child.line() == "begun"
        for _ in range(3):
            assert set(await served(whole)) == {"OK"}


@asynccontextmanager
async def streams(wire: Wire, count: int) -> AsyncIterator[list[Any]]:
    calls = [wire.stub.StreamActionTokens(timeout=60) for _ in range(count)]
    try:
        yield calls
    finally:
        for call in calls:
            call.cancel()


async def say(wire: Wire, call: Any, message_id: int = 1) -> str:
    """One message on a stream that has its nonce: "" for a token, else the reason."""
    nonce = dict(await call.initial_metadata())["dpop-nonce"]
    proof = wire.proof("StreamActionTokens", nonce=nonce)
    await call.write(
        broker_pb2.StreamActionTokensRequest(action=act(), spiffe_id=AGENT, dpop=proof, message_id=message_id)
    )
    try:
        return (await call.read()).result.refusal.reason
    except grpc.aio.AioRpcError as error:
        return error.code().name


async def test_a_stream_on_which_nobody_becomes_known_ends_and_a_quiet_one_of_a_known_caller_lasts(
    whole: Whole,
) -> None:
    async with whole.wire() as wire, streams(wire, 3) as (silent, stranger, known):
        started = time.monotonic()
        assert await say(wire, known) == ""
        await stranger.initial_metadata()
        await stranger.write(broker_pb2.StreamActionTokensRequest(action=act(), spiffe_id=AGENT))
        assert (await stranger.read()).result.refusal.reason == Reason.NONCE_REQUIRED
        for call in (silent, stranger):
            assert await call.code() is grpc.StatusCode.UNAUTHENTICATED
        assert places.PATIENCE_S - 1 < time.monotonic() - started < places.PATIENCE_S + 5
        assert not known.done()


async def test_one_known_caller_holds_no_more_streams_than_its_share(whole: Whole) -> None:
    most = places.MAX_STREAMS_OF_ONE
    async with whole.wire() as wire, contextlib.AsyncExitStack() as stack:

        async def begin() -> Any:
            (call,) = await stack.enter_async_context(streams(wire, 1))
            return call, await say(wire, call)

        calls = [await begin() for _ in range(most)]
        assert {said for _, said in calls} == {""}
        over, said = await begin()
        assert said in {Reason.QUOTA, "RESOURCE_EXHAUSTED"}
        assert await over.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        calls[0][0].cancel()

        async def again() -> str:
            return (await begin())[1]

        await eventually(again, "")
        assert set(await served(whole)) == {"OK"}


async def test_over_mutual_tls_a_stream_is_its_certificates_from_the_start(whole: Whole) -> None:
    svid = whole.domain.svid("build/agent")
    async with whole.mtls(svid) as wire, streams(wire, places.MAX_STREAMS_OF_ONE + 1) as calls:
        await until(lambda: any(call.done() for call in calls), "one too many is refused")
        await asyncio.gather(*(call.initial_metadata() for call in calls if not call.done()))
        over = [await call.code() for call in calls if call.done()]
        assert over == [grpc.StatusCode.RESOURCE_EXHAUSTED]


async def test_one_user_has_spire_asked_so_often_and_no_more() -> None:
    limits = {"attestations_per_second_per_uid": 1, "attestation_burst_per_uid": 20}
    with whole_broker(limits=limits) as whole, strangers(whole, "ask", 60) as child:
        assert await child.line() == "begun"
        said = json.loads(await child.line())
        if os.geteuid() == 0:  # else it is this user's own quota
            async with whole.wire() as wire:
                assert await wire.token()
    assert said[Reason.NOT_ATTESTED] + said[Reason.QUOTA] == 60
    assert 20 <= said[Reason.NOT_ATTESTED] <= 30


async def test_strangers_write_nothing_to_the_log(whole: Whole) -> None:
    before = len(whole.broker.log)
    with strangers(whole, "ask", 20) as child:
        assert await child.line() == "begun"
        assert json.loads(await child.line()) == {Reason.NOT_ATTESTED: 20}
    with strangers(whole, "garbage", 20) as child:
        assert await child.line() == "begun"
        assert json.loads(await child.line()) == {"INVALID_ARGUMENT": 40}
    for path in ("/nothing", "/metrics"):
        whole.get(path)
    told = [one for one in whole.broker.log[before:] if one.get("level") != "debug"]
    assert told == []
    assert [one for one in whole.broker.log[before:] if one["event"] == "refused"]


async def test_a_known_caller_fills_no_ledger_with_its_refusals() -> None:
    with whole_broker(limits={"requests_per_second": 10_000, "burst": 10_000}) as whole:
        async with whole.wire() as wire:
            await wire.token()
            for _ in range(5):
                many = broker_pb2.RequestActionTokensRequest(
                    actions=[act("orders.closed") for _ in range(100)], spiffe_id=AGENT
                )
                said = await wire.ask("RequestActionTokens", many)
                assert {one.refusal.reason for one in said.message.results} == {Reason.DENIED}
        whole.broker.stop()
        refusals = [one for one in whole.records() if isinstance(one, Refusal) and one.principal == AGENT]
        counted = sum(
            one.counts.get(Reason.DENIED, 0) for one in whole.records() if type(one).__name__ == "CountedRefusals"
        )
    assert 60 <= len(refusals) < 100
    assert len(refusals) + counted == 500


async def test_a_batch_counts_as_a_whole_or_not_at_all_and_tells_when_to_come_again() -> None:
    with whole_broker(limits={"requests_per_second": 20, "burst": 20}) as whole:
        async with whole.wire() as wire:

            def batch(count: int) -> Any:
                return broker_pb2.RequestActionTokensRequest(actions=[act() for _ in range(count)], spiffe_id=AGENT)

            for _ in range(40):
                said = await wire.ask("RequestActionTokens", batch(18))
                if said.code is grpc.StatusCode.OK:
                    break
                assert said.reason == Reason.QUOTA
                await asyncio.sleep(said.retry_after_s)
            assert said.code is grpc.StatusCode.OK
            await asyncio.sleep(1)
            too_large = await wire.ask("RequestActionTokens", batch(21))
            assert (too_large.code, too_large.reason) == (grpc.StatusCode.INVALID_ARGUMENT, Reason.MALFORMED)
            assert "1 to 20 actions" in (await whole.recorded(too_large.correlation_id, Refusal)).detail


async def test_connections_that_never_shake_hands_are_closed(whole: Whole) -> None:
    idle = [socket.create_connection(("127.0.0.1", whole.broker.grpc_port)) for _ in range(50)]
    try:
        for one in idle:
            one.settimeout(20)
            assert await asyncio.to_thread(one.recv, 1) == b""
    finally:
        for one in idle:
            one.close()
    async with whole.mtls(whole.domain.svid("build/agent")) as wire:
        assert (await wire.ask("RequestActionToken", request(spiffe_id=""))).code is grpc.StatusCode.OK
