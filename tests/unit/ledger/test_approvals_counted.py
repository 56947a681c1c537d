"""Whoever was counted when it was decided counts when it is recorded: for a grant, and for what it is spent on."""

import asyncio
from collections.abc import Awaitable
from datetime import timedelta
from pathlib import Path

import pytest
from support.ledger_records import (
    APPROVER,
    NOW,
    PRINCIPAL,
    approved,
    asked,
    intent,
    open_ledger,
    request_digest,
    signature,
    withdrawn,
)

from broker.errors import Reason, Refused
from broker.ledger.reading import last_seq
from broker.ledger.spending import Spent
from broker.ledger.store import Ledger
from broker.ledger.verify import verify

R = request_digest("r")
BEN = "https://login.acme.test/subject/YmVu"


async def refusal(call: Awaitable[object]) -> Reason:
    with pytest.raises(Refused) as caught:
        await call
    return caught.value.reason


def spending(
    ledger: Ledger, *approvers: str, grant: str = "grant", digest: str = R, after_s: float = 1
) -> Awaitable[Spent]:
    """The grant is spent on a signature, decided again on these."""
    now = NOW + timedelta(seconds=after_s)
    made = signature(grant, approval=digest, approvers=approvers, now=now)
    return ledger.spend(grant, "id-of-16-or-more", PRINCIPAL, b"c" * 32, intent=made, now=now, correlation_id="c")


@pytest.mark.parametrize("by", [APPROVER, BEN])
async def test_an_intent_needs_every_approval_that_was_counted_when_it_was_decided(tmp_path: Path, by: str) -> None:
    """One of two is withdrawn in between: what is left does not stand for both, whatever would have been enough."""
    async with await open_ledger(tmp_path) as ledger:
        for request in ("r", "s"):
            await ledger.ask_approval(asked(request))
            for approver in (APPROVER, BEN):
                await ledger.approve(approved(request, by=approver))
        await ledger.withdraw(withdrawn(by=by))
        both = {"approvers": (APPROVER, BEN)}
        assert await refusal(ledger.record_intent(intent("grant", approval=R, **both))) is Reason.APPROVAL_REQUIRED
        assert await ledger.record_intent(intent("control", approval=request_digest("s"), **both))
        assert await ledger.record_intent(intent("again", approval=R, approvers=tuple({APPROVER, BEN} - {by})))
    assert verify(tmp_path / "ledger.db").good


async def test_a_withdrawal_that_is_durable_before_a_grant_is_spent_stops_the_signature(tmp_path: Path) -> None:
    """Also after the second look has counted it; nothing is spent or recorded then."""
    async with await open_ledger(tmp_path) as ledger:
        for request in ("r", "s"):
            await ledger.ask_approval(asked(request))
            for approver in (APPROVER, BEN):
                await ledger.approve(approved(request, by=approver))
            await ledger.record_intent(intent(f"grant-{request}", approval=request_digest(request)))
        await ledger.withdraw(withdrawn(by=BEN))
        before = last_seq(tmp_path / "ledger.db")
        assert await refusal(spending(ledger, APPROVER, BEN, grant="grant-r")) is Reason.APPROVAL_REQUIRED
        assert last_seq(tmp_path / "ledger.db") == before
        other = spending(ledger, APPROVER, BEN, grant="grant-s", digest=request_digest("s"))
        assert (await other).intent_seq, "the control"
        assert (await spending(ledger, APPROVER, grant="grant-r")).intent_seq, "decided on what is left"
    assert verify(tmp_path / "ledger.db").good


async def test_an_approval_that_ended_before_a_grant_is_spent_stops_the_signature(tmp_path: Path) -> None:
    async with await open_ledger(tmp_path) as ledger:
        await ledger.ask_approval(asked())
        await ledger.approve(approved(lives_s=30))
        await ledger.record_intent(intent("grant", approval=R))
        assert await refusal(spending(ledger, APPROVER, after_s=30)) is Reason.APPROVAL_REQUIRED
        assert (await spending(ledger, APPROVER, after_s=29)).intent_seq


async def test_a_grant_is_not_spent_on_approvals_that_another_used_up(tmp_path: Path) -> None:
    async with await open_ledger(tmp_path) as ledger:
        await ledger.ask_approval(asked())
        await ledger.approve(approved())
        await ledger.record_intent(intent("grant", approval=R))
        await ledger.record_intent(intent("other"))
        assert await refusal(spending(ledger, APPROVER, grant="other")) is Reason.APPROVAL_REQUIRED
        assert (await spending(ledger, APPROVER)).intent_seq


@pytest.mark.parametrize("first", ["withdrawal", "signature"])
async def test_of_a_withdrawal_and_a_signature_in_one_group_the_first_comes_first(tmp_path: Path, first: str) -> None:
    async with await open_ledger(tmp_path) as ledger:
        await ledger.ask_approval(asked())
        await ledger.approve(approved())
        await ledger.record_intent(intent("grant", approval=R))
        steps = [ledger.withdraw(withdrawn()), spending(ledger, APPROVER)]
        if first == "signature":
            steps.reverse()
        answers = await asyncio.gather(*steps, return_exceptions=True)
        assert True in answers, "taken back in any case"
        assert {type(answer) for answer in answers} == {bool, Refused if first == "withdrawal" else Spent}
    assert verify(tmp_path / "ledger.db").good


async def test_an_intent_names_the_request_and_its_approvers_or_neither(tmp_path: Path) -> None:
    async with await open_ledger(tmp_path) as ledger:
        for changes in ({"approval": R, "approvers": ()}, {"approvers": (APPROVER,)}):
            with pytest.raises(ValueError, match="or neither"):
                ledger.record_intent(intent(**changes))  # type: ignore[arg-type] - as intent
        assert await ledger.record_intent(intent())
