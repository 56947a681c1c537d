"""SPIRE's word on processes, asked anew each time."""

import asyncio
import os
from collections.abc import Sequence

import pytest
from support.processes import PATIENCE_S, until
from support.spire import Spire, broker_api_of, clock, identity_from, process_of

from attestors.contract import AttestationFailed, AttestationRequest, AttestationUnavailable, Process
from attestors.spire import SpireAttestor
from broker.errors import BrokerError, Reason, Unavailable
from broker.identity.peer import read_process
from broker.identity.spiffe_id import SpiffeId
from broker.identity.spire_broker_api import AttestorEntitlements, SpireBrokerApi, any_agent

pytestmark = [pytest.mark.spire, pytest.mark.root]


async def answer(api: SpireBrokerApi, pid: int) -> list[str] | Reason:
    """The process's IDs, or the reason of the refusal."""
    try:
        return [str(entitlement.spiffe_id) for entitlement in await api.fetch(pid)]
    except BrokerError as error:
        return error.reason


async def until_answer(
    api: SpireBrokerApi, pid: int, wanted: Sequence[str] | Reason, within_s: float = PATIENCE_S
) -> None:
    """Returns once that is the answer: what changes at the server takes a moment to reach the agent."""
    last: object = None
    try:
        async with asyncio.timeout(within_s):
            while True:
                last = await answer(api, pid)
                if last == wanted:
                    return
                await asyncio.sleep(0.05)
    except TimeoutError:
        pytest.fail(f"still {last} after {within_s} s, not {wanted}")


async def test_each_process_has_exactly_the_ids_of_its_own_user(spire: Spire, broker_api, new_entry):
    new_entry("build/agent", uid=1600)
    new_entry("service/orders", uid=1700)
    new_entry("service/orders-admin", uid=1700)
    with process_of(1600) as build, process_of(1700) as orders, process_of(1800) as nobody:
        await until_answer(broker_api, build, [spire.id("build/agent")])
        await until_answer(broker_api, orders, [spire.id("service/orders"), spire.id("service/orders-admin")])
        assert await answer(broker_api, os.getpid()) == [spire.id("action-broker")]
        assert await answer(broker_api, nobody) is Reason.NOT_ATTESTED


async def test_a_deleted_entry_ends_the_attestation_while_the_process_lives_on(spire: Spire, broker_api, new_entry):
    kept, deleted = new_entry("build/agent", uid=1600), new_entry("service/orders", uid=1700)
    with process_of(1600) as build, process_of(1700) as orders:
        await until_answer(broker_api, build, [spire.id("build/agent")])
        await until_answer(broker_api, orders, [spire.id("service/orders")])
        spire.delete_entry(deleted)
        await until_answer(broker_api, orders, Reason.NOT_ATTESTED, within_s=15)
        assert await answer(broker_api, build) == [spire.id("build/agent")], f"entry {kept} was not touched"


async def test_a_dead_process_and_impossible_pids_are_not_attested(spire: Spire, broker_api, new_entry):
    new_entry("build/agent", uid=1600)
    with process_of(1600) as build:
        await until_answer(broker_api, build, [spire.id("build/agent")])
    assert await answer(broker_api, build) is Reason.NOT_ATTESTED
    for pid in (0, -1, 2**31, 2**22 - 1):
        assert await answer(broker_api, pid) is Reason.NOT_ATTESTED


async def test_no_agent_means_unavailable_and_a_restarted_one_is_asked_without_a_restart_of_ours(new_spire):
    spire: Spire = new_spire()
    spire.create_entry("build/agent", uid=1600)
    async with broker_api_of(spire) as api:
        with process_of(1600) as build:
            await until_answer(api, build, [spire.id("build/agent")])
            spire.kill_agent()
            assert await answer(api, build) is Reason.ATTESTATION_UNAVAILABLE
            spire.start_agent()
            await until_answer(api, build, [spire.id("build/agent")])
    assert api.last_error is None


