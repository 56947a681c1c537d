"""What any gRPC client finds at a running broker: health, reflection, the stream, and Explain for operators."""

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from support.receiving import as_action
from support.whole_broker import (
    AGENT,
    ISSUER,
    OPERATOR,
    ORDERS,
    RESOURCE,
    SERVICE,
    Whole,
    act,
    eventually,
    whole_broker,
)

from broker._proto.actionbroker.v1 import broker_pb2
from broker.client import Client
from broker.errors import Reason, Refused
from broker.ledger.records import Operated, PolicyChanged, Refusal


@pytest.fixture(scope="module")
def whole() -> Iterator[Whole]:
    """Left as it was found."""
    with whole_broker(limits={"requests_per_second": 10_000, "burst": 10_000}) as found:
        yield found


@asynccontextmanager
async def plain_channels(whole: Whole) -> AsyncIterator[list[grpc.aio.Channel]]:
    """A channel over the Unix socket and one over mutual TLS."""
    async with whole.wire() as unix, whole.mtls(whole.domain.svid("anybody")) as mtls:
        yield [unix.channel, mtls.channel]


async def test_any_health_probe_is_answered(whole: Whole) -> None:
    async with plain_channels(whole) as channels:
        for channel in channels:
            stub = health_pb2_grpc.HealthStub(channel)
            for service in ("", SERVICE):
                answer = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
            with pytest.raises(grpc.aio.AioRpcError) as unknown:
                await stub.Check(health_pb2.HealthCheckRequest(service="acme.Orders"), timeout=10)
            assert unknown.value.code() is grpc.StatusCode.NOT_FOUND


async def test_health_follows_what_the_broker_can_do(whole: Whole) -> None:
    async with whole.wire() as wire:
        watch = health_pb2_grpc.HealthStub(wire.channel).Watch(health_pb2.HealthCheckRequest(), timeout=20)
        states = aiter(watch)
        assert (await anext(states)).status == health_pb2.HealthCheckResponse.SERVING
        whole.limit_files(1)
        try:
            await wire.ask("RequestActionToken", broker_pb2.RequestActionTokenRequest(action=act(), spiffe_id=AGENT))
            assert (await anext(states)).status == health_pb2.HealthCheckResponse.NOT_SERVING
        finally:
            whole.limit_files(-1)
        assert (await anext(states)).status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()


async def test_reflection_tells_a_plain_client_the_api(whole: Whole) -> None:
    async with plain_channels(whole) as channels:
        for channel in channels:
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)

            async def ask(stub: Any = stub, **what: str) -> Any:
                call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(**what)]), timeout=10)
                return await anext(aiter(call))

            listed = await ask(list_services="")
            assert {one.name for one in listed.list_services_response.service} == {
                SERVICE,
                "actionbroker.v1.Approvals",
                "actionbroker.v1.Scope",
                "grpc.health.v1.Health",
                "grpc.reflection.v1alpha.ServerReflection",
            }
            found = await ask(file_containing_symbol=SERVICE)
            files = found.file_descriptor_response.file_descriptor_proto
            (service,) = [one for raw in files for one in descriptor_pb2.FileDescriptorProto.FromString(raw).service]
            assert {method.name for method in service.method} == {
                "RequestActionToken",
                "RequestActionTokens",
                "StreamActionTokens",
                "Check",
                "Redeem",
                "RequestSigningGrant",
                "Sign",
                "IssueSigningCertificate",
                "Explain",
            }


