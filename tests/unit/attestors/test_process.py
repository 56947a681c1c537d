"""Facts about a process are read from the kernel at each request, and only of the process that was identified."""

import asyncio
import contextlib
import dataclasses
import hashlib
import os
import shutil
import sys
import threading
from datetime import UTC, datetime
from io import BufferedReader
from pathlib import Path

import pytest
from support.processes import on_both_loops, running, script, until

from attestors import process as under_test
from attestors.contract import AttestationFailed, AttestationRequest, AttestationUnavailable, Process
from attestors.process import ProcessAttestor
from broker.identity.peer import read_process

WAITS = "tell('ready'); hear(); tell('again'); hear()"
EXECS = "tell('ready'); hear(); os.execv('/bin/sleep', ['sleep', '60'])"


PYTHON = Path(sys.executable).resolve()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def rewrite(tool: Path, extra: bytes) -> None:
    tool.write_bytes(Path("/bin/sleep").read_bytes() + extra)


def own_cgroup() -> str:
    return "/" + Path("/proc/self/cgroup").read_text().rpartition("0::/")[2].strip()


def request(process: Process | None) -> AttestationRequest:
    return AttestationRequest(principal="spiffe://acme.test/build", process=process)


def now() -> datetime:
    return datetime.now(UTC)


def runs(pid: int, program: str) -> bool:
    return Path(f"/proc/{pid}/exe").readlink().name == program


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def test_facts_of_a_process_are_what_the_kernel_says() -> None:
    with script(WAITS) as child:
        assert await child.line() == "ready"
        process = read_process(child.pid)
        at = now()
        facts = await ProcessAttestor(read_process).attest(request(process), at)
    assert facts is not None
    assert facts.attestor == "process"
    assert facts.key == f"process:{child.pid}:{process.start_time}"
    assert facts.attested_at == at
    assert facts.expires_at is None
    assert facts.values == {
        "uid": os.geteuid(),
        "gid": os.getegid(),
        "exe": str(PYTHON),
        "exe_sha256": sha256(PYTHON),
        "cgroup": own_cgroup(),
    }


async def test_a_caller_that_is_no_process_here_has_no_facts() -> None:
    assert await ProcessAttestor(read_process).attest(request(None), now()) is None


@pytest.mark.parametrize("field", ["start_time", "uid", "gid", "exe_device", "exe_inode"])
async def test_a_process_that_differs_from_the_identified_one_is_refused(field: str) -> None:
    attestor = ProcessAttestor(read_process)
    process = read_process(os.getpid())
    assert await attestor.attest(request(process), now())
    other = dataclasses.replace(process, **{field: getattr(process, field) + 1})
    with pytest.raises(AttestationFailed, match=field):
        await attestor.attest(request(other), now())


async def test_a_process_that_ran_another_program_since_it_was_identified_is_refused() -> None:
    attestor = ProcessAttestor(read_process)
    with script(EXECS) as child:
        assert await child.line() == "ready"
        process = read_process(child.pid)
        assert await attestor.attest(request(process), now())
        child.tell()
        await until(lambda: runs(child.pid, "sleep"), "exec")
        with pytest.raises(AttestationFailed, match="exe_inode"):
            await attestor.attest(request(process), now())


async def test_a_process_that_exited_is_refused() -> None:
    attestor = ProcessAttestor(read_process)
    with script(WAITS) as child:
        assert await child.line() == "ready"
        process = read_process(child.pid)
        assert await attestor.attest(request(process), now())
    with pytest.raises(AttestationFailed, match="gone"):
        await attestor.attest(request(process), now())


async def test_a_process_that_runs_another_program_while_it_is_looked_at_is_refused() -> None:
    looks = []

    def read(pid: int) -> Process:
        looks.append(pid)
        found = read_process(pid)
        return found if len(looks) == 1 else dataclasses.replace(found, exe_inode=found.exe_inode + 1)

    with pytest.raises(AttestationFailed, match="exe_inode"):
        await ProcessAttestor(read).attest(request(read_process(os.getpid())), now())
    assert len(looks) == 2


async def test_a_process_that_we_may_not_look_at_is_unavailable() -> None:
    def read(pid: int) -> Process:
        raise PermissionError(pid)

    with pytest.raises(AttestationUnavailable, match="CAP_SYS_PTRACE"):
        await ProcessAttestor(read).attest(request(read_process(os.getpid())), now())


async def test_the_hash_is_of_the_file_that_runs_and_not_of_what_its_path_leads_to_now(tmp_path: Path) -> None:
    tool = tmp_path / "tool"
    shutil.copy("/bin/sleep", tool)
    expected = sha256(tool)
    with running(str(tool), "60") as child:
        await until(lambda: runs(child.pid, "tool"), "exec")
        process = read_process(child.pid)
        tool.unlink()
        shutil.copy("/bin/true", tool)
        facts = await ProcessAttestor(read_process).attest(request(process), now())
    assert facts is not None
    assert facts.values["exe_sha256"] == expected
    assert facts.values["exe"] == f"{tool} (deleted)"


