"""An approval stands while the policies that gave it do, and is its approver's to take back, whatever they became."""

import hashlib
import json
from contextlib import aclosing
from pathlib import Path

import pytest
from support.approving import POLICY, WORKLOADS, Approving, approving, digest_of
from support.exchanging import CORRELATION

from broker.approval_records import rules_digest
from broker.errors import ApprovalRequired, Reason, Refused
from broker.ledger.records import ApprovalWithdrawn, Approved

APPROVERS = POLICY.index('@id("approvers")'), POLICY.index('@id("builders-approve-each-other")')


async def replace_policy(found: Approving, text: str) -> None:
    (found.parts.folder / "policy" / "release.cedar").write_text(text)
    await found.parts.exchange.policies.reload()


@pytest.mark.parametrize(
    ("changed", "count"),
    [
        (POLICY[: APPROVERS[0]] + POLICY[APPROVERS[1] :], 0),
        (POLICY.replace('Path::"spiffe://acme.test/approvers"', 'Path::"spiffe://acme.test/approvers/bob"'), 0),
        (POLICY.replace('@id("approvers") permit', '@id("approvers") forbid'), 0),
        (POLICY.replace('@id("approvers")', '@id("others")'), 0),
        (POLICY.replace('@id("builders-approve-each-other")', '@id("builders")'), 2),
        (POLICY.replace(">= 2", ">= 1"), 2),
        (f'{POLICY} @id("more") permit (principal, action == Action::"broker.approve", resource);', 2),
    ],
    ids=["taken-away", "narrowed", "turned", "renamed", "another", "what-it-is-for", "one-more"],
)
async def test_an_approval_counts_while_the_policy_that_gave_it_stands_as_it_was(
    changed: str, count: int, tmp_path: Path
) -> None:
    """For a first credential, and for the one that used it up; whoever looks sees the same."""
    async with approving(tmp_path) as found:
        for request_id in ("request-number-one", "request-number-two"):
            with pytest.raises(ApprovalRequired):
                await found.ask(request_id=request_id)
            for name in ("ann", "bob"):
                await found.approve(name, digest_of(request_id=request_id))
        issued = await found.ask(request_id="request-number-two")

        async def shown() -> int:
            waiting = found.desk.wait(found.who("agent"), found.digest, found.now, CORRELATION)
            async with aclosing(waiting) as states:
                return len((await anext(states)).approvals)

        await replace_policy(found, changed)
        lacking = None if count else Reason.APPROVAL_REQUIRED
        assert await found.why_not() is lacking
        assert await found.why_not(issued.claims.jti, request_id="request-number-two") is lacking
        assert await shown() == count
        if not count:
            with pytest.raises(ApprovalRequired):
                await found.ask()
            await replace_policy(found, POLICY)
        assert (await found.ask()).token


async def test_who_may_approve_no_more_still_takes_its_approval_back(tmp_path: Path) -> None:
    async with approving(tmp_path) as found:
        with pytest.raises(ApprovalRequired):
            await found.ask()
        for name in ("ann", "bob", "dora"):
            await found.approve(name)
        nobody = '@id("nobody") forbid (principal, action == Action::"broker.approve", resource);'
        await replace_policy(found, POLICY + nobody)
        for name in ("carol", "agent", "stranger", "emil"):
            with pytest.raises(Refused) as gave_none:
                await found.withdraw(name)
            assert gave_none.value.reason is Reason.DENIED
        with pytest.raises(Refused):
            await found.approve("ann")
        await found.withdraw("ann")
        await found.withdraw("dora")
        with pytest.raises(Refused):
            await found.withdraw("ann")
        with pytest.raises(ApprovalRequired):
            await found.ask()
        records = await found.parts.records()
    ann, dora = [one for one in records if isinstance(one, ApprovalWithdrawn)]
    assert (ann.by, ann.method, ann.request_digest) == (WORKLOADS["ann"], "mtls", found.digest)
    assert (dora.method, dora.evidence_sha256, dora.reason) == ("id-token", "11" * 32, "a mistake")


async def test_an_approval_is_recorded_with_the_texts_of_the_policies_that_gave_it(tmp_path: Path) -> None:
    async with approving(tmp_path) as found:
        with pytest.raises(ApprovalRequired):
            await found.ask()
        await found.approve("ann")
        policy = found.parts.exchange.policies.current
        (approved,) = [one for one in await found.parts.records() if isinstance(one, Approved)]
    text = POLICY[APPROVERS[0] : APPROVERS[1]].strip()
    named = json.dumps({"release.cedar#approvers": text}, separators=(",", ":")).encode()
    assert approved.rules_sha256 == hashlib.sha256(named).hexdigest()
    assert rules_digest(policy, approved.policies) == approved.rules_sha256
    for gone in ((), ("release.cedar#another",), ("release.cedar#approvers", "release.cedar#another")):
        assert not rules_digest(policy, gone)
    assert not rules_digest(policy, ("release.cedar#two-approvals",)), "it is no rule about approving"
