"""actionbroker.v1.Scope over gRPC: what guards listen to, and what operators change.

A watcher is told at its own pace, and nothing is kept for it: who does not take a message within `PATIENCE_S` is cut
off, and may come back with the number that it knows. Messages are made once for all who watch the same.
"""

import asyncio
import contextlib
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any, Final, cast

import grpc

from broker._proto.actionbroker.v1 import scope_pb2, scope_pb2_grpc
from broker.action import check_uri
from broker.edges.grpc_answers import Answers, Clock
from broker.edges.grpc_peer import Context, Identifier
from broker.edges.grpc_revocation import RevocationCalls
from broker.edges.grpc_sessions import SessionCalls
from broker.edges.metrics import Metrics
from broker.edges.places import Held
from broker.errors import BrokerError, Invalid, Reason, Refused
from broker.exchange import Exchange
from broker.identity import identify
from broker.identity.identify import Identified
from broker.scope.feed import Feed

SERVICE: Final = "actionbroker.v1.Scope"
PATIENCE_S: Final = 5.0  # for one message to be taken; as long as a guard believes what it has
MAX_WATCHERS: Final = 1024
MAX_WATCHERS_OF_ONE: Final = 128  # replicas of one service share its SPIFFE ID
# Of those whose audiences nobody asks credentials for, and no configuration names: anybody may watch its own name, and
# that shall not take the places of those who guard something.
MAX_IDLE_WATCHERS: Final = 128
MAX_IDLE_WATCHERS_OF_ONE: Final = 8
MAX_AUDIENCES: Final = 16


class Watchers:
    """Wakes those who watch: all at each proven read of the store, and whom it concerns at each change."""

    def __init__(self, feed: Feed) -> None:
        self._waiting: dict[asyncio.Event, frozenset[str]] = {}
        feed.wake = self.wake

    def __len__(self) -> int:
        return len(self._waiting)

    def wake(self, audiences: frozenset[str] | None) -> None:
        """There is something to tell about these; None: to all."""
        for one, whose in self._waiting.items():
            if audiences is None or not whose.isdisjoint(audiences):
                one.set()

    @contextlib.contextmanager
    def one(self, audiences: Iterable[str]) -> Iterator[asyncio.Event]:
        """Set whenever there is something to tell."""
        event = asyncio.Event()
        self._waiting[event] = frozenset(audiences)
        try:
            yield event
        finally:
            del self._waiting[event]


