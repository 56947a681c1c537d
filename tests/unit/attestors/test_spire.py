"""The attestor `spire` against a scripted agent; tests/spire/ has the real one."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import pytest
from support.virtual_time import in_virtual_time

import attestors.spire
from attestors.contract import (
    AttestationFailed,
    AttestationRequest,
    AttestationUnavailable,
    FactKey,
    Facts,
    Process,
)
from attestors.spire import SpireAttestor

NOW = datetime(2031, 5, 6, 7, 8, 9, tzinfo=UTC)
BUILD, ORDERS = "spiffe://acme.test/build/agent", "spiffe://acme.test/service/orders"


@dataclass(frozen=True)
class Entitlement:
    spiffe_id: str
    expires_at: datetime = NOW + timedelta(minutes=5)


@dataclass
class Agent:
    """answers: by PID, what it says or raises. asked: PIDs, in order."""

    answers: dict[int, Sequence[Entitlement] | Exception] = field(default_factory=dict)
    asked: list[int] = field(default_factory=list)

    async def fetch(self, pid: int) -> Sequence[Entitlement]:
        self.asked.append(pid)
        answer = self.answers.get(pid, AttestationFailed("no entry"))
        if isinstance(answer, Exception):
            raise answer
        return answer


def process(pid: int = 4711, start_time: int = 99120) -> Process:
    return Process(pid=pid, start_time=start_time, uid=1600, gid=1600, exe_device=1, exe_inode=2)


def request(principal: str = BUILD, **changes: object) -> AttestationRequest:
    return AttestationRequest(**{"principal": principal, "process": process(), **changes})


@pytest.fixture
def agent() -> Agent:
    return Agent({4711: [Entitlement(BUILD)]})


@pytest.fixture
def attestor(agent: Agent) -> SpireAttestor:
    return SpireAttestor(agent)


async def test_the_facts_name_every_id_sorted_and_end_with_the_first_token(agent, attestor):
    soon = NOW + timedelta(seconds=30)
    agent.answers[4711] = [Entitlement(ORDERS), Entitlement(BUILD, soon), Entitlement(BUILD)]
    facts = await attestor.attest(request(), NOW)
    assert facts == Facts(
        attestor="spire",
        key=FactKey("spire:4711:99120"),
        values={"ids": [BUILD, ORDERS]},
        attested_at=NOW,
        expires_at=soon,
    )


async def test_a_caller_without_a_process_here_has_no_spire_facts(agent, attestor):
    assert await attestor.attest(request(process=None), NOW) is None
    assert agent.asked == []
    assert await attestor.attest(request(), NOW) is not None


async def test_a_principal_that_the_process_is_not_entitled_to_is_refused(attestor):
    assert await attestor.attest(request(BUILD), NOW)
    for principal in (ORDERS, BUILD + "x", BUILD[:-1], BUILD.upper(), "", "spiffe://acme.test"):
        with pytest.raises(AttestationFailed):
            await attestor.attest(request(principal), NOW)


@pytest.mark.parametrize(
    ("answer", "raised"),
    [
        ([], AttestationFailed),
        (AttestationFailed("dead"), AttestationFailed),
        (AttestationUnavailable("agent is away"), AttestationUnavailable),
    ],
    ids=["no entitlement", "not attested", "agent away"],
)
async def test_no_word_from_spire_is_never_a_yes(agent, attestor, answer, raised):
    assert await attestor.attest(request(), NOW)
    agent.answers[4711] = answer
    with pytest.raises(raised):
        await attestor.attest(request(), NOW)


async def test_spire_is_asked_at_each_request_and_once_within_one(agent, attestor):
    first = await attestor.attest(request(), NOW)
    await attestor.attest(request(), NOW)
    assert agent.asked == [4711, 4711]
    assert await attestor.attest(request(known={"spire": first}), NOW) == first
    assert agent.asked == [4711, 4711]


async def test_what_identification_learned_still_has_to_name_the_principal(attestor):
    known = {"spire": await attestor.look(process(), NOW)}
    assert await attestor.attest(request(BUILD, known=known), NOW)
    with pytest.raises(AttestationFailed):
        await attestor.attest(request(ORDERS, known=known), NOW)


async def test_the_watch_tells_of_lost_and_changed_ids_and_not_of_the_rest(agent, attestor, monkeypatch):
    monkeypatch.setattr(attestors.spire, "POLL_S", 0.01)
    for pid in (1, 2, 3, 4):
        agent.answers[pid] = [Entitlement(BUILD)]
        await attestor.look(process(pid), NOW)
    agent.answers[1] = AttestationFailed("no entry")
    agent.answers[2] = [Entitlement(BUILD), Entitlement(ORDERS)]
    agent.answers[3] = [Entitlement(BUILD, NOW + timedelta(hours=1))]  # a renewed token changes nothing
    told = attestor.watch()
    async with asyncio.timeout(10):
        assert {await anext(told), await anext(told)} == {"spire:1:99120", "spire:2:99120"}
        agent.asked.clear()
        agent.answers[4] = AttestationFailed("no entry")
        assert await anext(told) == "spire:4:99120"
    await told.aclose()
    assert 1 not in agent.asked, "what was told as lost is not asked about again"
    assert {2, 3} <= set(agent.asked)


async def test_an_agent_that_is_away_tells_nothing_and_is_asked_little(agent, attestor, monkeypatch):
    monkeypatch.setattr(attestors.spire, "POLL_S", 0.01)
    for pid in range(1, 101):
        agent.answers[pid] = [Entitlement(BUILD)]
        await attestor.look(process(pid), NOW)
    agent.answers = dict.fromkeys(agent.answers, AttestationUnavailable("away"))
    agent.asked.clear()
    assert await attestor._changed(0) == []
    assert len(agent.asked) <= attestors.spire.AT_ONCE

    agent.answers = {pid: [Entitlement(BUILD)] for pid in agent.answers}
    agent.answers[50] = AttestationFailed("no entry")
    told = attestor.watch()
    async with asyncio.timeout(10):
        assert await anext(told) == "spire:50:99120"
    await told.aclose()


async def test_a_change_that_a_request_sees_first_is_told_too(agent, attestor):
    facts = await attestor.look(process(), NOW)
    assert await attestor._changed(0) == []
    agent.answers[4711] = [Entitlement(ORDERS)]
    await attestor.look(process(), NOW)
    assert await attestor._changed(0) == [facts.key]


async def test_a_pid_used_again_is_another_fact(agent, attestor):
    first = await attestor.look(process(), NOW)
    second = await attestor.look(process(start_time=99121), NOW)
    assert first.key != second.key


async def test_what_is_watched_is_bounded_and_what_falls_out_is_told(agent, attestor, monkeypatch):
    monkeypatch.setattr(attestors.spire, "WATCHED", 2)
    keys = []
    for pid in (1, 2, 3):
        agent.answers[pid] = [Entitlement(BUILD)]
        keys.append((await attestor.look(process(pid), NOW)).key)
    assert len(attestor._watched) == 2
    assert await attestor._changed(0) == keys[:1]
    forever = asyncio.get_running_loop().time() + attestors.spire.WATCH_S + 1
    assert await attestor._changed(forever) == []
    assert not attestor._watched, "no credential can still rest on it"


async def test_a_process_about_which_spire_does_not_answer_in_time_blinds_nobody_else(agent, attestor):
    """What SPIRE says of a process takes as long as the process makes it take: it reads the whole executable."""
    for pid in range(1, 21):
        agent.answers[pid] = [Entitlement(BUILD)]
        await attestor.look(process(pid), NOW)
    agent.answers[7] = AttestationUnavailable("deadline exceeded")
    assert await attestor._changed(1.0) == ["spire:7:99120"], "whoever decides again looks for itself"
    assert attestor.blind() == {}
    agent.asked.clear()
    assert await attestor._changed(2.0) == []
    assert 7 not in agent.asked, "it holds up one round"
    assert len(agent.asked) == 19


async def test_many_such_processes_at_once_hold_up_a_round_and_blind_nobody_else(agent, attestor):
    hostile, good = range(1, 13), range(101, 121)
    for pid in (*hostile, *good):
        agent.answers[pid] = [Entitlement(BUILD)]
        await attestor.look(process(pid), NOW)
    for pid in hostile:
        agent.answers[pid] = AttestationUnavailable("deadline exceeded")
    told = await attestor._changed(1.0)
    assert told == [], "the first that are asked about are silent, all of them: the agent may be away"
    assert attestor.blind() == {"spire:": 1.0}
    agent.asked.clear()
    agent.answers[good[0]] = AttestationFailed("no entry")
    told = await attestor._changed(3.0)
    assert agent.asked[:4] == [*hostile[8:]], "who was not asked about in the last round is first"
    assert set(agent.asked) >= set(good)
    assert "spire:101:99120" in told
    assert attestor.blind() == {}
    told += await attestor._changed(5.0)
    assert sorted(told) == sorted([f"spire:{pid}:99120" for pid in (*hostile, 101)])
    assert len(attestor._watched) == 19


async def test_an_agent_that_goes_away_in_the_middle_of_a_round_is_blind_since_its_beginning(agent, attestor):
    for pid in range(1, 41):
        agent.answers[pid] = [Entitlement(BUILD)]
        await attestor.look(process(pid), NOW)
    answered = dict(agent.answers)

    class Going(Agent):
        async def fetch(self, pid):
            if len(self.asked) == 12:
                self.answers = dict.fromkeys(self.answers, AttestationUnavailable("away"))
            return await super().fetch(pid)

    attestor._entitlements = Going(answered)
    assert await attestor._changed(1.0) == []
    assert await attestor._changed(2.0) == []
    assert attestor.blind() == {"spire:": 1.0}
    attestor._entitlements = agent
    assert await attestor._changed(3.0) == []
    assert attestor.blind() == {}
    assert len(attestor._watched) == 40, "nothing was let go"


class BusyAgent(Agent):
    """Answers a thousand questions a second, eight of them at one time."""

    async def fetch(self, pid):
        await asyncio.sleep(0.008)
        return await super().fetch(pid)


@pytest.mark.parametrize("processes", [1, 100, 300, 1000, 2500])
@in_virtual_time
async def test_a_change_at_spire_is_told_within_a_bound_that_grows_with_the_processes(processes: int) -> None:
    """One second, or as long as asking about all of them takes, and as long as that takes again: up to 300, 1.3 s."""
    agent = BusyAgent({pid: [Entitlement(BUILD)] for pid in range(1, processes + 1)})
    attestor, loop = SpireAttestor(agent), asyncio.get_running_loop()
    for pid in agent.answers:
        await attestor.look(process(pid), NOW)
    asking = processes / 1000
    bound = max(attestors.spire.POLL_S, asking) + asking
    changed: dict[str, float] = {}
    late: list[float] = []

    async def change() -> None:
        """One after the other, at moments that fall on all parts of a round."""
        for turn in range(40):
            await asyncio.sleep(0.37)
            pid = 1 + turn * 7919 % processes
            agent.answers[pid] = [Entitlement(f"{BUILD}/{turn}")]
            changed.setdefault(f"spire:{pid}:99120", loop.time())

    changing = asyncio.create_task(change())
    async for key in attestor.watch():
        late.append(loop.time() - changed.pop(key))
        if changing.done() and not changed:
            break
    assert len(late) >= min(5, processes)
    assert max(late) <= bound + 0.02
    if processes <= 300:
        assert max(late) <= 1.3 + 0.02
