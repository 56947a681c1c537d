"""A signing grant is spent once in the world, together with the intent of what it is spent on, and answers once."""

import asyncio
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import apsw
import msgspec
import pytest
from support.ledger_records import (
    NOW,
    QUICK,
    Clock,
    approved,
    asked,
    checkpointer,
    intent,
    open_ledger,
    outcome,
    request_digest,
    signature,
)
from support.processes import until

from broker.errors import Reason, Refused, Unavailable
from broker.ledger import records, schema
from broker.ledger.reading import last_seq, read
from broker.ledger.spending import Spent
from broker.ledger.store import Ledger
from broker.ledger.verify import verify

CALLER = "spiffe://acme.test/build/agent"
ID = "id-of-16-or-more"
CONTENT = b"c" * 32
ANSWER = b'{"signature":"public"}'
NEW = object()
_Record = TypeVar("_Record", bound=records.Event)


async def spend(
    ledger: Ledger,
    grant: str = "grant",
    idempotency_id: str = ID,
    caller: str = CALLER,
    content: bytes = CONTENT,
    after_s: float = 1,
    on: object = NEW,
) -> Spent:
    now = NOW + timedelta(seconds=after_s)
    made = signature(grant) if on is NEW else on
    assert made is None or isinstance(made, records.Intent)
    return await ledger.spend(grant, idempotency_id, caller, content, intent=made, now=now, correlation_id="c")


async def find(
    ledger: Ledger, idempotency_id: str = ID, caller: str = CALLER, content: bytes = CONTENT, after_s: float = 2
) -> bytes | None:
    return await ledger.find_answer("grant", idempotency_id, caller, content, NOW + timedelta(seconds=after_s))


async def refusal(call: object) -> Reason:
    with pytest.raises(Refused) as caught:
        await call  # type: ignore[misc] - a coroutine
    return caught.value.reason


def written(folder: Path, kind: type[_Record]) -> list[_Record]:
    found = [row.record() for row in read(folder / "ledger.db")]
    return [record for record in found if isinstance(record, kind)]


def sql(folder: Path, text: str) -> None:
    connection = apsw.Connection(str(folder / "ledger.db"))
    connection.set_busy_timeout(5_000)
    connection.execute(text)
    connection.close()


async def granted(ledger: Ledger, **changes: object) -> Ledger:
    await ledger.record_intent(intent("grant", credential="signing_grant", **changes))  # type: ignore[arg-type] - as intent
    return ledger


async def test_a_grant_is_spent_together_with_the_intent_of_its_signature(tmp_path: Path) -> None:
    """Invariants 1 and 7, the ledger's part."""
    async with await open_ledger(tmp_path) as ledger:
        await granted(ledger)
        assert await find(ledger) is None, "nobody has spent it"
        made = signature("grant", jti="signature-1")
        spent = await spend(ledger, on=made)
        assert (spent.repeated, spent.answer) == (False, None)
        assert spent.intent_seq is not None
        row = await ledger.credential("grant")
        assert row is not None
        assert row.redeemed_at == NOW + timedelta(seconds=1)
        last = checkpointer(tmp_path).read()
        assert last is not None
        assert last[0].size == last_seq(tmp_path / "ledger.db"), "no copy without it can be put back unseen"
        assert await ledger.credential("signature-1") is None, "a signature is no credential"
    used = written(tmp_path, records.Redemption)
    assert [(record.jti, record.by, record.result) for record in used] == [("grant", CALLER, "used")]
    assert written(tmp_path, records.Intent)[1] == made
    assert verify(tmp_path / "ledger.db").good


async def test_a_certificate_that_a_grant_is_spent_on_is_a_live_credential(tmp_path: Path) -> None:
    async with await open_ledger(tmp_path) as ledger:
        await granted(ledger)
        await spend(ledger, on=signature("grant", jti="leaf", credential="signing_certificate"))
        row = await ledger.credential("leaf")
        assert row is not None
        assert row.intent.parent == "grant"


