"""The client: typed calls to the broker, each bounded in time, each answer a value or an exception."""

import secrets
from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from functools import partial
from typing import Any, Final, Self

import grpc

from broker._proto.actionbroker.v1 import broker_pb2, scope_pb2
from broker.action import Action, canonical_json, check_random_id
from broker.client import routes
from broker.client.approvals import ApprovalCalls
from broker.client.faults import refusal, unintelligible
from broker.client.link import Method, authority_of
from broker.client.routes import Route
from broker.client.scope import ScopeCalls, watch
from broker.client.sessions import SessionCalls
from broker.client.signing import SigningCalls
from broker.client.stream import TokenStream
from broker.client.token import ActionToken
from broker.client.wire import Explanation, Redeemed, redeemed, to_wire
from broker.errors import Invalid, Refused, Unavailable
from broker.identity.spiffe_id import SpiffeId
from broker.identity.workload_api import WorkloadApi

SOCKET: Final = "/run/action-broker/broker.sock"
DEADLINE_S: Final = 5.0
MAX_BATCH: Final = 256

_REQUEST: Final = Method(name="RequestActionToken", of=lambda stubs: stubs.broker.RequestActionToken)
_REQUEST_MANY: Final = Method(name="RequestActionTokens", of=lambda stubs: stubs.broker.RequestActionTokens)
_CHECK: Final = Method(name="Check", of=lambda stubs: stubs.broker.Check)
_REDEEM: Final = Method(name="Redeem", of=lambda stubs: stubs.broker.Redeem)
_EXPLAIN: Final = Method(name="Explain", of=lambda stubs: stubs.broker.Explain)