class ScopeService(scope_pb2_grpc.ScopeServicer):
    """The service. Holds no state of its own but who watches. audiences: who speaks for what is no SPIFFE ID."""

    def __init__(  # noqa: PLR0913 -- one for each kind of call
        self,
        exchange: Exchange,
        feed: Feed,
        audiences: Mapping[str, frozenset[str]],
        sessions: SessionCalls,
        revocation: RevocationCalls,
        *,
        identifier: Identifier,
        metrics: Metrics,
        clock: Clock,
    ) -> None:
        self._exchange, self._feed, self._audiences = exchange, feed, audiences
        self._sessions, self._revocation = sessions, revocation
        self._identifier, self._clock = identifier, clock
        self._calls = Answers(identifier, metrics, clock)
        self._held = Held(MAX_WATCHERS, MAX_WATCHERS_OF_ONE)
        self._idle = Held(MAX_IDLE_WATCHERS, MAX_IDLE_WATCHERS_OF_ONE)
        self.watchers = Watchers(feed)

    async def ScoreSession(
        self, request: scope_pb2.ScoreSessionRequest, context: Context
    ) -> scope_pb2.ScoreSessionResponse:
        """Says how risky a session is."""

        async def work(now: datetime, correlation: str) -> scope_pb2.ScoreSessionResponse:
            return await self._sessions.score(request, context, now, correlation)

        return await self._calls.answer(context, "ScoreSession", "scored", work)

    async def Revoke(self, request: scope_pb2.RevokeRequest, context: Context) -> scope_pb2.RevokeResponse:
        """Refuses what an operator selects."""

        async def work(now: datetime, correlation: str) -> scope_pb2.RevokeResponse:
            return await self._revocation.revoke(request, context, now, correlation)

        return await self._calls.answer(context, "Revoke", "revoked", work)

    async def Standing(self, request: scope_pb2.StandingRequest, context: Context) -> scope_pb2.StandingResponse:
        """What operators said beside policy."""

        async def work(now: datetime, correlation: str) -> scope_pb2.StandingResponse:
            return await self._revocation.standing(request, context, now, correlation)

        return await self._calls.answer(context, "Standing", "shown", work)

    async def Lift(self, request: scope_pb2.LiftRequest, context: Context) -> scope_pb2.LiftResponse:
        """Ends one of that."""

        async def work(now: datetime, correlation: str) -> scope_pb2.LiftResponse:
            return await self._revocation.lift(request, context, now, correlation)

        return await self._calls.answer(context, "Lift", "lifted", work)

    async def BreakGlass(self, request: scope_pb2.BreakGlassRequest, context: Context) -> scope_pb2.BreakGlassResponse:
        """Permits one thing for a while, beside policy."""

        async def work(now: datetime, correlation: str) -> scope_pb2.BreakGlassResponse:
            return await self._revocation.break_glass(request, context, now, correlation)

        return await self._calls.answer(context, "BreakGlass", "permitted", work)

    async def Watch(self, request: scope_pb2.WatchRequest, context: Context) -> None:  # type: ignore[override]
        """Tells until the caller goes, its identity ends, or it does not listen."""
        with contextlib.ExitStack() as place:  # kept to the very end, as in grpc_approvals.py

            async def work(now: datetime, correlation: str) -> None:
                caller = await self._identifier.identify_call(
                    context, "Watch", request.spiffe_id, now, correlation, SERVICE
                )
                try:
                    audiences = self._own_audiences(caller.identity, list(request.audiences))
                except BrokerError as error:
                    self._exchange.refused(caller.identity, None, error, now, correlation, "watch")
                    raise
                place.enter_context(self._place(caller.identity, audiences))
                await context.send_initial_metadata(self._identifier.nonce_metadata(context, self._clock()))
                await self._tell(caller.identity, audiences, request, context)

            await self._calls.answer(context, "Watch", "told", work)

    def _own_audiences(self, watcher: Identified, asked: list[str]) -> tuple[str, ...]:
        """Raises: Invalid; Refused(WRONG_AUDIENCE) for one that is another's."""
        if not 0 < len(set(asked)) == len(asked) <= MAX_AUDIENCES:
            raise Invalid(f"a watcher names 1 to {MAX_AUDIENCES} audiences, each once")
        for audience in asked:
            check_uri(audience, "an audience")
            if str(watcher.principal) not in self._audiences.get(audience, frozenset((audience,))):
                raise Refused(Reason.WRONG_AUDIENCE, "only a credential's own audience is told about it")
        return tuple(sorted(asked))

    @contextlib.contextmanager
    def _place(self, watcher: Identified, audiences: tuple[str, ...]) -> Iterator[None]:
        places, name = self._held if self._guards(watcher, audiences) else self._idle, str(watcher.principal)
        with self._exchange.counted():
            places.take(name)
        try:
            yield
        finally:
            places.give_back(name)

    def _guards(self, watcher: Identified, audiences: tuple[str, ...]) -> bool:
        """Whether it is of our own trust domain, or guards something: configuration names it, or a credential does."""
        own = self._exchange.trust(self._clock()).own
        if own is not None and watcher.spiffe_id.trust_domain == own.spiffe_id.trust_domain:
            return self._exchange.scope.live.has_audience(audiences) or any(one in self._audiences for one in audiences)
        return any(one in self._audiences for one in audiences)

    async def _tell(
        self, watcher: Identified, audiences: tuple[str, ...], request: scope_pb2.WatchRequest, context: Context
    ) -> None:
        feed = self._feed
        with self.watchers.one(audiences) as changed:
            if feed.can_resume(request.feed, request.after):
                position = request.after
            else:
                position = feed.position
                for message in feed.snapshot(audiences, self._clock()):
                    await self._write(context, message)
            while True:
                now = self._clock()
                self._require_known(watcher, now)
                if not feed.can_resume(feed.name, position):  # what it lacks may be gone since the last message
                    raise self._too_slow()
                changed.clear()
                position, message = feed.since(audiences, position, now)
                await self._write(context, message)
                if position == feed.position:
                    await changed.wait()

    def _require_known(self, watcher: Identified, now: datetime) -> None:
        """Raises: Refused where its SVID has ended, or its trust domain is trusted no more; Unavailable."""
        with self._exchange.counted():
            if watcher.expires_at <= now:
                raise Refused(Reason.EXPIRED, "the watcher's identity has ended: come back with a new SVID")
            trust = self._exchange.trust(now)
            if watcher.authority_sha256 is None:
                trust.bundle_for(watcher.spiffe_id.trust_domain)
            else:
                identify.require_authority(watcher.authority_sha256, watcher.spiffe_id, trust)

    async def _write(self, context: Context, message: bytes) -> None:
        try:
            async with asyncio.timeout(PATIENCE_S):
                await context.write(message)
        except TimeoutError:
            raise self._too_slow() from None

    def _too_slow(self) -> Refused:
        self._exchange.ledger.count_refusal(Reason.QUOTA)
        return Refused(Reason.QUOTA, "the watcher does not take what it is told")


def add_to_server(service: ScopeService, server: Any) -> None:
    """Adds it. `Watch` answers with bytes that were made once for many."""
    scope_pb2_grpc.add_ScopeServicer_to_server(service, cast("grpc.aio.Server", _Raw(server)))


class _Raw:
    """Stands in for the server while the generated code adds the service, so that `Watch` is sent as it is."""

    def __init__(self, server: Any) -> None:
        self._server = server

    def add_generic_rpc_handlers(self, handlers: tuple[grpc.GenericRpcHandler, ...]) -> None:
        """As the server's."""
        self._server.add_generic_rpc_handlers(tuple(_RawHandler(one) for one in handlers))

    def add_registered_method_handlers(self, service: str, handlers: Any) -> None:
        """As the server's, which in asyncio does nothing."""


class _RawHandler(grpc.GenericRpcHandler):
    def __init__(self, service: grpc.GenericRpcHandler) -> None:
        self._service = service

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> "grpc.RpcMethodHandler[Any, Any] | None":
        """The handler for a method."""
        found: Any = self._service.service(handler_call_details)
        if found is None or not found.response_streaming:
            return found  # type: ignore[no-any-return]
        return grpc.unary_stream_rpc_method_handler(
            found.unary_stream, request_deserializer=found.request_deserializer, response_serializer=_as_it_is
        )


def _as_it_is(message: bytes) -> bytes:
    return message
