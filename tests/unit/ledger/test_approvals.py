"""Approvals: bound to one request, counted once, used up by one intent, taken back at once, gone with their time."""

import asyncio
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from support.ledger_records import (
    APPROVER,
    NOW,
    PRINCIPAL,
    QUICK,
    Clock,
    approved,
    asked,
    checkpointer,
    intent,
    open_ledger,
    request_digest,
    signature,
    withdrawn,
)
from support.processes import until

from broker.errors import Reason, Refused, Unavailable
from broker.ledger import records, schema
from broker.ledger.approvals import MAX_OPEN, MAX_PENDING
from broker.ledger.group import Limits
from broker.ledger.reading import last_seq, read
from broker.ledger.store import Ledger
from broker.ledger.verify import verify

R = request_digest("r")
BEN = "https://login.acme.test/subject/YmVu"


async def counting(ledger: Ledger, credential: str = "", after_s: float = 1, digest: str = R) -> list[str]:
    """Whose approvals count."""
    found = await ledger.approvals(digest, NOW + timedelta(seconds=after_s), credential)
    return [seen.approver for seen in found]


async def refusal(call: "asyncio.Future[int] | object") -> Reason:
    with pytest.raises(Refused) as caught:
        await call  # type: ignore[misc] - a coroutine or a future
    return caught.value.reason


def kinds(folder: Path, *wanted: type[records.Record]) -> list[str]:
    found = [row.record() for row in read(folder / "ledger.db")]
    return [type(record).__name__ for record in found if isinstance(record, wanted)]


async def test_an_approval_counts_for_its_request_and_for_no_other(tmp_path: Path) -> None:
    async with await open_ledger(tmp_path) as ledger:
        await ledger.ask_approval(asked("r"))
        await ledger.ask_approval(asked("another"))
        seen = await ledger.approve(approved("r"))
        assert (seen.approver, seen.reason, seen.method) == (APPROVER, "looked at it", "mtls")
        assert (seen.approved_at, seen.expires_at) == (NOW, NOW + timedelta(seconds=600))
        assert await ledger.approvals(R, NOW, "") == (seen,)
        assert await counting(ledger, digest=request_digest("another")) == []


async def test_one_approver_counts_once_and_its_latest_word_counts(tmp_path: Path) -> None:
    async with await open_ledger(tmp_path) as ledger:
        await ledger.ask_approval(asked())
        await ledger.approve(approved(lives_s=600))
        await ledger.approve(approved(by=BEN))
        await ledger.approve(approved(now=NOW + timedelta(seconds=5), lives_s=20))
        assert sorted(await counting(ledger)) == [BEN, APPROVER]
        assert await counting(ledger, after_s=25) == [BEN], "it made its own approval shorter"


async def test_an_approval_ends_with_its_time(tmp_path: Path) -> None:
    async with await open_ledger(tmp_path) as ledger:
        await ledger.ask_approval(asked())
        await ledger.approve(approved(lives_s=600))
        assert await counting(ledger, after_s=599) == [APPROVER]
        assert await counting(ledger, after_s=600) == []


async def test_only_a_request_that_waits_can_be_approved(tmp_path: Path) -> None:
    async with await open_ledger(tmp_path) as ledger:
        assert await refusal(ledger.approve(approved())) is Reason.EXPIRED
        await ledger.ask_approval(asked(lives_s=60))
        assert await refusal(ledger.approve(approved(now=NOW + timedelta(seconds=60)))) is Reason.EXPIRED
        assert await ledger.approve(approved(now=NOW + timedelta(seconds=59)))
        await ledger.record_intent(intent("grant", approval=R))
        assert await refusal(ledger.approve(approved(by=BEN))) is Reason.ALREADY_USED
    assert kinds(tmp_path, records.Approved) == ["Approved"]


async def test_an_approval_for_longer_than_a_day_is_a_mistake(tmp_path: Path) -> None:
    async with await open_ledger(tmp_path) as ledger:
        for record in (asked(lives_s=86_401), approved(lives_s=86_401)):
            with pytest.raises(ValueError, match="a day at most"):
                await (
                    ledger.ask_approval(record) if isinstance(record, records.ApprovalAsked) else ledger.approve(record)
                )
        await ledger.ask_approval(asked(lives_s=86_400))
        assert await ledger.approve(approved(lives_s=86_400))


