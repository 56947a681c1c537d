"""A process that is followed: its exit, another program or user in it, and how many can be followed for how long."""

import asyncio
import dataclasses
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest
from support.processes import on_both_loops, running, script, until
from support.virtual_time import in_virtual_time

from attestors import process as under_test
from attestors.contract import AttestationRequest, FactKey, Process
from attestors.process import ProcessAttestor
from broker.identity.peer import read_process

WAITS = "tell('ready'); hear(); tell('again'); hear()"
EXECS = "tell('ready'); hear(); os.execv('/bin/sleep', ['sleep', '60'])"


def request(process: Process | None) -> AttestationRequest:
    return AttestationRequest(principal="spiffe://acme.test/build", process=process)


def now() -> datetime:
    return datetime.now(UTC)


def runs(pid: int, program: str) -> bool:
    return Path(f"/proc/{pid}/exe").readlink().name == program


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@asynccontextmanager
async def watching(attestor: ProcessAttestor) -> AsyncIterator[list[FactKey]]:
    """The keys told so far."""
    told: list[FactKey] = []
    changes = attestor.watch()

    async def listen() -> None:
        async for key in changes:
            told.append(key)  # noqa: PERF401 - told one by one

    listening = asyncio.create_task(listen())
    await until(lambda: attestor._watch._told, "it listens")
    try:
        yield told
    finally:
        listening.cancel()
        await asyncio.wait([listening])


@on_both_loops
async def test_a_watch_tells_of_an_exit_at_once_and_of_another_program_within_the_poll() -> None:
    attestor = ProcessAttestor(read_process)
    before = descriptors()
    async with watching(attestor) as told:
        with script(WAITS) as stays, script(EXECS) as execs:
            with script(WAITS) as exits:
                facts = {}
                for child in (stays, execs, exits):
                    assert await child.line() == "ready"
                    found = await attestor.attest(request(read_process(child.pid)), now())
                    assert found is not None
                    facts[child] = found.key
                exits.end()
                start = asyncio.get_running_loop().time()
                await until(lambda: told == [facts[exits]], "an exit is told")
                assert asyncio.get_running_loop().time() - start < 0.5  # not by the poll
            execs.tell()
            await until(lambda: told == [facts[exits], facts[execs]], "another program is told")
            stays.tell()
            assert await stays.line() == "again"
        await until(lambda: told[2:] == [facts[stays]], "the last one is told when it exits")
    await until(lambda: descriptors() <= before + 4, "pidfds are given back")  # pipes of the loop's own threads


async def test_a_process_attested_as_another_program_is_told_before_the_poll_sees_it() -> None:
    attestor = ProcessAttestor(read_process)
    async with watching(attestor) as told:
        with script(EXECS) as child:
            assert await child.line() == "ready"
            first = await attestor.attest(request(read_process(child.pid)), now())
            child.tell()
            await until(lambda: runs(child.pid, "sleep"), "exec")
            assert await attestor.attest(request(read_process(child.pid)), now())
            await until(lambda: told == [first.key], "the change is told")


async def test_what_else_was_told_of_a_process_is_compared_too_where_somebody_asked_for_it(tmp_path: Path) -> None:
    """Its executable has another path, and the process is the same: what policies see of it is not."""
    tool = tmp_path / "tool"
    shutil.copy("/bin/sleep", tool)
    attestor = ProcessAttestor(read_process)
    async with watching(attestor) as told:
        with running(str(tool), "60") as asked, running(str(tool), "60") as unasked:
            await until(lambda: runs(asked.pid, "tool") and runs(unasked.pid, "tool"), "exec")
            attestor.follow(read_process(unasked.pid))
            facts = await attestor.attest(request(read_process(asked.pid)), now())
            assert facts is not None
            assert facts.values["exe"] == str(tool)
            tool.rename(tmp_path / "other")
            await until(lambda: told == [facts.key], "it is told")
            assert (await attestor.attest(request(read_process(asked.pid)), now())).key == facts.key


