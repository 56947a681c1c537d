"""The whole product on a real SPIRE: workloads are processes of three users, known by nothing but their processes."""

import os
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from support.broker import RunningBroker
from support.on_spire import NOTICED_S, Workload, broker_in, workloads_of
from support.processes import until
from support.spire import Spire
from support.whole_broker import RESOURCE

from broker.errors import Reason
from broker.ledger.reading import read
from broker.ledger.records import Intent, Refusal

pytestmark = [pytest.mark.spire, pytest.mark.root]

AGENT, ORDERS, OTHER = "spiffe://acme.test/build/agent", "spiffe://acme.test/service/orders", "spiffe://acme.test/other"
UIDS = {AGENT: 1600, ORDERS: 1700, OTHER: 1800}


@pytest.fixture(scope="module")
def broker(spire: Spire) -> Iterator[RunningBroker]:
    with ExitStack() as stack:
        yield stack.enter_context(broker_in(spire))


async def test_three_users_get_a_token_each_by_their_process_and_none_gets_anothers(spire, broker, new_entry):
    for spiffe_id, uid in UIDS.items():
        new_entry(spiffe_id.removeprefix("spiffe://acme.test/"), uid=uid)
    async with workloads_of(broker, spire, *UIDS.values()) as workloads:
        for own, workload in zip(UIDS, workloads, strict=True):
            await workload.until_token()
            assert await workload.token(spiffe_id=own) == ""
            for other in (*UIDS, spire.id("action-broker")):
                if other != own:
                    assert await workload.token(spiffe_id=other) == Reason.NOT_ATTESTED
            assert await workload.token("orders.attested") == ""
            assert await workload.token("orders.refund") in {Reason.DENIED, Reason.MALFORMED}, "without parameters"
    intents = [row.record() for row in read(broker.ledger)]
    by_user = {(one.principal, one.process.uid) for one in intents if isinstance(one, Intent) and one.process}
    assert by_user >= set(UIDS.items())
    assert {principal: uid for principal, uid in by_user if principal in UIDS} == UIDS


async def test_an_entry_that_is_deleted_ends_it_at_the_next_request(spire, broker, new_entry):
    entry, kept = new_entry("build/agent", uid=1600), new_entry("service/orders", uid=1700)
    async with workloads_of(broker, spire, 1600, 1700) as (agent, orders):
        await agent.until_token()
        await orders.until_token()
        spire.delete_entry(entry)
        await agent.until_token(Reason.NOT_ATTESTED, NOTICED_S)
        assert await orders.token() == "", "the other entry is still there"
        new_entry("build/agent", uid=1600)
        await agent.until_token("", NOTICED_S)
    assert kept


async def test_an_agent_that_is_killed_is_unavailable_and_its_return_needs_no_restart(new_spire):
    spire = new_spire()
    spire.create_entry("build/agent", uid=1600)
    with broker_in(spire) as broker:
        async with workloads_of(broker, spire, 1600) as (agent,):
            await agent.until_token()
            await agent.until_token(transport="mtls")
            spire.kill_agent()
            assert await agent.token() == Reason.ATTESTATION_UNAVAILABLE
            assert await agent.token(transport="mtls") == "", "an SVID that it has is good until it ends"
            spire.start_agent()
            await agent.until_token()
            await agent.until_token(transport="mtls")
        assert broker.process.poll() is None


def snapshots(broker):
    """What the broker said of each new SVID."""
    return [entry for entry in broker.log if str(entry.get("event")).startswith("snapshot ")]


async def test_svids_rotate_under_load_and_no_request_fails(new_spire):
    spire = new_spire(x509_ttl=16)  # renewed every 3 s
    spire.create_entry("build/agent", uid=1600)
    with broker_in(spire) as broker:
        async with workloads_of(broker, spire, 1600) as (agent,):
            await agent.until_token()
            await agent.until_token(transport="mtls")
            before = len(snapshots(broker))
            await agent.do("load", action="orders.read", resource=RESOURCE, audience=ORDERS)
            await until(lambda: len(snapshots(broker)) >= before + 3, "three renewals")
            assert await agent.do("stop") == []


