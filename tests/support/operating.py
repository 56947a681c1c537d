"""An exchange with scope around it as `serve` wires it, and what operators and approvers do to it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from support.exchanging import CORRELATION, Exchanging, act, exchanging
from support.whole_broker import AGENT, OPERATOR, POLICY, RESOURCE, SCHEMA

from attestors.approval import ApprovalAttestor
from broker.approval_records import RecordedApprovals
from broker.approval_text import Texts
from broker.approvals import Approvals
from broker.break_glass import Emergencies
from broker.cli.serve_scope import ScopeParts, open_scope, watching
from broker.decision.attest import Attestation
from broker.errors import ApprovalRequired, BrokerError
from broker.exchange import Exchange, Issued
from broker.ledger.records import BreakGlass
from broker.ledger.scope_records import StandingDenial
from broker.operator_orders import Emergency, Order, Selection
from broker.operator_revocation import Revocations, Revoked
from broker.scope.scope import Scope
from broker.scope.standing import Entry

OTHER = "spiffe://acme.test/build/other"
FAR = "spiffe://acme.test/shop/till"
SECOND_OPERATOR = "spiffe://acme.test/operators/second"
STRANGER = "spiffe://acme.test/stranger"
ANN, BOB, CAROL = (f"spiffe://acme.test/approvers/{name}" for name in ("ann", "bob", "carol"))
REQUEST_ID = "emergency-number-one"
CLOSED = "orders.closed"
"""An action that no policy permits."""
WHY = "the night shift cannot reach the store"

EMERGENCY_SCHEMA = """
action "orders.sealed" appliesTo { principal: [Workload], resource: [Resource], context: {} };
action "orders.weighed" appliesTo {
  principal: [Workload], resource: [Resource], context: { parameters: { amount: Long } }
};
action "orders.stamped" appliesTo {
  principal: [Workload], resource: [Resource], context: { parameters: { signing: Signing } }
};
"""
EMERGENCY_POLICY = """
@id("operators") permit (
  principal in Path::"spiffe://acme.test/operators", action == Action::"broker.operate", resource
);
@id("may-break-glass") permit (
  principal == Workload::"spiffe://acme.test/operator", action == Action::"broker.breakglass", resource
) when { context.approval.count >= 2 };
@id("may-break-glass-alone") permit (
  principal == Workload::"spiffe://acme.test/operators/second", action == Action::"broker.breakglass", resource
);
@id("approvers") permit (
  principal in Path::"spiffe://acme.test/approvers", action == Action::"broker.approve", resource
) when { context.parameters.action == "broker.breakglass" };
@id("builders-approve-too") permit (
  principal in Path::"spiffe://acme.test/build", action == Action::"broker.approve", resource
) when { context.parameters.action == "broker.breakglass" };
@id("sealed") forbid (principal, action == Action::"orders.sealed", resource);
@id("not-too-heavy") forbid (principal, action == Action::"orders.weighed", resource)
when { context.parameters.amount * 9007199254740991 > 9000000000000000000 };
"""
POLICIES = {
    "orders.cedarschema": SCHEMA,
    "orders.cedar": POLICY,
    "emergency.cedarschema": EMERGENCY_SCHEMA,
    "emergency.cedar": EMERGENCY_POLICY,
}


@dataclass
class Operating:
    """The parts, for tests to turn."""

    parts: Exchanging
    opened: ScopeParts
    desk: Approvals

    @property
    def exchange(self) -> Exchange:
        return self.parts.exchange

    @property
    def scope(self) -> Scope:
        return self.parts.exchange.scope

    @property
    def revocations(self) -> Revocations:
        return self.opened.revocations

    @property
    def emergencies(self) -> Emergencies:
        return self.opened.emergencies

    def now(self) -> datetime:
        return self.parts.now()

    async def token(self, name: str = "orders.read", who: str = AGENT, **parameters: object) -> Issued:
        """Raises: BrokerError."""
        return await self.parts.token(act(name, **parameters), self.parts.caller(who))

    async def reason(self, name: str = "orders.read", who: str = AGENT, **parameters: object) -> str:
        """Why there is no token; empty where there is one."""
        return await why(self.token(name, who, **parameters))

    def dead(self, token: Issued) -> bool:
        """Whether it is refused for good."""
        return self.scope.is_refused(token.claims.jti)

    async def revoke(
        self,
        by: str = OPERATOR,
        *,
        standing: bool = False,
        until: datetime | None = None,
        dry_run: bool = False,
        reason: str = "",
        **chosen: str,
    ) -> Revoked:
        def order() -> Order:
            return Order(selection=Selection(**chosen), standing=standing, until=until, dry_run=dry_run, reason=reason)

        return await self.revocations.revoke(self.parts.caller(by), order, self.now(), CORRELATION)

    async def lift(self, entry_id: str, by: str = OPERATOR, reason: str = "") -> None:
        await self.revocations.lift(self.parts.caller(by), entry_id, reason, self.now(), CORRELATION)

    async def standing(self, by: str = OPERATOR) -> list[Entry]:
        return list(await self.revocations.standing(self.parts.caller(by), self.now(), CORRELATION))

    # -- emergencies -------------------------------------------------------------------------------------------------

    def emergency(self, **changes: object) -> Callable[[], Emergency]:
        """That the agent may do what no policy permits, for an hour."""
        whole = (self.now() + timedelta(hours=1)).replace(microsecond=0)
        wanted = {"principal": AGENT, "action": CLOSED, "resource": RESOURCE, "until": whole, "reason": WHY}
        return lambda: Emergency(**(wanted | changes))  # type: ignore[arg-type] - what the test wants

    async def ask(self, asked: Callable[[], Emergency], by: str = OPERATOR, request_id: str = REQUEST_ID) -> BreakGlass:
        """Raises: BrokerError."""
        return await self.emergencies.permit(self.parts.caller(by), asked, request_id, self.now(), CORRELATION)

    async def lay_down(
        self, asked: Callable[[], Emergency], by: str = OPERATOR, request_id: str = REQUEST_ID
    ) -> ApprovalRequired:
        """It waits for approvals from now on."""
        try:
            await self.ask(asked, by, request_id)
        except ApprovalRequired as error:
            return error
        raise AssertionError("nobody has approved it")

    async def approve(self, digest: str, *approvers: str) -> None:
        for one in approvers:
            await self.desk.approve(self.parts.caller(one).identity, digest, "yes", 0, self.now(), CORRELATION)

    async def withdraw(self, digest: str, approver: str) -> None:
        await self.desk.withdraw(self.parts.caller(approver).identity, digest, "no", self.now(), CORRELATION)

    async def permitted(
        self, asked: Callable[[], Emergency] | None = None, by: str = OPERATOR, request_id: str = REQUEST_ID
    ) -> BreakGlass:
        """One that ann and bob approved."""
        wanted = asked or self.emergency()
        lacking = await self.lay_down(wanted, by, request_id)
        await self.approve(lacking.request_digest, ANN, BOB)
        return await self.ask(wanted, by, request_id)

    async def settled(self) -> None:
        """Returns once everything that changed has been decided again."""
        async with asyncio.timeout(20):
            while True:
                await asyncio.sleep(0)
                if self.opened.deciding.idle:
                    return


async def why(call: object) -> str:
    """The reason that it is refused for; empty where it is not."""
    try:
        await call  # type: ignore[misc] - an awaitable
    except BrokerError as error:
        return str(error.reason)
    return ""


def is_denial(entry: Entry) -> bool:
    return isinstance(entry, StandingDenial)


@asynccontextmanager
async def operating(folder: Path, more_policy: str = "") -> AsyncIterator[Operating]:
    """One in `folder`, which may have a ledger already; what lives is decided again when this begins."""
    async with exchanging(folder, policies=POLICIES | {"more.cedar": more_policy}) as parts:
        exchange = parts.exchange
        approval = ApprovalAttestor(RecordedApprovals(exchange.ledger, exchange.policies))
        exchange.attestation = Attestation({"approval": approval}, 2.0)
        exchange.desk = desk = Approvals(exchange, Texts())
        opened = await open_scope(exchange, {"approval": approval}, lambda _: None, parts.now)
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(opened.close)
            await stack.enter_async_context(watching(opened, exchange, parts.now))
            found = Operating(parts, opened, desk)
            await found.settled()
            yield found
