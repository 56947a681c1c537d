"""The store in use: what is awaited is on the disk, what is refused changed nothing, what is bounded stays so."""

import asyncio
import stat
import threading
from datetime import timedelta
from pathlib import Path

import apsw
import msgspec
import pytest
from support.ledger_records import NOW, QUICK, Clock, checkpointer, intent, open_ledger, outcome
from support.processes import until

from broker.errors import Reason, Refused, Unavailable
from broker.ledger import records, schema
from broker.ledger.group import Limits
from broker.ledger.operations import Append
from broker.ledger.reading import last_seq, read, tail
from broker.ledger.store import Ledger
from broker.ledger.verify import Report, verify


def store_files(folder: Path) -> list[Path]:
    return list(folder.glob("ledger.db*"))


def kinds(folder: Path) -> list[str]:
    return [type(row.record()).__name__ for row in read(folder / "ledger.db")]


def found(folder: Path, kind: type[records.Record]) -> list[records.Record]:
    return [row.record() for row in read(folder / "ledger.db") if isinstance(row.record(), kind)]


async def reached(folder: Path, kind: type[records.Record], count: int) -> None:
    """Waits until the file holds `count` records of this kind."""
    await until(lambda: len(found(folder, kind)) >= count, f"{count} of {kind.__name__}")


async def test_an_intent_is_in_the_file_when_recording_it_returns(tmp_path: Path) -> None:
    """Invariant 1, the ledger's part: a second connection, which sees only what is committed, sees it."""
    async with await open_ledger(tmp_path) as ledger:
        made = intent("a")
        assert not found(tmp_path, records.Intent)
        seq = await ledger.record_intent(made)
        assert [(row.seq, row.record()) for row in read(tmp_path / "ledger.db", after=seq - 1)] == [(seq, made)]


async def test_every_commit_is_synced_to_the_disk(tmp_path: Path) -> None:
    """Invariant 1, the ledger's part: a commit that returned survives a power cut, as far as SQLite can see to it."""
    async with await open_ledger(tmp_path) as ledger:
        connection = ledger._writer._connection
        assert connection.pragma("synchronous") == 2  # FULL
        assert connection.pragma("journal_mode") == "wal"


async def test_concurrent_callers_share_commits_and_each_gets_its_own_number(tmp_path: Path) -> None:
    async with await open_ledger(tmp_path) as ledger:
        numbers = await asyncio.gather(*[ledger.record_intent(intent(f"{n}")) for n in range(500)])
        assert sorted(numbers) == list(range(min(numbers), min(numbers) + 500))
        for number, seq in enumerate(numbers):
            row = next(read(tmp_path / "ledger.db", after=seq - 1, limit=1))
            assert row.record() == intent(f"{number}")
    assert verify(tmp_path / "ledger.db").good


async def test_what_nobody_awaits_is_written_within_its_bound(tmp_path: Path) -> None:
    async with await open_ledger(tmp_path) as ledger:
        ledger.append_later(records.PolicyChanged(at=NOW, revision="r"))
        await reached(tmp_path, records.PolicyChanged, 1)


async def test_what_nobody_awaits_is_written_at_close(tmp_path: Path) -> None:
    async with await open_ledger(tmp_path, limits=Limits(later_s=3600)) as ledger:
        seq = await ledger.record_intent(intent())
        ledger.append_later(outcome(seq))
    assert found(tmp_path, records.Outcome) == [outcome(seq)]
    assert kinds(tmp_path)[-1] == "Stopped"


async def test_a_cancelled_caller_leaves_a_whole_record_or_none(tmp_path: Path) -> None:
    async with await open_ledger(tmp_path) as ledger:
        before = last_seq(tmp_path / "ledger.db")
        calls = [asyncio.ensure_future(ledger.record_intent(intent())) for _ in range(20)]
        await asyncio.sleep(0)
        for call in calls[::2]:
            call.cancel()
        done = await asyncio.gather(*calls, return_exceptions=True)
        assert sum(isinstance(answer, int) for answer in done) == 10
        intents = [row for row in read(tmp_path / "ledger.db", after=before) if row.record()]
        assert len(intents) >= 10
    assert verify(tmp_path / "ledger.db").good