async def test_an_agent_with_another_spiffe_id_than_expected_is_not_asked(spire: Spire):
    expectations = {
        "another agent's ID": SpiffeId.parse(spire.id("spire/agent/join_token/another")),
        "the server's ID": SpiffeId.parse(spire.id("spire/server")),
        "a matcher that says no": lambda spiffe_id: spiffe_id.path.startswith("/spire/agent/k8s_psat/"),
        "an ID of a domain that we have no bundle of": SpiffeId.parse("spiffe://other.test/spire/agent/x"),
    }
    async with identity_from(spire) as identity:
        for what, agent in expectations.items():
            async with SpireBrokerApi(spire.broker_api, identity.snapshot, clock, agent=agent) as api:
                with pytest.raises(Unavailable) as refused:
                    await api.fetch(os.getpid())
                assert refused.value.reason is Reason.ATTESTATION_UNAVAILABLE, what
                said = refused.value.detail
                assert "spire/agent/join_token/" in said or "no trust bundle for spiffe://other.test" in said, what
        async with SpireBrokerApi(spire.broker_api, identity.snapshot, clock, agent=any_agent) as api:
            assert await answer(api, os.getpid()) == [spire.id("action-broker")]


async def test_an_agent_that_does_not_know_us_as_a_broker_says_so_to_the_operator(new_spire):
    spire: Spire = new_spire(broker=False)
    spire.create_entry("not-the-broker", uid=os.geteuid())
    async with broker_api_of(spire) as api:
        with pytest.raises(Unavailable) as refused:
            await api.fetch(os.getpid())
        assert refused.value.reason is Reason.ATTESTATION_UNAVAILABLE
        assert spire.id("not-the-broker") in str(api.last_error)


async def test_no_question_fails_while_our_svid_and_the_agents_are_renewed(new_spire):
    spire: Spire = new_spire(name="brief.test", x509_ttl=16, jwt_ttl=20)
    async with identity_from(spire) as identity, SpireBrokerApi(spire.broker_api, identity.snapshot, clock) as api:
        leaves = {identity.snapshot().own.chain[0]}
        identity.subscribe(lambda snapshot: leaves.add(snapshot.own.chain[0]))
        answers: list[object] = []
        done = asyncio.Event()

        async def ask() -> None:
            while not done.is_set():
                answers.append(await answer(api, os.getpid()))

        async with asyncio.TaskGroup() as group:
            for _ in range(4):
                group.create_task(ask())
            # Longer than an SVID lives: what was there at the start has expired at the end.
            await until(lambda: len(leaves) >= 6, "six generations of our SVID")
            done.set()
    assert len(answers) > 1000
    assert [found for found in answers if found != [spire.id("action-broker")]] == []


async def attested(attestor: SpireAttestor, principal: str, process: Process):
    return await attestor.attest(AttestationRequest(principal=principal, process=process), clock())


async def test_the_attestor_holds_a_principal_to_what_spire_says_now(spire: Spire, broker_api, new_entry):
    entry = new_entry("build/agent", uid=1600)
    attestor = SpireAttestor(AttestorEntitlements(broker_api))
    with process_of(1600) as build:
        await until_answer(broker_api, build, [spire.id("build/agent")])
        process = read_process(build)
        facts = await attested(attestor, spire.id("build/agent"), process)
        assert facts.values == {"ids": [spire.id("build/agent")]}
        assert clock() < facts.expires_at
        with pytest.raises(AttestationFailed):
            await attested(attestor, spire.id("service/orders"), process)

        changes = attestor.watch()
        change = asyncio.ensure_future(anext(changes))
        spire.delete_entry(entry)
        async with asyncio.timeout(15):
            assert await change == facts.key
        await changes.aclose()
        with pytest.raises(AttestationFailed):
            await attested(attestor, spire.id("build/agent"), process)


async def test_the_attestor_says_unavailable_when_spire_is_away(new_spire):
    spire: Spire = new_spire()
    async with broker_api_of(spire) as api:
        attestor = SpireAttestor(AttestorEntitlements(api))
        process = read_process(os.getpid())
        assert await attested(attestor, spire.id("action-broker"), process)
        spire.kill_agent()
        with pytest.raises(AttestationUnavailable):
            await attested(attestor, spire.id("action-broker"), process)
