"""A credential dies the moment its reasons do, on a real SPIRE: its agent, a broker, and a guard that hears the feed.

How late SPIRE itself notices is SPIRE's; what is measured here begins when its agent knows (docs/staleness.md).
"""

import asyncio
import os
import shutil
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from cryptography import x509
from support.broker import RunningBroker
from support.on_spire import NOTICED_S, Workload, broker_in, workloads_of
from support.processes import until
from support.scoped import Receiver, receiving
from support.spire import Spire, broker_api_of, identity_from

from broker.errors import BrokerError
from broker.identity.spire_broker_api import SpireBrokerApi
from broker.identity.trust import TrustSnapshot

pytestmark = [pytest.mark.spire, pytest.mark.root]

SERVICE = "spiffe://acme.test/action-broker"
"""The guard is in this process, which has this ID, as the broker does; so it is the audience here."""
ENTRY_S = EXEC_S = 1.3
BLIND_S, POLL_S = 5.0, 1.0
SLACK_S = 1.0  # for a machine that has other things to do


@pytest.fixture(scope="module")
def broker(spire: Spire) -> Iterator[RunningBroker]:
    with broker_in(spire) as found:
        yield found


@asynccontextmanager
async def guard_of(broker: RunningBroker) -> AsyncIterator[Receiver]:
    async with receiving(broker.socket, SERVICE) as found:
        yield found


async def given(workload: Workload, *, transport: str = "unix") -> str:
    """A token for the guard's service, once SPIRE's agent knows the workload."""
    await workload.until_token("", NOTICED_S, action="orders.longest", audience=SERVICE, transport=transport)
    return await workload.do("show")


async def refused_by(api: SpireBrokerApi, pid: int) -> float:
    """When the agent itself stopped vouching, asked without a pause worth naming."""
    async with asyncio.timeout(NOTICED_S):
        while True:
            try:
                await api.fetch(pid)
            except BrokerError:
                return time.monotonic()
            await asyncio.sleep(0.005)


async def refused_at(guard: Receiver, token: str, reason: str) -> float:
    await guard.hears(token, reason)
    return time.monotonic()


async def test_what_rests_on_a_deleted_entry_is_refused_at_the_guard_within_the_poll(spire, broker, new_entry):
    late = []
    kept = new_entry("service/orders", uid=1700)
    async with (
        workloads_of(broker, spire, 1600, 1700) as (agent, other),
        guard_of(broker) as guard,
        broker_api_of(spire) as api,
    ):
        spared = await given(other)
        for _ in range(3):
            entry = new_entry("build/agent", uid=1600)
            token = await given(agent)
            assert guard.reason(token) == ""
            knows = asyncio.create_task(refused_by(api, agent.child.pid))
            refuses = asyncio.create_task(refused_at(guard, token, "not_attested"))
            await asyncio.to_thread(spire.delete_entry, entry)
            late.append(await refuses - await knows)
        assert guard.reason(spared) == "", kept
    assert max(late) < ENTRY_S + SLACK_S


async def test_the_exit_of_another_users_process_is_noticed_at_once(spire, broker, new_entry):
    new_entry("build/agent", uid=1600)
    async with workloads_of(broker, spire, 1600, 1600) as (agent, other), guard_of(broker) as guard:
        token, spared = await given(agent), await given(other)
        assert guard.reason(token) == guard.reason(spared) == ""
        start = time.monotonic()
        agent.child.end()
        late = await refused_at(guard, token, "not_attested") - start
        assert guard.reason(spared) == "", "same user, same entry, another process"
    assert late < SLACK_S


async def test_another_program_in_another_users_process_is_noticed_within_the_poll(spire, broker, new_entry):
    """SPIRE goes on vouching for it: to its entry one program of that user is as good as another."""
    new_entry("build/agent", uid=1600)
    async with (
        workloads_of(broker, spire, 1600, 1600) as (agent, other),
        guard_of(broker) as guard,
        broker_api_of(spire) as api,
    ):
        token, spared = await given(agent), await given(other)
        assert guard.reason(token) == guard.reason(spared) == ""
        assert await agent.do("replace") == "replaced"
        start = time.monotonic()
        late = await refused_at(guard, token, "not_attested") - start
        assert await api.fetch(agent.child.pid), "the agent sees nothing wrong with it"
        assert guard.reason(spared) == ""
    assert late < EXEC_S + SLACK_S