async def test_a_second_intent_with_the_same_jti_is_refused_and_harms_no_other(tmp_path: Path) -> None:
    async with await open_ledger(tmp_path) as ledger:
        await ledger.record_intent(intent("taken"))
        calls = [ledger.record_intent(intent(jti)) for jti in ("b", "taken", "c")]
        first, second, third = await asyncio.gather(*calls, return_exceptions=True)
        assert isinstance(second, Refused)
        assert second.reason is Reason.ALREADY_USED
        assert isinstance(first, int)
        assert isinstance(third, int)
        assert len(found(tmp_path, records.Intent)) == 3
    assert verify(tmp_path / "ledger.db").good


async def test_too_much_waiting_is_refused_at_once(tmp_path: Path) -> None:
    async with await open_ledger(tmp_path, limits=Limits(queue=10)) as ledger:
        calls = [asyncio.ensure_future(ledger.append(records.PolicyChanged(at=NOW, revision="r"))) for _ in range(12)]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        refused = [answer for answer in answers if isinstance(answer, Unavailable)]
        assert len(refused) == 2
        assert {error.reason for error in refused} == {Reason.LEDGER_UNAVAILABLE}
        assert await ledger.append(records.PolicyChanged(at=NOW, revision="r"))


async def test_a_refusal_that_finds_no_place_is_counted_instead(tmp_path: Path) -> None:
    refusal = records.Refusal(at=NOW, reason=Reason.DENIED, principal="p", edge="grpc", stage="decide")
    async with await open_ledger(tmp_path, limits=Limits(queue=3)) as ledger:
        for _ in range(10):
            ledger.append_later(refusal)
        ledger.append_later(outcome(1))  # no place either: it is logged, and becomes "unknown" after expiry
    assert len(found(tmp_path, records.Refusal)) == 3
    assert not found(tmp_path, records.CountedRefusals), "the queue was still full when the counts came"


async def test_strangers_cannot_fill_the_disk(tmp_path: Path) -> None:
    """A hundred thousand refusals of nobody in particular make a few records."""
    async with await open_ledger(tmp_path, limits=QUICK) as ledger:
        for number in range(100_000):
            ledger.count_refusal(Reason.MALFORMED if number % 2 else Reason.UNAUTHENTICATED)
        await reached(tmp_path, records.CountedRefusals, 1)
        ledger.count_refusal(Reason.MALFORMED, 5)
    counted = found(tmp_path, records.CountedRefusals)
    assert 2 <= len(counted) <= 4
    total: dict[Reason, int] = {}
    for record in counted:
        assert isinstance(record, records.CountedRefusals)
        for reason, n in record.counts.items():
            total[reason] = total.get(reason, 0) + n
    assert total == {Reason.MALFORMED: 50_005, Reason.UNAUTHENTICATED: 50_000}


async def test_an_idle_ledger_does_not_grow(tmp_path: Path) -> None:
    """Its own notes that a checkpoint was written are not news that need another checkpoint."""
    async with await open_ledger(tmp_path, limits=QUICK) as ledger:
        await reached(tmp_path, records.Checkpointed, 1)
        size = last_seq(tmp_path / "ledger.db")
        ticks = 0
        original = ledger._write_counts

        def counting(now: object) -> None:
            nonlocal ticks
            ticks += 1
            original(NOW)

        ledger._write_counts = counting  # type: ignore[method-assign] - to know that time has passed
        await until(lambda: ticks >= 5, "five ticks")
        assert last_seq(tmp_path / "ledger.db") == size
        await ledger.append(records.PolicyChanged(at=NOW, revision="r"))
        await reached(tmp_path, records.Checkpointed, 2)


async def test_two_brokers_cannot_open_one_store(tmp_path: Path) -> None:
    async with await open_ledger(tmp_path):
        with pytest.raises(Unavailable, match="open in another broker"):
            await open_ledger(tmp_path)
    async with await open_ledger(tmp_path):
        pass


async def test_a_closed_ledger_takes_nothing_and_leaves_no_thread(tmp_path: Path) -> None:
    ledger = await open_ledger(tmp_path)
    await ledger.close()
    await ledger.close()
    with pytest.raises(Unavailable, match="closed"):
        await ledger.append(records.Stopped(at=NOW))
    assert "ledger" not in {thread.name for thread in threading.enumerate()}


async def test_the_store_is_its_owners_alone(tmp_path: Path) -> None:
    async with await open_ledger(tmp_path) as ledger:
        await ledger.record_intent(intent())
        assert {stat.S_IMODE(file.stat().st_mode) for file in store_files(tmp_path)} == {0o600}