async def test_a_federated_caller_is_verified_by_its_own_domains_bundle_alone(new_spire):
    home, away = new_spire(name="acme.test", broker=False), new_spire(name="other.test", broker=False)
    home.federate(away)
    away.federate(home)
    home.create_entry("action-broker", uid=os.geteuid(), federates_with=["other.test"])
    home.create_entry("build/agent", uid=1600)
    away.create_entry("build/agent", uid=1600, federates_with=["acme.test"])
    with broker_in(home) as broker:
        async with (
            workloads_of(broker, home, 1600) as (ours,),
            workloads_of(broker, away, 1600) as (theirs,),
        ):
            await ours.until_token(transport="mtls")
            await theirs.until_token(transport="mtls")
            principals = {one.principal for one in records_of(broker, Intent)}
            assert principals == {home.id("build/agent"), away.id("build/agent")}

            home.defederate(away)
            # On the connection that it has: the identity is verified anew with each request.
            await theirs.until_token(Reason.UNAUTHENTICATED, NOTICED_S, transport="mtls")
            assert await ours.token(transport="mtls") == ""
            assert not [one for one in records_of(broker, Refusal) if one.principal.startswith("spiffe://other")]

            home.federate(away)
            entries = {spiffe_id: entry for entry, spiffe_id in home.entries().items()}
            home.delete_entry(entries[home.id("action-broker")])
            home.create_entry("action-broker", uid=os.geteuid(), federates_with=["other.test"])
            await theirs.until_token("", NOTICED_S, transport="mtls")


def records_of(broker: RunningBroker, kind: type[Any]) -> list[Any]:
    return [one for one in (row.record() for row in read(broker.ledger)) if isinstance(one, kind)]


async def test_a_guarded_service_does_the_one_act_and_refuses_everything_else(spire, broker, new_entry):
    for spiffe_id, uid in UIDS.items():
        new_entry(spiffe_id.removeprefix("spiffe://acme.test/"), uid=uid)
    order = "https://orders.acme.test/v1/orders/17"
    async with workloads_of(broker, spire, *UIDS.values()) as (agent, orders, thief):
        for workload in (agent, orders, thief):
            await workload.until_token()
            await workload.until_token(transport="mtls")
        port = await orders.do("serve", audience=ORDERS)

        async def take(action: str, **changes: str) -> None:
            assert await agent.token(action, transport="mtls", **({"resource": order} | changes)) == ""

        async def call(method: str, message: str = "17", by: Workload = agent) -> str:
            return await by.do("call", port=port, method=method, message=message)

        await take("orders.once", audience=OTHER)
        for_another = await agent.do("show")
        await take("orders.once")
        assert await call("Refund", "18") == Reason.OUT_OF_SCOPE, "another order"
        assert await call("Unmapped") == Reason.OUT_OF_SCOPE, "a method without a rule"
        assert await call("Failing") == Reason.OUT_OF_SCOPE, "another action"
        good = await agent.do("show")
        for stolen, by, reason in (
            (None, agent, Reason.UNAUTHENTICATED),
            (for_another, agent, Reason.WRONG_AUDIENCE),
            (good, thief, Reason.KEY_MISMATCH),
            (good, orders, Reason.KEY_MISMATCH),
        ):
            await by.do("steal", token=stolen)
            assert await call("Refund", by=by) == reason
        await agent.do("steal", token=good)
        assert await call("Refund") == "", "the one act"
        assert await call("Refund") == Reason.ALREADY_USED

        await take("orders.charge")
        assert await call("Failing", "18") == Reason.OUT_OF_SCOPE, "which does not use it up"
        assert await call("Failing") == "", "redeemed at the broker, by the service's own process"
        assert await call("Failing") == Reason.ALREADY_USED

        await take("orders.long")
        assert await call("Upload") == "", "the broker would grant it again"
