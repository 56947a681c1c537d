"""Approvals: to look at what waits, to say yes to it, to take that back, and to wait for others to.

What an approver is shown is computed again here: the broker's digest counts for nothing unless it is that of the fields
beside it.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Self

from attestors.approval import request_digest
from broker._proto.actionbroker.v1 import approvals_pb2
from broker.action import Action
from broker.client.faults import Unreachable, unintelligible
from broker.client.link import APPROVALS, Feed, Link, Method
from broker.errors import Invalid

_SHOW: Final = Method(name="Show", of=lambda stubs: stubs.approvals.Show, service=APPROVALS)
_PENDING: Final = Method(name="Pending", of=lambda stubs: stubs.approvals.Pending, service=APPROVALS)
_APPROVE: Final = Method(name="Approve", of=lambda stubs: stubs.approvals.Approve, service=APPROVALS)
_WITHDRAW: Final = Method(name="Withdraw", of=lambda stubs: stubs.approvals.Withdraw, service=APPROVALS)
_WAIT: Final = Feed(name="Wait", of=lambda stubs: stubs.approvals.Wait, service=APPROVALS)

_PAUSE_S: Final = 0.25  # before a stream that broke off is opened again
_LONGEST_PAUSE_S: Final = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Approval:
    """One yes. by: a SPIFFE ID, or <issuer>/subject/<base64url of sub> for a person."""

    by: str
    reason: str
    approved_at: datetime
    expires_at: datetime

    @classmethod
    def read(cls, message: approvals_pb2.Approval) -> Self:
        """From the wire."""
        return cls(
            by=message.by,
            reason=message.reason,
            approved_at=message.approved_at.ToDatetime(tzinfo=UTC),
            expires_at=message.expires_at.ToDatetime(tzinfo=UTC),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingRequest:
    """A request that somebody is asked to approve, whose digest was computed here, from these very fields.

    text: the operator's template, filled in by the broker. approvals: those that count now. is_used: they gave a
    credential.
    """

    request_digest: str
    action: Action
    principal: str
    request_id: str
    text: str
    asked_at: datetime
    expires_at: datetime
    approvals: tuple[Approval, ...]
    is_used: bool

    @classmethod
    def read(cls, message: approvals_pb2.ApprovalRequest) -> Self:
        """From the wire. Raises: Unreachable when the digest is not that of the fields."""
        wire = message.action
        try:
            action = Action.parse(wire.name, wire.resource, wire.audience, wire.parameters)
        except Invalid as error:
            raise unintelligible(f"a request for an action that cannot be: {error.detail}") from error
        digest = request_digest(action.digest.hex(), message.principal, message.request_id)
        if digest != message.request_digest:
            raise unintelligible("a request whose digest is not that of its fields: approve nothing of this broker")
        return cls(
            request_digest=digest,
            action=action,
            principal=message.principal,
            request_id=message.request_id,
            text=message.text,
            asked_at=message.asked_at.ToDatetime(tzinfo=UTC),
            expires_at=message.expires_at.ToDatetime(tzinfo=UTC),
            approvals=tuple(Approval.read(one) for one in message.approvals),
            is_used=message.state == "used",
        )


class ApprovalCalls:
    """`Client.approvals`. Each call raises Refused, Invalid or Unavailable, as the client's others do."""

    def __init__(self, link: Link, *, spiffe_id: str, seconds: float) -> None:
        self._link, self._spiffe_id, self._seconds = link, spiffe_id, seconds

    async def show(self, digest: str) -> PendingRequest:
        """One request, as it stands."""
        message = approvals_pb2.ShowApprovalRequest(request_digest=digest, spiffe_id=self._spiffe_id)
        return _asked_for(await self._link.call(_SHOW, message, self._seconds), digest)

    async def pending(self) -> tuple[PendingRequest, ...]:
        """Those that wait and that we may approve."""
        message = approvals_pb2.PendingApprovalsRequest(spiffe_id=self._spiffe_id)
        answer = await self._link.call(_PENDING, message, self._seconds)
        return tuple(PendingRequest.read(one) for one in answer.requests)

    async def approve(self, request: PendingRequest, *, reason: str = "", valid_for_s: int = 0) -> Approval:
        """Says yes to a request that was looked at. valid_for_s: 0 for the broker's default."""
        message = approvals_pb2.ApproveRequest(
            request_digest=request.request_digest, reason=reason, valid_for_s=valid_for_s, spiffe_id=self._spiffe_id
        )
        answer = await self._link.call(_APPROVE, message, self._seconds)
        return Approval.read(answer.approval)

    async def withdraw(self, digest: str, *, reason: str = "") -> None:
        """Takes our yes back."""
        message = approvals_pb2.WithdrawRequest(request_digest=digest, reason=reason, spiffe_id=self._spiffe_id)
        await self._link.call(_WITHDRAW, message, self._seconds)

    async def wait(self, digest: str, seconds: float) -> AsyncGenerator[PendingRequest]:
        """How a request of ours stands, now and at each change, until it is used or `seconds` are over.

        It is told and not asked for: a stream, which is opened again when it breaks off. Other calls can be made
        meanwhile.
        """
        clock = asyncio.get_running_loop().time
        until, told, pause = clock() + seconds, None, _PAUSE_S
        fault: Unreachable | None = None
        message = approvals_pb2.WaitForApprovalRequest(request_digest=digest, spiffe_id=self._spiffe_id)
        while (left := until - clock()) > 0:
            try:
                async with contextlib.aclosing(self._link.feed(_WAIT, message, left)) as answers:
                    async for answer in answers:
                        found = _asked_for(answer, digest)
                        if found == told:
                            continue
                        told, pause = found, _PAUSE_S
                        yield found
                        if found.is_used:
                            return
            except Unreachable as error:
                if told is not None and until - clock() < _PAUSE_S:
                    return
                if not error.may_retry:
                    raise
                fault = error
            await asyncio.sleep(min(pause, max(until - clock(), 0)))
            pause = min(2 * pause, _LONGEST_PAUSE_S)
        if told is None and fault is not None:
            raise fault


def _asked_for(message: approvals_pb2.ApprovalRequest, digest: str) -> PendingRequest:
    found = PendingRequest.read(message)
    if found.request_digest != digest:
        raise unintelligible("another request than was asked for")
    return found
