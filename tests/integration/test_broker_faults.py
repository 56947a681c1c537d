"""A running broker under load and among broken parts: what it refuses, what it goes on doing, and that it recovers."""

import asyncio
import os
import signal
from typing import Any

import grpc
import pytest
from support.processes import until
from support.whole_broker import (
    AGENT,
    ORDERS,
    RESOURCE,
    Said,
    Wire,
    act,
    eventually,
    request,
    whole_broker,
)

from broker._proto.actionbroker.v1 import broker_pb2
from broker.client import Client
from broker.errors import Reason, Refused
from broker.ledger.records import CountedRefusals, Refusal

OTHER = ORDERS
"""Another caller than AGENT."""


async def test_a_caller_over_its_quota_is_told_when_to_come_again_and_others_are_not_touched() -> None:
    with whole_broker(limits={"requests_per_second": 1, "burst": 8}) as whole:
        async with whole.wire() as wire, whole.wire() as same_caller:
            said = [await wire.ask("RequestActionToken", request()) for _ in range(12)]
            admitted = [one for one in said if one.code is grpc.StatusCode.OK]
            assert 6 <= len(admitted) <= 8, "each costs one, and the first call of a connection asks for a nonce"
            for one in said[len(admitted) :]:
                assert (one.code, one.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.QUOTA)
                assert 0 < one.retry_after_s <= 1.1
            assert (await same_caller.ask("RequestActionToken", request())).reason == Reason.QUOTA
            assert (await wire.ask("RequestActionToken", request(spiffe_id=OTHER))).code is grpc.StatusCode.OK

            batch = broker_pb2.RequestActionTokensRequest(actions=[act()] * 8, spiffe_id=OTHER)
            assert (await wire.ask("RequestActionTokens", batch)).reason == Reason.QUOTA, "a batch costs what it holds"
            async with whole.client(AGENT) as client, client.stream() as stream:
                with pytest.raises(Refused) as refused:
                    await stream.request("orders.read", RESOURCE, ORDERS)
                assert refused.value.reason is Reason.QUOTA
                assert refused.value.retry_after_ms

            await eventually(wire.reason, "")
            counted = [one for one in whole.records() if isinstance(one, Refusal) and one.reason is Reason.QUOTA]
            assert counted == [], "however many it sends, they are counted"
        assert whole.broker.stop() == 0
        counts = [one.counts.get(Reason.QUOTA, 0) for one in whole.records() if isinstance(one, CountedRefusals)]
        assert sum(counts) >= 7


async def test_over_capacity_some_are_refused_at_once_and_the_admitted_are_all_answered() -> None:
    limits = {"requests_per_second": 10_000, "burst": 10_000}
    with whole_broker(limits=limits, grpc={"max_concurrent_requests": 8}) as whole:
        wires = [whole.wire() for _ in range(24)]
        try:
            for wire in wires:
                await wire.token()
            os.kill(whole.domain.pid, signal.SIGSTOP)  # what is admitted waits for SPIRE's word
            order: list[str] = []

            async def ask(wire: Wire) -> Said:
                said = await wire.ask("RequestActionToken", request())
                order.append(said.reason or said.code.name)
                return said

            asking = [asyncio.create_task(ask(wire)) for wire in wires]
            await until(lambda: len(order) == 16, "those beyond capacity are answered while the others wait")
            assert set(order) == {grpc.StatusCode.RESOURCE_EXHAUSTED.name}
            os.kill(whole.domain.pid, signal.SIGCONT)
            said = await asyncio.gather(*asking)
            assert sum(one.code is grpc.StatusCode.OK for one in said) == 8
            assert [await wire.reason() for wire in wires] == [""] * 24, "capacity is there again"
        finally:
            os.kill(whole.domain.pid, signal.SIGCONT)
            await asyncio.gather(*[wire.channel.close() for wire in wires])


async def test_connections_have_a_bound_for_each_user() -> None:
    with whole_broker(unix={"max_connections_per_uid": 5}) as whole:
        kept = [whole.wire() for _ in range(5)]
        try:
            for wire in kept:
                await wire.token()
            async with whole.wire() as one_more:
                said = await one_more.ask("RequestActionToken", request())
                assert said.code is grpc.StatusCode.UNAVAILABLE
            assert [await wire.reason() for wire in kept] == [""] * 5
            await kept.pop().channel.close()
            async with whole.wire() as instead:

                async def answer() -> str:
                    return (await instead.ask("RequestActionToken", request())).code.name

                await eventually(answer, "OK")
        finally:
            await asyncio.gather(*[wire.channel.close() for wire in kept])