async def test_a_watch_is_bounded_and_tells_of_what_it_lets_go() -> None:
    attestor = ProcessAttestor(read_process, max_watched=1)
    async with watching(attestor) as told:
        with script(WAITS) as one, script(WAITS) as other:
            keys = []
            for child in (one, other):
                assert await child.line() == "ready"
                facts = await attestor.attest(request(read_process(child.pid)), now())
                keys.append(facts.key)
            await until(lambda: told == keys[:1], "the older one may have changed")
            assert list(attestor._watch._followed) == keys[1:]
    assert not attestor._watch._followed


async def test_nothing_is_followed_while_nobody_listens() -> None:
    attestor = ProcessAttestor(read_process)
    await attestor.attest(request(read_process(os.getpid())), now())
    assert not attestor._watch._followed
    async with watching(attestor):
        await attestor.attest(request(read_process(os.getpid())), now())
        assert len(attestor._watch._followed) == 1
        with pytest.raises(RuntimeError, match="one consumer"):
            await anext(attestor.watch())


async def test_more_processes_than_can_be_followed_take_turns_at_the_poll(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is told of one follows it again, and so lets another one go: without end, but not without a pause."""
    monkeypatch.setattr(under_test, "_POLL_S", 0.05)
    attestor, loop = ProcessAttestor(read_process, max_watched=2), asyncio.get_running_loop()
    with script(WAITS) as one, script(WAITS) as two, script(WAITS) as three:
        processes = {}
        for child in (one, two, three):
            assert await child.line() == "ready"
            found = read_process(child.pid)
            processes[f"process:{found.pid}:{found.start_time}"] = found
        changes, told = attestor.watch(), []
        first = asyncio.create_task(anext(changes))
        await until(lambda: attestor._watch.is_listened_to, "it listens")
        start = loop.time()
        for found in processes.values():
            attestor.follow(found)
        told.append(await first)
        while len(told) < 6:
            attestor.follow(processes[told[-1]])
            told.append(await anext(changes))
        assert loop.time() - start >= 0.05 * 6
        assert told == [*processes] * 2
        await changes.aclose()


class Proc:
    """What /proc says, as a test has it."""

    def __init__(self, process: Process) -> None:
        self.now = process

    def __call__(self, pid: int) -> Process:
        assert pid == self.now.pid
        return self.now


@in_virtual_time
async def test_another_user_of_a_process_is_told_within_the_poll() -> None:
    """As another program is: a pidfd shows neither."""
    us, loop = read_process(os.getpid()), asyncio.get_running_loop()
    proc, told = Proc(us), []
    attestor = ProcessAttestor(proc)

    async def follow() -> None:
        async for key in attestor.watch():
            told.append((loop.time(), key))  # noqa: PERF401 -- it never ends; each is wanted as it comes

    task = asyncio.create_task(follow())
    await asyncio.sleep(0)
    for turn, field in enumerate(("uid", "gid", "exe_inode", "exe_device", "start_time")):
        proc.now = us
        attestor.follow(us)
        await asyncio.sleep(1.3)
        assert told == [], "nothing changed"
        proc.now, when = dataclasses.replace(us, **{field: turn + 1_000_000}), loop.time()
        await asyncio.sleep(1)
        ((at, key),) = told
        assert key == f"process:{us.pid}:{us.start_time}"
        assert at - when <= 1.0, field
        told.clear()
    task.cancel()


@in_virtual_time
async def test_a_process_is_followed_for_as_long_as_a_credential_can_live() -> None:
    us = read_process(os.getpid())
    attestor = ProcessAttestor(Proc(us))
    changes = asyncio.create_task(anext(attestor.watch()))
    await asyncio.sleep(0.5)
    attestor.follow(us)
    await asyncio.sleep(200)
    attestor.follow(us)  # another request
    await asyncio.sleep(309)
    assert len(attestor._watch._followed) == 1
    await asyncio.sleep(3)
    assert not attestor._watch._followed, "300 s, and 5 s each for leeway and for clocks that differ"
    assert not changes.done(), "nobody is told: nothing can rest on it"
    changes.cancel()
    await asyncio.wait([changes])
