"""What bad input gets at a running broker's gRPC edge and Unix socket: a reason, a record, and no harm done."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import grpc
import pytest
from cryptography import x509
from support.pki import CA, JwtAuthority, der, jwks, snapshot, usage
from support.processes import until
from support.receiving import as_action
from support.whole_broker import (
    AGENT,
    BROKER,
    ORDERS,
    RESOURCE,
    SERVICE,
    Said,
    Whole,
    Wire,
    act,
    dialled,
    eventually,
    refused,
    request,
    utc_now,
    whole_broker,
)

from broker._proto.actionbroker.v1 import broker_pb2
from broker.errors import BrokerError, Reason
from broker.ledger.records import CountedRefusals, Intent, Outcome, Refusal


@pytest.fixture(scope="module")
def whole() -> Iterator[Whole]:
    """Left as it was found."""
    limits = {"requests_per_second": 10_000, "burst": 10_000}
    with whole_broker(limits=limits) as found:
        yield found


@pytest.fixture
async def wire(whole: Whole) -> AsyncIterator[Wire]:
    """A connection that gets a token before the test and, the positive control, after it."""
    async with whole.wire() as found:
        assert await found.token()
        yield found
        assert await found.token(), "the broker answers as before"


MALFORMED: dict[str, dict[str, str]] = {
    "an action without a name": {"name": ""},
    "a name with a newline": {"name": "orders.read\n"},
    "a resource that is no URI": {"resource": "orders/17"},
    "a resource with dot segments": {"resource": "https://orders.acme.test/orders/../17"},
    "a resource with an encoded slash": {"resource": "https://orders.acme.test/orders%2f17"},
    "a resource with userinfo": {"resource": "https://me@orders.acme.test/orders/17"},
    "a resource of 10,000 characters": {"resource": f"https://orders.acme.test/{'a' * 10_000}"},
    "an audience that is no URI": {"audience": "orders"},
    "no audience": {"audience": ""},
    "parameters that are no JSON": {"parameters": "{"},
    "parameters that are no object": {"parameters": "[]"},
    "a parameter twice": {"parameters": '{"amount": 1, "amount": 50}'},
    "a lone surrogate": {"parameters": '{"amount": "\\ud800"}'},
    "an integer beyond 2^53": {"parameters": '{"amount": 9007199254740993}'},
    "parameters of 100 kB": {"parameters": f'{{"amount": "{"x" * 100_000}"}}'},
    "parameters 2,000 deep": {"parameters": '{"a":' * 2000 + "1" + "}" * 2000},
}


@pytest.mark.parametrize("changes", MALFORMED.values(), ids=MALFORMED.keys())
async def test_what_cannot_be_an_action_is_malformed(whole: Whole, wire: Wire, changes: dict[str, str]) -> None:
    said = await wire.ask("RequestActionToken", request(**({"name": "orders.read"} | changes)))
    record = await refused(whole, said, Reason.MALFORMED, grpc.StatusCode.INVALID_ARGUMENT)
    assert (record.principal, record.stage, record.edge) == (AGENT, "request", "unix")


async def test_parameters_that_the_action_does_not_take_are_refused(whole: Whole, wire: Wire) -> None:
    for parameters in ('{"amount": 5}', '{"more": true}'):
        said = await wire.ask("RequestActionToken", request("orders.read", parameters=parameters))
        assert said.code in {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.PERMISSION_DENIED}
        await whole.recorded(said.correlation_id, Refusal)
    said = await wire.ask("RequestActionToken", request("orders.refund", parameters='{"amount": 5, "more": 1}'))
    await whole.recorded(said.correlation_id, Refusal)
    assert await wire.token("orders.refund")


async def test_an_unknown_action_is_not_found(whole: Whole, wire: Wire) -> None:
    said = await wire.ask("RequestActionToken", request("orders.unheard"))
    record = await refused(whole, said, Reason.UNKNOWN_ACTION, grpc.StatusCode.NOT_FOUND)
    assert record.action == "orders.unheard"


async def test_a_message_over_a_megabyte_is_cut_off_by_the_transport(wire: Wire) -> None:
    said = await wire.ask("RequestActionToken", request(parameters=f'{{"a": "{"x" * 1024 * 1024}"}}'))
    assert (said.code, said.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "")


@pytest.mark.parametrize("count", [0, 257, 5000])
async def test_a_batch_of_none_or_too_many_is_malformed(whole: Whole, wire: Wire, count: int) -> None:
    batch = broker_pb2.RequestActionTokensRequest(actions=[act()] * count, spiffe_id=AGENT)
    before = len(whole.intents())
    said = await wire.ask("RequestActionTokens", batch)
    await refused(whole, said, Reason.MALFORMED, grpc.StatusCode.INVALID_ARGUMENT)
    assert len(whole.intents()) == before


async def test_a_full_batch_is_answered_one_by_one(whole: Whole, wire: Wire) -> None:
    actions = [act(), act("orders.closed"), act(resource="nowhere"), *[act()] * 253]
    said = await wire.ask(
        "RequestActionTokens", broker_pb2.RequestActionTokensRequest(actions=actions, spiffe_id=AGENT)
    )
    results = said.message.results
    assert [result.refusal.reason for result in results] == ["", Reason.DENIED, Reason.MALFORMED, *[""] * 253]
    assert len({result.correlation_id for result in results}) == 256
    for result in results[1:3]:
        await whole.recorded(result.refusal.correlation_id, Refusal)
    issued = {result.token.access_token for result in results if result.HasField("token")}
    assert len(issued) == 254


@pytest.mark.parametrize("body", [b"\xff", b"\x0a\xff", b"\x00" * 100, os.urandom(1000)], ids=len)
async def test_bytes_that_are_no_message_harm_nothing(wire: Wire, body: bytes) -> None:
    for method in ("RequestActionToken", "Check", "Redeem", "Explain", "Unheard"):
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await wire.channel.unary_unary(f"/{SERVICE}/{method}")(body, timeout=10)
        assert failed.value.code() is not grpc.StatusCode.DEADLINE_EXCEEDED
    stream = wire.channel.stream_stream(f"/{SERVICE}/StreamActionTokens")(timeout=10)
    await stream.write(body)
    assert await stream.code() not in {grpc.StatusCode.OK, grpc.StatusCode.DEADLINE_EXCEEDED}


async def test_a_proof_counts_once(whole: Whole, wire: Wire) -> None:
    proof = wire.proof("RequestActionToken")
    assert (await wire.send("RequestActionToken", request(), [proof])).code is grpc.StatusCode.OK
    said = await wire.send("RequestActionToken", request(), [proof])
    record = await refused(whole, said, Reason.PROOF_REPLAYED, grpc.StatusCode.UNAUTHENTICATED)
    assert record.stage == "identify"


async def test_a_proof_counts_for_its_own_call_and_connection(whole: Whole, wire: Wire) -> None:
    async with whole.wire() as another:
        await another.token()
        wrong: list[tuple[str, Reason]] = [
            ("not a proof", Reason.INVALID_PROOF),
            (wire.proof("RequestActionToken", url="https://broker.acme.test/oauth2/token"), Reason.INVALID_PROOF),
            (wire.proof("Check"), Reason.INVALID_PROOF),
            (wire.proof("RequestActionToken", now=utc_now() - timedelta(minutes=5)), Reason.INVALID_PROOF),
            (wire.proof("RequestActionToken", now=utc_now() + timedelta(minutes=5)), Reason.INVALID_PROOF),
        ]
        for proof, reason in wrong:
            said = await wire.send("RequestActionToken", request(), [proof])
            await refused(whole, said, reason, grpc.StatusCode.UNAUTHENTICATED)
        for nonce in (another.nonce, "A" * 43, None):
            said = await wire.send("RequestActionToken", request(), [wire.proof("RequestActionToken", nonce=nonce)])
            assert said.reason == Reason.NONCE_REQUIRED
        assert (await wire.send("RequestActionToken", request())).reason == Reason.NONCE_REQUIRED


async def test_two_proofs_in_one_call_are_refused(wire: Wire) -> None:
    proof = wire.proof("RequestActionToken")
    said = await wire.send("RequestActionToken", request(), [proof, proof])
    assert (said.reason, said.code) == (Reason.INVALID_PROOF, grpc.StatusCode.UNAUTHENTICATED)
    assert said.correlation_id
    assert (await wire.send("RequestActionToken", request(), [proof])).code is grpc.StatusCode.OK, "it was not used up"


async def test_a_process_with_several_ids_names_the_one_to_use(wire: Wire) -> None:
    for name in ("", "spiffe://acme.test/somebody/else", BROKER, "spiffe://other.test/build/agent", "not an ID"):
        said = await wire.ask("RequestActionToken", request(spiffe_id=name))
        assert (said.reason, said.code) == (Reason.NOT_ATTESTED, grpc.StatusCode.PERMISSION_DENIED)


async def test_a_caller_that_dies_under_way_leaves_every_intent_with_its_outcome(whole: Whole, wire: Wire) -> None:
    with whole.caller() as child:
        assert await child.line() == "ready"
        child.tell("flood orders.read")
        assert await child.line() == "flooding"
        await until(lambda: len(intents_of(whole, child.pid)) > 50, "it is under load")
        os.kill(whole.domain.pid, signal.SIGSTOP)  # some of its requests wait for SPIRE's word
        try:
            child.end()
        finally:
            os.kill(whole.domain.pid, signal.SIGCONT)

    def all_told() -> bool:
        told = {one.intent for one in whole.records() if isinstance(one, Outcome)}
        return intents_of(whole, child.pid) <= told

    await until(all_told, "each intent has its outcome")


def intents_of(whole: Whole, pid: int) -> set[int]:
    """Sequence numbers; the n-th record has number n."""
    return {
        seq
        for seq, one in enumerate(whole.records(), 1)
        if isinstance(one, Intent) and one.process is not None and one.process.pid == pid
    }


async def test_a_certificate_that_is_no_svid_is_refused(whole: Whole, wire: Wire) -> None:
    """What passes the handshake, since its authority is trusted for another domain or another purpose."""
    other, keys = CA("other.test", now=utc_now()), JwtAuthority()
    ours = whole.domain.svid("build/agent")
    whole.domain.federate("other.test", der(other.certificate), jwks(keys.jwk()))
    agent = "spiffe://other.test/build/agent"
    ca = x509.BasicConstraints(ca=True, path_length=None)
    good = other.svid(agent)
    defects = {
        "two URI SANs": (other.svid(uris=[agent, AGENT]), Reason.UNAUTHENTICATED),
        "an authority": (
            other.svid(agent, basic_constraints=ca, key_usage=usage("key_cert_sign")),
            Reason.UNAUTHENTICATED,
        ),
        "the domain itself": (other.svid("spiffe://other.test"), Reason.UNAUTHENTICATED),
        "no SPIFFE ID": (other.svid("https://other.test/build/agent"), Reason.MALFORMED),
        "another domain's": (other.svid(AGENT), Reason.UNAUTHENTICATED),
    }

    async def ask(svid: Any) -> Said:
        own = replace(good.own(), chain=svid.chain, private_key_pkcs8=svid.key_pkcs8)
        async with whole.mtls(snapshot(*ours.bundles.values(), own=own)) as mtls:
            return await mtls.ask("RequestActionToken", request(spiffe_id=""))

    async def outcome() -> str:
        return "a token" if (await ask(good)).code is grpc.StatusCode.OK else "refused"

    try:
        await eventually(outcome, "a token")
        for what, (svid, expected) in defects.items():
            said = await ask(svid)
            if said.code is not grpc.StatusCode.UNAVAILABLE:  # the transport's own: cut off in the handshake
                assert (what, said.reason) == (what, expected)
                assert said.correlation_id
    finally:
        whole.domain.unfederate("other.test")
    await eventually(outcome, "refused")  # by us, or already in the handshake, whose roots have changed too


async def test_a_stranger_is_cut_off_in_the_handshake(whole: Whole, wire: Wire) -> None:
    stranger = CA("acme.test", now=utc_now()).svid(AGENT)
    ours = whole.domain.svid("build/agent")
    async with whole.mtls(snapshot(*ours.bundles.values(), own=stranger.own())) as mtls:
        said = await mtls.ask("RequestActionToken", request())
    assert (said.code, said.reason) == (grpc.StatusCode.UNAVAILABLE, "")
    async with grpc.aio.insecure_channel(f"127.0.0.1:{whole.broker.grpc_port}") as plain:
        with pytest.raises(grpc.aio.AioRpcError):
            await plain.unary_unary(f"/{SERVICE}/RequestActionToken")(b"", timeout=10)
    async with whole.mtls(ours) as mtls:
        assert await mtls.token()


async def test_strangers_are_counted_and_callers_are_written_down() -> None:
    with whole_broker() as whole:
        async with whole.wire() as wire, whole.mtls(whole.domain.svid("build/agent", of="other.test")) as nobody:
            await wire.token()
            for _ in range(7):
                said = await wire.ask("RequestActionToken", request(spiffe_id="spiffe://acme.test/somebody/else"))
                assert said.reason == Reason.NOT_ATTESTED
            for _ in range(5):
                proof = wire.proof("RequestActionToken")
                assert (await wire.send("RequestActionToken", request(), [proof, proof])).reason
            for _ in range(3):
                assert (await nobody.ask("RequestActionToken", request(spiffe_id=""))).reason == Reason.UNAUTHENTICATED
            known = await wire.ask("RequestActionToken", request("orders.closed"))
            await wire.send("RequestActionToken", request(), ["not a proof"])
        assert whole.broker.stop() == 0
        counts: dict[str, int] = {}
        for record in whole.records():
            if isinstance(record, CountedRefusals):
                for reason, count in record.counts.items():
                    counts[reason] = counts.get(reason, 0) + count
        assert counts == {
            Reason.NOT_ATTESTED: 7,
            Reason.INVALID_PROOF: 5,
            Reason.UNAUTHENTICATED: 3,
            Reason.NONCE_REQUIRED: 1,
        }
        written = [(one.principal, one.reason) for one in whole.records() if isinstance(one, Refusal)]
        assert written == [(AGENT, Reason.DENIED), (AGENT, Reason.INVALID_PROOF)]
        assert known.correlation_id in [one.correlation_id for one in whole.records() if isinstance(one, Refusal)]


async def test_many_at_once_with_all_that_is_wrong_leave_the_others_unharmed(whole: Whole, wire: Wire) -> None:
    async def wrong(number: int) -> None:
        async with whole.wire() as one:
            await one.ask("RequestActionToken", request("orders.closed"))
            await one.ask("RequestActionToken", request(parameters="{" * number))
            await one.send("RequestActionToken", request(), [one.proof("Check")] * (number % 3))
            await one.redeem("a.b.c", f"idempotency-id-{number:04}")

    async def right() -> list[str]:
        async with whole.client() as client:
            return [(await client.request("orders.read", RESOURCE, ORDERS)).access_token for _ in range(20)]

    done = await asyncio.gather(right(), *[wrong(number) for number in range(12)], right())
    assert len({*done[0], *done[-1]}) == 40


async def test_our_own_client_says_what_to_do_about_it(whole: Whole, wire: Wire) -> None:
    async with whole.client() as client:
        with pytest.raises(BrokerError) as refused:
            await client.request_action(as_action("orders.closed"))
    assert refused.value.reason is Reason.DENIED
    assert "action-broker explain" in refused.value.detail


async def test_a_client_does_not_take_another_server_for_the_broker(whole: Whole, wire: Wire) -> None:
    seen = whole.domain.svid("build/agent")
    async with dialled(whole.broker.http_port, seen) as wrong_port:
        assert (await wrong_port.ask("RequestActionToken", request())).code is grpc.StatusCode.UNAVAILABLE
