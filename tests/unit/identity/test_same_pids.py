"""A broker that counts PIDs otherwise than the agent would take one workload for another."""

import os
from datetime import UTC, datetime

import pytest
from support.pki import CA, snapshot

from attestors.contract import AttestationFailed, AttestationUnavailable
from broker.identity.same_pids import SamePids
from broker.identity.spiffe_id import SpiffeId
from broker.identity.spire_broker_api import Entitlement

BROKER = "spiffe://acme.test/action-broker"
VICTIM = "spiffe://acme.test/build/agent"
LATER = datetime(2026, 11, 23, tzinfo=UTC)


class Agent:
    """Answers by PID, as a SPIRE agent in some PID namespace."""

    def __init__(self, **known: str) -> None:
        self.known = {int(name.removeprefix("pid_")): text for name, text in known.items()}
        self.away = False
        self.asked: list[int] = []

    async def fetch(self, pid: int) -> tuple[Entitlement, ...]:
        self.asked.append(pid)
        if self.away:
            raise AttestationUnavailable("away")
        if pid not in self.known:
            raise AttestationFailed("no identity issued")
        return (Entitlement(spiffe_id=SpiffeId.parse(self.known[pid]), expires_at=LATER),)


def asker(agent: Agent) -> SamePids:
    authority = CA("acme.test")
    trust = snapshot(authority.bundle(), own=authority.svid(BROKER).own())
    return SamePids(agent, lambda: trust)


async def test_an_agent_that_knows_us_by_our_pid_is_asked_about_others() -> None:
    agent = Agent(**{f"pid_{os.getpid()}": BROKER, "pid_42": VICTIM})
    found = await asker(agent).fetch(42)
    assert [str(one.spiffe_id) for one in found] == [VICTIM]


@pytest.mark.parametrize("ours", [{}, {f"pid_{os.getpid()}": VICTIM}], ids=["unknown", "somebody-else"])
async def test_an_agent_in_another_pid_namespace_is_not_believed_about_anybody(ours: dict[str, str]) -> None:
    agent = Agent(**ours, pid_42=VICTIM)
    pids = asker(agent)
    for _ in range(2):
        with pytest.raises(AttestationUnavailable, match="PID namespace"):
            await pids.fetch(42)
    assert 42 not in agent.asked


async def test_it_is_shown_once_and_again_after_the_agent_was_away() -> None:
    agent = Agent(**{f"pid_{os.getpid()}": BROKER, "pid_42": VICTIM})
    pids = asker(agent)
    await pids.fetch(42)
    await pids.fetch(42)
    assert agent.asked.count(os.getpid()) == 1
    agent.away = True
    with pytest.raises(AttestationUnavailable):
        await pids.fetch(42)
    agent.away = False
    del agent.known[os.getpid()]  # another agent came back, which counts otherwise
    with pytest.raises(AttestationUnavailable, match="PID namespace"):
        await pids.fetch(42)