async def test_of_many_spends_at_once_exactly_one_wins(tmp_path: Path) -> None:
    """Invariant 7, the ledger's part: from many connections, in the same and in different groups."""
    async with await open_ledger(tmp_path) as ledger:
        await granted(ledger)
        racers = [spend(ledger, idempotency_id=f"idempotency-{n:04}") for n in range(400)]
        answers = await asyncio.gather(*racers, return_exceptions=True)
        assert sum(isinstance(answer, Spent) and answer.intent_seq is not None for answer in answers) == 1
        assert {answer.reason for answer in answers if isinstance(answer, Refused)} == {Reason.ALREADY_USED}
        assert sum(isinstance(answer, Refused) for answer in answers) == 399
    assert len(written(tmp_path, records.Redemption)) == 1
    assert len(written(tmp_path, records.Intent)) == 2, "one signature was intended"
    assert verify(tmp_path / "ledger.db").good


async def test_the_same_spend_sent_twice_at_once_is_carried_out_once(tmp_path: Path) -> None:
    """A caller that sends its request over two connections gets one signature."""
    async with await open_ledger(tmp_path) as ledger:
        await granted(ledger)
        spent = await asyncio.gather(*[spend(ledger) for _ in range(200)])
        assert sum(one.intent_seq is not None for one in spent) == 1
        assert sum(one.repeated for one in spent) == 199
    assert len(written(tmp_path, records.Intent)) == 2


@pytest.mark.parametrize(
    "change",
    [{"idempotency_id": "another-id-of-16"}, {"caller": "spiffe://acme.test/other"}, {"content": b"d" * 32}],
    ids=["another-id", "another-caller", "other-content"],
)
async def test_the_answer_is_for_the_very_question_that_was_asked(tmp_path: Path, change: dict[str, object]) -> None:
    async with await open_ledger(tmp_path) as ledger:
        await granted(ledger)
        spent = await spend(ledger)
        assert spent.intent_seq is not None
        await ledger.store_answer("grant", ANSWER, outcome(spent.intent_seq))
        assert await refusal(find(ledger, **change)) is Reason.ALREADY_USED  # type: ignore[arg-type] - as find
        assert await refusal(spend(ledger, **change)) is Reason.ALREADY_USED  # type: ignore[arg-type] - as spend
        assert await find(ledger) == ANSWER
        again = await spend(ledger, after_s=30)
        assert again == Spent(intent_seq=None, repeated=True, answer=ANSWER)
    assert len(written(tmp_path, records.Intent)) == 2


async def test_an_answer_is_given_again_after_a_restart_and_until_the_grant_ends(tmp_path: Path) -> None:
    async with await open_ledger(tmp_path) as ledger:
        await granted(ledger, ttl_s=60)
        spent = await spend(ledger)
        assert spent.intent_seq is not None
        await ledger.store_answer("grant", ANSWER, outcome(spent.intent_seq))
        ended = written(tmp_path, records.Outcome)  # durable when it returned
        assert [record.intent for record in ended] == [spent.intent_seq]
        assert await refusal(ledger.store_answer("grant", b"other", outcome(spent.intent_seq))) is Reason.ALREADY_USED
    async with await open_ledger(tmp_path) as ledger:
        assert await find(ledger, after_s=59) == ANSWER
        assert await refusal(find(ledger, after_s=60)) is Reason.EXPIRED
    assert [record.result for record in written(tmp_path, records.Outcome)] == ["issued", "unknown"], "the grant's own"


async def test_a_grant_that_was_spent_without_an_answer_never_gives_a_second_signature(tmp_path: Path) -> None:
    """The broker ended between spend and answer: invariant 7, and no guessing whether a signature left."""
    async with await open_ledger(tmp_path) as ledger:
        await granted(ledger)
        spent = await spend(ledger)
    async with await open_ledger(tmp_path) as ledger:
        assert await refusal(find(ledger)) is Reason.ALREADY_USED
        assert await spend(ledger) == Spent(intent_seq=None, repeated=True, answer=None)
    unknown = [record.intent for record in written(tmp_path, records.Outcome) if record.result == "unknown"]
    assert spent.intent_seq in unknown
    assert len(written(tmp_path, records.Intent)) == 2
    assert verify(tmp_path / "ledger.db").good


async def test_a_refusal_spends_the_grant(tmp_path: Path) -> None:
    async with await open_ledger(tmp_path) as ledger:
        await granted(ledger)
        assert await spend(ledger, on=None) == Spent(intent_seq=None, repeated=False, answer=None)
        assert await refusal(find(ledger)) is Reason.ALREADY_USED
        assert await spend(ledger) == Spent(intent_seq=None, repeated=True, answer=None)
        assert await refusal(spend(ledger, idempotency_id="another-id-of-16")) is Reason.ALREADY_USED
    assert [record.result for record in written(tmp_path, records.Redemption)] == ["refused"]
    assert len(written(tmp_path, records.Intent)) == 1, "no signature was intended"
    assert verify(tmp_path / "ledger.db").good


