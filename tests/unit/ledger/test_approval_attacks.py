"""Who can write the store writes the rows of approvals: what was used, taken back or never given must not count."""

from datetime import timedelta
from pathlib import Path

import apsw
import pytest
from support.ledger_records import (
    APPROVER,
    NOW,
    Clock,
    approved,
    asked,
    intent,
    open_ledger,
    request_digest,
    signature,
    withdrawn,
)

from broker.errors import Reason, Refused
from broker.ledger import consistency, records, recovery
from broker.ledger.consistency import Fault
from broker.ledger.store import Ledger
from broker.ledger.verify import verify

R, S = request_digest("r"), request_digest("s")


def sql(folder: Path, text: str, *values: int | str) -> None:
    connection = apsw.Connection(str(folder / "ledger.db"))
    connection.set_busy_timeout(5_000)
    connection.execute(text, values or None)
    connection.close()


def put_approval(folder: Path, seq: int, digest: str, approver: str) -> None:
    """A row that says that record `seq` is this approver's approval of the request, and never ends."""
    sql(folder, "INSERT INTO approvals VALUES (?, ?, ?, 9999999999)", seq, digest, approver)


def fault(folder: Path) -> Fault | None:
    finding = verify(folder / "ledger.db").finding
    return finding and finding.fault


async def approvers(ledger: Ledger, digest: str = R, credential: str = "", after_s: float = 1) -> list[str]:
    found = await ledger.approvals(digest, NOW + timedelta(seconds=after_s), credential)
    return [seen.approver for seen in found]


async def use(ledger: Ledger, jti: str, digest: str = R, **changes: object) -> Reason | int:
    """The intent's number, or the reason why not."""
    try:
        return await ledger.record_intent(intent(jti, approval=digest, **changes))  # type: ignore[arg-type] - as intent
    except Refused as refused:
        return refused.reason


async def used_and_withdrawn(folder: Path, clock: Clock | None = None) -> None:
    """A ledger in which `r` was approved and used, and the approval of `s` taken back."""
    async with await open_ledger(folder, clock) as ledger:
        for request in ("r", "s"):
            await ledger.ask_approval(asked(request, lives_s=86_400))
            await ledger.approve(approved(request, lives_s=86_400))
        assert isinstance(await use(ledger, "grant"), int)
        assert await ledger.withdraw(withdrawn("s"))


@pytest.mark.parametrize(
    "attack",
    [
        "DELETE FROM consumptions",
        "UPDATE consumptions SET digest = 'another'",
        "UPDATE consumptions SET jti = '', seq = seq + 1000",
        "UPDATE consumptions SET seq = -5",
        "UPDATE approvals SET expires_at = expires_at * 2; DELETE FROM consumptions",
        f"INSERT INTO approvals SELECT seq + 2, '{S}', approver, expires_at FROM approvals",  # noqa: S608 - a test's own
        "DELETE FROM approvals; DELETE FROM approval_requests; DELETE FROM consumptions",
    ],
    ids=["deleted", "renamed", "moved-up", "moved-down", "prolonged", "brought-back", "all-deleted"],
)
@pytest.mark.parametrize("hours", [0, 23], ids=["at-once", "a-day-later"])
async def test_rows_that_somebody_changed_are_written_anew_at_the_next_start(
    tmp_path: Path, attack: str, hours: int
) -> None:
    """Invariant 7, the ledger's part. After a day as well: the records are read back to the oldest approval."""
    await used_and_withdrawn(tmp_path)
    clock = Clock(NOW + timedelta(hours=hours))
    async with await open_ledger(tmp_path, clock) as ledger:  # so that the last record is of this hour
        await ledger.append(records.PolicyChanged(at=clock.now, revision="r"))
    sql(tmp_path, attack)
    async with await open_ledger(tmp_path, clock) as ledger:
        assert await approvers(ledger) == []
        assert await approvers(ledger, S) == []
        assert await use(ledger, "again", now=clock.now) is Reason.APPROVAL_REQUIRED
        assert await use(ledger, "again", S, now=clock.now) is Reason.APPROVAL_REQUIRED
        if "DELETE FROM approvals" not in attack or not hours:
            assert await approvers(ledger, credential="grant", after_s=hours * 3600) == [APPROVER]
    assert fault(tmp_path) is None


