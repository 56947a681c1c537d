"""What operators deny and permit is in the records alone: no row can be deleted or made up, no window forgets it."""

import shutil
from datetime import datetime, timedelta
from pathlib import Path

import apsw
import msgspec
import pytest
from support.ledger_records import (
    NOW,
    QUICK,
    Clock,
    approved,
    asked,
    intent,
    open_ledger,
    request_digest,
    withdrawn,
)
from support.processes import until
from support.session_records import sql

from broker.errors import BrokerError, Reason, Refused
from broker.ledger import chain, records, standing
from broker.ledger.reading import read
from broker.ledger.records import BreakGlass, Checkpointed, PolicyChanged, StandingDenial, StandingLifted, Started
from broker.ledger.scope_steps import Kept
from broker.ledger.scope_store import ScopeStore
from broker.ledger.store import Ledger
from broker.ledger.verify import Fault, verify

OPERATOR = "spiffe://acme.test/operator"
AGENT = "spiffe://acme.test/build/agent"
ANN, BOB = "spiffe://acme.test/people/ann", "spiffe://acme.test/people/bob"


def denial(name: str = "d-1", *, now: datetime = NOW, until: datetime | None = None) -> StandingDenial:
    return StandingDenial(
        at=now, id=name, principal=AGENT, until=until, by=OPERATOR, policies=("operators",), policy_revision="r"
    )


def permit(
    name: str = "p-1", request_id: str = "r", *, now: datetime = NOW, approvers: tuple[str, ...] = (ANN, BOB)
) -> BreakGlass:
    return BreakGlass(
        at=now,
        id=name,
        principal=AGENT,
        action="orders.closed",
        resource="https://orders.acme.test/orders/17",
        until=NOW + timedelta(hours=1),
        by=OPERATOR,
        approval=request_digest(request_id),
        approvers=(ANN, BOB),
        policies=("may-break-glass",),
        policy_revision="r",
    )


def lifted(name: str = "d-1", *, now: datetime = NOW) -> StandingLifted:
    return StandingLifted(at=now, id=name, by=OPERATOR, policies=("operators",), policy_revision="r")


def store_of(ledger: Ledger) -> ScopeStore:
    return ScopeStore(ledger.submit, ledger.append_later)


async def kept(folder: Path, now: datetime = NOW) -> Kept:
    """What the next process finds."""
    async with await open_ledger(folder, Clock(now)) as ledger:
        return await store_of(ledger).kept(now)


async def ids(folder: Path, now: datetime = NOW) -> list[str]:
    return [one.id for one in (await kept(folder, now)).standing]


async def approve(ledger: Ledger, request_id: str = "r", *approvers: str, now: datetime = NOW) -> None:
    await ledger.ask_approval(asked(request_id, now=now))
    for one in approvers or (ANN, BOB):
        await ledger.approve(approved(request_id, one, now=now))


def chained(folder: Path) -> list[tuple[int, records.Record]]:
    return [(row.seq, row.record()) for row in read(folder / "ledger.db")]


async def test_what_stands_is_found_at_the_next_start_oldest_first_and_what_was_lifted_or_ended_is_not(
    tmp_path: Path,
) -> None:
    async with await open_ledger(tmp_path) as ledger:
        store = store_of(ledger)
        await store.deny(denial("first"))
        await store.deny(denial("lifted"))
        await store.deny(denial("brief", until=NOW + timedelta(minutes=1)))
        await approve(ledger)
        await store.permit(permit())
        await store.lift(lifted("lifted"))
        await store.deny(denial("last"))
    assert await ids(tmp_path) == ["first", "brief", "p-1", "last"]
    assert await ids(tmp_path, NOW + timedelta(minutes=1)) == ["first", "p-1", "last"]
    assert await ids(tmp_path, NOW + timedelta(hours=1)) == ["first", "last"]
    assert await ids(tmp_path, NOW + timedelta(days=3650)) == ["first", "last"], "a denial stands for years"
    found = (await kept(tmp_path)).standing[0]
    assert (found.by, found.principal) == (OPERATOR, AGENT)
    assert verify(tmp_path / "ledger.db").good


