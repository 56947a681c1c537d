"""actionbroker.v1.Approvals over gRPC. Each call is: identify, hand to the desk, answer in one of two ways.

An approver is an SVID, a process, or a person whose ID token is in the message; its nonce is the digest of the request,
so it speaks for that request alone, and no key is proven beside it.
"""

import asyncio
import contextlib
from collections.abc import Iterator
from datetime import datetime
from typing import Final

from broker._proto.actionbroker.v1 import action_pb2, approvals_pb2, approvals_pb2_grpc
from broker.action import canonical_json
from broker.approval_records import Shown
from broker.approvals import Approvals
from broker.edges.grpc_answers import Answers, Clock
from broker.edges.grpc_peer import Context, Identifier
from broker.edges.grpc_wire import timestamp
from broker.edges.metrics import Metrics
from broker.edges.places import PATIENCE_S, Held
from broker.errors import Invalid, Reason, Refused
from broker.exchange import Exchange
from broker.identity.identify import Identified
from broker.ledger.approvals import ApprovalSeen

SERVICE: Final = "actionbroker.v1.Approvals"
MAX_WAITS: Final = 256  # streams of callers that wait, and of one of them
MAX_WAITS_OF_ONE: Final = 8


class ApprovalsService(approvals_pb2_grpc.ApprovalsServicer):
    """The service. Holds no state of its own but who waits. Its calls must be added as `PromptCalls` (places.py)."""

    def __init__(
        self,
        approvals: Approvals,
        exchange: Exchange,
        *,
        identifier: Identifier,
        metrics: Metrics,
        clock: Clock,
    ) -> None:
        self._approvals, self._exchange = approvals, exchange
        self._identifier, self._clock = identifier, clock
        self._calls = Answers(identifier, metrics, clock)
        self._held = Held(MAX_WAITS, MAX_WAITS_OF_ONE)

    async def Show(self, request: approvals_pb2.ShowApprovalRequest, context: Context) -> approvals_pb2.ApprovalRequest:
        """One request, to who may approve it."""

        async def work(now: datetime, correlation: str) -> approvals_pb2.ApprovalRequest:
            asker = await self._asker(context, "Show", request, now, correlation)
            return _request(await self._approvals.show(asker, request.request_digest, now, correlation))

        return await self._calls.answer(context, "Show", "shown", work)

    async def Pending(
        self, request: approvals_pb2.PendingApprovalsRequest, context: Context
    ) -> approvals_pb2.PendingApprovalsResponse:
        """What waits for the asker."""

        async def work(now: datetime, correlation: str) -> approvals_pb2.PendingApprovalsResponse:
            caller = await self._identifier.identify_call(
                context, "Pending", request.spiffe_id, now, correlation, SERVICE
            )
            found = await self._approvals.pending(caller.identity, now, correlation)
            return approvals_pb2.PendingApprovalsResponse(requests=[_request(one) for one in found])

        return await self._calls.answer(context, "Pending", "shown", work)

    async def Approve(self, request: approvals_pb2.ApproveRequest, context: Context) -> approvals_pb2.ApproveResponse:
        """Says yes."""

        async def work(now: datetime, correlation: str) -> approvals_pb2.ApproveResponse:
            approver = await self._asker(context, "Approve", request, now, correlation)
            given = await self._approvals.approve(
                approver, request.request_digest, request.reason, request.valid_for_s, now, correlation
            )
            return approvals_pb2.ApproveResponse(approval=_approval(given), correlation_id=correlation)

        return await self._calls.answer(context, "Approve", "approved", work)

    async def Withdraw(
        self, request: approvals_pb2.WithdrawRequest, context: Context
    ) -> approvals_pb2.WithdrawResponse:
        """Takes a yes back."""

        async def work(now: datetime, correlation: str) -> approvals_pb2.WithdrawResponse:
            approver = await self._asker(context, "Withdraw", request, now, correlation)
            await self._approvals.withdraw(approver, request.request_digest, request.reason, now, correlation)
            return approvals_pb2.WithdrawResponse(correlation_id=correlation)

        return await self._calls.answer(context, "Withdraw", "withdrawn", work)

    async def Wait(  # type: ignore[override]
        self, request: approvals_pb2.WaitForApprovalRequest, context: Context
    ) -> None:
        """Tells a request's caller its state until it ends."""
        with (
            contextlib.ExitStack() as place
        ):  # kept to the very end: to end a call may take as long as its client wants

            async def work(now: datetime, correlation: str) -> None:
                caller = await self._identifier.identify_call(
                    context, "Wait", request.spiffe_id, now, correlation, SERVICE
                )
                place.enter_context(self._place(str(caller.identity.principal)))
                # The next nonce: who waits asks for its credential on this connection, while this call is still open.
                await context.send_initial_metadata(self._identifier.nonce_metadata(context, self._clock()))
                await self._tell(caller.identity, request.request_digest, context, correlation)

            await self._calls.answer(context, "Wait", "told", work)

    @contextlib.contextmanager
    def _place(self, caller: str) -> Iterator[None]:
        with self._exchange.counted():
            self._held.take(caller)
        try:
            yield
        finally:
            self._held.give_back(caller)

    async def _tell(self, caller: Identified, digest: str, context: Context, correlation: str) -> None:
        """Writes each state. Who does not take one in time is told no more, and keeps its place until it goes."""
        async with contextlib.aclosing(self._approvals.wait(caller, digest, self._clock, correlation)) as states:
            async for state in states:
                try:
                    async with asyncio.timeout(PATIENCE_S):
                        await context.write(_request(state))
                except TimeoutError:
                    with self._exchange.counted():
                        raise Refused(Reason.QUOTA, "a state was not taken in time") from None

    async def _asker(
        self,
        context: Context,
        method: str,
        request: approvals_pb2.ShowApprovalRequest | approvals_pb2.ApproveRequest | approvals_pb2.WithdrawRequest,
        now: datetime,
        correlation: str,
    ) -> Identified:
        """Who says this. Raises: BrokerError."""
        if not request.id_token:
            caller = await self._identifier.identify_call(context, method, request.spiffe_id, now, correlation, SERVICE)
            return caller.identity
        with self._exchange.counted():
            if request.spiffe_id:
                raise Invalid("a person has no SPIFFE ID: send an ID token or a SPIFFE ID")
            uid = self._identifier.uid(context)
            if uid is not None:  # a token costs the issuer's keys and a signature: as much as SPIRE's word
                self._exchange.attestations.take(str(uid), asyncio.get_running_loop().time())
        return await self._approvals.person(request.id_token, request.request_digest, now)


def _request(shown: Shown) -> approvals_pb2.ApprovalRequest:
    request = shown.request
    action = action_pb2.Action(
        name=request.action.name,
        resource=request.action.resource,
        audience=request.action.audience,
        parameters=canonical_json(request.action.parameters, plain=False).decode(),
    )
    return approvals_pb2.ApprovalRequest(
        request_digest=request.digest,
        action=action,
        action_digest=request.action.digest.hex(),
        principal=request.principal,
        request_id=request.request_id,
        text=shown.text,
        asked_at=timestamp(shown.asked_at),
        expires_at=timestamp(shown.expires_at),
        approvals=[_approval(one) for one in shown.approvals],
        state=shown.state,
    )


def _approval(given: ApprovalSeen) -> approvals_pb2.Approval:
    return approvals_pb2.Approval(
        by=given.approver,
        reason=given.reason,
        approved_at=timestamp(given.approved_at),
        expires_at=timestamp(given.expires_at),
    )