async def test_an_intent_of_another_epoch_is_a_mistake(tmp_path: Path) -> None:
    async with await open_ledger(tmp_path) as ledger:
        with pytest.raises(ValueError, match="own epoch"):
            await ledger.record_intent(intent(epoch=2))
        assert await ledger.record_intent(intent(epoch=1))


async def test_a_credential_is_found_by_its_id_only(tmp_path: Path) -> None:
    async with await open_ledger(tmp_path) as ledger:
        made = intent("a")
        seq = await ledger.record_intent(made)
        row = await ledger.credential("a")
        assert row is not None
        assert (row.seq, row.epoch, row.expires_at, row.redeemed_at) == (seq, 1, made.expires_at, None)
        assert row.intent == made
        assert await ledger.credential("b") is None


async def test_index_rows_go_a_minute_after_expiry_and_the_record_stays(tmp_path: Path) -> None:
    clock = Clock()
    async with await open_ledger(tmp_path, clock, QUICK) as ledger:
        await asyncio.gather(*[ledger.record_intent(intent(f"{n}", ttl_s=60)) for n in range(600)])
        await ledger.record_intent(intent("long", ttl_s=300))
        await ledger.redeem("1", "id-1", "spiffe://acme.test/orders", bytes(32), now=NOW, correlation_id="")
        await ledger.bind_key(bytes(32), "jkt", NOW + timedelta(seconds=60), now=NOW, correlation_id="")
        clock.now = NOW + timedelta(seconds=119)
        await _ticked(ledger)
        assert await ledger.credential("0")
        clock.now = NOW + timedelta(seconds=122)
        connection = schema.open_readonly(tmp_path / "ledger.db")
        await until(lambda: connection.execute("SELECT count(*) FROM credentials").get == 1, "only `long` is left")
        assert await ledger.credential("long")
        assert len(found(tmp_path, records.Intent)) == 601
    counts = [connection.execute(f"SELECT count(*) FROM {t}").get for t in ("credentials", "redemptions", "bindings")]  # noqa: S608 - ours
    connection.close()
    assert counts == [1, 0, 0]


async def _ticked(ledger: Ledger) -> None:
    """Waits until maintenance has run with the clock as it is now."""
    seen = ledger._timer
    await until(lambda: ledger._timer is not seen, "a tick")
    await ledger.published_keys(NOW)  # whatever the tick asked for was asked before


async def test_published_keys_are_served_until_their_time_and_replaced_by_kid(tmp_path: Path) -> None:
    async with await open_ledger(tmp_path) as ledger:
        until = NOW + timedelta(hours=1)
        await ledger.publish_key("k1", b"old", until, NOW)
        await ledger.publish_key("k2", b"other", until, NOW)
        await ledger.publish_key("k1", b"new", until, NOW)
        assert list(await ledger.published_keys(NOW)) == [b"new", b"other"]
        assert list(await ledger.published_keys(until)) == []
        assert len(found(tmp_path, records.KeyPublished)) == 3
    async with await open_ledger(tmp_path) as ledger:
        assert list(await ledger.published_keys(NOW)) == [b"new", b"other"]


async def test_a_fault_in_one_group_fails_who_awaits_it_and_nobody_later(tmp_path: Path) -> None:
    async with await open_ledger(tmp_path) as ledger:
        with pytest.raises(Unavailable, match="TypeError"):
            await ledger._groups.submit(Append(body="not bytes"))  # type: ignore[arg-type] - the defect
        assert await ledger.record_intent(intent())
        ledger._groups.submit_later(Append(body="not bytes"))  # type: ignore[arg-type] - the defect
        with pytest.raises(Unavailable, match="TypeError"):
            await ledger.record_intent(intent())
        assert await ledger.record_intent(intent())
    assert verify(tmp_path / "ledger.db").good


async def test_a_file_that_is_no_ledger_is_not_opened(tmp_path: Path) -> None:
    other = apsw.Connection(str(tmp_path / "ledger.db"))
    other.execute("CREATE TABLE customers (name TEXT)")
    other.close()
    with pytest.raises(Unavailable, match="not a ledger"):
        await open_ledger(tmp_path)
    with pytest.raises(Unavailable, match="not a ledger"):
        list(read(tmp_path / "ledger.db"))
    with pytest.raises(FileNotFoundError):
        list(read(tmp_path / "nothing.db"))
    (tmp_path / "ledger.db").write_bytes(b"x" * 8192)
    with pytest.raises(Unavailable, match="cannot open"):
        await open_ledger(tmp_path)


