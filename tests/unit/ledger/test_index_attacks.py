"""Who can write the store writes the index tables, or waits for the clock: a second use must not come of it unseen."""

from datetime import timedelta
from pathlib import Path

import apsw
import pytest
from support.ledger_records import NOW, Clock, checkpointer, intent, open_ledger, outcome

from broker.errors import Reason, Refused
from broker.ledger import consistency, records
from broker.ledger.consistency import Consistency, Fault, FoundFault
from broker.ledger.group import Limits
from broker.ledger.operations import PRUNE_ROWS, Maintain
from broker.ledger.store import Ledger
from broker.ledger.verify import verify

ONCE, AGAIN = "idempotency-id-1", "idempotency-id-2"
CALLER = "spiffe://acme.test/orders"
BY_HAND = Limits(maintain_s=3600)


def sql(folder: Path, text: str) -> None:
    connection = apsw.Connection(str(folder / "ledger.db"))
    connection.set_busy_timeout(5_000)
    connection.execute(text)
    connection.close()


async def redeem(ledger: Ledger, jti: str, idempotency_id: str = ONCE, after_s: float = 1) -> Reason | bool:
    """The reason why not, or whether it was a repetition."""
    now = NOW + timedelta(seconds=after_s)
    try:
        found = await ledger.redeem(jti, idempotency_id, CALLER, b"c" * 32, now=now, correlation_id="c")
    except Refused as refused:
        return refused.reason
    return found.repeated


async def bind(ledger: Ledger, jkt: str, assertion: bytes = b"1" * 32, lives_s: int = 300) -> str:
    """The bound key, or the reason why there is none."""
    expires_at = NOW + timedelta(seconds=lives_s)
    try:
        return await ledger.bind_key(assertion, jkt, expires_at, now=NOW, correlation_id="c")
    except Refused as refused:
        return refused.reason


async def maintain(ledger: Ledger, after_s: float) -> None:
    await ledger._groups.submit(Maintain(now=NOW + timedelta(seconds=after_s)))


def faults(folder: Path) -> Fault | None:
    finding = verify(folder / "ledger.db", folder / "checkpoint", str(checkpointer(folder).verifier_key)).finding
    return finding and finding.fault


async def test_a_clock_that_goes_ahead_and_back_gives_no_second_redemption(tmp_path: Path) -> None:
    """Invariant 7, the ledger's part: the credential's row outlives its redemption's behind longer-lived ones."""
    async with await open_ledger(tmp_path, limits=BY_HAND) as ledger:
        for number in range(PRUNE_ROWS):
            await ledger.record_intent(intent(f"long-lived-{number}", ttl_s=300))
        await ledger.record_intent(intent("a", ttl_s=60))
        await ledger.record_intent(intent("b", ttl_s=60))
        assert await redeem(ledger, "a") is False
        await maintain(ledger, 150)
        assert await redeem(ledger, "a", AGAIN, after_s=5) is Reason.ALREADY_USED
        assert await redeem(ledger, "b", after_s=5) is False
        await maintain(ledger, 1_000)
        await maintain(ledger, 1_000)
        assert await redeem(ledger, "a", AGAIN, after_s=5) is Reason.REVOKED
    assert faults(tmp_path) is None


async def test_redemptions_go_with_their_credentials(tmp_path: Path) -> None:
    async with await open_ledger(tmp_path, limits=BY_HAND) as ledger:
        await ledger.record_intent(intent("a"))
        assert await redeem(ledger, "a") is False
        await maintain(ledger, 1_000)
        connection = apsw.Connection(str(tmp_path / "ledger.db"))
        assert connection.execute("SELECT count(*) FROM redemptions").get == 0
        connection.close()


async def test_a_clock_that_goes_ahead_and_back_binds_no_assertion_anew(tmp_path: Path) -> None:
    clock = Clock()
    async with await open_ledger(tmp_path, clock, BY_HAND) as ledger:
        assert await bind(ledger, "owner") == "owner"
        await maintain(ledger, 1_000)
        assert await bind(ledger, "thief") == Reason.EXPIRED
        assert await bind(ledger, "owner", b"2" * 32, lives_s=301) == "owner", "a fresh assertion is good"
    clock.now = NOW + timedelta(seconds=5)
    async with await open_ledger(tmp_path, clock, BY_HAND) as ledger:
        assert await bind(ledger, "thief") == Reason.EXPIRED, "also after a restart"


