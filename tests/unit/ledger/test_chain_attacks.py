"""Attacks on a ledger's file, as edits to a real one; `verify` must find each of them.

The attacker writes SQL: what SQLite itself would notice is the lesser problem.
"""

import shutil
from pathlib import Path

import apsw
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.ledger_records import NAME, NOW, checkpointer, intent, open_ledger, outcome

from broker.ledger import chain, note
from broker.ledger.checkpoint import Checkpointer
from broker.ledger.verify import Fault, verify


@pytest.fixture
async def folder(tmp_path: Path) -> Path:
    async with await open_ledger(tmp_path) as ledger:
        for number in range(10):
            seq = await ledger.record_intent(intent(f"jti-{number}"))
            await ledger.append(outcome(seq))
    return tmp_path


def sql(folder: Path, text: str, *bindings: object) -> None:
    connection = apsw.Connection(str(folder / "ledger.db"))
    connection.execute(text, bindings)
    connection.close()


def verify_alone(folder: Path) -> tuple[Fault, int] | None:
    finding = verify(folder / "ledger.db").finding
    return finding and (finding.fault, finding.seq)


def verify_with_checkpoint(folder: Path, checkpoint: Path | None = None) -> tuple[Fault, int] | None:
    key = str(checkpointer(folder).verifier_key)
    finding = verify(folder / "ledger.db", checkpoint or folder / "checkpoint", key).finding
    return finding and (finding.fault, finding.seq)


def rechain(folder: Path) -> None:
    """What somebody who can write the store, and knows our code, does after an edit."""
    connection = apsw.Connection(str(folder / "ledger.db"))
    with connection:
        (ledger_id,) = connection.execute("SELECT id FROM ledger").fetchone()
        head, seq = chain.genesis(ledger_id), 0
        bodies = connection.execute("SELECT body FROM records ORDER BY seq").fetchall()
        connection.execute("DELETE FROM records")
        for (body,) in bodies:
            seq += 1
            head = chain.link(head, seq, body)
            connection.execute("INSERT INTO records VALUES (?, ?, ?)", (seq, head, body))
        connection.execute("UPDATE ledger SET seq = ?, head = ?", (seq, head))
    connection.close()


def test_an_untouched_ledger_verifies_alone_and_with_its_checkpoint(folder: Path) -> None:
    report = verify(folder / "ledger.db", folder / "checkpoint", str(checkpointer(folder).verifier_key))
    assert report.good
    assert report.size == report.checkpoint_size == 23
    assert report.epoch == 1
    assert verify(folder / "ledger.db").good


def test_an_older_checkpoint_still_verifies_after_more_was_recorded(folder: Path) -> None:
    old = shutil.copy(folder / "checkpoint", folder / "old")
    _append_more(folder)
    assert verify_with_checkpoint(folder, Path(old)) is None


def _append_more(folder: Path) -> None:
    """More records, chained as the broker does."""
    sql(folder, "INSERT INTO records SELECT max(seq) + 1, x'', x'7b7d' FROM records")
    rechain(folder)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_any_byte_changed_in_any_row_is_found_at_that_row(folder: Path, data: st.DataObject) -> None:
    connection = apsw.Connection(str(folder / "ledger.db"))
    seq = data.draw(st.integers(1, 23))
    column = data.draw(st.sampled_from(["body", "hash"]))
    (old,) = connection.execute(f"SELECT {column} FROM records WHERE seq = ?", (seq,)).fetchone()  # noqa: S608 - ours
    new = bytearray(old)
    new[data.draw(st.integers(0, len(old) - 1))] ^= data.draw(st.integers(1, 255))
    update = f"UPDATE records SET {column} = ? WHERE seq = ?"  # noqa: S608 - ours
    connection.execute(update, (bytes(new), seq))
    assert verify_alone(folder) == (Fault.CHANGED, seq)
    connection.execute(update, (old, seq))
    assert verify_alone(folder) is None
    connection.close()


@pytest.mark.parametrize("seq", [1, 2, 11, 22])
def test_a_deleted_row_is_found_as_a_gap(folder: Path, seq: int) -> None:
    sql(folder, "DELETE FROM records WHERE seq = ?", seq)
    assert verify_alone(folder) == (Fault.GAP, seq)


def test_a_deleted_row_with_the_later_ones_moved_up_is_found(folder: Path) -> None:
    sql(folder, "DELETE FROM records WHERE seq = 11; UPDATE records SET seq = seq - 1 WHERE seq > 11")
    assert verify_alone(folder) == (Fault.CHANGED, 11)


def test_two_rows_swapped_are_found(folder: Path) -> None:
    sql(
        folder,
        "UPDATE records SET seq = -1 WHERE seq = 4; UPDATE records SET seq = 4 WHERE seq = 6;"
        "UPDATE records SET seq = 6 WHERE seq = -1",
    )
    assert verify_alone(folder) == (Fault.CHANGED, 4)


def test_a_row_put_before_the_first_is_found(folder: Path) -> None:
    sql(folder, "INSERT INTO records SELECT 0, hash, body FROM records WHERE seq = 1")
    assert verify_alone(folder) == (Fault.GAP, 1)


