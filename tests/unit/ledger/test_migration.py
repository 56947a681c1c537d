"""A store that an earlier release wrote is migrated when it is opened, with all that it says still counting.

tests/vectors/ledger/schema-2.sql was dumped from a store that the code of schema 2 wrote: one credential redeemed, one
not, one key bound.
"""

from datetime import timedelta
from pathlib import Path

import apsw
import pytest
from support.ledger_records import (
    NOW,
    approved,
    asked,
    checkpointer,
    intent,
    open_ledger,
    outcome,
    request_digest,
    signature,
)

from broker.errors import Reason, Refused
from broker.ledger import schema
from broker.ledger.reading import read
from broker.ledger.verify import verify

VECTOR = Path(__file__).parents[2] / "vectors" / "ledger" / "schema-2.sql"
CALLER = "spiffe://acme.test/orders"
CONTENT = b"c" * 32


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    connection = apsw.Connection(str(tmp_path / "ledger.db"))
    connection.execute(VECTOR.read_text())
    connection.close()
    found = verify(tmp_path / "ledger.db")
    checkpointer(tmp_path).write(found.size, found.head, found.epoch, NOW)
    return tmp_path


def version(folder: Path) -> int:
    connection = schema.open_readonly(folder / "ledger.db")
    found = int(connection.execute("SELECT max(number) FROM migrations").get)
    connection.close()
    return found


def good(folder: Path) -> bool:
    report = verify(folder / "ledger.db", folder / "checkpoint", str(checkpointer(folder).verifier_key))
    return report.good and report.checkpoint_size > 0


async def test_a_store_of_schema_2_is_migrated_and_every_record_stays_as_it_was(folder: Path) -> None:
    assert version(folder) == 2
    assert good(folder), "auditors read it without migrating it"
    before = [(row.seq, row.hash, row.body) for row in read(folder / "ledger.db")]
    async with await open_ledger(folder) as ledger:
        assert ledger.epoch == 1, "a migration is no restore"
    assert version(folder) == len(schema.MIGRATIONS)
    after = [(row.seq, row.hash, row.body) for row in read(folder / "ledger.db")]
    assert after[: len(before)] == before
    assert good(folder)


async def test_what_counted_before_the_migration_counts_after_it(folder: Path) -> None:
    """Invariant 7, the ledger's part: nothing is redeemed a second time by way of an upgrade."""
    async with await open_ledger(folder) as ledger:
        now = NOW + timedelta(seconds=1)
        again = await ledger.redeem("redeemed", "id-of-16-or-more", CALLER, CONTENT, now=now, correlation_id="")
        assert (again.repeated, again.redeemed_at) == (True, NOW)
        with pytest.raises(Refused) as caught:
            await ledger.redeem("redeemed", "another-id-of-16", CALLER, CONTENT, now=now, correlation_id="")
        assert caught.value.reason is Reason.ALREADY_USED
        first = await ledger.redeem("unused", "id-of-16-or-more", CALLER, CONTENT, now=now, correlation_id="")
        assert not first.repeated
        ends = NOW + timedelta(hours=1)
        assert await ledger.bind_key(b"1" * 32, "thief", ends, now=now, correlation_id="") == "owner"


async def test_a_migrated_store_takes_approvals_spends_and_answers(folder: Path) -> None:
    async with await open_ledger(folder) as ledger:
        await ledger.ask_approval(asked())
        await ledger.approve(approved())
        await ledger.record_intent(intent("grant", credential="signing_grant", approval=request_digest()))
        spent = await ledger.spend(
            "grant", "id-of-16-or-more", CALLER, CONTENT, intent=signature("grant"), now=NOW, correlation_id=""
        )
        assert spent.intent_seq is not None
        await ledger.store_answer("grant", b"answer", outcome(spent.intent_seq))
    async with await open_ledger(folder) as ledger:
        assert await ledger.find_answer("grant", "id-of-16-or-more", CALLER, CONTENT, NOW) == b"answer"
    assert good(folder)