@pytest.mark.parametrize(
    "attack",
    [
        "DELETE FROM redemptions; DELETE FROM bindings",
        "UPDATE redemptions SET jti = 'x'; UPDATE bindings SET assertion = x'00'",
        "UPDATE redemptions SET idempotency = x'00', caller = 'somebody'; UPDATE bindings SET jkt = 'thief'",
        "UPDATE bindings SET expires_at = 0; UPDATE redemptions SET seq = seq + 100",
    ],
    ids=["deleted", "renamed", "rewritten", "moved"],
)
async def test_index_rows_that_somebody_changed_come_back_at_the_next_start(tmp_path: Path, attack: str) -> None:
    """Invariant 7, the ledger's part."""
    async with await open_ledger(tmp_path) as ledger:
        await ledger.record_intent(intent("a"))
        await ledger.record_intent(intent("b"))
        assert await redeem(ledger, "a") is False
        assert await bind(ledger, "owner") == "owner"
    sql(tmp_path, attack)
    async with await open_ledger(tmp_path) as ledger:
        assert await redeem(ledger, "a", AGAIN) is Reason.ALREADY_USED
        assert await redeem(ledger, "a") is True, "a lost answer is still given again"
        assert await bind(ledger, "thief") == "owner"
        assert await redeem(ledger, "b") is False
    assert faults(tmp_path) is None


async def test_the_last_hour_counts_from_the_last_record_whatever_the_clock_says(tmp_path: Path) -> None:
    clock = Clock()
    async with await open_ledger(tmp_path, clock, BY_HAND) as ledger:
        await ledger.record_intent(intent("a"))
        assert await redeem(ledger, "a") is False
    sql(tmp_path, "DELETE FROM redemptions")
    clock.now = NOW + timedelta(days=1)
    async with await open_ledger(tmp_path, clock, BY_HAND) as ledger:
        assert await redeem(ledger, "a", AGAIN) is Reason.ALREADY_USED


async def test_a_second_redemption_by_deleting_the_first_ones_row_is_found(tmp_path: Path) -> None:
    async with await open_ledger(tmp_path) as ledger:
        await ledger.record_intent(intent("a"))
        assert await redeem(ledger, "a") is False
        assert faults(tmp_path) is None
        sql(tmp_path, "DELETE FROM redemptions")
        assert await redeem(ledger, "a", AGAIN) is False, "nothing in the file tells a running broker"
    assert faults(tmp_path) is Fault.REDEEMED_TWICE


async def test_a_credential_that_was_put_into_the_index_is_found(tmp_path: Path) -> None:
    async with await open_ledger(tmp_path) as ledger:
        await ledger.record_intent(intent("a"))
        sql(tmp_path, "INSERT INTO credentials SELECT 100, 'forged', epoch, expires_at FROM credentials")
        assert await redeem(ledger, "forged") is False
        sql(tmp_path, "DELETE FROM credentials WHERE jti = 'a'; UPDATE credentials SET seq = 2, jti = 'other'")
        with pytest.raises(Refused) as caught:
            await ledger.credential("other")
        assert caught.value.reason is Reason.REVOKED, "the intent behind the row is another's"
    assert faults(tmp_path) is Fault.NO_INTENT


@pytest.mark.parametrize("named", [0, 1, 4, 100])
async def test_an_outcome_of_what_is_no_intent_before_it_is_found(tmp_path: Path, named: int) -> None:
    async with await open_ledger(tmp_path) as ledger:
        assert await ledger.record_intent(intent("a")) == 3
        assert faults(tmp_path) is None
        await ledger.append(outcome(named))
    assert faults(tmp_path) is Fault.NO_INTENT


async def test_an_intent_that_ended_twice_is_no_fault(tmp_path: Path) -> None:
    """A jump of the clock ends it as "unknown" before its outcome is written."""
    async with await open_ledger(tmp_path, limits=BY_HAND) as ledger:
        seq = await ledger.record_intent(intent("a"))
        await maintain(ledger, 1_000)
        await ledger.append(outcome(seq))
    assert faults(tmp_path) is None


async def test_what_is_no_longer_remembered_is_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consistency.Consistency.__init__, "__defaults__", (2,))
    async with await open_ledger(tmp_path) as ledger:
        seqs = [await ledger.record_intent(intent(f"jti-{number}")) for number in range(10)]
        for number, seq in enumerate(seqs):
            assert await redeem(ledger, f"jti-{number}") is False
            await ledger.append(outcome(seq))
        assert faults(tmp_path) is None
        sql(tmp_path, "DELETE FROM redemptions")
        assert await redeem(ledger, "jti-0", AGAIN) is False
    assert faults(tmp_path) is Fault.REDEEMED_TWICE


def test_a_later_releases_kind_of_record_is_passed_over_and_what_is_none_is_not() -> None:
    connection = apsw.Connection("")
    reader = Consistency(connection)
    reader.see(1, b'{"kind":"thought_of_later","at":"2026-11-22T23:07:00Z","more":[1]}')
    reader.see(2, records.encode(intent("a")))
    for body in (b"", b"[]", b'{"kind":1}', b"\xff"):
        with pytest.raises(FoundFault) as caught:
            reader.see(3, body)
        assert caught.value.fault is Fault.UNREADABLE
    connection.close()