async def test_a_store_of_a_newer_release_is_not_opened(tmp_path: Path) -> None:
    async with await open_ledger(tmp_path):
        pass
    newer = apsw.Connection(str(tmp_path / "ledger.db"))
    newer.execute("INSERT INTO migrations VALUES (?)", (len(schema.MIGRATIONS) + 1,))
    newer.close()
    with pytest.raises(Unavailable, match="newer release"):
        await open_ledger(tmp_path)
    with pytest.raises(Unavailable, match="newer release"):
        verify(tmp_path / "ledger.db")


@pytest.mark.parametrize("damage", ["head", "last-record", "open-record"])
async def test_a_damaged_store_is_not_opened(tmp_path: Path, damage: str) -> None:
    async with await open_ledger(tmp_path) as ledger:
        seq = await ledger.record_intent(intent())
    connection = apsw.Connection(str(tmp_path / "ledger.db"))
    if damage == "head":
        connection.execute("UPDATE ledger SET seq = seq - 1")
    elif damage == "last-record":
        connection.execute("DELETE FROM records WHERE seq = (SELECT seq FROM ledger)")
    else:
        connection.execute("UPDATE records SET body = x'00' WHERE seq = ?", (seq,))
    connection.close()
    with pytest.raises(Unavailable, match="damaged"):
        await open_ledger(tmp_path)


async def test_readers_page_and_follow_while_the_broker_writes(tmp_path: Path) -> None:
    async with await open_ledger(tmp_path) as ledger:
        await asyncio.gather(*[ledger.append(records.PolicyChanged(at=NOW, revision=f"{n}")) for n in range(1200)])
        rows = list(read(tmp_path / "ledger.db", after=2))
        assert [row.seq for row in rows] == list(range(3, 1203))
        assert [row.seq for row in read(tmp_path / "ledger.db", after=600, limit=550)] == list(range(601, 1151))
        assert list(read(tmp_path / "ledger.db", after=5, limit=0)) == []
        pauses = iter([True, False])
        following = tail(tmp_path / "ledger.db", lambda: next(pauses), after=1201)
        assert next(following).seq == 1202
        await ledger.append(records.PolicyChanged(at=NOW, revision="next"))
        assert msgspec.json.decode(next(following).body)["revision"] == "next"
        assert list(following) == []


async def test_a_ledger_verifies_while_the_broker_writes_it(tmp_path: Path) -> None:
    async with await open_ledger(tmp_path, limits=QUICK) as ledger:
        key = str(checkpointer(tmp_path).verifier_key)

        def verify_while_it_grows() -> list[Report]:
            reports: dict[int, Report] = {}
            while len(reports) < 5 and all(report.good for report in reports.values()):
                report = verify(tmp_path / "ledger.db", tmp_path / "checkpoint", key)
                reports[report.size] = report
            return list(reports.values())

        verifying = asyncio.get_running_loop().run_in_executor(None, verify_while_it_grows)
        while not verifying.done():
            await asyncio.gather(*[ledger.record_intent(intent()) for _ in range(32)])
        assert [report.finding for report in await verifying] == [None] * 5


async def test_a_reader_cannot_write(tmp_path: Path) -> None:
    async with await open_ledger(tmp_path):
        connection = schema.open_readonly(tmp_path / "ledger.db")
        with pytest.raises(apsw.ReadOnlyError):
            connection.execute("DELETE FROM records")
        connection.close()


async def test_health_says_when_the_checkpoint_cannot_be_written_and_redeeming_waits_for_it(tmp_path: Path) -> None:
    async with await open_ledger(tmp_path, limits=QUICK) as ledger:
        await ledger.record_intent(intent("a"))
        assert ledger.health() is None
        (tmp_path / "checkpoint.new").mkdir()  # in the way of the next one
        with pytest.raises(Unavailable, match="checkpoint"):
            await ledger.redeem("a", "id", "caller", bytes(32), now=NOW, correlation_id="")
        assert "checkpoint" in (ledger.health() or "")
        assert await ledger.record_intent(intent("b")), "minting goes on"
        (tmp_path / "checkpoint.new").rmdir()
        again = await ledger.redeem("a", "id", "caller", bytes(32), now=NOW, correlation_id="")
        assert again.repeated
        assert ledger.health() is None
    last = checkpointer(tmp_path).read()
    assert last is not None
    assert last[0].size == last_seq(tmp_path / "ledger.db")