async def test_each_record_names_the_one_before_it_and_each_note_the_last(tmp_path: Path) -> None:
    async with await open_ledger(tmp_path, limits=QUICK) as ledger:
        store = store_of(ledger)
        for name in ("a", "b"):
            await store.deny(denial(name))
            size = ledger.size
            await until(
                lambda size=size: any(s > size and isinstance(r, Checkpointed) for s, r in chained(tmp_path)), "a note"
            )
        await store.lift(lifted("a"))
    async with await open_ledger(tmp_path):
        pass
    last, notes = 0, set()
    for seq, record in chained(tmp_path):
        if isinstance(record, StandingDenial | StandingLifted | BreakGlass):
            assert record.before == last
            last = seq
        elif isinstance(record, Checkpointed | Started):
            assert record.standing == last
            notes.add((type(record), last))
    assert len(notes) >= 4
    assert (Started, last) in notes


async def test_a_denial_behind_any_number_of_records_is_found(tmp_path: Path) -> None:
    async with await open_ledger(tmp_path, limits=QUICK) as ledger:
        await store_of(ledger).deny(denial())
        for number in range(300):
            await ledger.append(PolicyChanged(at=NOW, revision=f"{number}"))
    for _ in range(3):
        async with await open_ledger(tmp_path) as ledger:
            await ledger.append(PolicyChanged(at=NOW, revision="r"))
    assert await ids(tmp_path) == ["d-1"]


async def test_a_crash_without_any_note_keeps_it(tmp_path: Path) -> None:
    live, copy = tmp_path / "live", tmp_path / "copy"
    live.mkdir()
    async with await open_ledger(live) as ledger:
        await store_of(ledger).deny(denial())
        shutil.copytree(live, copy)
        await store_of(ledger).lift(lifted())
    assert await ids(copy) == ["d-1"]
    assert await ids(live) == []


# -- epochs ------------------------------------------------------------------------------------------------------------


async def test_in_a_new_epoch_denials_stand_and_permits_do_not(tmp_path: Path) -> None:
    """A copy that was put back: what it denies is safe; what it permits may have been lifted since, or ended."""
    live, copy = tmp_path / "live", tmp_path / "copy"
    live.mkdir()
    async with await open_ledger(live) as ledger:
        store = store_of(ledger)
        await store.deny(denial())
        await approve(ledger)
        await store.permit(permit())
    copy.mkdir()
    for file in live.glob("ledger.db*"):
        shutil.copy(file, copy)
    assert await ids(live) == ["d-1", "p-1"], "the control: a start like any other"
    for file in live.glob("ledger.db*"):
        file.unlink()
    for file in copy.iterdir():
        shutil.copy(file, live)
    async with await open_ledger(live) as ledger:
        assert ledger.epoch == 2
        assert [one.id for one in (await store_of(ledger).kept(NOW)).standing] == ["d-1"]
        store = store_of(ledger)
        with pytest.raises(Refused) as caught:  # its approvals count no more either
            await store.permit(permit("p-2"))
        assert caught.value.reason is Reason.APPROVAL_REQUIRED
        await approve(ledger, "again")
        await store.permit(permit("p-3", "again"))
    assert await ids(live) == ["d-1", "p-3"]
    assert verify(live / "ledger.db").good


# -- permits use approvals up ------------------------------------------------------------------------------------------


async def test_a_permit_uses_its_approvals_up_and_nothing_else_can(tmp_path: Path) -> None:
    async with await open_ledger(tmp_path) as ledger:
        store = store_of(ledger)
        await approve(ledger)
        await store.permit(permit())
        with pytest.raises(Refused) as caught:
            await store.permit(permit("p-2"))
        assert caught.value.reason is Reason.APPROVAL_REQUIRED
        with pytest.raises(Refused) as caught:
            await ledger.record_intent(intent("a", approval=request_digest()))
        assert caught.value.reason is Reason.APPROVAL_REQUIRED
        row = await ledger.approval_request(request_digest())
        assert row is not None
        assert row.used_by == "p-1"
    async with await open_ledger(tmp_path) as ledger:
        with pytest.raises(Refused):
            await store_of(ledger).permit(permit("p-3"))
        await approve(ledger, "another")
        await store_of(ledger).permit(permit("p-4", "another"))
    assert await ids(tmp_path) == ["p-1", "p-4"]