def test_a_row_added_at_the_end_without_the_head_is_found(folder: Path) -> None:
    sql(folder, "INSERT INTO records SELECT 24, hash, body FROM records WHERE seq = 23")
    assert verify_alone(folder) == (Fault.CHANGED, 24)
    connection = apsw.Connection(str(folder / "ledger.db"))
    head, body = connection.execute("SELECT hash, body FROM records WHERE seq = 23").fetchone()
    connection.execute("UPDATE records SET hash = ? WHERE seq = 24", (chain.link(head, 24, body),))
    connection.close()
    assert verify_alone(folder) == (Fault.HEAD_MISMATCH, 24)


def test_a_cut_off_end_is_found_even_without_a_checkpoint(folder: Path) -> None:
    sql(folder, "DELETE FROM records WHERE seq > 20")
    assert verify_alone(folder) == (Fault.TRUNCATED, 21)


def test_everything_deleted_is_found(folder: Path) -> None:
    sql(folder, "DELETE FROM records")
    assert verify_alone(folder) == (Fault.TRUNCATED, 1)
    sql(folder, "DELETE FROM ledger")
    assert verify_alone(folder) == (Fault.HEAD_MISMATCH, 0)


def test_a_cut_off_end_with_the_head_mended_is_found_with_a_checkpoint(folder: Path) -> None:
    sql(
        folder,
        "DELETE FROM records WHERE seq > 20;"
        "UPDATE ledger SET seq = 20, head = (SELECT hash FROM records WHERE seq = 20)",
    )
    assert verify_alone(folder) is None, "this is what checkpoints are for"
    assert verify_with_checkpoint(folder) == (Fault.BEHIND_CHECKPOINT, 21)


def test_a_history_chained_anew_is_found_with_a_checkpoint(folder: Path) -> None:
    sql(folder, "UPDATE records SET body = CAST(replace(body, 'acme', 'evil') AS BLOB) WHERE seq = 5")
    rechain(folder)
    assert verify_alone(folder) is None, "this is what checkpoints are for"
    assert verify_with_checkpoint(folder) == (Fault.FORKED, 23)


async def test_the_checkpoint_of_another_ledger_is_found(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = tmp_path_factory.mktemp("other")
    shutil.copy(folder / "checkpoint.key", other)
    async with await open_ledger(other):
        pass
    size = verify(other / "ledger.db").size
    assert verify_with_checkpoint(folder, other / "checkpoint") == (Fault.FORKED, size)


def test_a_checkpoint_of_a_later_epoch_is_found(folder: Path) -> None:
    report = verify(folder / "ledger.db")
    later = Checkpointer(folder / "checkpoint.key", folder / "later", NAME)
    later.write(report.size, report.head, 2, NOW)
    assert verify_with_checkpoint(folder, folder / "later") == (Fault.FORKED, report.size)


def test_a_checkpoint_by_another_key_or_name_is_not_believed(folder: Path) -> None:
    report = verify(folder / "ledger.db")
    forged = Checkpointer(folder / "other.key", folder / "forged", NAME)
    forged.write(report.size, report.head, 1, NOW)
    with pytest.raises(note.NoteError):
        verify_with_checkpoint(folder, folder / "forged")
    misnamed = Checkpointer(folder / "checkpoint.key", folder / "misnamed", "broker.other.test/ledger")
    misnamed.write(report.size, report.head, 1, NOW)
    with pytest.raises(note.NoteError):
        verify_with_checkpoint(folder, folder / "misnamed")


def test_a_checkpoint_without_the_key_to_verify_it_is_a_mistake(folder: Path) -> None:
    with pytest.raises(ValueError, match="needs the key"):
        verify(folder / "ledger.db", folder / "checkpoint")


def test_a_file_with_broken_pages_is_reported_not_raised(folder: Path) -> None:
    file = folder / "ledger.db"
    content = bytearray(file.read_bytes())
    for page in range(4096, len(content), 4096):
        content[page : page + 64] = b"\xff" * 64
    file.write_bytes(content)
    finding = verify(file).finding
    assert finding is not None
    assert finding.fault is Fault.UNREADABLE


def test_a_row_of_one_ledger_does_not_fit_into_another() -> None:
    assert chain.genesis(bytes(32)) != chain.genesis(b"\1" + bytes(31))
    first = chain.link(chain.genesis(bytes(32)), 1, b"{}")
    assert first != chain.link(chain.genesis(b"\1" + bytes(31)), 1, b"{}")
    assert first != chain.link(chain.genesis(bytes(32)), 2, b"{}")


def test_the_chain_is_pinned() -> None:
    """Ledgers out there verify only while these bytes stay."""
    assert chain.genesis(bytes(32)).hex() == PINNED_GENESIS
    assert chain.link(bytes(32), 1, b"{}").hex() == PINNED_LINK


PINNED_GENESIS = "49778a646bf06adbdd6fc2d2740b02299618216948a7003f98f69dbd1a0ced9e"
PINNED_LINK = "585b86338be156c0dc3b01467d2fab78ea406ec2bffb40aec34931844a3e84ad"
