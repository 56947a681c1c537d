"""Single use: once in the world, the same answer to the same question, and nothing for anybody else."""

import asyncio
from datetime import timedelta
from pathlib import Path

import apsw
import pytest
from support.ledger_records import NOW, QUICK, checkpointer, intent, open_ledger

from broker.errors import Reason, Refused
from broker.ledger import records
from broker.ledger.reading import read
from broker.ledger.store import Ledger

CALLER = "spiffe://acme.test/orders"
CONTENT = b"c" * 32


async def redeem(
    ledger: Ledger,
    jti: str = "a",
    idempotency_id: str = "id-of-16-or-more",
    caller: str = CALLER,
    content: bytes = CONTENT,
    after_s: float = 1,
) -> tuple[float, bool]:
    now = NOW + timedelta(seconds=after_s)
    found = await ledger.redeem(jti, idempotency_id, caller, content, now=now, correlation_id="c")
    return (found.redeemed_at - NOW).total_seconds(), found.repeated


async def refusal(ledger: Ledger, **changes: object) -> Reason:
    with pytest.raises(Refused) as caught:
        await redeem(ledger, **changes)  # type: ignore[arg-type]
    return caught.value.reason


async def test_a_token_is_redeemed_once_and_the_same_question_gets_the_same_answer(tmp_path: Path) -> None:
    """Invariant 7, the ledger's part."""
    async with await open_ledger(tmp_path) as ledger:
        await ledger.record_intent(intent("a"))
        assert await redeem(ledger, after_s=1.25) == (1.25, False)
        assert await redeem(ledger, after_s=30) == (1.25, True)
        row = await ledger.credential("a")
        assert row is not None
        assert row.redeemed_at == NOW + timedelta(seconds=1.25)
    written = [row.record() for row in read(tmp_path / "ledger.db")]
    redeemed = [record for record in written if isinstance(record, records.Redemption)]
    assert [(record.jti, record.by) for record in redeemed] == [("a", CALLER)]


@pytest.mark.parametrize(
    "change",
    [{"idempotency_id": "another-id-of-16"}, {"caller": "spiffe://acme.test/other"}, {"content": b"d" * 32}],
    ids=["another-id", "another-caller", "other-content"],
)
async def test_anybody_or_anything_else_finds_it_used(tmp_path: Path, change: dict[str, object]) -> None:
    """Invariant 7, the ledger's part."""
    async with await open_ledger(tmp_path) as ledger:
        await ledger.record_intent(intent("a"))
        assert await redeem(ledger) == (1, False)
        assert await refusal(ledger, **change) is Reason.ALREADY_USED
        assert await redeem(ledger) == (1, True)


async def test_of_many_who_race_exactly_one_wins(tmp_path: Path) -> None:
    """Invariant 7, the ledger's part: many callers at once, in the same and in different groups."""
    async with await open_ledger(tmp_path) as ledger:
        await ledger.record_intent(intent("a"))
        racers = [redeem(ledger, idempotency_id=f"idempotency-{n:04}") for n in range(400)]
        answers = await asyncio.gather(*racers, return_exceptions=True)
        assert sum(answer == (1, False) for answer in answers) == 1
        assert sum(isinstance(answer, Refused) for answer in answers) == 399


async def test_a_lost_answer_burns_nothing_across_a_restart(tmp_path: Path) -> None:
    async with await open_ledger(tmp_path) as ledger:
        await ledger.record_intent(intent("a"))
        assert await redeem(ledger) == (1, False)
    async with await open_ledger(tmp_path) as ledger:
        assert await redeem(ledger, after_s=2) == (1, True)
        assert await refusal(ledger, idempotency_id="another-id-of-16") is Reason.ALREADY_USED


async def test_an_unknown_or_expired_token_is_not_redeemed(tmp_path: Path) -> None:
    async with await open_ledger(tmp_path) as ledger:
        await ledger.record_intent(intent("a", ttl_s=60))
        assert await refusal(ledger, jti="b") is Reason.REVOKED
        assert await refusal(ledger, after_s=60) is Reason.EXPIRED
        assert await redeem(ledger, after_s=59.9) == (59.9, False)
        assert await refusal(ledger, after_s=60) is Reason.EXPIRED, "the answer is kept until expiry, not longer"


async def test_the_database_itself_holds_a_redemption_to_once(tmp_path: Path) -> None:
    """Invariant 7, the ledger's part: no matter which connection writes it."""
    async with await open_ledger(tmp_path) as ledger:
        await ledger.record_intent(intent("a"))
        await redeem(ledger)
    other = apsw.Connection(str(tmp_path / "ledger.db"))
    with pytest.raises(apsw.ConstraintError):
        other.execute("INSERT INTO redemptions SELECT seq + 100, jti, 'x', x'', x'', 0, 0 FROM redemptions")
    other.close()


async def test_a_redemption_is_covered_by_the_outside_checkpoint_before_its_answer(tmp_path: Path) -> None:
    """Invariant 7, the ledger's part: no copy of the store that lacks it can be put back unseen."""
    async with await open_ledger(tmp_path) as ledger:
        seq = await ledger.record_intent(intent("a"))
        await redeem(ledger)
        last = checkpointer(tmp_path).read()
        assert last is not None
        assert last[0].size > seq


async def test_the_first_key_bound_to_an_assertion_stays(tmp_path: Path) -> None:
    async def bind(ledger: Ledger, assertion: bytes, jkt: str) -> str:
        return await ledger.bind_key(assertion, jkt, NOW + timedelta(hours=1), now=NOW, correlation_id="c")

    one, other = b"1" * 32, b"2" * 32
    async with await open_ledger(tmp_path, limits=QUICK) as ledger:
        bound = await asyncio.gather(*[bind(ledger, one, f"key-{n}") for n in range(50)])
        assert set(bound) == {bound[0]}
        assert await bind(ledger, other, "key-of-the-other") == "key-of-the-other"
    async with await open_ledger(tmp_path) as ledger:
        assert await bind(ledger, one, "thief") == bound[0]
    written = [row.record() for row in read(tmp_path / "ledger.db")]
    assert sum(isinstance(record, records.KeyBound) for record in written) == 2