@pytest.mark.parametrize("approvers", [(ANN,), (ANN, "spiffe://acme.test/people/carol")], ids=["too-few", "another"])
async def test_a_permit_whose_approvers_did_not_all_approve_is_not_recorded(
    tmp_path: Path, approvers: tuple[str, ...]
) -> None:
    async with await open_ledger(tmp_path) as ledger:
        await approve(ledger, "r", *approvers[:1])
        with pytest.raises(Refused):
            await store_of(ledger).permit(permit())
        await ledger.approve(approved("r", BOB))
        await ledger.approve(approved("r", ANN))
        await store_of(ledger).permit(permit())
    assert await ids(tmp_path) == ["p-1"]


async def test_an_approval_that_is_withdrawn_in_the_same_moment_gives_no_permit(tmp_path: Path) -> None:
    async with await open_ledger(tmp_path) as ledger:
        await approve(ledger)
        withdrawing = ledger.withdraw(withdrawn("r", BOB))
        assert await withdrawing
        with pytest.raises(Refused):
            await store_of(ledger).permit(permit())
    assert await ids(tmp_path) == []


async def test_a_permit_ends_with_the_approval_of_one_who_gave_it_and_not_with_anothers(tmp_path: Path) -> None:
    async with await open_ledger(tmp_path) as ledger:
        await approve(ledger, "r", ANN, BOB, "spiffe://acme.test/people/carol")
        await store_of(ledger).permit(permit())
        assert await ledger.withdraw(withdrawn("r", "spiffe://acme.test/people/carol"))
    assert await ids(tmp_path) == ["p-1"]
    async with await open_ledger(tmp_path) as ledger:
        assert await ledger.withdraw(withdrawn("r", BOB))
    assert await ids(tmp_path) == []
    (end,) = [one for _, one in chained(tmp_path) if isinstance(one, StandingLifted)]
    assert (end.id, end.by) == ("p-1", BOB)
    assert verify(tmp_path / "ledger.db").good


# -- attacks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "table", ["refused", "consumptions", "approvals", "approval_requests", "credentials", "sessions"]
)
async def test_whatever_table_somebody_empties_a_denial_stands_and_a_lifted_permit_does_not(
    tmp_path: Path, table: str
) -> None:
    async with await open_ledger(tmp_path) as ledger:
        await store_of(ledger).deny(denial())
        await approve(ledger)
        await store_of(ledger).permit(permit())
        await store_of(ledger).lift(lifted("p-1"))
    sql(tmp_path, f"DELETE FROM {table}")  # noqa: S608 - ours
    assert await ids(tmp_path) == ["d-1"]
    async with await open_ledger(tmp_path) as ledger:
        with pytest.raises(Refused):
            await store_of(ledger).permit(permit("p-2"))


async def test_a_refused_credential_whose_row_somebody_deleted_is_refused_after_the_next_start(tmp_path: Path) -> None:
    async with await open_ledger(tmp_path) as ledger:
        await ledger.record_intent(intent("a"))
        await ledger.record_intent(intent("b"))
        gone = records.ScopeRefused(at=NOW, jtis=("a",), reason=Reason.REVOKED, cause="operator")
        await store_of(ledger).refuse(gone, [int(NOW.timestamp()) + 60])
        sql(tmp_path, "DELETE FROM refused")
    assert {jti: reason for jti, (reason, _) in (await kept(tmp_path)).refused.items()} == {"a": Reason.REVOKED}


def rewrite(folder: Path, seq: int, body: bytes) -> None:
    """Puts another body in, with the chain as it was."""
    connection = apsw.Connection(str(folder / "ledger.db"))
    connection.execute("UPDATE records SET body = ? WHERE seq = ?", (body, seq))
    connection.close()


def chain_anew(folder: Path) -> None:
    """Makes the hashes fit again, as somebody can who knows how."""
    connection = apsw.Connection(str(folder / "ledger.db"))
    head = chain.genesis(connection.execute("SELECT id FROM ledger").get)
    for seq, body in connection.execute("SELECT seq, body FROM records ORDER BY seq").fetchall():
        head = chain.link(head, seq, body)
        connection.execute("UPDATE records SET hash = ? WHERE seq = ?", (head, seq))
    connection.execute("UPDATE ledger SET head = ?", (head,))
    connection.close()