async def test_an_executable_rewritten_in_place_is_hashed_again(tmp_path: Path) -> None:
    tool = tmp_path / "tool"
    shutil.copy("/bin/sleep", tool)
    attestor = ProcessAttestor(read_process)
    hashes = []
    for extra in (b"", b"one", b"two"):  # the last two have the same size
        rewrite(tool, extra)
        with running(str(tool), "60") as child:
            await until(lambda pid=child.pid: runs(pid, "tool"), "exec")
            facts = await attestor.attest(request(read_process(child.pid)), now())
        assert facts is not None
        assert facts.values["exe_sha256"] == sha256(tool)
        hashes.append(facts.values["exe_sha256"])
    assert len(set(hashes)) == 3
    assert not attestor._hashes  # all of them changed just now: another change could share their time stamps


async def test_an_executable_that_has_settled_is_hashed_once_and_few_are_remembered(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hashed = []
    real = under_test._hash
    monkeypatch.setattr(under_test, "_hash", lambda exe, state: hashed.append(state) or real(exe, state))
    monkeypatch.setattr(under_test, "_HASHES", 1)
    attestor = ProcessAttestor(read_process)
    process = read_process(os.getpid())
    together = await asyncio.gather(*[attestor.attest(request(process), now()) for _ in range(8)])
    assert await attestor.attest(request(process), now()) is not None
    assert len({facts.values["exe_sha256"] for facts in together}) == len(hashed) == 1
    with running("/bin/sleep", "60") as child:
        await until(lambda: runs(child.pid, "sleep"), "exec")
        await attestor.attest(request(read_process(child.pid)), now())
    assert len(attestor._hashes) == 1


async def test_an_executable_over_the_bound_is_refused_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    process = read_process(os.getpid())
    monkeypatch.setattr(under_test, "MAX_EXE", 100)
    with pytest.raises(AttestationFailed, match="larger than the 100"):
        await ProcessAttestor(read_process).attest(request(process), now())


async def test_a_request_that_gave_up_leaves_the_work_to_the_next() -> None:
    attestor = ProcessAttestor(read_process)
    process = read_process(os.getpid())
    first = asyncio.create_task(attestor.attest(request(process), now()))
    await asyncio.sleep(0)
    assert attestor._hashing
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert await attestor.attest(request(process), now())
    await until(lambda: not attestor._hashing, "nothing is left")


@on_both_loops
async def test_executables_are_hashed_two_at_once_and_what_nobody_waits_for_any_more_is_not_begun(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Else a caller with many large programs has all processors, and the threads that policies are reloaded in."""
    begun, go_on = [], threading.Event()
    real = under_test._hash

    def slow(exe: BufferedReader, state: object) -> str:
        begun.append(threading.current_thread())
        assert go_on.wait(20)
        return real(exe, state)

    monkeypatch.setattr(under_test, "_hash", slow)
    attestor = ProcessAttestor(read_process)
    before = descriptors()
    with contextlib.ExitStack() as stack:
        asking = []
        for n in range(5):
            shutil.copy("/bin/sleep", tmp_path / f"tool{n}")
            child = stack.enter_context(running(str(tmp_path / f"tool{n}"), "60"))
            await until(lambda pid=child.pid, n=n: runs(pid, f"tool{n}"), "exec")
            asking.append(asyncio.create_task(attestor.attest(request(read_process(child.pid)), now())))
            await until(lambda n=n: len(attestor._hashing) == n + 1, "it asked")
        await until(lambda: len(begun) == 2, "two are hashed")
        for task in (asking[0], asking[4]):  # one that was begun, one that was not
            task.cancel()
        await asyncio.wait([asking[0], asking[4]])
        assert len(attestor._hashing) == 4
        again = asyncio.create_task(attestor.attest(request(read_process(child.pid)), now()))
        await until(lambda: len(attestor._hashing) == 5, "it asked again")
        assert len(begun) == 2
        again.cancel()
        await asyncio.wait([again])
        go_on.set()
        facts = await asyncio.gather(*asking[1:4])
        assert {found.values["exe_sha256"] for found in facts} == {sha256(Path("/bin/sleep"))}
        await until(lambda: not attestor._hashing, "all is done")
    assert len(begun) == 4
    assert all(thread.name.startswith("hash-executable") for thread in begun)
    await attestor.close()
    await until(lambda: descriptors() <= before + 4, "files are closed")  # pipes of the loop's own threads
    assert not any(thread.is_alive() for thread in begun)


def test_an_executable_of_ordinary_size_is_within_the_bound_and_a_huge_one_is_not() -> None:
    assert PYTHON.stat().st_size < under_test.MAX_EXE == 256 * 1024**2