async def test_a_full_disk_mints_nothing_says_why_and_recovers_by_itself() -> None:
    with whole_broker(limits={"requests_per_second": 10_000, "burst": 10_000}) as whole:
        await whole.ready()
        size = max(file.stat().st_size for file in (whole.broker.folder / "state").iterdir())
        whole.limit_files(size + 200_000)
        async with whole.wire() as wire, whole.mtls(whole.domain.svid("build/agent")) as mtls:
            minted: list[str] = []
            await eventually(lambda: keep(wire, minted), Reason.LEDGER_UNAVAILABLE)
            assert minted, "there was room at first"
            for _ in range(20):
                await keep(wire, minted)
            recorded = len(whole.intents())
            assert len(minted) <= recorded
            whole.limit_files(1)
            for one in (wire, mtls):
                said = await one.ask("RequestActionToken", request())
                assert (said.code, said.reason) == (grpc.StatusCode.UNAVAILABLE, Reason.LEDGER_UNAVAILABLE)
            assert len(whole.intents()) == recorded
            await whole.not_ready_because("ledger")
            await until(lambda: whole.broker.events("not_ready"), "the log says it as well")

            whole.limit_files(-1)
            await whole.ready()
            assert await wire.reason() == ""
            assert await mtls.reason() == ""
        ours = {one.correlation_id for one in whole.intents().values()}
        assert set(minted) <= ours
        assert whole.broker.stop() == 0


async def keep(wire: Wire, minted: list[str]) -> str:
    """Asks; keeps the correlation ids of what was minted. The reason."""
    said = await wire.ask("RequestActionToken", request())
    if said.message is not None:
        minted.append(said.message.correlation_id)
    return said.reason


async def test_spire_away_refuses_who_must_be_attested_until_it_is_back() -> None:
    with whole_broker() as whole:
        caller, service = whole.domain.svid("build/agent"), whole.domain.svid("service/orders")
        async with whole.wire() as wire, whole.mtls(caller) as mtls:
            for _ in range(2):  # away and back, twice, without a restart
                assert await wire.reason() == ""
                assert await mtls.reason() == ""
                token = await wire.token("orders.charge")
                by_svid = await mtls.token("orders.charge")
                whole.domain.down()
                said = await wire.ask("RequestActionToken", request())
                assert (said.code, said.reason) == (grpc.StatusCode.UNAVAILABLE, Reason.ATTESTATION_UNAVAILABLE)
                assert await mtls.reason() == "", "our own identity, and an SVID that was verified, need no agent"
                async with whole.mtls(service) as asker:
                    assert await asker.check(token, "orders.charge", spiffe_id="") == Reason.ATTESTATION_UNAVAILABLE
                    assert await asker.check(by_svid, "orders.charge", spiffe_id="") == "", "no process to look at"
                whole.domain.up()
                await eventually(wire.reason, "")
                await whole.ready()


async def test_our_own_identity_lasts_until_its_svid_ends_and_comes_back_without_a_restart() -> None:
    with whole_broker(x509_seconds=3) as whole:
        await whole.ready()
        caller = whole.domain.svid("build/agent")
        async with whole.mtls(caller) as mtls:
            assert await mtls.reason() == ""
            whole.domain.down()
            await eventually(mtls.reason, Reason.IDENTITY_UNAVAILABLE)
            await whole.not_ready_because("identity")
            whole.domain.up()
            await whole.ready()
        async with whole.mtls(caller) as again, whole.wire() as wire:
            assert await again.reason() == ""
            await eventually(wire.reason, "")


async def test_svids_are_renewed_under_load_with_no_failed_request() -> None:
    with whole_broker(x509_seconds=4, limits={"requests_per_second": 10_000, "burst": 10_000}) as whole:
        stop = asyncio.Event()
        counts: dict[str, int] = {"unix": 0, "mtls": 0}

        async def load(kind: str, client: Any) -> None:
            while not stop.is_set():
                await client.request("orders.read", RESOURCE, ORDERS)
                counts[kind] += 1

        def renewals() -> int:
            return sum(str(entry.get("event")).startswith("snapshot ") for entry in whole.broker.log)

        mtls = Client.mtls(
            f"127.0.0.1:{whole.broker.grpc_port}",
            broker_id="spiffe://acme.test/action-broker",
            workload_api=whole.domain.workload_api,
        )
        async with whole.client() as unix, mtls, asyncio.TaskGroup() as group:
            before = renewals()
            for _ in range(2):
                group.create_task(load("unix", unix))
                group.create_task(load("mtls", mtls))
            await until(lambda: renewals() >= before + 2, "our SVID was renewed twice")
            stop.set()
        assert min(counts.values()) > 10


async def test_the_broker_ends_in_good_order_under_load() -> None:
    with whole_broker(limits={"requests_per_second": 10_000, "burst": 10_000}) as whole:
        async with whole.wire() as wire:
            await wire.token()
            with whole.caller() as child:
                assert await child.line() == "ready"
                child.tell("flood orders.read")
                assert await child.line() == "flooding"
                await until(lambda: len(whole.intents()) > 50, "it is under load")
                assert await asyncio.to_thread(whole.broker.stop) == 0
        assert type(whole.records()[-1]).__name__ == "Stopped"