@pytest.mark.parametrize("kind", [Started, StandingDenial, StandingLifted], ids=lambda kind: kind.__name__)
async def test_a_record_that_leads_past_a_denial_is_found_by_verify_even_where_the_chain_was_made_to_fit(
    tmp_path: Path, kind: type
) -> None:
    async with await open_ledger(tmp_path) as ledger:
        for name in ("a", "b"):
            await store_of(ledger).deny(denial(name))
        await store_of(ledger).lift(lifted("b"))
    async with await open_ledger(tmp_path):
        pass
    assert verify(tmp_path / "ledger.db").good
    seq, record = [(seq, one) for seq, one in chained(tmp_path) if isinstance(one, kind)][-1]
    field = "standing" if kind is Started else "before"
    rewrite(tmp_path, seq, records.encode(msgspec.structs.replace(record, **{field: 0})))
    report = verify(tmp_path / "ledger.db")
    assert report.finding is not None
    assert (report.finding.fault, report.finding.seq) == (Fault.CHANGED, seq)
    chain_anew(tmp_path)
    report = verify(tmp_path / "ledger.db")
    assert report.finding is not None
    assert (report.finding.fault, report.finding.seq) == (Fault.STANDING_LOST, seq)


@pytest.mark.parametrize(
    "approvers",
    [(), (ANN,), (ANN, ANN), (ANN, "spiffe://acme.test/people/carol")],
    ids=["none", "one", "twice", "other"],
)
async def test_a_permit_that_two_did_not_approve_is_found_by_verify(tmp_path: Path, approvers: tuple[str, ...]) -> None:
    async with await open_ledger(tmp_path) as ledger:
        await approve(ledger)
        await store_of(ledger).permit(permit())
    (found,) = [(seq, one) for seq, one in chained(tmp_path) if isinstance(one, BreakGlass)]
    assert verify(tmp_path / "ledger.db").good
    rewrite(tmp_path, found[0], records.encode(msgspec.structs.replace(found[1], approvers=approvers)))
    chain_anew(tmp_path)
    report = verify(tmp_path / "ledger.db")
    assert report.finding is not None
    assert (report.finding.fault, report.finding.seq) == (Fault.NO_APPROVAL, found[0])


async def test_approvals_that_gave_two_permits_are_found_by_verify(tmp_path: Path) -> None:
    async with await open_ledger(tmp_path) as ledger:
        await approve(ledger)
        await store_of(ledger).permit(permit())
        sql(tmp_path, "DELETE FROM consumptions")  # by somebody who writes to a running broker's store
        await store_of(ledger).permit(permit("p-2"))
    report = verify(tmp_path / "ledger.db")
    assert report.finding is not None
    assert report.finding.fault is Fault.APPROVAL_USED_TWICE


@pytest.mark.parametrize(
    "body",
    [b"{", b'{"kind":"stopped","at":"2026-11-22T23:07:00Z"}', None],
    ids=["unreadable", "another-kind", "names-itself"],
)
async def test_a_store_whose_records_do_not_say_what_stands_is_not_served_from(
    tmp_path: Path, body: bytes | None
) -> None:
    async with await open_ledger(tmp_path) as ledger:
        await store_of(ledger).deny(denial("a"))
        await store_of(ledger).deny(denial("b"))
    seq, first = next((seq, one) for seq, one in chained(tmp_path) if isinstance(one, StandingDenial))
    itself = records.encode(msgspec.structs.replace(first, before=seq))
    rewrite(tmp_path, seq, itself if body is None else body)
    with pytest.raises(BrokerError) as caught:
        await kept(tmp_path)
    assert "ledger verify" in caught.value.detail


def test_what_counts_as_about_what_stands_is_all_of_it() -> None:
    kinds = {record.__struct_config__.tag: record for record in (StandingDenial, StandingLifted, BreakGlass)}
    assert set(kinds) == standing.KINDS
    assert {record.__struct_config__.tag for record in (Started, Checkpointed)} == standing.NOTES
