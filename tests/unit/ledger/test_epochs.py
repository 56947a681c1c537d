"""A store that was put back, promoted from an old copy or swapped starts a new epoch, in which nothing earlier counts.

Each attack is done with real copies of real files; the positive control is a restart with nothing changed.
"""

import shutil
from datetime import timedelta
from pathlib import Path

import apsw
import pytest
from support.ledger_records import NAME, NOW, intent, open_ledger

from broker.errors import Reason, Refused, Unavailable
from broker.ledger import records
from broker.ledger.checkpoint import Checkpointer
from broker.ledger.reading import read
from broker.ledger.store import Ledger
from broker.ledger.verify import verify


async def redeem(ledger: Ledger, jti: str = "a", idempotency_id: str = "first-use-of-it-") -> bool:
    found = await ledger.redeem(jti, idempotency_id, "caller", bytes(32), now=NOW, correlation_id="")
    return found.repeated


def epochs(folder: Path) -> list[records.EpochStarted]:
    written = [row.record() for row in read(folder / "ledger.db")]
    return [record for record in written if isinstance(record, records.EpochStarted)]


def copy_store(source: Path, target: Path) -> None:
    """As a backup would, while nothing writes."""
    target.mkdir()
    for file in source.glob("ledger.db*"):
        shutil.copy(file, target)


def lose_store(folder: Path) -> None:
    for file in folder.glob("ledger.db*"):
        file.unlink()


def put_back(backup: Path, folder: Path) -> None:
    lose_store(folder)
    for file in backup.iterdir():
        shutil.copy(file, folder)


@pytest.fixture
async def folder(tmp_path: Path) -> Path:
    """A ledger with two credentials, backed up, then one redeemed."""
    live = tmp_path / "live"
    live.mkdir()
    async with await open_ledger(live) as ledger:
        await ledger.record_intent(intent("a"))
        await ledger.record_intent(intent("b"))
    copy_store(live, tmp_path / "backup")
    async with await open_ledger(live) as ledger:
        assert not await redeem(ledger)
    return live


async def test_a_restart_keeps_the_epoch_and_its_credentials(folder: Path) -> None:
    async with await open_ledger(folder) as ledger:
        assert ledger.epoch == 1
        assert await redeem(ledger), "the same question, the same answer"
        assert not await redeem(ledger, "b")
    assert [record.epoch for record in epochs(folder)] == [1]


async def test_a_store_that_was_put_back_starts_an_epoch_in_which_nothing_earlier_counts(folder: Path) -> None:
    """Invariant 7: in the copy, `a` was never redeemed; it must not be redeemed a second time."""
    put_back(folder.parent / "backup", folder)
    note = (folder / "checkpoint").read_text()
    async with await open_ledger(folder) as ledger:
        assert ledger.epoch == 2
        assert ledger.epoch_since == NOW
        for jti in ("a", "b"):
            with pytest.raises(Refused) as caught:
                await redeem(ledger, jti)
            assert caught.value.reason is Reason.REVOKED
            assert await ledger.credential(jti) is None
        await ledger.record_intent(intent("c", epoch=2))
        assert not await redeem(ledger, "c"), "the new epoch's credentials count"
    started = epochs(folder)[-1]
    assert (started.epoch, started.checkpoint) == (2, note)
    assert "put back" in started.detail
    async with await open_ledger(folder) as ledger:
        assert ledger.epoch == 2, "once seen, it is not seen again"


async def test_a_kill_between_new_epoch_and_new_checkpoint_is_harmless(folder: Path) -> None:
    """Invariant 7: the epoch is durable before the checkpoint; another start may count one more, never one less."""
    put_back(folder.parent / "backup", folder)
    old = (folder / "checkpoint").read_bytes()
    async with await open_ledger(folder) as ledger:
        assert ledger.epoch == 2
    (folder / "checkpoint").write_bytes(old)
    async with await open_ledger(folder) as ledger:
        assert ledger.epoch == 3
        assert await ledger.credential("a") is None


async def test_a_fresh_store_beside_a_checkpoint_starts_after_the_checkpoints_epoch(folder: Path) -> None:
    """Invariant 7: a lost store is behind, too."""
    put_back(folder.parent / "backup", folder)
    async with await open_ledger(folder):
        pass
    lose_store(folder)
    async with await open_ledger(folder) as ledger:
        assert ledger.epoch == 3


async def test_a_store_whose_checkpoint_is_gone_starts_a_new_epoch(folder: Path) -> None:
    """Invariant 7: putting a copy back and removing the proof gains nothing."""
    put_back(folder.parent / "backup", folder)
    (folder / "checkpoint").unlink()
    async with await open_ledger(folder) as ledger:
        assert ledger.epoch == 2
        assert await ledger.credential("a") is None


