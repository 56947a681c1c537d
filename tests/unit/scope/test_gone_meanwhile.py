"""What comes between a reason's end and its credential's: a suspension that ends first, or a rule that goes."""

import asyncio
from pathlib import Path

import pytest
import support.operating as around
from support.exchanging import CORRELATION, act
from support.lives import Reader
from support.operating import ANN, Operating, operating
from support.processes import until
from support.redeciding import POLICY, Redeciding, redeciding

from broker.errors import ApprovalRequired, Reason, Refused
from broker.exchange import Issued
from broker.ledger.records import ScopeRefused
from broker.presented import Presented
from broker.scope.live import Live


class SlowKeeper:
    """Passes refusals on to the store once it is let to, as a slow disk would."""

    def __init__(self, found: Redeciding) -> None:
        self.lets = asyncio.Event()
        self._refuse = found.scope.store.refuse

    async def refuse(self, record: ScopeRefused, ends: object) -> object:
        await self.lets.wait()
        return await self._refuse(record, ends)  # type: ignore[arg-type] - passed on as it came


async def test_the_end_of_a_suspension_gives_no_guard_back_what_is_being_refused(tmp_path: Path) -> None:
    """All were suspended, and one was revoked meanwhile: its refusal is not durable yet when the others come back."""
    async with redeciding(tmp_path) as found:
        lives = [await found.token() for _ in range(80)]
        one, said = lives[-1], [""]
        slow = SlowKeeper(found)
        found.scope.deciding.refusing._keeper = slow  # type: ignore[assignment] - the same, but slow

        async def listen() -> None:
            while True:
                if (now := str(found.says(one))) != said[-1]:
                    said.append(now)
                await asyncio.sleep(0)

        listening = asyncio.create_task(listen())
        await found.policy(POLICY.replace('"300s"', '"200s"'))
        await found.becomes(one, "suspended")
        revoking = asyncio.create_task(found.scope.deciding.refuse([one], Reason.REVOKED, "operator"))
        await until(lambda: found.parts.exchange.scope.is_refused(one.jti), "the broker refuses it")
        for _ in range(200):
            await asyncio.sleep(0)
        slow.lets.set()
        await revoking
        await found.becomes(one, "revoked")
        await found.settled()
        listening.cancel()
        assert said == ["", "suspended", "revoked"]
        assert {str(found.says(other)) for other in lives[:-1]} == {""}


GUARDED = """
action "orders.guarded" appliesTo { principal: [Workload], resource: [Resource], context: { approval: Approval } };
"""
RULE = """
@id("guarded") @reuse("ttl") @max_ttl("300s")
permit (principal, action == Action::"orders.guarded", resource) when { context.approval.count >= 1 };
"""
MAY_APPROVE = """
@id("ann-approves") permit (
  principal == Workload::"spiffe://acme.test/approvers/ann", action == Action::"broker.approve", resource
) when { context.parameters.action == "orders.guarded" };
"""


async def approved(found: Operating) -> Live:
    """A credential that rests on ann's yes."""

    async def ask() -> Issued:
        return await found.parts.exchange.request(
            found.parts.caller(),
            lambda: act("orders.guarded"),
            found.now(),
            CORRELATION,
            Presented(request_id="r" * 20),
        )

    try:
        await ask()
    except ApprovalRequired as lacking:
        await found.approve(lacking.request_digest, ANN)
    live = found.scope.live.get((await ask()).claims.jti)
    assert live is not None
    return live


async def test_an_approval_whose_approver_may_no_longer_approve_ends_what_it_gave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not only a withdrawal does: the policy that let its approver say yes is part of it."""
    monkeypatch.setitem(around.POLICIES, "more.cedarschema", GUARDED)
    async with operating(tmp_path, RULE + MAY_APPROVE) as found:
        live = await approved(found)
        reader = Reader(found.opened.feed, live.audience, now=found.now())

        def says() -> str:
            found.opened.feed.proven(reader.now)
            return str(reader.catch_up().says(live))

        assert says() == ""
        (found.parts.folder / "policy" / "more.cedar").write_text(RULE)
        await found.parts.exchange.policies.reload()
        await until(lambda: says() == Reason.APPROVAL_REQUIRED, "a guard refuses it")
        with pytest.raises(Refused) as refused:
            found.scope.require(live.jti)
        assert refused.value.reason is Reason.APPROVAL_REQUIRED