async def test_explain_is_an_operators_action_and_recorded(whole: Whole) -> None:
    async with whole.client(OPERATOR) as operator, whole.client(AGENT) as agent:
        asked = as_action("orders.refund", {"amount": 51})
        with pytest.raises(Refused) as refused:
            await agent.explain(AGENT, asked, facts={"spire": {"ids": [AGENT]}})
        assert refused.value.reason is Reason.DENIED

        found = await operator.explain(AGENT, asked, facts={"spire": {"ids": [AGENT]}})
        assert not found.allowed
        (policy,) = [one for one in found.policies if "refund" in one.id]
        assert any("amount" in clause for clause in policy.failed)
        smaller = as_action("orders.refund", {"amount": 50})
        assert (await operator.explain(AGENT, smaller, facts={"spire": {"ids": [AGENT]}})).allowed
        assert "spire" in (await operator.explain(AGENT, smaller)).attestors
        with whole.caller() as child:
            assert await child.line() == "ready"
            assert (await operator.explain(AGENT, as_action("orders.attested"), pid=child.pid)).allowed

    operated = [one for one in whole.records() if isinstance(one, Operated)]
    assert {(one.principal, one.resource) for one in operated} == {(OPERATOR, f"{ISSUER}/explain")}
    assert len(operated) == 4
    refusals = [one for one in whole.records() if isinstance(one, Refusal) and one.stage == "explain"]
    assert [one.principal for one in refusals] == [AGENT]


async def test_the_ledger_says_which_policy_decided(whole: Whole) -> None:
    async with whole.wire() as wire:
        await wire.token()
    (intent, *_) = whole.intents().values()
    assert intent.policy_revision in {one.revision for one in whole.records() if isinstance(one, PolicyChanged)}


def asking(message_id: int, proof: str, **changes: Any) -> Any:
    made = {"action": act(), "spiffe_id": AGENT, "dpop": proof, "message_id": message_id} | changes
    return broker_pb2.StreamActionTokensRequest(**made)


async def test_a_bad_message_on_a_stream_spoils_no_other(whole: Whole) -> None:
    async with whole.wire() as wire:
        stream = wire.stub.StreamActionTokens(timeout=20)
        nonce = dict(await stream.initial_metadata())["dpop-nonce"]

        async def say(message_id: int, *, proof: str | None = None, **changes: Any) -> Any:
            nonlocal nonce
            made = wire.proof("StreamActionTokens", nonce=nonce) if proof is None else proof
            await stream.write(asking(message_id, made, **changes))
            answer = await stream.read()
            assert answer.message_id == message_id
            assert answer.result.correlation_id
            nonce = answer.dpop_nonce
            return answer.result

        replayed = wire.proof("StreamActionTokens", nonce=nonce)
        assert (await say(1, proof=replayed)).token.access_token
        bad: list[tuple[Reason, dict[str, Any]]] = [
            (Reason.PROOF_REPLAYED, {"proof": replayed}),
            (Reason.INVALID_PROOF, {"proof": "not a proof"}),
            (Reason.INVALID_PROOF, {"proof": wire.proof("RequestActionToken", nonce=nonce)}),
            (Reason.NONCE_REQUIRED, {"proof": ""}),
            (Reason.MALFORMED, {"action": act(resource="nowhere")}),
            (Reason.MALFORMED, {"action": act(parameters="{")}),
            (Reason.UNKNOWN_ACTION, {"action": act("orders.unheard")}),
            (Reason.DENIED, {"action": act("orders.closed")}),
            (Reason.NOT_ATTESTED, {"spiffe_id": "spiffe://acme.test/somebody/else"}),
        ]
        for number, (reason, changes) in enumerate(bad):
            result = await say(10 + number, **changes)
            assert (result.refusal.reason, result.HasField("token")) == (reason, False)
            assert (await say(100 + number)).token.access_token, "the next one is answered"
        await stream.done_writing()
        assert await stream.read() is grpc.aio.EOF
        assert await stream.code() is grpc.StatusCode.OK


async def test_bytes_in_the_middle_of_a_stream_end_it_and_nothing_else(whole: Whole) -> None:
    async with whole.wire() as wire:
        stream = wire.channel.stream_stream(f"/{SERVICE}/StreamActionTokens")(timeout=20)
        nonce = dict(await stream.initial_metadata())["dpop-nonce"]
        await stream.write(asking(1, wire.proof("StreamActionTokens", nonce=nonce)).SerializeToString())
        first = broker_pb2.StreamActionTokensResponse.FromString(await stream.read())
        assert first.result.token.access_token
        await stream.write(b"\xff\xff\xff")
        assert await stream.code() not in {grpc.StatusCode.OK, grpc.StatusCode.DEADLINE_EXCEEDED}
        assert await wire.token()


