"""actionbroker.v1.ActionBroker over gRPC. Each call is: identify, hand to the exchange, answer in one of two ways."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from datetime import datetime
from functools import partial
from typing import Final, NoReturn, cast

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from broker._proto.actionbroker.v1 import action_pb2, approvals_pb2_grpc, broker_pb2, broker_pb2_grpc, signing_pb2
from broker.edges.grpc_answers import Answers, Clock
from broker.edges.grpc_approvals import MAX_WAITS, ApprovalsService
from broker.edges.grpc_approvals import SERVICE as APPROVALS
from broker.edges.grpc_peer import SERVICE, Context, Identifier, correlation_id
from broker.edges.grpc_scope import MAX_WATCHERS, ScopeService, add_to_server
from broker.edges.grpc_scope import SERVICE as SCOPE
from broker.edges.grpc_signing import SigningCalls
from broker.edges.grpc_wire import timestamp, to_action
from broker.edges.metrics import Metrics
from broker.edges.places import (
    MAX_REFLECTIONS,
    MAX_STREAMS,
    MAX_UNKNOWN_STREAMS,
    MAX_UNKNOWN_STREAMS_OF_ONE,
    MAX_WATCHES,
    Health,
    Held,
    Reflection,
    Registrar,
    StreamPlace,
    Waiting,
)
from broker.errors import BrokerError, Invalid, Reason, Unavailable
from broker.exchange import Caller, Exchange, Issued
from broker.operate import Operators, Question
from broker.presented import Presented
from broker.recheck import Recheck
from broker.sign import Signing

MAX_MESSAGE: Final = 1024 * 1024
MAX_BATCH: Final = 256
MAX_STREAM_IN_FLIGHT: Final = 64
MAX_STREAMS_OF_CONNECTION: Final = 128  # HTTP/2 streams: calls of any kind
MAX_CONNECTIONS: Final = 4096  # on one listener, handshakes that have not ended included
HANDSHAKE_TIMEOUT_S: Final = 10


def _token(issued: Issued) -> broker_pb2.ActionToken:
    return broker_pb2.ActionToken(
        access_token=issued.token,
        token_type="DPoP" if issued.claims.cnf.jkt else "Bearer",
        expires_at=timestamp(issued.claims.expires_at),
        use=issued.claims.use,
    )


def _refusal(error: BrokerError, correlation: str) -> action_pb2.Refusal:
    return action_pb2.Refusal(reason=error.reason, correlation_id=correlation, retry_after_ms=error.retry_after_ms or 0)


class ActionBrokerService(broker_pb2_grpc.ActionBrokerServicer):
    """The service. Holds no state of its own but who holds streams."""

    def __init__(
        self,
        exchange: Exchange,
        recheck: Recheck,
        operators: Operators,
        signing: Signing,
        *,
        identifier: Identifier,
        metrics: Metrics,
        clock: Clock,
    ) -> None:
        self._exchange, self._recheck, self._operators = exchange, recheck, operators
        self._identifier, self._metrics, self._clock = identifier, metrics, clock
        self._calls = Answers(identifier, metrics, clock)
        self._signing = SigningCalls(signing, identifier)
        self._unknown, self._held = Waiting(MAX_UNKNOWN_STREAMS, MAX_UNKNOWN_STREAMS_OF_ONE), Held()

    async def refuse(self, context: Context, error: BrokerError) -> NoReturn:
        """Ends a call of whoever it is with a refusal, and counts it."""
        self._exchange.ledger.count_refusal(error.reason)
        await self._calls.abort(context, error, correlation_id())

    async def RequestActionToken(
        self, request: broker_pb2.RequestActionTokenRequest, context: Context
    ) -> broker_pb2.RequestActionTokenResponse:
        """One token."""

        async def work(now: datetime, correlation: str) -> broker_pb2.RequestActionTokenResponse:
            caller = await self._identifier.identify_call(
                context, "RequestActionToken", request.spiffe_id, now, correlation
            )
            presented = Presented(request_id=request.request_id, ticket=request.ticket, session=request.session)
            issued = await self._exchange.request(
                caller, lambda: to_action(request.action), now, correlation, presented
            )
            return broker_pb2.RequestActionTokenResponse(token=_token(issued), correlation_id=correlation)

        return await self._calls.answer(context, "RequestActionToken", "issued", work)

    async def RequestActionTokens(
        self, request: broker_pb2.RequestActionTokensRequest, context: Context
    ) -> broker_pb2.RequestActionTokensResponse:
        """Many tokens of one caller; each refused or issued for itself."""

        async def work(now: datetime, correlation: str) -> broker_pb2.RequestActionTokensResponse:
            caller = await self._identifier.identify_call(
                context, "RequestActionTokens", request.spiffe_id, now, correlation
            )
            most = min(MAX_BATCH, self._exchange.quota.burst)
            if not 0 < len(request.actions) <= most:
                wrong = Invalid(f"a batch has 1 to {most} actions")
                self._exchange.refused(caller.identity, None, wrong, now, correlation, "request")
                raise wrong
            self._exchange.admit_more(caller, len(request.actions) - 1)
            presented = Presented(ticket=request.ticket, session=request.session)
            each = (self._result(caller, action, presented, now) for action in request.actions)
            return broker_pb2.RequestActionTokensResponse(results=await asyncio.gather(*each))

        return await self._calls.answer(context, "RequestActionTokens", "answered", work)

    async def _result(
        self, caller: Caller, message: action_pb2.Action, presented: Presented, now: datetime
    ) -> broker_pb2.ActionTokenResult:
        correlation = correlation_id()
        try:
            with self._metrics.observe("ActionToken", "issued"):
                issued = await self._exchange.request(caller, lambda: to_action(message), now, correlation, presented)
        except BrokerError as error:
            return broker_pb2.ActionTokenResult(refusal=_refusal(error, correlation), correlation_id=correlation)
        return broker_pb2.ActionTokenResult(token=_token(issued), correlation_id=correlation)

    async def StreamActionTokens(
        self, requests: AsyncIterator[broker_pb2.StreamActionTokensRequest], context: Context
    ) -> AsyncIterator[broker_pb2.StreamActionTokensResponse]:
        """Tokens as asked for, each message identified, proven and answered for itself, in whatever order is ready."""
        try:
            async with self._stream_place(context) as place:
                await context.send_initial_metadata(self._identifier.nonce_metadata(context, self._clock()))
                async with contextlib.aclosing(self._answers(requests, context, place)) as answers:
                    async for answer in answers:
                        yield answer
        except BrokerError as error:
            await self.refuse(context, error)

    def _stream_place(self, context: Context) -> StreamPlace:
        """Raises: BrokerError; over mutual TLS a stranger has no stream at all."""
        uid = self._identifier.uid(context)
        if uid is not None:
            return StreamPlace(self._unknown, self._held, uid)
        holder = self._identifier.holder(context, self._clock())
        return StreamPlace(self._unknown, self._held, None, str(holder.spiffe_id))

    async def _answers(
        self, requests: AsyncIterator[broker_pb2.StreamActionTokensRequest], context: Context, place: StreamPlace
    ) -> AsyncGenerator[broker_pb2.StreamActionTokensResponse]:
        answers: asyncio.Queue[broker_pb2.StreamActionTokensResponse | None] = asyncio.Queue()
        places = asyncio.Semaphore(MAX_STREAM_IN_FLIGHT)  # each held until its answer is taken, which bounds the queue

        async def one(message: broker_pb2.StreamActionTokensRequest) -> None:
            answers.put_nowait(await self._stream_answer(message, context, place))

        async def read() -> None:
            try:
                async with asyncio.TaskGroup() as group:
                    async for message in requests:
                        await places.acquire()
                        group.create_task(one(message))
            except* DecodeError:
                place.end(Invalid("a message of the stream cannot be read"))
                await asyncio.Event().wait()  # until the end reaches us
            finally:
                answers.put_nowait(None)  # however it ends, who waits for answers hears of it

        reader = asyncio.create_task(read())
        try:
            while (answer := await answers.get()) is not None:
                yield answer
                places.release()
            await reader
        except Exception:
            await self._calls.fail(context, "StreamActionTokens", correlation_id())
        finally:
            reader.cancel()
            await asyncio.wait((reader,))

    async def _stream_answer(
        self, message: broker_pb2.StreamActionTokensRequest, context: Context, place: StreamPlace
    ) -> broker_pb2.StreamActionTokensResponse:
        now, correlation = self._clock(), correlation_id()
        try:
            with self._metrics.observe("StreamActionTokens", "issued"):
                caller = await self._identifier.identify(
                    context, "StreamActionTokens", message.spiffe_id, message.dpop or None, now, correlation
                )
                place.known(str(caller.identity.spiffe_id))
                presented = Presented(ticket=message.ticket, session=message.session)
                issued = await self._exchange.request(
                    caller, lambda: to_action(message.action), now, correlation, presented
                )
            result = broker_pb2.ActionTokenResult(token=_token(issued), correlation_id=correlation)
        except BrokerError as error:
            result = broker_pb2.ActionTokenResult(refusal=_refusal(error, correlation), correlation_id=correlation)
        nonce = self._identifier.next_nonce(context, self._clock(), proves=bool(message.dpop))
        return broker_pb2.StreamActionTokensResponse(result=result, dpop_nonce=nonce, message_id=message.message_id)

    async def Check(self, request: broker_pb2.CheckRequest, context: Context) -> broker_pb2.CheckResponse:
        """Whether a token would be minted again now."""

        async def work(now: datetime, correlation: str) -> broker_pb2.CheckResponse:
            caller = await self._identifier.identify_call(context, "Check", request.spiffe_id, now, correlation)
            try:
                await self._recheck.check(caller, request.token, lambda: to_action(request.action), now, correlation)
            except (Invalid, Unavailable):
                raise
            except BrokerError as error:
                if error.reason is Reason.WRONG_AUDIENCE:  # about the asker, not about the token
                    raise
                return broker_pb2.CheckResponse(allowed=False, reason=error.reason, correlation_id=correlation)
            return broker_pb2.CheckResponse(allowed=True, correlation_id=correlation)

        return await self._calls.answer(context, "Check", "answered", work)

    async def Redeem(self, request: broker_pb2.RedeemRequest, context: Context) -> broker_pb2.RedeemResponse:
        """Uses a single-use token up."""

        async def work(now: datetime, correlation: str) -> broker_pb2.RedeemResponse:
            caller = await self._identifier.identify_call(context, "Redeem", request.spiffe_id, now, correlation)
            redeemed_at = await self._recheck.redeem(
                caller, request.token, lambda: to_action(request.action), request.idempotency_id, now, correlation
            )
            return broker_pb2.RedeemResponse(redeemed_at=timestamp(redeemed_at), correlation_id=correlation)

        return await self._calls.answer(context, "Redeem", "redeemed", work)

    async def RequestSigningGrant(
        self, request: signing_pb2.RequestSigningGrantRequest, context: Context
    ) -> signing_pb2.RequestSigningGrantResponse:
        """Leave for one signature."""
        return await self._calls.answer(
            context, "RequestSigningGrant", "issued", partial(self._signing.grant, request, context)
        )

    async def Sign(self, request: signing_pb2.SignRequest, context: Context) -> signing_pb2.SignResponse:
        """One signature, or the one that the same request gave before."""
        return await self._calls.answer(context, "Sign", "signed", partial(self._signing.sign, request, context))

    async def IssueSigningCertificate(
        self, request: signing_pb2.IssueSigningCertificateRequest, context: Context
    ) -> signing_pb2.IssueSigningCertificateResponse:
        """A certificate for the caller's own key, or the one that the same request gave before."""
        return await self._calls.answer(
            context, "IssueSigningCertificate", "issued", partial(self._signing.certify, request, context)
        )

    async def Explain(self, request: broker_pb2.ExplainRequest, context: Context) -> broker_pb2.ExplainResponse:
        """A dry run, for operators."""

        async def work(now: datetime, correlation: str) -> broker_pb2.ExplainResponse:
            caller = await self._identifier.identify_call(context, "Explain", request.spiffe_id, now, correlation)
            question = Question(
                principal=request.principal,
                asked=lambda: to_action(request.action),
                facts=request.facts,
                pid=request.pid,
            )
            found = await self._operators.explain(caller, question, now, correlation)
            return broker_pb2.ExplainResponse(
                allowed=found.allowed,
                reason=found.reason or "",
                policy_revision=found.policy_revision,
                policies=[
                    broker_pb2.PolicyExplanation(id=p.id, effect=p.effect, satisfied=p.satisfied, failed=p.failed)
                    for p in found.policies
                ],
                attestors=found.attestors,
                missing=found.missing,
                errors=found.errors,
            )

        return await self._calls.answer(context, "Explain", "answered", work)