async def test_a_store_of_the_same_length_with_another_history_starts_a_new_epoch(folder: Path) -> None:
    """Invariant 7: the copy was used in another place and grew as long as the checkpoint says."""
    put_back(folder.parent / "backup", folder)
    elsewhere = folder.parent / "elsewhere"
    shutil.copytree(folder, elsewhere)
    (elsewhere / "checkpoint").unlink()
    async with await open_ledger(elsewhere) as ledger:
        for _ in range(5):
            await ledger.append(records.PolicyChanged(at=NOW, revision="r"))
    shutil.copytree(elsewhere, folder.parent / "grown", ignore=shutil.ignore_patterns("checkpoint*"))
    put_back(folder.parent / "grown", folder)
    async with await open_ledger(folder) as ledger:
        assert ledger.epoch == 3  # elsewhere it was 2
    assert "another history" in epochs(folder)[-1].detail


async def test_a_checkpoint_of_a_later_epoch_moves_the_store_beyond_it(folder: Path) -> None:
    report = verify(folder / "ledger.db")
    Checkpointer(folder / "checkpoint.key", folder / "checkpoint", NAME).write(report.size, report.head, 7, NOW)
    async with await open_ledger(folder) as ledger:
        assert ledger.epoch == 8


@pytest.mark.parametrize("damage", ["forged", "other-key", "key-lost"])
async def test_a_checkpoint_that_does_not_verify_stops_the_broker(folder: Path, damage: str) -> None:
    """Invariant 7: it might be the proof that the store was put back, so it is never passed over in silence."""
    if damage == "forged":
        forged = (folder / "checkpoint").read_bytes().replace(b"epoch 1", b"epoch 2")
        (folder / "checkpoint").write_bytes(forged)
    elif damage == "other-key":
        Checkpointer(folder.parent / "other.key", folder / "checkpoint", NAME).write(1, bytes(32), 1, NOW)
    else:
        (folder / "checkpoint.key").unlink()
    before = (folder / "ledger.db").read_bytes()
    with pytest.raises(Unavailable, match="move the checkpoint away") as caught:
        await open_ledger(folder)
    assert caught.value.reason is Reason.LEDGER_UNAVAILABLE
    assert (folder / "ledger.db").read_bytes() == before
    (folder / "checkpoint").unlink()  # what the message says
    async with await open_ledger(folder) as ledger:
        assert ledger.epoch == 2


async def test_intents_left_open_become_unknown_once(tmp_path: Path) -> None:
    async with await open_ledger(tmp_path) as ledger:
        left_open = await ledger.record_intent(intent("a"))
        closed = await ledger.record_intent(intent("b"))
        await ledger.append(records.Outcome(at=NOW, intent=closed, result="failed"))
        also_open = await ledger.record_intent(intent("c"))
    for _ in range(2):
        async with await open_ledger(tmp_path) as ledger:
            pass
    written = [row.record() for row in read(tmp_path / "ledger.db")]
    outcomes = [(r.intent, r.result) for r in written if isinstance(r, records.Outcome)]
    assert outcomes == [(closed, "failed"), (left_open, "unknown"), (also_open, "unknown")]


async def test_the_search_for_open_intents_does_not_grow_with_the_ledger(tmp_path: Path) -> None:
    async with await open_ledger(tmp_path) as ledger:
        for _ in range(3):
            seq = await ledger.record_intent(intent())
            await ledger.append(records.Outcome(at=NOW, intent=seq, result="failed"))
        await ledger.append(records.PolicyChanged(at=NOW, revision="r"))
    connection = apsw.Connection(str(tmp_path / "ledger.db"), flags=apsw.SQLITE_OPEN_READONLY)
    seq, open_from = connection.execute("SELECT seq, open_from FROM ledger").fetchone()
    connection.close()
    assert open_from == seq + 1


async def test_in_a_new_epoch_no_earlier_key_is_served(folder: Path) -> None:
    """Invariant 7: what they signed no longer counts."""
    async with await open_ledger(folder) as ledger:
        await ledger.publish_key("k", b"record", NOW + timedelta(hours=1), NOW)
        assert await ledger.published_keys(NOW) == (b"record",)
    async with await open_ledger(folder) as ledger:
        assert await ledger.published_keys(NOW) == (b"record",), "a restart alone is no reason"
    (folder / "checkpoint").unlink()
    async with await open_ledger(folder) as ledger:
        assert await ledger.published_keys(NOW) == ()