async def test_an_unknown_or_expired_grant_is_not_spent(tmp_path: Path) -> None:
    async with await open_ledger(tmp_path) as ledger:
        await granted(ledger, ttl_s=60)
        assert await refusal(spend(ledger, "unheard-of")) is Reason.REVOKED
        assert await refusal(spend(ledger, after_s=60)) is Reason.EXPIRED
        assert await refusal(ledger.store_answer("grant", ANSWER, outcome(3))) is Reason.REVOKED
        assert (await spend(ledger, after_s=59)).intent_seq
    assert len(written(tmp_path, records.Redemption)) == 1


async def test_an_intent_of_another_grant_is_a_mistake(tmp_path: Path) -> None:
    async with await open_ledger(tmp_path) as ledger:
        await granted(ledger)
        with pytest.raises(ValueError, match="parent"):
            await spend(ledger, on=signature("another"))
        with pytest.raises(ValueError, match="own epoch"):
            await spend(ledger, on=signature("grant", epoch=2))
        assert (await spend(ledger)).intent_seq


async def test_a_spend_whose_intent_is_refused_leaves_the_grant_unspent(tmp_path: Path) -> None:
    """Both or neither."""
    async with await open_ledger(tmp_path) as ledger:
        await granted(ledger)
        lacking = signature("grant", approval=request_digest())
        assert await refusal(spend(ledger, on=lacking)) is Reason.APPROVAL_REQUIRED
        assert await find(ledger) is None
        await ledger.ask_approval(asked())
        await ledger.approve(approved())
        assert (await spend(ledger, on=lacking)).intent_seq
    assert len(written(tmp_path, records.Redemption)) == 1
    assert verify(tmp_path / "ledger.db").good


async def test_a_grant_of_an_earlier_epoch_is_not_spent(tmp_path: Path) -> None:
    """Invariant 7: in a store without its proof, nothing that was granted before counts, nor any answer to it."""
    async with await open_ledger(tmp_path) as ledger:
        await granted(ledger)
        await ledger.record_intent(intent("other", credential="signing_grant"))
        spent = await spend(ledger)
        assert spent.intent_seq is not None
        await ledger.store_answer("grant", ANSWER, outcome(spent.intent_seq))
    (tmp_path / "checkpoint").unlink()
    async with await open_ledger(tmp_path) as ledger:
        assert ledger.epoch == 2
        assert await refusal(find(ledger)) is Reason.REVOKED
        assert await refusal(spend(ledger, "other", on=signature("other", epoch=2))) is Reason.REVOKED
        await ledger.record_intent(intent("new", credential="signing_grant", epoch=2))
        assert (await spend(ledger, "new", on=signature("new", epoch=2))).intent_seq


async def test_while_no_checkpoint_can_be_written_no_spend_is_answered(tmp_path: Path) -> None:
    """Invariant 7: the grant is then spent for nothing; a copy put back could otherwise spend it again."""
    async with await open_ledger(tmp_path) as ledger:
        await granted(ledger)
        (tmp_path / "checkpoint.new").mkdir()  # in the way of the next one
        with pytest.raises(Unavailable, match="checkpoint"):
            await spend(ledger)
        (tmp_path / "checkpoint.new").rmdir()
        assert await spend(ledger) == Spent(intent_seq=None, repeated=True, answer=None)
        assert await refusal(find(ledger)) is Reason.ALREADY_USED


