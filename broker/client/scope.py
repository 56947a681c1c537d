"""Scope as a client sees it: the feed for guards, and what operators change."""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Self

from google.protobuf.timestamp_pb2 import Timestamp

from broker._proto.actionbroker.v1 import scope_pb2
from broker.client.link import SCOPE, Feed, Link, Method

STREAM_S: Final = 3600.0
"""How long one stream may last; then another one goes on where it ended."""

_WATCH: Final = Feed(name="Watch", of=lambda stubs: stubs.scope.Watch, service=SCOPE)
_REVOKE: Final = Method(name="Revoke", of=lambda stubs: stubs.scope.Revoke, service=SCOPE)
_STANDING: Final = Method(name="Standing", of=lambda stubs: stubs.scope.Standing, service=SCOPE)
_LIFT: Final = Method(name="Lift", of=lambda stubs: stubs.scope.Lift, service=SCOPE)
_BREAK_GLASS: Final = Method(name="BreakGlass", of=lambda stubs: stubs.scope.BreakGlass, service=SCOPE)


async def watch(
    link: Link, audiences: Sequence[str], *, feed: str, after: int, spiffe_id: str
) -> AsyncGenerator[scope_pb2.WatchResponse]:
    """See Client.watch_scope."""
    message = scope_pb2.WatchRequest(audiences=audiences, feed=feed, after=after, spiffe_id=spiffe_id)
    async for answer in link.feed(_WATCH, message, STREAM_S):
        yield answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Hit:
    """A live credential that a revocation hits."""

    jti: str
    credential: str
    principal: str
    action: str
    resource: str
    audience: str
    expires_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Revoked:
    """What was refused, or would be. hits: how many. credentials: the first of them. standing_id: "" without one."""

    hits: int
    credentials: tuple[Hit, ...]
    standing_id: str
    correlation_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StandingEntry:
    """A standing denial, or a break-glass permit (kind: "denial", "break_glass"). until: None until it is lifted."""

    id: str
    kind: str
    principal: str
    action: str
    trust_domain: str
    resource: str
    since: datetime
    until: datetime | None
    by: str
    reason: str

    @classmethod
    def read(cls, entry: scope_pb2.StandingEntry) -> Self:
        """From the wire."""
        chosen = entry.selection
        return cls(
            id=entry.id,
            kind=entry.kind,
            principal=chosen.principal,
            action=chosen.action,
            trust_domain=chosen.trust_domain,
            resource=entry.resource,
            since=entry.since.ToDatetime(tzinfo=UTC),
            until=entry.until.ToDatetime(tzinfo=UTC) if entry.HasField("until") else None,
            by=entry.by,
            reason=entry.reason,
        )


class ScopeCalls:
    """For operators. Every call raises Refused or Unavailable, as `Client`'s do."""

    def __init__(self, link: Link, *, spiffe_id: str, seconds: float) -> None:
        self._link, self._spiffe_id, self._seconds = link, spiffe_id, seconds

    async def revoke(  # noqa: PLR0913 -- a selection, and what to do with it
        self,
        *,
        jti: str = "",
        principal: str = "",
        action: str = "",
        trust_domain: str = "",
        standing: bool = False,
        until: datetime | None = None,
        reason: str = "",
        dry_run: bool = False,
    ) -> Revoked:
        """Refuses all live credentials that fit everything that is given, at every guard.

        principal: a SPIFFE ID, or with a slash at its end all below a path. standing: also refuse new ones, until
        `until` or until it is lifted. dry_run: only say what it would hit.
        """
        message = scope_pb2.RevokeRequest(
            selection=scope_pb2.Selection(jti=jti, principal=principal, action=action, trust_domain=trust_domain),
            dry_run=dry_run,
            standing=standing,
            until=_timestamp(until),
            reason=reason,
            spiffe_id=self._spiffe_id,
        )
        answer = await self._link.call(_REVOKE, message, self._seconds)
        hits = tuple(
            Hit(
                jti=one.jti,
                credential=one.credential,
                principal=one.principal,
                action=one.action.name,
                resource=one.action.resource,
                audience=one.action.audience,
                expires_at=one.expires_at.ToDatetime(tzinfo=UTC),
            )
            for one in answer.credentials
        )
        return Revoked(
            hits=answer.hits, credentials=hits, standing_id=answer.standing_id, correlation_id=answer.correlation_id
        )

    async def standing(self) -> tuple[StandingEntry, ...]:
        """The standing denials and break-glass permits that are in force."""
        answer = await self._link.call(_STANDING, scope_pb2.StandingRequest(spiffe_id=self._spiffe_id), self._seconds)
        return tuple(StandingEntry.read(one) for one in answer.entries)

    async def lift(self, entry_id: str, *, reason: str = "") -> None:
        """Ends one of them before its time."""
        message = scope_pb2.LiftRequest(id=entry_id, reason=reason, spiffe_id=self._spiffe_id)
        await self._link.call(_LIFT, message, self._seconds)

    async def break_glass(
        self, principal: str, action: str, resource: str, *, until: datetime, reason: str, request_id: str
    ) -> str:
        """Permits this for a while, once two others approved it; its id.

        request_id: as in `Client.request`. Raises: ApprovalRequired (a Refused) with what to approve.
        """
        message = scope_pb2.BreakGlassRequest(
            principal=principal,
            action=action,
            resource=resource,
            until=_timestamp(until),
            reason=reason,
            request_id=request_id,
            spiffe_id=self._spiffe_id,
        )
        return (await self._link.call(_BREAK_GLASS, message, self._seconds)).id


def _timestamp(moment: datetime | None) -> Timestamp | None:
    if moment is None:
        return None
    found = Timestamp()
    found.FromDatetime(moment)
    return found