async def test_a_stream_answers_no_more_than_are_taken(whole: Whole) -> None:
    """A client that asks and never reads is held back; it is answered in full once it reads."""
    async with whole.mtls(whole.domain.svid("build/agent")) as wire:
        stream = wire.stub.StreamActionTokens(timeout=30)
        for number in range(300):
            await stream.write(asking(number, "", spiffe_id=""))
        await stream.done_writing()
        seen = [answer.message_id async for answer in stream if answer.result.token.access_token]
        assert sorted(seen) == list(range(300))


async def test_a_key_bound_stream_over_mutual_tls_starts_on_a_fresh_client(whole: Whole) -> None:
    """Nobody gave this client a nonce yet: the first message is asked for one, and proves its key with it."""
    agent = {"broker_id": "spiffe://acme.test/action-broker", "workload_api": whole.domain.workload_api}
    target = f"127.0.0.1:{whole.broker.grpc_port}"
    async with Client.mtls(target, proof_for=ISSUER, **agent) as client, client.stream() as stream:
        token = await stream.request("orders.read", RESOURCE, ORDERS)
        assert (token.token_type, token.svid) == ("DPoP", None)
        assert (await stream.request("orders.read", RESOURCE, ORDERS)).token_type == "DPoP"
        with pytest.raises(Refused) as refused:
            await stream.request("orders.closed", RESOURCE, ORDERS)
        assert refused.value.reason is Reason.DENIED
    async with Client.mtls(target, **agent) as client, client.stream() as stream:
        assert (await stream.request("orders.read", RESOURCE, ORDERS)).token_type == "Bearer"


async def test_a_stream_whose_caller_loses_its_entry_is_refused_from_then_on(whole: Whole) -> None:
    async with whole.client() as client, client.stream() as stream:
        assert await stream.request("orders.read", RESOURCE, ORDERS)
        whole.domain.delete(whole.entries[AGENT])
        try:
            with pytest.raises(Refused) as refused:
                await stream.request("orders.read", RESOURCE, ORDERS)
            assert refused.value.reason is Reason.NOT_ATTESTED
        finally:
            whole.entries[AGENT] = whole.domain.entry("build/agent", os.getpid())
        assert await stream.request("orders.read", RESOURCE, ORDERS)


async def test_a_stream_over_mutual_tls_is_refused_once_its_svid_has_expired(whole: Whole) -> None:
    async with whole.mtls(whole.domain.svid("build/agent", 2)) as wire:
        stream = wire.stub.StreamActionTokens(timeout=20)

        async def ask() -> str:
            await stream.write(asking(1, "", spiffe_id=""))
            return (await stream.read()).result.refusal.reason

        assert await ask() == ""
        await eventually(ask, Reason.EXPIRED)


async def test_an_answer_over_a_connection_names_no_nonce_where_none_is_used(whole: Whole) -> None:
    async with whole.mtls(whole.domain.svid("build/agent")) as wire, whole.wire() as unix:
        said = await wire.ask("RequestActionToken", broker_pb2.RequestActionTokenRequest(action=act()))
        assert said.message.token.token_type == "Bearer"
        assert "dpop-nonce" not in said.trailers
        said = await unix.ask("RequestActionToken", broker_pb2.RequestActionTokenRequest(action=act(), spiffe_id=AGENT))
        assert said.message.token.token_type == "DPoP"
        assert said.trailers["dpop-nonce"]


async def test_a_grpc_connection_ends_with_its_age_so_that_handshakes_happen_with_todays_roots() -> None:
    with whole_broker(grpc={"max_connection_age_s": 10}) as whole:
        async with grpc.aio.insecure_channel(whole.target) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            await health.Check(health_pb2.HealthCheckRequest(), wait_for_ready=True)
            assert channel.get_state() is grpc.ChannelConnectivity.READY
            async with asyncio.timeout(13):  # gRPC spreads it by a tenth, so that not all come back at once
                await channel.wait_for_state_change(grpc.ChannelConnectivity.READY)
            await health.Check(health_pb2.HealthCheckRequest())