async def test_approvals_are_used_up_by_one_intent_and_stay_for_it(tmp_path: Path) -> None:
    async with await open_ledger(tmp_path) as ledger:
        await ledger.ask_approval(asked())
        await ledger.approve(approved())
        await ledger.approve(approved(by=BEN))
        seq = await ledger.record_intent(intent("grant", approval=R))
        assert await counting(ledger) == []
        assert await counting(ledger, "another-grant") == []
        assert await counting(ledger, "grant") == [APPROVER, BEN]
        assert await refusal(ledger.record_intent(intent("second", approval=R))) is Reason.APPROVAL_REQUIRED
        row = await ledger.approval_request(R)
        assert row is not None
        assert row.used_by == "grant"
        last = checkpointer(tmp_path).read()
        assert last is not None
        assert last[0].size >= seq, "no copy of the store without it can be put back unseen"
        assert await ledger.record_intent(signature("grant", approval=R)), "a child names what its parent used"
    assert verify(tmp_path / "ledger.db").good


async def test_of_many_intents_that_race_for_one_approval_exactly_one_wins(tmp_path: Path) -> None:
    async with await open_ledger(tmp_path) as ledger:
        await ledger.ask_approval(asked())
        await ledger.approve(approved())
        racers = [ledger.record_intent(intent(f"grant-{n}", approval=R)) for n in range(400)]
        answers = await asyncio.gather(*racers, return_exceptions=True)
        assert sum(isinstance(answer, int) for answer in answers) == 1
        assert {answer.reason for answer in answers if isinstance(answer, Refused)} == {Reason.APPROVAL_REQUIRED}
    assert kinds(tmp_path, records.Intent) == ["Intent"], "no record of those who lost"
    assert verify(tmp_path / "ledger.db").good


async def test_approvals_that_went_between_decision_and_intent_give_nothing(tmp_path: Path) -> None:
    async with await open_ledger(tmp_path) as ledger:
        await ledger.ask_approval(asked())
        assert await refusal(ledger.record_intent(intent("a", approval=R))) is Reason.APPROVAL_REQUIRED
        await ledger.approve(approved(lives_s=60))
        late = intent("b", approval=R, now=NOW + timedelta(seconds=60))
        assert await refusal(ledger.record_intent(late)) is Reason.APPROVAL_REQUIRED
        await ledger.withdraw(withdrawn())
        assert await refusal(ledger.record_intent(intent("c", approval=R))) is Reason.APPROVAL_REQUIRED
        await ledger.approve(approved())
        assert await ledger.record_intent(intent("d", approval=R))


async def test_a_withdrawn_approval_counts_no_more_not_even_for_what_it_gave(tmp_path: Path) -> None:
    async with await open_ledger(tmp_path) as ledger:
        await ledger.ask_approval(asked())
        await ledger.approve(approved())
        await ledger.approve(approved(by=BEN))
        await ledger.record_intent(intent("grant", approval=R))
        assert await ledger.withdraw(withdrawn()) is True
        assert await counting(ledger, "grant") == [BEN]
        last = checkpointer(tmp_path).read()
        assert last is not None
        assert last[0].size == last_seq(tmp_path / "ledger.db"), "no copy without it can be put back unseen"
        assert await ledger.withdraw(withdrawn()) is False
        assert await ledger.withdraw(withdrawn(by="spiffe://acme.test/stranger")) is False
        assert await ledger.withdraw(withdrawn(by=BEN, now=NOW + timedelta(seconds=600))) is False, "it had ended"
    assert kinds(tmp_path, records.ApprovalWithdrawn) == ["ApprovalWithdrawn"]


async def test_a_request_that_is_asked_again_is_one_request(tmp_path: Path) -> None:
    async with await open_ledger(tmp_path) as ledger:
        for after_s in (0, 1, 1_799):
            await ledger.ask_approval(asked(now=NOW + timedelta(seconds=after_s)))
        assert kinds(tmp_path, records.ApprovalAsked) == ["ApprovalAsked"]
        await ledger.approve(approved(lives_s=3_000))
        await ledger.ask_approval(asked(now=NOW + timedelta(seconds=1_801)))
        assert len(await ledger.pending(NOW + timedelta(seconds=3_700))) == 1, "it is kept longer"
        assert await counting(ledger, after_s=2_000) == [APPROVER]
    assert verify(tmp_path / "ledger.db").good


async def test_a_request_whose_approvals_were_used_is_not_asked_again(tmp_path: Path) -> None:
    async with await open_ledger(tmp_path) as ledger:
        await ledger.ask_approval(asked())
        await ledger.approve(approved())
        await ledger.record_intent(intent("grant", approval=R))
        assert await refusal(ledger.ask_approval(asked())) is Reason.ALREADY_USED
        assert await ledger.pending(NOW) == ()
        await ledger.ask_approval(asked("a-new-request-id"))
        assert len(await ledger.pending(NOW)) == 1