async def test_with_a_full_disk_nothing_is_spent_and_nothing_answered(tmp_path: Path) -> None:
    """Invariants 1 and 7, the ledger's part."""
    async with await open_ledger(tmp_path) as ledger:
        await granted(ledger)
        connection = ledger._writer._connection
        connection.pragma("max_page_count", connection.pragma("page_count"))
        with pytest.raises(Unavailable):
            await spend(ledger, on=signature("grant", facts={"padding": "x" * 100_000}))
        assert await find(ledger) is None
        connection.pragma("max_page_count", 2**32 - 2)
        spent = await spend(ledger)
        assert spent.intent_seq is not None
        connection.pragma("max_page_count", connection.pragma("page_count"))
        with pytest.raises(Unavailable):
            await ledger.store_answer("grant", b"x" * 100_000, outcome(spent.intent_seq))
        assert await refusal(find(ledger)) is Reason.ALREADY_USED
        connection.pragma("max_page_count", 2**32 - 2)
        await ledger.store_answer("grant", ANSWER, outcome(spent.intent_seq))
        assert await find(ledger) == ANSWER
    assert len(written(tmp_path, records.Redemption)) == 1
    assert verify(tmp_path / "ledger.db").good


async def test_answers_go_with_their_grants(tmp_path: Path) -> None:
    clock = Clock()
    async with await open_ledger(tmp_path, clock, QUICK) as ledger:
        await granted(ledger, ttl_s=60)
        spent = await spend(ledger)
        assert spent.intent_seq is not None
        await ledger.store_answer("grant", ANSWER, outcome(spent.intent_seq))
        connection = schema.open_readonly(tmp_path / "ledger.db")
        assert connection.execute("SELECT count(*) FROM answers").get == 1
        clock.now = NOW + timedelta(seconds=122)
        await until(lambda: connection.execute("SELECT count(*) FROM answers").get == 0, "no answer is left")
        assert connection.execute("SELECT count(*) FROM redemptions").get == 0
        connection.close()
        clock.now = NOW + timedelta(seconds=5)  # the clock went back: what is forgotten is refused
        assert await refusal(find(ledger)) is Reason.REVOKED
        assert await refusal(spend(ledger, idempotency_id="another-id-of-16")) is Reason.REVOKED


@pytest.mark.parametrize(
    "attack",
    [
        "UPDATE answers SET answer = CAST('{\"signature\":\"forged\"}' AS BLOB) WHERE jti = 'grant'",
        "UPDATE answers SET seq = 1 WHERE jti = 'grant'",
        "UPDATE answers SET seq = 1000 WHERE jti = 'grant'",
        "DELETE FROM answers WHERE jti = 'grant'; UPDATE answers SET jti = 'grant'",
    ],
    ids=["another-answer", "another-record", "no-record", "the-answer-to-another"],
)
async def test_an_answer_that_somebody_put_into_the_file_is_not_given(tmp_path: Path, attack: str) -> None:
    async with await open_ledger(tmp_path) as ledger:
        await granted(ledger)
        await ledger.record_intent(intent("other", credential="signing_grant"))
        for grant in ("grant", "other"):
            spent = await spend(ledger, grant)
            assert spent.intent_seq is not None
            await ledger.store_answer(grant, f"answer to {grant}".encode(), outcome(spent.intent_seq))
        assert await find(ledger) == b"answer to grant"
        sql(tmp_path, attack)
        assert await refusal(find(ledger)) is Reason.REVOKED
        assert await refusal(spend(ledger)) is Reason.REVOKED


async def test_a_second_spend_by_deleting_the_first_ones_row_is_found(tmp_path: Path) -> None:
    async with await open_ledger(tmp_path) as ledger:
        await granted(ledger)
        await spend(ledger)
        assert verify(tmp_path / "ledger.db").good
        sql(tmp_path, "DELETE FROM redemptions")
        await spend(ledger, idempotency_id="another-id-of-16")
    finding = verify(tmp_path / "ledger.db").finding
    assert finding is not None
    assert finding.fault == "redeemed_twice"


async def test_the_stored_answer_is_in_no_record(tmp_path: Path) -> None:
    """Invariant 10, the ledger's part: its hash only."""
    async with await open_ledger(tmp_path) as ledger:
        await granted(ledger)
        spent = await spend(ledger)
        assert spent.intent_seq is not None
        await ledger.store_answer("grant", b"an answer of its own", outcome(spent.intent_seq))
    bodies = [row.body for row in read(tmp_path / "ledger.db")]
    assert not [body for body in bodies if b"an answer of its own" in body or ID.encode() in body]
    [hashed] = [record for record in written(tmp_path, records.Outcome) if record.intent == spent.intent_seq]
    assert msgspec.structs.replace(hashed, answer_sha256="") == outcome(spent.intent_seq)
    assert len(hashed.answer_sha256) == 64
