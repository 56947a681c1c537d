"""Approvals that are withdrawn while a token is decided on, or after. Signatures are in test_redemption.py."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import pytest
from support.approving import Approving, approving, digest_of, publish
from support.exchanging import CORRELATION
from support.scope import ScopeAround
from support.whole_broker import ISSUER, ORDERS

from attestors.approval import ApprovalAttestor, ApprovalSeen
from broker.approval_records import RecordedApprovals
from broker.decision.attest import Attestation
from broker.errors import ApprovalRequired, BrokerError, Reason, Refused
from broker.ledger.records import Intent, Record, Redemption

ID = "idempotency-id-1"


@dataclass
class Meanwhile:
    """The ledger as the source of approvals; `withdraws` does so once they were read, before anything comes of it."""

    found: Approving
    source: RecordedApprovals
    withdraws: str = ""
    started: list[asyncio.Task[None]] = field(default_factory=list)

    async def current(self, request_digest: str, now: datetime, credential: str) -> Sequence[ApprovalSeen]:
        seen = await self.source.current(request_digest, now, credential)
        if self.withdraws:
            self.started.append(asyncio.ensure_future(self.found.withdraw(self.withdraws)))
        return seen

    def subscribe(self, changed: Callable[[str], None]) -> Callable[[], None]:
        return self.source.subscribe(changed)

    async def reason(self, call: "asyncio.Future[object] | object", by: str = "") -> str:
        """Why not, where this one withdraws meanwhile; empty for yes."""
        self.withdraws = by
        try:
            await call  # type: ignore[misc] - a coroutine
        except BrokerError as error:
            return error.reason
        finally:
            self.withdraws = ""
            await asyncio.gather(*self.started)
            self.started.clear()
        return ""


async def meanwhile(found: Approving, *approvers: str) -> Meanwhile:
    """These have approved what the agent asks for."""
    exchange = found.parts.exchange
    made = Meanwhile(found, RecordedApprovals(exchange.ledger, exchange.policies))
    exchange.attestation = Attestation({"approval": ApprovalAttestor(made)}, 2.0)
    with pytest.raises(ApprovalRequired):
        await found.ask()
    for name in approvers:
        await found.approve(name)
    return made


async def records(found: Approving, kind: type[Record]) -> list[Record]:
    return [one for one in await found.parts.records() if isinstance(one, kind)]


async def test_a_token_is_not_minted_on_an_approval_that_was_withdrawn_while_it_was_decided(tmp_path: Path) -> None:
    """Two would do, and two are left: but it was decided on three, and would be recorded so."""
    async with approving(tmp_path) as found:
        made = await meanwhile(found, "ann", "bob", "carol")
        assert await made.reason(found.ask(), "carol") == Reason.APPROVAL_REQUIRED
        issued = await found.ask()
        (intent,) = await records(found, Intent)
    assert intent.jti == issued.claims.jti
    assert [name.rpartition("/")[2] for name in intent.approvers] == ["ann", "bob"]


def checks(found: Approving, token: str) -> object:
    asker, recheck = (
        found.parts.caller(ORDERS),
        ScopeAround(found.parts.exchange, found.parts.now).recheck({ISSUER: frozenset({ORDERS})}),
    )
    return recheck.check(asker, token, publish, found.now(), CORRELATION)


def redeems(found: Approving, token: str) -> object:
    asker, recheck = (
        found.parts.caller(ORDERS),
        ScopeAround(found.parts.exchange, found.parts.now).recheck({ISSUER: frozenset({ORDERS})}),
    )
    return recheck.redeem(asker, token, publish, ID, found.now(), CORRELATION)


async def test_a_token_is_good_as_long_as_the_approvals_that_gave_it(tmp_path: Path) -> None:
    async with approving(tmp_path) as found:
        made = await meanwhile(found, "ann", "bob")
        token = (await found.ask()).token
        assert await made.reason(checks(found, token)) == ""
        await found.withdraw("bob")
        assert await made.reason(checks(found, token)) == Reason.APPROVAL_REQUIRED
        assert await made.reason(redeems(found, token)) == Reason.APPROVAL_REQUIRED
        assert not await records(found, Redemption)


async def test_a_token_that_approvals_gave_is_redeemed_once(tmp_path: Path) -> None:
    async with approving(tmp_path) as found:
        made = await meanwhile(found, "ann", "bob")
        token = (await found.ask()).token
        assert await made.reason(redeems(found, token)) == ""
        assert await made.reason(checks(found, token)) == Reason.ALREADY_USED
        await found.withdraw("bob")
        assert await made.reason(redeems(found, token)) == "", "the first answer again, whatever has changed since"
        assert len(await records(found, Redemption)) == 1


async def test_a_withdrawal_between_decision_and_redemption_stops_it(tmp_path: Path) -> None:
    async with approving(tmp_path) as found:
        made = await meanwhile(found, "ann", "bob")
        token = (await found.ask()).token
        assert await made.reason(redeems(found, token), "bob") == Reason.APPROVAL_REQUIRED
        assert not await records(found, Redemption)


async def test_approvals_of_one_request_are_none_for_a_token_of_another(tmp_path: Path) -> None:
    async with approving(tmp_path) as found:
        made = await meanwhile(found, "ann", "bob")
        token = (await found.ask()).token
        other = "request-number-two"
        with pytest.raises(ApprovalRequired):
            await found.ask(request_id=other)
        for name in ("ann", "bob"):
            await found.approve(name, digest_of(request_id=other))
        await found.withdraw("ann")
        assert await made.reason(checks(found, token)) == Reason.APPROVAL_REQUIRED
        with pytest.raises(Refused):
            await found.ask()
        assert (await found.ask(request_id=other)).token