class Client:
    """Talks to one broker. Make it with `Client.unix` or `Client.mtls`, enter it once, share it between tasks.

    Every call ends within its deadline (`deadline_s`: the client's unless given) and raises one of

    - `Refused`: the broker looked, and the answer is no. Asking again changes nothing. `Invalid`: it could not read it.
    - `Unavailable`: the broker, or what it needs to see, is out of reach. That is a no as well; later may help.

    each with `reason`, `correlation_id` and a sentence on what to do. What is safe to repeat was repeated before.
    """

    def __init__(
        self, route: Callable[[], AbstractAsyncContextManager[Route]], *, spiffe_id: str, deadline_s: float
    ) -> None:
        self._open, self._spiffe_id, self._deadline_s = route, spiffe_id, deadline_s
        self._stack = AsyncExitStack()
        self._opened: Route | None = None

    @classmethod
    def unix(
        cls,
        path: str = SOCKET,
        *,
        issuer: str,
        spiffe_id: str | SpiffeId | None = None,
        server_uids: Collection[int] | None = None,
        deadline_s: float = DEADLINE_S,
    ) -> Self:
        """As the process that we are: no secret, no file. Tokens are bound to a key that this client makes.

        issuer: the broker's `issuer`, which proofs of the key name. spiffe_id: which identity to ask as, where SPIRE
        gives this process more than one. server_uids: the users that the broker may run as (default: root, or ours).

        Raises: Invalid when `issuer` or `spiffe_id` is malformed.
        """
        authority_of(issuer)
        wanted = "" if spiffe_id is None else str(SpiffeId.parse(str(spiffe_id)))
        route = partial(routes.unix, path, issuer=issuer, server_uids=server_uids)
        return cls(route, spiffe_id=wanted, deadline_s=deadline_s)

    @classmethod
    def mtls(
        cls,
        target: str,
        *,
        broker_id: str | SpiffeId,
        workload_api: str | WorkloadApi,
        proof_for: str | None = None,
        deadline_s: float = DEADLINE_S,
    ) -> Self:
        """As the holder of our X.509-SVID, to `target` ("host:port"). Tokens are bound to that SVID's certificate.

        broker_id: the SPIFFE ID that the broker must have, exactly. workload_api: the agent's socket
        ("unix:///run/spire/agent.sock"), or a WorkloadApi that is entered already. proof_for: the broker's `issuer`, to
        bind tokens to a key that this client makes instead; services behind proxies need that.

        Raises: Invalid when `broker_id` or `proof_for` is malformed.
        """
        if proof_for is not None:
            authority_of(proof_for)
        route = partial(
            routes.mtls,
            target,
            broker_id=SpiffeId.parse(str(broker_id)),
            workload_api=workload_api,
            proof_for=proof_for,
            seconds=deadline_s,
        )
        return cls(route, spiffe_id="", deadline_s=deadline_s)

    async def __aenter__(self) -> Self:
        if self._opened is not None:
            raise RuntimeError("this client is open already: share it, or make another")
        self._opened = await self._stack.enter_async_context(self._open())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._opened = None
        await self._stack.aclose()

    @property
    def _route(self) -> Route:
        if self._opened is None:
            raise RuntimeError("make calls inside `async with Client.unix(...) as broker:`")
        return self._opened

    async def request(  # noqa: PLR0913 -- what may be said of one request; all but the act is optional
        self,
        name: str,
        resource: str,
        audience: str,
        parameters: Mapping[str, Any] | None = None,
        *,
        request_id: str = "",
        ticket: str = "",
        session: str = "",
        deadline_s: float | None = None,
    ) -> ActionToken:
        """A token for one act: `name` done on `resource` at `audience` with exactly these `parameters`.

        request_id: 16 to 64 of A-Z a-z 0-9 - _, random, where policy wants approvals: they are given to it, and asking
        with the same one again uses them. ticket: "<system>:<id>" of the one it is done for, session: the one it is
        done in, where policy wants them. Raises: Refused (ApprovalRequired), Invalid, Unavailable.
        """
        action = Action(name, resource, audience, parameters or {})
        return await self.request_action(
            action, request_id=request_id, ticket=ticket, session=session, deadline_s=deadline_s
        )

    async def request_action(
        self,
        action: Action,
        *,
        request_id: str = "",
        ticket: str = "",
        session: str = "",
        deadline_s: float | None = None,
    ) -> ActionToken:
        """The same for an Action."""
        route = self._route
        message = broker_pb2.RequestActionTokenRequest(
            action=to_wire(action),
            spiffe_id=self._spiffe_id,
            request_id=request_id,
            ticket=ticket,
            session=session,
        )
        answer = await route.link.call(_REQUEST, message, self._seconds(deadline_s))
        return route.holder.take(answer.token, action, answer.correlation_id)

    async def request_many(
        self, actions: Sequence[Action], *, ticket: str = "", session: str = "", deadline_s: float | None = None
    ) -> list[ActionToken | Refused | Unavailable]:
        """The answer to each of up to 256 actions, in their order: one key proof, one decision for each.

        A refusal stands in the list as the exception that `request` would raise. Raises: when the whole call fails.
        """
        if not 0 < len(actions) <= MAX_BATCH:
            raise Invalid(f"a batch has 1 to {MAX_BATCH} actions: ask in parts, or use `stream()`")
        route = self._route
        message = broker_pb2.RequestActionTokensRequest(
            actions=map(to_wire, actions), spiffe_id=self._spiffe_id, ticket=ticket, session=session
        )
        answer = await route.link.call(_REQUEST_MANY, message, self._seconds(deadline_s))
        if len(answer.results) != len(actions):
            raise unintelligible(f"{len(answer.results)} results for {len(actions)} actions")
        return [self._result(route, result, action) for result, action in zip(answer.results, actions, strict=True)]

    @staticmethod
    def _result(
        route: Route, result: broker_pb2.ActionTokenResult, action: Action
    ) -> ActionToken | Refused | Unavailable:
        if result.HasField("refusal"):
            no = result.refusal
            return refusal(no.reason, no.correlation_id, retry_after_ms=no.retry_after_ms or None)
        return route.holder.take(result.token, action, result.correlation_id)

    def stream(self) -> TokenStream:
        """Requests over one call, for thousands a second: `async with broker.stream() as s: await s.request(...)`."""
        route = self._route
        return TokenStream(route.link, route.holder, spiffe_id=self._spiffe_id, seconds=self._deadline_s)

    def service_channel(self, token: ActionToken, target: str) -> AbstractAsyncContextManager[grpc.aio.Channel]:
        """A gRPC channel to the token's audience at `target`, over mutual TLS with the certificate it is bound to.

        The server must have the audience's SPIFFE ID. Good for later tokens, too, while their `svid` is the same.

        Raises: Invalid when the audience is no SPIFFE ID.
        """
        route = self._route
        if route.workload_api is None:
            raise RuntimeError("a Unix-socket client has no certificate: use your own channel and `grpc_metadata`")
        service_id = SpiffeId.parse(token.action.audience)
        return routes.service(target, service_id=service_id, svid=token.svid, workload_api=route.workload_api)

    @property
    def scope(self) -> ScopeCalls:
        """What operators change of scope: revocations, standing denials, break-glass."""
        return ScopeCalls(self._route.link, spiffe_id=self._spiffe_id, seconds=self._deadline_s)

    def watch_scope(
        self, audiences: Sequence[str], *, feed: str = "", after: int = 0
    ) -> AsyncGenerator[scope_pb2.WatchResponse]:
        """What the broker tells guards of these audiences, until the stream breaks off: `ScopeFeed` follows it.

        feed, after: where an earlier stream ended. Raises: BrokerError.
        """
        return watch(self._route.link, audiences, feed=feed, after=after, spiffe_id=self._spiffe_id)

    @property
    def signing(self) -> SigningCalls:
        """Grants, signatures and signing certificates."""
        return SigningCalls(self._route.link, spiffe_id=self._spiffe_id, seconds=self._deadline_s)

    @property
    def approvals(self) -> ApprovalCalls:
        """What waits for approval: to look at, to approve, to withdraw, to wait for."""
        return ApprovalCalls(self._route.link, spiffe_id=self._spiffe_id, seconds=self._deadline_s)

    @property
    def sessions(self) -> SessionCalls:
        """Agents' sessions, to score."""
        return SessionCalls(self._route.link, spiffe_id=self._spiffe_id, seconds=self._deadline_s)

    async def check(self, token: str, action: Action, *, deadline_s: float | None = None) -> None:
        """Returns when the broker would mint `token` for `action` again now. For the token's own audience.

        action: as rebuilt from the request at hand. Raises: Refused with the reason when it would not; Unavailable.
        """
        message = broker_pb2.CheckRequest(token=token, action=to_wire(action), spiffe_id=self._spiffe_id)
        answer = await self._route.link.call(_CHECK, message, self._seconds(deadline_s))
        if not answer.allowed:
            raise refusal(answer.reason, answer.correlation_id)

    async def redeem(
        self, token: str, action: Action, idempotency_id: str | None = None, *, deadline_s: float | None = None
    ) -> Redeemed:
        """Uses a single-use token up, for the token's own audience. Act only after this returned.

        idempotency_id: 16 to 64 of A-Z a-z 0-9 - _, of your own making, to be able to ask again after a crash; else one
        is made, and the answer has it. Raises: Refused(ALREADY_USED) to everyone but the first; Refused, Unavailable.
        """
        idempotency_id = secrets.token_urlsafe(24) if idempotency_id is None else idempotency_id
        check_random_id(idempotency_id, "an idempotency id")
        message = broker_pb2.RedeemRequest(
            token=token, action=to_wire(action), idempotency_id=idempotency_id, spiffe_id=self._spiffe_id
        )
        answer = await self._route.link.call(_REDEEM, message, self._seconds(deadline_s))
        return redeemed(answer, idempotency_id)

    async def explain(
        self,
        principal: str | SpiffeId,
        action: Action,
        *,
        facts: Mapping[str, Any] | None = None,
        pid: int | None = None,
        deadline_s: float | None = None,
    ) -> Explanation:
        """How the broker would decide for `principal`, and which conditions fail. For operators; nothing is minted.

        facts: to assume, by attestor. pid: a process on the broker's node to attest now; `facts` win over it.
        """
        message = broker_pb2.ExplainRequest(
            principal=str(SpiffeId.parse(str(principal))),
            action=to_wire(action),
            facts=canonical_json(facts, plain=False).decode() if facts else "",
            pid=pid or 0,
            spiffe_id=self._spiffe_id,
        )
        return Explanation.read(await self._route.link.call(_EXPLAIN, message, self._seconds(deadline_s)))

    def _seconds(self, deadline_s: float | None) -> float:
        return self._deadline_s if deadline_s is None else deadline_s