def signed_by(snapshot: TrustSnapshot) -> str:
    """The authority of our own SVID, as SPIRE names it: its key's identifier."""
    assert snapshot.own is not None
    leaf = x509.load_der_x509_certificate(snapshot.own.chain[0])
    authority = leaf.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value
    assert authority.key_identifier is not None
    return authority.key_identifier.hex()


async def test_an_authority_that_is_revoked_takes_what_it_vouched_for_with_it(new_spire):
    spire = new_spire()
    spire.create_entry("build/agent", uid=1600)
    with broker_in(spire) as broker:
        async with (
            workloads_of(broker, spire, 1600) as (agent,),
            guard_of(broker) as guard,
            identity_from(spire) as ours,
        ):
            vouched, spared = await given(agent, transport="mtls"), await given(agent)
            old = signed_by(ours.snapshot())
            new = spire.prepare_authority()
            spire.authority("activate", new)
            spire.authority("taint", old)
            await until(lambda: signed_by(ours.snapshot()) == new, "SVIDs are renewed by the new one")
            assert guard.reason(vouched) == guard.reason(spared) == "", "a tainted authority is still in the bundle"
            start = time.monotonic()
            await asyncio.to_thread(spire.authority, "revoke", old)
            late = await refused_at(guard, vouched, "unauthenticated") - start
            assert guard.reason(spared) == "", "it rests on the process"
            assert guard.reason(await given(agent, transport="mtls")) == "", "which has an SVID of the new one"
    assert late < NOTICED_S


async def test_a_trust_domain_that_is_trusted_no_more_takes_what_its_callers_were_given_with_it(new_spire):
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
            guard_of(broker) as guard,
        ):
            spared, vouched = await given(ours, transport="mtls"), await given(theirs, transport="mtls")
            assert guard.reason(vouched) == guard.reason(spared) == ""
            start = time.monotonic()
            await asyncio.to_thread(home.defederate, away)
            late = await refused_at(guard, vouched, "unauthenticated") - start
            assert guard.reason(spared) == ""
    assert late < NOTICED_S


@pytest.mark.parametrize("how", ["killed", "hangs"])
async def test_an_agent_that_is_away_ends_what_rests_on_it_after_the_bound_and_nothing_else(new_spire, how: str):
    spire = new_spire()
    spire.create_entry("build/agent", uid=1600)
    with broker_in(spire) as broker:
        async with workloads_of(broker, spire, 1600) as (agent,), guard_of(broker) as guard:
            spared, token = await given(agent, transport="mtls"), await given(agent)
            assert guard.reason(token) == guard.reason(spared) == ""
            start = time.monotonic()
            if how == "killed":
                spire.kill_agent()
            else:
                os.kill(spire.agent_pid, signal.SIGSTOP)
            try:
                late = await refused_at(guard, token, "attestation_unavailable") - start
                assert guard.reason(spared) == "", "an SVID that it has is good until it ends"
                assert await agent.token(audience=SERVICE) == "attestation_unavailable"
            finally:
                if how == "killed":
                    spire.start_agent()
                else:
                    os.kill(spire.agent_pid, signal.SIGCONT)
            assert guard.reason(await given(agent)) == "", "it recovers for new requests"
            assert guard.reason(token) == "attestation_unavailable", "what was refused stays so"
            assert guard.reason(spared) == ""
    assert BLIND_S < late < POLL_S + BLIND_S + SLACK_S


def huge_program(folder: Path) -> Path:
    """A shell with gigabytes of nothing behind it: SPIRE's agent hashes all of it at each look, for its selectors."""
    found = folder / "huge"
    shutil.copy("/bin/sh", found)
    os.truncate(found, 16 * 1024**3)
    found.chmod(0o755)
    return found


async def test_a_process_that_keeps_the_agent_busy_loses_its_own_credential_and_nobody_elses(spire, broker, new_entry):
    new_entry("build/agent", uid=1600)
    new_entry("service/orders", uid=1700)
    folder = broker.folder / "programs"
    folder.mkdir(exist_ok=True)
    async with workloads_of(broker, spire, 1600, 1700) as (hostile, other), guard_of(broker) as guard:
        token, spared = await given(hostile), await given(other)
        assert guard.reason(token) == guard.reason(spared) == ""
        assert await hostile.do("replace", program=str(huge_program(folder))) == "replaced"
        await guard.hears(token, "not_attested")
        end = time.monotonic() + BLIND_S + 2 * POLL_S + SLACK_S
        while time.monotonic() < end:  # for as long as it takes to be refused for want of SPIRE's word
            assert guard.reason(spared) == ""
            assert await other.token(audience=SERVICE) == ""
