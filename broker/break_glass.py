"""Break-glass: one workload is permitted one action on one resource for a while, although no policy permits it.

That is an action like any other, "broker.breakglass": a policy has to permit it to who asks. And two others have to
approve it, whatever policy says: neither the workload that it is for, nor any name of who asks, is counted. It uses
their approvals up, and ends when one of them takes his back while it counts.

A permit stands in for a policy that permits, and for nothing else (decision/decide.py): a forbid, a standing denial,
missing evidence, an attestor that says no, an identity that does not hold, and a ledger that cannot be written refuse
as ever. What it gives names it in the ledger, as the policy that gave it.
"""

from collections.abc import Callable
from datetime import datetime

import structlog

from attestors.contract import Facts
from broker.action import check_random_id
from broker.decision.decide import Grant
from broker.errors import BrokerError, Reason, Refused, Unavailable
from broker.exchange import Caller, Exchange
from broker.identity.identify import Identified
from broker.in_time import InTime
from broker.intents import used_approvals
from broker.ledger.records import BreakGlass, StandingLifted
from broker.ledger.scope_records import FEWEST_APPROVERS
from broker.ledger.scope_store import ScopeStore
from broker.operator_orders import Emergency
from broker.operator_revocation import ToItsEnd, new_id, require_room, until_taken
from broker.presented import Presented

_log = structlog.get_logger(__name__)


class Emergencies:
    """One for each broker process; close it to wait for what is under way."""

    def __init__(self, exchange: Exchange, store: ScopeStore) -> None:
        self._exchange, self._store = exchange, store
        self._to_its_end = ToItsEnd()
        self.close = self._to_its_end.close

    async def permit(
        self, caller: Caller, asked: Callable[[], Emergency], request_id: str, now: datetime, correlation_id: str
    ) -> BreakGlass:
        """Permits it, once it is approved: durably, and in force when it returns.

        asked: makes it from what was sent. request_id: the operator's own id of it, to which approvals are given.

        Raises: Invalid; ApprovalRequired with what to approve; Refused DENIED for who may not, REVOKED where a denial
        stands against it, QUOTA; Unavailable. Each refusal is in the ledger.
        """
        exchange, presented = self._exchange, Presented(request_id=request_id)
        action = None
        try:
            check_random_id(request_id, "a request id")
            wanted = asked()
            wanted.require(now)
            action = wanted.to_action(exchange.issuer)
            async with InTime() as bound:
                try:
                    grant = await exchange.decide(caller.identity, action, now, presented)
                    approvers = _require_approved(grant, caller.identity, wanted.principal)
                except Refused as error:
                    if error.reason is Reason.APPROVAL_REQUIRED:
                        exchange.scope.standing.require(wanted.principal, wanted.action, now)
                    bound.reason = Reason.LEDGER_UNAVAILABLE
                    raise await exchange.unless_approved(
                        caller, action, error, presented, now, correlation_id
                    ) from error
                exchange.scope.standing.require(wanted.principal, wanted.action, now)
                require_room(exchange, now)
                grant.spend()
            permit = _permit(wanted, grant, approvers, request_id, now, correlation_id)
            await self._to_its_end.run(self._open(permit))
        except BrokerError as error:
            exchange.refused(caller.identity, action, error, now, correlation_id, "break_glass")
            raise
        return permit

    async def _open(self, permit: BreakGlass) -> None:
        """It counts once it is durable; where the store does not say whether it is, it is taken back."""
        try:
            await self._store.permit(permit)
        except Unavailable as error:
            lifted = StandingLifted(
                at=permit.at, correlation_id=permit.correlation_id, id=permit.id, by=permit.by, detail=error.detail
            )
            await until_taken(lambda: self._store.lift(lifted))
            raise
        self._exchange.scope.standing.add(permit)
        tell(permit)


def tell(permit: BreakGlass) -> None:
    """Says loudly that it is open: when it is opened, and at each start."""
    _log.warning(
        "break_glass",
        id=permit.id,
        principal=permit.principal,
        action=permit.action,
        resource=permit.resource,
        until=permit.until.isoformat(),
        by=permit.by,
        approvers=permit.approvers,
        correlation_id=permit.correlation_id,
    )


def _require_approved(grant: Grant, operator: Identified, principal: str) -> tuple[str, ...]:
    """Who approved it, of those who count. Raises: Refused DENIED; APPROVAL_REQUIRED where they are too few."""
    if grant.permit:
        raise Refused(Reason.DENIED, "no permit permits the next one: a policy has to")
    _, by = used_approvals(grant, "")
    counted = tuple(sorted(set(by) - {principal, *_names(operator)}))
    if len(counted) < FEWEST_APPROVERS:
        raise Refused(Reason.APPROVAL_REQUIRED, f"{len(counted)} approvals count, and {FEWEST_APPROVERS} are needed")
    return counted


def _names(operator: Identified) -> list[str]:
    """All names that the process that asks is entitled to."""
    spire: Facts | None = operator.known.get("spire")
    ids = spire.values["ids"] if spire is not None else []
    return [str(operator.principal), *(str(one) for one in (ids if isinstance(ids, list) else []))]


def _permit(
    wanted: Emergency, grant: Grant, approvers: tuple[str, ...], request_id: str, now: datetime, correlation_id: str
) -> BreakGlass:
    digest, _ = used_approvals(grant, request_id)
    return BreakGlass(
        at=now,
        correlation_id=correlation_id,
        id=new_id(),
        principal=wanted.principal,
        action=wanted.action,
        resource=wanted.resource,
        until=wanted.until,
        by=str(grant.principal),
        approval=digest,
        approvers=approvers,
        policies=grant.policies,
        policy_revision=grant.policy_revision,
        detail=wanted.reason,
    )
