"""What operators change, of actionbroker.v1.Scope: messages to values and back. grpc_scope.py ends the calls."""

from datetime import UTC, datetime
from typing import Final

from google.protobuf.timestamp_pb2 import Timestamp

from broker._proto.actionbroker.v1 import action_pb2, scope_pb2
from broker.action import canonical_json
from broker.break_glass import Emergencies
from broker.edges.grpc_peer import Context, Identifier
from broker.edges.grpc_wire import timestamp
from broker.errors import Invalid
from broker.ledger.scope_records import BreakGlass
from broker.operator_orders import Emergency, Order, Selection
from broker.operator_revocation import Revocations
from broker.scope.live import Live
from broker.scope.standing import Entry

SERVICE: Final = "actionbroker.v1.Scope"


class RevocationCalls:
    """Identifies, hands on, and writes the answer. Raises what they raise."""

    def __init__(self, revocations: Revocations, emergencies: Emergencies, identifier: Identifier) -> None:
        self._revocations, self._emergencies, self._identifier = revocations, emergencies, identifier

    async def revoke(
        self, request: scope_pb2.RevokeRequest, context: Context, now: datetime, correlation: str
    ) -> scope_pb2.RevokeResponse:
        """Refuses what is selected."""
        caller = await self._identifier.identify_call(context, "Revoke", request.spiffe_id, now, correlation, SERVICE)
        found = await self._revocations.revoke(caller, lambda: _order(request), now, correlation)
        return scope_pb2.RevokeResponse(
            hits=found.hits,
            credentials=[_live(one) for one in found.first],
            standing_id=found.standing_id,
            correlation_id=correlation,
        )

    async def standing(
        self, request: scope_pb2.StandingRequest, context: Context, now: datetime, correlation: str
    ) -> scope_pb2.StandingResponse:
        """What stands."""
        caller = await self._identifier.identify_call(context, "Standing", request.spiffe_id, now, correlation, SERVICE)
        entries = await self._revocations.standing(caller, now, correlation)
        return scope_pb2.StandingResponse(entries=[_entry(one) for one in entries], correlation_id=correlation)

    async def lift(
        self, request: scope_pb2.LiftRequest, context: Context, now: datetime, correlation: str
    ) -> scope_pb2.LiftResponse:
        """Ends one of it."""
        caller = await self._identifier.identify_call(context, "Lift", request.spiffe_id, now, correlation, SERVICE)
        await self._revocations.lift(caller, request.id, request.reason, now, correlation)
        return scope_pb2.LiftResponse(correlation_id=correlation)

    async def break_glass(
        self, request: scope_pb2.BreakGlassRequest, context: Context, now: datetime, correlation: str
    ) -> scope_pb2.BreakGlassResponse:
        """Permits one thing for a while."""
        caller = await self._identifier.identify_call(
            context, "BreakGlass", request.spiffe_id, now, correlation, SERVICE
        )
        permit = await self._emergencies.permit(
            caller, lambda: _emergency(request), request.request_id, now, correlation
        )
        return scope_pb2.BreakGlassResponse(id=permit.id, until=timestamp(permit.until), correlation_id=correlation)


def _order(request: scope_pb2.RevokeRequest) -> Order:
    chosen = request.selection
    return Order(
        selection=Selection(
            jti=chosen.jti, principal=chosen.principal, action=chosen.action, trust_domain=chosen.trust_domain
        ),
        dry_run=request.dry_run,
        standing=request.standing,
        until=_moment(request.until) if request.HasField("until") else None,
        reason=request.reason,
    )


def _emergency(request: scope_pb2.BreakGlassRequest) -> Emergency:
    return Emergency(
        principal=request.principal,
        action=request.action,
        resource=request.resource,
        until=_moment(request.until),
        reason=request.reason,
    )


def _moment(stamp: Timestamp) -> datetime:
    try:
        return stamp.ToDatetime(tzinfo=UTC)
    except (ValueError, OverflowError) as error:
        raise Invalid("a time is between the years 1 and 9999") from error


def _live(live: Live) -> scope_pb2.LiveCredential:
    action = live.to_action()
    return scope_pb2.LiveCredential(
        jti=live.jti,
        credential=live.credential,
        principal=live.principal,
        action=action_pb2.Action(
            name=action.name,
            resource=action.resource,
            audience=action.audience,
            parameters=canonical_json(action.parameters, plain=False).decode(),
        ),
        expires_at=timestamp(live.ends),
    )


def _entry(entry: Entry) -> scope_pb2.StandingEntry:
    told = scope_pb2.StandingEntry(id=entry.id, since=timestamp(entry.at), by=entry.by, reason=entry.detail)
    told.selection.principal, told.selection.action = entry.principal, entry.action
    if entry.until is not None:
        told.until.CopyFrom(timestamp(entry.until))
    if isinstance(entry, BreakGlass):
        told.kind, told.resource = "break_glass", entry.resource
    else:
        told.kind, told.selection.trust_domain = "denial", entry.trust_domain
    return told