class GrpcServer:
    """The service with reflection and grpc.health.v1, on a private Unix socket and, where asked, over mutual TLS."""

    def __init__(
        self,
        service: ActionBrokerService,
        approvals: ApprovalsService,
        scope: ScopeService,
        *,
        max_concurrent: int,
        max_connection_age_s: int,
        max_connections: int = MAX_CONNECTIONS,
    ) -> None:
        # A connection's certificate is checked on every request; its age is bounded so that handshakes, too, happen
        # again with today's roots.
        options = [
            ("grpc.max_receive_message_length", MAX_MESSAGE),
            ("grpc.max_metadata_size", 48 * 1024),
            ("grpc.max_concurrent_streams", MAX_STREAMS_OF_CONNECTION),
            ("grpc.max_allowed_incoming_connections", max_connections),
            ("grpc.server_handshake_timeout_ms", HANDSHAKE_TIMEOUT_S * 1000),
            ("grpc.max_connection_age_ms", max_connection_age_s * 1000),
            ("grpc.max_connection_age_grace_ms", 30_000),
            ("grpc.so_reuseport", 0),
            ("grpc.http2.bdp_probe", 0),  # a ping beside each request, to size windows that a request never fills
            ("grpc.http2.min_ping_interval_without_data_ms", 2_000),  # clients ask if a quiet stream lives
        ]
        # Places for what stays open come on top, so that however many of them are taken, requests find theirs.
        still_open = max_concurrent + MAX_UNKNOWN_STREAMS + MAX_STREAMS + MAX_WATCHES + MAX_REFLECTIONS + MAX_WAITS
        still_open += MAX_WATCHERS
        self._server = grpc.aio.server(options=options, maximum_concurrent_rpcs=max_concurrent + still_open)
        registrar = cast("grpc.aio.Server", Registrar(self._server, max_concurrent, service.refuse))
        self._health = Health()
        names = (SERVICE, APPROVALS, SCOPE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        broker_pb2_grpc.add_ActionBrokerServicer_to_server(service, registrar)
        approvals_pb2_grpc.add_ApprovalsServicer_to_server(approvals, registrar)
        add_to_server(scope, registrar)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, registrar)
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(Reflection(names), registrar)

    def listen_unix(self, path: str) -> None:
        """Serves the private socket behind a UnixFront; in a 0700 folder, since who reaches it could name its peer."""
        self._server.add_insecure_port(f"unix:{path}")

    def listen_tls(self, address: str, credentials: grpc.ServerCredentials) -> int:
        """Serves mutual TLS on HOST:PORT; returns the port. Raises: RuntimeError when it is taken."""
        return int(self._server.add_secure_port(address, credentials))

    async def start(self) -> None:
        """Starts serving; health says NOT_SERVING until `set_ready`."""
        await self.set_ready(ready=False)
        await self._server.start()

    async def set_ready(self, *, ready: bool) -> None:
        """What grpc.health.v1 answers, for the server and for the service."""
        status = health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", SERVICE):
            await self._health.set(name, status)

    async def close(self, grace_s: float) -> None:
        """Refuses new requests and gives those under way `grace_s` to end."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)