async def test_a_principal_cannot_flood_approvers(tmp_path: Path) -> None:
    async with await open_ledger(tmp_path) as ledger:
        await asyncio.gather(*[ledger.ask_approval(asked(f"{n}", lives_s=60)) for n in range(MAX_OPEN)])
        assert await refusal(ledger.ask_approval(asked("one-more"))) is Reason.QUOTA
        await ledger.ask_approval(asked("0"))  # what waits already is no further one
        await ledger.ask_approval(asked("of-another", principal="spiffe://acme.test/other"))
        await ledger.approve(approved("0"))
        await ledger.record_intent(intent(approval=request_digest("0")))
        await ledger.ask_approval(asked("one-more"))
        assert await refusal(ledger.ask_approval(asked("two-more"))) is Reason.QUOTA
        await ledger.ask_approval(asked("later", now=NOW + timedelta(seconds=60)))


async def test_pending_shows_what_waits_the_oldest_first_and_no_more_than_its_bound(tmp_path: Path) -> None:
    async with await open_ledger(tmp_path) as ledger:
        await ledger.ask_approval(asked("ends", lives_s=60))
        await ledger.ask_approval(asked("used"))
        await ledger.approve(approved("used"))
        await ledger.record_intent(intent(approval=request_digest("used")))
        first = asked("first")
        await ledger.ask_approval(first)
        many = [asked(f"{n}", principal=f"{PRINCIPAL}/{n % 30}") for n in range(MAX_PENDING)]
        await asyncio.gather(*[ledger.ask_approval(one) for one in many])
        rows = await ledger.pending(NOW + timedelta(seconds=60))
        assert len(rows) == MAX_PENDING
        assert (rows[0].asked, rows[0].used_by) == (first, "")
        assert rows[0].asked.to_action().name == "orders.refund"
        assert await ledger.approval_request(request_digest("unheard-of")) is None


async def test_steps_of_one_group_see_one_another(tmp_path: Path) -> None:
    """An approval that is replaced does not count for nothing for a moment."""
    async with await open_ledger(tmp_path) as ledger:
        steps = [
            ledger.ask_approval(asked()),
            ledger.approve(approved()),
            ledger.approve(approved(lives_s=700)),
            ledger.approvals(R, NOW, ""),
            ledger.pending(NOW),
            ledger.withdraw(withdrawn()),
            ledger.approvals(R, NOW, ""),
        ]
        answers = await asyncio.gather(*steps)
        assert [len(answer) for answer in answers[3:5] if isinstance(answer, tuple)] == [1, 1]
        assert answers[5:] == [True, ()]
    assert verify(tmp_path / "ledger.db").good


async def test_who_waits_is_told_of_each_change_once_it_is_durable(tmp_path: Path) -> None:
    told: list[tuple[str, int]] = []
    async with await open_ledger(tmp_path) as ledger:
        end = ledger.subscribe_approvals(lambda digest: told.append((digest, last_seq(tmp_path / "ledger.db"))))

        async def heard(change: object, count: int) -> None:
            await change  # type: ignore[misc] - a coroutine or a future
            await until(lambda: len(told) == count, f"{count} notices")

        await heard(ledger.ask_approval(asked()), 1)
        await heard(ledger.approve(approved()), 2)
        await heard(ledger.approve(approved(by=BEN)), 3)
        await heard(ledger.withdraw(withdrawn()), 4)
        await heard(ledger.record_intent(intent("grant", approval=R, approvers=(BEN,))), 5)
        assert {digest for digest, _ in told} == {R}
        assert [seq for _, seq in told] == sorted({seq for _, seq in told}), "each after its record"
        await refusal(ledger.approve(approved()))
        end()
        await ledger.withdraw(withdrawn(by=BEN))
        await asyncio.sleep(0)
        assert len(told) == 5


async def test_an_approver_that_goes_away_leaves_who_waits_told(tmp_path: Path) -> None:
    told: list[str] = []
    async with await open_ledger(tmp_path) as ledger:
        await ledger.ask_approval(asked())
        ledger.subscribe_approvals(told.append)
        approving = asyncio.ensure_future(ledger.approve(approved()))
        await asyncio.sleep(0)
        approving.cancel()
        await until(lambda: told == [R], "the notice")
        assert await counting(ledger) == [APPROVER]