async def test_an_approval_out_of_reach_of_the_start_counts_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing would say whether it was used: two requests are approved, one of them used, and both are forgotten."""
    async with await open_ledger(tmp_path) as ledger:
        for request in ("r", "s"):
            await ledger.ask_approval(asked(request))
            await ledger.approve(approved(request))
    async with await open_ledger(tmp_path) as ledger:
        assert await approvers(ledger) == [APPROVER], "the control: all of it is read"
        for number in range(10):
            await ledger.append(records.PolicyChanged(at=NOW, revision=f"{number}"))
        assert isinstance(await use(ledger, "grant"), int)
    monkeypatch.setattr(recovery, "_READ_BACK_RECORDS", 8)
    async with await open_ledger(tmp_path) as ledger:
        assert await approvers(ledger, S) == []
        assert await approvers(ledger, credential="grant") == []
        assert await use(ledger, "again", S) is Reason.APPROVAL_REQUIRED
        await ledger.approve(approved("s"))
        assert isinstance(await use(ledger, "again", S), int), "its request is still there"


@pytest.mark.parametrize(
    ("attack", "digest"),
    [
        (f"UPDATE approvals SET digest = '{S}'", S),  # noqa: S608 - a test's own
        ("UPDATE approvals SET approver = 'somebody'", R),
        ("UPDATE approvals SET seq = 1", R),
        ("UPDATE approvals SET seq = 1000", R),
    ],
    ids=["another-request", "another-approver", "another-record", "no-record"],
)
async def test_an_approval_that_nobody_gave_counts_for_nothing(tmp_path: Path, attack: str, digest: str) -> None:
    """Not even in a running broker: a row only leads to the record of who approved what, until when."""
    async with await open_ledger(tmp_path) as ledger:
        await ledger.ask_approval(asked("r"))
        await ledger.ask_approval(asked("s"))
        await ledger.approve(approved("r"))
        assert await approvers(ledger) == [APPROVER]
        sql(tmp_path, attack)
        with pytest.raises(Refused) as caught:
            await approvers(ledger, digest)
        assert caught.value.reason is Reason.REVOKED


async def test_an_approval_that_was_made_up_counts_for_nothing(tmp_path: Path) -> None:
    async with await open_ledger(tmp_path) as ledger:
        await ledger.ask_approval(asked("r"))
        put_approval(tmp_path, 3, R, "forged")
        with pytest.raises(Refused) as caught:
            await approvers(ledger)
        assert caught.value.reason is Reason.REVOKED


async def test_an_approvals_end_is_that_of_its_record(tmp_path: Path) -> None:
    async with await open_ledger(tmp_path) as ledger:
        await ledger.ask_approval(asked())
        await ledger.approve(approved(lives_s=60))
        sql(tmp_path, "UPDATE approvals SET expires_at = 9999999999")
        assert await approvers(ledger, after_s=59) == [APPROVER]
        assert await approvers(ledger, after_s=60) == []


async def test_a_request_that_nobody_asked_for_cannot_be_approved(tmp_path: Path) -> None:
    async with await open_ledger(tmp_path) as ledger:
        await ledger.ask_approval(asked("r"))
        sql(tmp_path, f"UPDATE approval_requests SET digest = '{S}'")  # noqa: S608 - a test's own
        for call in (ledger.approve(approved("s")), ledger.approval_request(S), ledger.pending(NOW)):
            with pytest.raises(Refused) as caught:
                await call
            assert caught.value.reason is Reason.REVOKED
    async with await open_ledger(tmp_path) as ledger:
        assert await ledger.approve(approved("r")), "written anew"


async def test_approvals_that_were_used_twice_by_deleting_a_row_are_found(tmp_path: Path) -> None:
    async with await open_ledger(tmp_path) as ledger:
        await ledger.ask_approval(asked())
        await ledger.approve(approved())
        assert isinstance(await use(ledger, "grant"), int)
        assert await ledger.record_intent(signature("grant", approval=R))
        assert fault(tmp_path) is None, "a child names what its parent used"
        sql(tmp_path, "DELETE FROM consumptions")
        assert isinstance(await use(ledger, "again"), int), "nothing in the file tells a running broker"
    assert fault(tmp_path) is Fault.APPROVAL_USED_TWICE


async def test_approvals_that_were_used_twice_by_asking_again_are_found(tmp_path: Path) -> None:
    async with await open_ledger(tmp_path) as ledger:
        await ledger.ask_approval(asked())
        await ledger.approve(approved())
        assert isinstance(await use(ledger, "grant"), int)
        sql(tmp_path, "DELETE FROM consumptions; DELETE FROM approval_requests")
        await ledger.ask_approval(asked())
        assert fault(tmp_path) is None
        assert isinstance(await use(ledger, "again"), int)
    assert fault(tmp_path) is Fault.NO_APPROVAL, "those of before were used"


async def test_an_intent_that_uses_approvals_nobody_gave_is_found(tmp_path: Path) -> None:
    async with await open_ledger(tmp_path) as ledger:
        await ledger.ask_approval(asked())
        put_approval(tmp_path, 1000, R, "forged")
        assert isinstance(await use(ledger, "grant", approvers=("forged",)), int), "who counts was decided before"
    assert fault(tmp_path) is Fault.NO_APPROVAL


@pytest.mark.parametrize("which", ["first", "child"])
async def test_an_intent_that_uses_an_approval_which_was_withdrawn_is_found(tmp_path: Path, which: str) -> None:
    """Somebody put the row back in a running broker."""
    async with await open_ledger(tmp_path) as ledger:
        await ledger.ask_approval(asked())
        await ledger.approve(approved())
        if which == "child":
            assert isinstance(await use(ledger, "grant"), int)
        assert await ledger.withdraw(withdrawn())
        made = signature("grant", approval=R) if which == "child" else intent("late", approval=R)
        with pytest.raises(Refused):
            await ledger.record_intent(made)
        assert fault(tmp_path) is None
        put_approval(tmp_path, 4, R, APPROVER)
        assert await ledger.record_intent(made)
    assert fault(tmp_path) is Fault.NO_APPROVAL


async def test_an_intent_that_names_an_approver_who_never_approved_is_found(tmp_path: Path) -> None:
    async with await open_ledger(tmp_path) as ledger:
        await ledger.ask_approval(asked())
        await ledger.approve(approved())
        sql(tmp_path, "UPDATE approvals SET approver = 'somebody'")
        assert isinstance(await use(ledger, "grant", approvers=("somebody",)), int), "who counts was decided before"
    assert fault(tmp_path) is Fault.NO_APPROVAL


async def test_what_is_no_longer_remembered_is_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consistency.Consistency.__init__, "__defaults__", (2,))
    digests = [request_digest(f"{number}") for number in range(8)]
    async with await open_ledger(tmp_path) as ledger:
        for number in range(8):
            await ledger.ask_approval(asked(f"{number}", lives_s=100))
        for number in range(8):
            await ledger.approve(approved(f"{number}"))
        for number in range(8):  # kept longer
            await ledger.ask_approval(asked(f"{number}", lives_s=3_600, now=NOW + timedelta(seconds=1)))
        for number, digest in enumerate(digests):
            assert isinstance(await use(ledger, f"jti-{number}", digest), int)
        assert fault(tmp_path) is None
        sql(tmp_path, "DELETE FROM consumptions")
        assert isinstance(await use(ledger, "again", digests[0]), int)
    assert fault(tmp_path) is Fault.APPROVAL_USED_TWICE


async def test_an_approval_of_an_earlier_epoch_counts_for_nothing(tmp_path: Path) -> None:
    """Invariant 7: in a store that may have been put back, nothing says what was taken back or used since."""
    async with await open_ledger(tmp_path) as ledger:
        await ledger.ask_approval(asked("r"))
        await ledger.approve(approved("r"))
        assert await approvers(ledger) == [APPROVER]
    (tmp_path / "checkpoint").unlink()
    for _ in range(2):  # the start that sees it, and one that reads the records back
        async with await open_ledger(tmp_path) as ledger:
            assert ledger.epoch == 2
            assert await approvers(ledger) == []
            assert await ledger.pending(NOW) == ()
            with pytest.raises(Refused) as caught:
                await ledger.approve(approved("r"))
            assert caught.value.reason is Reason.EXPIRED
            assert await use(ledger, "grant", epoch=2) is Reason.APPROVAL_REQUIRED
    put_approval(tmp_path, 4, R, APPROVER)  # the record of epoch 1
    async with await open_ledger(tmp_path) as ledger:
        assert await approvers(ledger) == []
        await ledger.ask_approval(asked("r"))
        await ledger.approve(approved("r"))
        sql(tmp_path, "UPDATE approvals SET seq = 4")
        assert isinstance(await use(ledger, "grant", epoch=2), int), "given anew"
    assert fault(tmp_path) is None


async def test_an_intent_that_uses_an_approval_of_an_earlier_epoch_is_found(tmp_path: Path) -> None:
    async with await open_ledger(tmp_path) as ledger:
        await ledger.ask_approval(asked("r"))
        await ledger.approve(approved("r"))
    (tmp_path / "checkpoint").unlink()
    async with await open_ledger(tmp_path) as ledger:
        put_approval(tmp_path, 4, R, APPROVER)
        assert isinstance(await use(ledger, "grant", epoch=2), int), "a running broker takes the row"
    assert fault(tmp_path) is Fault.NO_APPROVAL
