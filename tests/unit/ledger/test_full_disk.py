"""A store that cannot be written: nothing is promised, health says why, and it goes on by itself when it can."""

import asyncio
import json
import os
import sys
from datetime import timedelta
from pathlib import Path

import pytest
from support.ledger_records import NOW, QUICK, Clock, intent, open_ledger, outcome
from support.processes import until

from broker.errors import Reason, Unavailable
from broker.ledger import records
from broker.ledger.group import Limits
from broker.ledger.reading import last_seq, read
from broker.ledger.store import Ledger
from broker.ledger.verify import verify

TESTS = Path(__file__).parents[2]


def fill(ledger: Ledger) -> None:
    """SQLite itself then says SQLITE_FULL for every page more, as it does when the disk is full."""
    pages = ledger._writer._connection.pragma("page_count")
    ledger._writer._connection.pragma("max_page_count", pages)


def make_room(ledger: Ledger) -> None:
    ledger._writer._connection.pragma("max_page_count", 2**32 - 2)


def swap_store(folder: Path, other: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        (folder / f"ledger.db{suffix}").unlink(missing_ok=True)
    (other / "ledger.db").rename(folder / "ledger.db")


async def exhaust(ledger: Ledger) -> Unavailable:
    fill(ledger)
    for _ in range(1_000):
        try:
            await ledger.record_intent(intent())
        except Unavailable as error:
            return error
    raise AssertionError("the store never filled up")


async def test_with_a_full_disk_nothing_is_recorded_and_so_nothing_minted(tmp_path: Path) -> None:
    """Invariant 1, the ledger's part: who awaits its intent hears that it is not durable."""
    async with await open_ledger(tmp_path) as ledger:
        error = await exhaust(ledger)
        assert error.reason is Reason.LEDGER_UNAVAILABLE
        assert "full" in (ledger.health() or "")
        head = last_seq(tmp_path / "ledger.db")
        answers = await asyncio.gather(*[ledger.record_intent(intent()) for _ in range(300)], return_exceptions=True)
        assert all(isinstance(answer, Unavailable) for answer in answers)
        assert len({id(answer) for answer in answers}) == 300, "each caller raises an error of its own"
        assert last_seq(tmp_path / "ledger.db") == head
        make_room(ledger)
        assert await ledger.record_intent(intent()) == head + 1
        assert ledger.health() is None
    assert verify(tmp_path / "ledger.db").good


async def test_an_outcome_nobody_awaits_survives_a_full_disk(tmp_path: Path) -> None:
    async with await open_ledger(tmp_path) as ledger:
        seq = await ledger.record_intent(intent("a"))
        await exhaust(ledger)
        for number in range(100):
            ledger.append_later(outcome(seq, NOW + timedelta(seconds=number)))
        with pytest.raises(Unavailable):
            await ledger.record_intent(intent())
        make_room(ledger)
    written = [row.record() for row in read(tmp_path / "ledger.db")]
    kept = [record for record in written if isinstance(record, records.Outcome)]
    assert kept == [outcome(seq, NOW + timedelta(seconds=number)) for number in range(100)], "in order, none twice"


async def test_health_recovers_without_a_request(tmp_path: Path) -> None:
    """A broker that says it is not ready gets no requests: it must find out by itself."""
    async with await open_ledger(tmp_path, limits=QUICK) as ledger:
        await exhaust(ledger)
        assert ledger.health()
        make_room(ledger)
        await until(lambda: ledger.health() is None, "healthy again")


async def test_a_file_that_cannot_grow_is_survived_in_the_same_process(tmp_path: Path) -> None:
    """An I/O error, whose commit may or may not have reached the disk, in a real child process."""
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "support.full_disk_ledger",
        str(tmp_path),
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": f"{TESTS}:{TESTS.parent}"},
    )
    async with asyncio.timeout(60):
        output, _ = await child.communicate()
    assert child.returncode == 0
    full, after = (json.loads(line) for line in output.splitlines())
    assert len(full["recorded"]) > 8
    assert full["reasons"] == ["ledger_unavailable"]
    assert "cannot be written" in full["health"]
    assert full["failed_again"] == 5
    assert after["health"] is None
    assert verify(tmp_path / "ledger.db").good
    intents = {row.seq for row in read(tmp_path / "ledger.db") if isinstance(row.record(), records.Intent)}
    assert {*full["recorded"], after["after"]} <= intents, "what was acknowledged is there"


async def test_a_store_swapped_under_a_running_broker_is_not_written(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    async with await open_ledger(other):
        pass
    async with await open_ledger(tmp_path) as ledger:
        assert await ledger.record_intent(intent("a"))
        ledger._writer._attempted = ledger._writer.head  # as after a commit of unknown fate
        ledger._writer._connection.close()
        swap_store(tmp_path, other)
        with pytest.raises(Unavailable, match="changed by somebody else"):
            await ledger.record_intent(intent("b"))
        assert "restart" in (ledger.health() or "")


async def test_an_intent_whose_outcome_was_lost_becomes_unknown_after_expiry(tmp_path: Path) -> None:
    clock = Clock()
    async with await open_ledger(tmp_path, clock, Limits(maintain_s=0.02)) as ledger:
        lost = [await ledger.record_intent(intent(f"{n}")) for n in range(3)]
        await ledger.append(records.Outcome(at=NOW, intent=lost[1], result="issued"))
        clock.now = NOW + timedelta(seconds=121)
        await until(lambda: not ledger._writer.open, "no open intent")
    written = [row.record() for row in read(tmp_path / "ledger.db")]
    outcomes = [(r.intent, r.result) for r in written if isinstance(r, records.Outcome)]
    assert outcomes == [(lost[1], "issued"), (lost[0], "unknown"), (lost[2], "unknown")]