async def test_what_was_used_or_taken_back_stays_so_across_a_restart(tmp_path: Path) -> None:
    async with await open_ledger(tmp_path) as ledger:
        for request in ("r", "s", "t"):
            await ledger.ask_approval(asked(request))
            await ledger.approve(approved(request))
        await ledger.record_intent(intent("grant", approval=R))
        await ledger.record_intent(signature("grant", approval=R))
        await ledger.withdraw(withdrawn("s"))
    async with await open_ledger(tmp_path) as ledger:
        assert await counting(ledger) == []
        assert await counting(ledger, "grant") == [APPROVER]
        assert await counting(ledger, digest=request_digest("s")) == []
        assert await counting(ledger, digest=request_digest("t")) == [APPROVER]
        assert [row.asked.request_id for row in await ledger.pending(NOW)] == ["s", "t"]


async def test_no_clock_brings_used_approvals_back(tmp_path: Path) -> None:
    """Invariant 7, the ledger's part: what says that they are used stays as long as one of them could count."""
    clock = Clock()
    async with await open_ledger(tmp_path, clock, QUICK) as ledger:
        await ledger.ask_approval(asked(lives_s=60))
        await ledger.approve(approved(lives_s=1_000))
        await ledger.record_intent(intent("grant", approval=R))
        clock.now = NOW + timedelta(seconds=500)
        await gone(tmp_path, "approval_requests")
        assert await counting(ledger) == []
        assert await refusal(ledger.record_intent(intent("again", approval=R))) is Reason.APPROVAL_REQUIRED
        clock.now = NOW + timedelta(seconds=1_200)
        await gone(tmp_path, "consumptions")
        await gone(tmp_path, "approvals")
        clock.now = NOW + timedelta(seconds=5)
        assert await refusal(ledger.record_intent(intent("again", approval=R))) is Reason.APPROVAL_REQUIRED
        await ledger.ask_approval(asked(now=clock.now))
        assert await refusal(ledger.record_intent(intent("again", approval=R))) is Reason.APPROVAL_REQUIRED
        await ledger.approve(approved(now=clock.now, by=BEN))
        assert await ledger.record_intent(intent("again", approval=R, approvers=(BEN,))), "a round of its own"
    assert verify(tmp_path / "ledger.db").good
    async with await open_ledger(tmp_path, clock) as ledger:
        assert await counting(ledger, "again", after_s=5) == [BEN], "the first round's are not written anew"


async def gone(folder: Path, table: str) -> None:
    """Waits until maintenance has emptied the table."""
    connection = schema.open_readonly(folder / "ledger.db")
    await until(lambda: connection.execute(f"SELECT count(*) FROM {table}").get == 0, f"no {table}")  # noqa: S608 - ours
    connection.close()


async def test_with_a_full_disk_no_approval_is_used_and_none_is_lost(tmp_path: Path) -> None:
    async with await open_ledger(tmp_path) as ledger:
        await ledger.ask_approval(asked())
        await ledger.approve(approved())
        connection = ledger._writer._connection
        connection.pragma("max_page_count", connection.pragma("page_count"))
        attempts: list[Callable[[], object]] = [
            lambda: ledger.record_intent(intent("full", approval=R, facts={"padding": "x" * 100_000})),
            lambda: ledger.approve(approved(by="x" * 100_000)),
        ]
        for attempt in attempts:
            with pytest.raises(Unavailable):
                await attempt()  # type: ignore[misc] - a coroutine or a future
        connection.pragma("max_page_count", 2**32 - 2)
        assert await counting(ledger) == [APPROVER]
        assert await ledger.record_intent(intent("grant", approval=R))
    assert verify(tmp_path / "ledger.db").good


async def test_an_append_without_approvals_reads_nothing(tmp_path: Path) -> None:
    """The ledger's budget: an append to a ledger of ten million rows costs what one to an empty ledger does."""
    async with await open_ledger(tmp_path, limits=Limits(maintain_s=3600)) as ledger:
        statements: list[str] = []
        ledger._writer._connection.trace_v2(0x01, lambda event: statements.append(event["sql"]))
        await ledger.record_intent(intent())
        assert not [text for text in statements if text.lstrip().upper().startswith("SELECT")]
        assert [text for text in statements if text.startswith("INSERT INTO records")]
        await ledger.ask_approval(asked())
        assert [text for text in statements if text.startswith("SELECT")], "the trace would have seen it"
        ledger._writer._connection.trace_v2(0, None)
