"""The guard in front of a real grpc.aio server, over mutual TLS and by DPoP."""

import asyncio
import contextlib
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any, Self

import grpc
import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from support.grpc_orders import SERVICE, Orders, resource
from support.issuer import AUDIENCE, CALLER, Issuer, Prover, guard_for, x5t
from support.pki import CA, Svid, der

from broker import guard
from broker.action import Action
from broker.errors import BrokerError, Reason
from broker.guard import GuardInterceptor, Rule, Table
from broker.status import CORRELATION_ID, DETAILS, reason_of

AUTHORITY = "orders.acme.test"
ISSUER = Issuer()
PROVER = Prover()


def now() -> datetime:
    return datetime.now(UTC)


def act(order: str = "17", name: str = "orders.refund", **parameters: Any) -> Action:
    return Action(name, f"https://orders.acme.test/v1/orders/{order}", AUDIENCE, parameters)


def rule(method: str, **more: Any) -> Rule:
    return Rule(**({"method": f"/{SERVICE}/{method}", "action": "orders.refund", "resource": resource} | more))


TABLE = Table(
    [
        rule("Refund"),
        rule("Lines"),
        rule("WriteLines"),
        rule("Upload", payload=lambda message: message.startswith(b"chunk")),
        rule("ReadUpload"),
        rule("Talk"),
        rule("Blocking"),
        rule("Failing", parameters=lambda message: {"amount": int(message)}),
    ],
    public=[f"/{SERVICE}/Health"],
)


class Service:
    """A running server, and channels to it."""

    def __init__(self, orders: Orders, port: int, ca: CA) -> None:
        self.orders, self.port, self.ca = orders, port, ca

    def channel(self, svid: Svid) -> grpc.aio.Channel:
        credentials = grpc.ssl_channel_credentials(
            self.ca.certificate.public_bytes(Encoding.PEM), svid.key_pem, svid.chain_pem
        )
        options = [("grpc.ssl_target_name_override", AUTHORITY)]
        return grpc.aio.secure_channel(f"127.0.0.1:{self.port}", credentials, options)


Serve = Callable[..., Awaitable[Service]]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    async with contextlib.AsyncExitStack() as stack:

        async def start(*, table: Table = TABLE, interceptors: list[Any] | None = None, **changes: Any) -> Service:
            ca = CA(now=now())
            if interceptors is None:
                arguments = {"clock": now} | changes
                interceptors = [GuardInterceptor(await guard_for(ISSUER, **arguments), table, authorities=[AUTHORITY])]
            server = grpc.aio.server(interceptors=interceptors)
            orders = Orders()
            server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, orders.handlers()),))
            svid = ca.svid(AUDIENCE, dns=[AUTHORITY])
            credentials = grpc.ssl_server_credentials(
                [(svid.key_pem, svid.chain_pem)], ca.certificate.public_bytes(Encoding.PEM), require_client_auth=True
            )
            port = server.add_secure_port("127.0.0.1:0", credentials)
            await server.start()
            stack.push_async_callback(server.stop, None)
            return Service(orders, port, ca)

        yield start


def metadata(token: str | None, proof: str | None = None) -> list[tuple[str, str]]:
    scheme = "Bearer" if proof is None else "DPoP"
    found = [] if token is None else [("authorization", f"{scheme} {token}")]
    return found + ([] if proof is None else [("dpop", proof)])


class Caller:
    """A workload with an SVID, a channel and tokens for it."""

    def __init__(self, service: Service) -> None:
        self.svid = service.ca.svid(CALLER)
        self.channel = service.channel(self.svid)
        self._count = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.channel.close()

    def token(self, action: Action, **changes: Any) -> str:
        self._count += 1
        defaults = {"cnf": x5t(der(self.svid.leaf)), "jti": f"token-{self._count}", "now": now()}
        return ISSUER.token(action, **(defaults | changes))

    def bearer(self, action: Action, **changes: Any) -> list[tuple[str, str]]:
        return metadata(self.token(action, **changes))

    async def unary(self, method: str, request: bytes, sent: list[tuple[str, str]]) -> bytes:
        return await self.channel.unary_unary(f"/{SERVICE}/{method}")(request, metadata=sent, timeout=10)


async def refused(reason: Reason, code: grpc.StatusCode, call: Awaitable[Any]) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    error = caught.value
    trailers = dict(error.trailing_metadata())
    assert (error.code(), reason_of(trailers[DETAILS])) == (code, reason), error
    assert error.details() == str(reason)  # and nothing else: invariant 9
    assert len(trailers[CORRELATION_ID]) == 32


DENIED = grpc.StatusCode.PERMISSION_DENIED
UNAUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED


async def test_a_certificate_bound_token_admits_its_act_over_mutual_tls(serve: Serve) -> None:
    async with Caller(service := await serve()) as caller:
        assert await caller.unary("Refund", b"17", caller.bearer(act())) == CALLER.encode()
        await refused(Reason.OUT_OF_SCOPE, DENIED, caller.unary("Refund", b"18", caller.bearer(act())))
    assert service.orders.seen == [b"17"]


async def test_a_stolen_token_is_worthless_on_another_connection(serve: Serve) -> None:
    service = await serve()
    async with Caller(service) as caller, Caller(service) as thief:
        sent = caller.bearer(act())
        await refused(Reason.KEY_MISMATCH, UNAUTHENTICATED, thief.unary("Refund", b"17", sent))
        assert await caller.unary("Refund", b"17", sent)
        await refused(Reason.ALREADY_USED, DENIED, caller.unary("Refund", b"17", sent))


async def test_a_key_bound_token_admits_with_a_proof_for_our_authority_only(serve: Serve) -> None:
    async with Caller(await serve()) as caller:
        token = caller.token(act(), cnf=PROVER.cnf, use="ttl")
        url = f"https://{AUTHORITY}/{SERVICE}/Refund"
        proof = PROVER.proof(token, now=now(), htu=url)
        assert await caller.unary("Refund", b"17", metadata(token, proof))
        await refused(Reason.PROOF_REPLAYED, UNAUTHENTICATED, caller.unary("Refund", b"17", metadata(token, proof)))
        for wrong in (
            {"htu": f"https://127.0.0.1/{SERVICE}/Refund"},
            {"htu": f"https://{AUTHORITY}/{SERVICE}/Lines"},
            {"htu": url, "htm": "GET"},
            {"htu": url, "ath": "x"},
        ):
            bad = PROVER.proof(token, **({"now": now()} | wrong))
            await refused(Reason.INVALID_PROOF, UNAUTHENTICATED, caller.unary("Refund", b"17", metadata(token, bad)))


async def test_nothing_twice_and_no_mixture_in_the_metadata(serve: Serve) -> None:
    async with Caller(service := await serve()) as caller:
        token, key_bound = caller.token(act(), use="ttl"), caller.token(act(), cnf=PROVER.cnf, use="ttl")
        proof = PROVER.proof(key_bound, now=now(), htu=f"https://{AUTHORITY}/{SERVICE}/Refund")
        sound = metadata(token)
        for sent, reason in (
            ([], Reason.UNAUTHENTICATED),
            ([("dpop", proof)], Reason.UNAUTHENTICATED),
            ([("authorization", token)], Reason.MALFORMED),
            ([("authorization", "Bearer")], Reason.MALFORMED),
            ([("authorization", f"Basic {token}")], Reason.MALFORMED),
            (sound + sound, Reason.MALFORMED),
            ([*sound, ("dpop", proof)], Reason.MALFORMED),
            ([*metadata(key_bound, proof), ("dpop", proof)], Reason.MALFORMED),
            ([("authorization", f"DPoP {key_bound}")], Reason.INVALID_PROOF),
            (metadata(key_bound), Reason.KEY_MISMATCH),
            ([("authorization", f"Bearer  {token}")], Reason.MALFORMED),
        ):
            code = grpc.StatusCode.INVALID_ARGUMENT if reason is Reason.MALFORMED else UNAUTHENTICATED
            await refused(reason, code, caller.unary("Refund", b"17", sent))
        assert not service.orders.seen
        assert await caller.unary("Refund", b"17", sound)
        assert await caller.unary("Refund", b"17", [("authorization", f"bearer {token}")])  # RFC 9110: any case


async def test_invariant_13_a_method_without_a_mapping_is_refused(serve: Serve) -> None:
    """Invariant 13: no mapping, refused; with every credential in the world."""
    async with Caller(service := await serve()) as caller:
        await refused(Reason.OUT_OF_SCOPE, DENIED, caller.unary("Unmapped", b"17", caller.bearer(act())))
        call = caller.channel.stream_stream(f"/{SERVICE}/UnmappedStream")(metadata=caller.bearer(act()), timeout=10)
        await refused(Reason.OUT_OF_SCOPE, DENIED, call.read())
        assert not service.orders.seen
        assert await caller.unary("Refund", b"17", caller.bearer(act()))


async def test_a_mapping_that_cannot_read_the_message_refuses(serve: Serve) -> None:
    async with Caller(service := await serve()) as caller:
        bad = act(amount=17)
        await refused(Reason.OUT_OF_SCOPE, DENIED, caller.unary("Failing", b"many", caller.bearer(bad)))
        assert not service.orders.seen
        assert await caller.unary("Failing", b"17", caller.bearer(bad))


async def test_what_is_listed_as_public_is_open_and_knows_nobody(serve: Serve) -> None:
    async with Caller(await serve()) as caller:
        assert await caller.unary("Health", b"", []) == b"nobody"
        assert await caller.unary("Health", b"", caller.bearer(act())) == b"nobody"


async def test_a_rule_at_the_handler_counts_like_one_in_the_table(serve: Serve) -> None:
    async with Caller(service := await serve()) as caller:
        sound = act(name="orders.declared")
        assert await caller.unary("Declared", b"17", caller.bearer(sound)) == b"declared"
        call = caller.channel.unary_stream(f"/{SERVICE}/DeclaredLines")
        assert [m async for m in call(b"17", metadata=caller.bearer(sound), timeout=10)] == [b"declared"]
        await refused(Reason.OUT_OF_SCOPE, DENIED, caller.unary("Declared", b"17", caller.bearer(act())))
        assert service.orders.seen == [b"17", b"17"]


async def test_a_declared_handler_without_an_interceptor_answers_nobody(serve: Serve) -> None:
    async with Caller(service := await serve(interceptors=[])) as caller:
        with pytest.raises(grpc.aio.AioRpcError):
            await caller.unary("Declared", b"17", caller.bearer(act(name="orders.declared")))
        assert not service.orders.seen


async def test_a_handler_that_is_not_async_never_runs_unguarded(serve: Serve) -> None:
    async with Caller(service := await serve()) as caller:
        for sent in (caller.bearer(act()), []):
            with pytest.raises(grpc.aio.AioRpcError):
                await caller.unary("Blocking", b"17", sent)
        assert not service.orders.seen


@pytest.mark.parametrize("method", ["Lines", "WriteLines"])
async def test_a_streamed_answer_comes_only_after_the_act_was_admitted(serve: Serve, method: str) -> None:
    async with Caller(service := await serve()) as caller:
        call = caller.channel.unary_stream(f"/{SERVICE}/{method}")
        got = [message async for message in call(b"17", metadata=caller.bearer(act()), timeout=10)]
        assert got == [b"orders.refund 0", b"orders.refund 1", b"orders.refund 2"]
        await refused(Reason.OUT_OF_SCOPE, DENIED, call(b"18", metadata=caller.bearer(act()), timeout=10).read())
        assert service.orders.seen == [b"17"] * 3


async def send(*messages: bytes) -> AsyncIterator[bytes]:
    for message in messages:
        yield message


@pytest.mark.parametrize("method", ["Upload", "ReadUpload"])
async def test_every_message_of_a_stream_means_the_act_that_was_admitted(serve: Serve, method: str) -> None:
    """However the handler reads them: by iterating or by context.read()."""
    async with Caller(service := await serve()) as caller:
        call = caller.channel.stream_unary(f"/{SERVICE}/{method}")
        sent = {"metadata": caller.bearer(act(), use="ttl"), "timeout": 10}
        assert await call(send(b"17/a", b"17/b"), **sent) == b"17/a,17/b"
        service.orders.seen.clear()
        await refused(Reason.OUT_OF_SCOPE, DENIED, call(send(b"17/a", b"18/b", b"17/c"), **sent))
        assert service.orders.seen == [b"17/a"]
        await refused(Reason.OUT_OF_SCOPE, DENIED, call(send(b"18/a"), **sent))
        await refused(Reason.OUT_OF_SCOPE, DENIED, call(send(), **sent))
        assert service.orders.seen == [b"17/a"]


async def test_messages_that_only_carry_payload_need_no_act_of_their_own(serve: Serve) -> None:
    async with Caller(await serve()) as caller:
        call = caller.channel.stream_unary(f"/{SERVICE}/Upload")
        sent = {"metadata": caller.bearer(act(), use="ttl"), "timeout": 10}
        assert await call(send(b"17", b"chunk-1", b"chunk-2"), **sent) == b"17,chunk-1,chunk-2"
        await refused(Reason.OUT_OF_SCOPE, DENIED, call(send(b"chunk-1", b"17"), **sent))
        await refused(Reason.OUT_OF_SCOPE, DENIED, call(send(b"17", b"chunk-1", b"18"), **sent))


async def test_a_conversation_ends_where_it_turns_to_another_act_or_the_token_expires(serve: Serve) -> None:
    clock = [now()]
    async with Caller(service := await serve(clock=lambda: clock[0])) as caller:
        for turn, reason in ((b"18/x", Reason.OUT_OF_SCOPE), (b"17/late", Reason.EXPIRED)):
            call = caller.channel.stream_stream(f"/{SERVICE}/Talk")(metadata=caller.bearer(act()), timeout=10)
            await call.write(b"17/a")
            assert await call.read() == b"17/A"
            if reason is Reason.EXPIRED:
                clock[0] += timedelta(seconds=66)
            await call.write(turn)
            await refused(reason, DENIED, call.read())
        assert service.orders.seen == [b"17/a", b"17/a"]


async def test_a_guard_without_keys_refuses_as_unavailable_and_recovers(serve: Serve) -> None:
    seconds, sets = [0.0], [b""]

    async def fetch() -> bytes:
        return sets[-1]

    keys = guard.KeyCache(fetch, seconds=lambda: seconds[0])
    async with Caller(await serve(keys=keys)) as caller:
        sent = caller.bearer(act())
        await refused(Reason.SCOPE_STALE, grpc.StatusCode.UNAVAILABLE, caller.unary("Refund", b"17", sent))
        sets.append(ISSUER.jwks())
        seconds[0] += 6
        assert await caller.unary("Refund", b"17", sent)


async def test_of_many_at_once_one_uses_a_token_that_counts_once(serve: Serve) -> None:
    async with Caller(service := await serve()) as caller:
        sent = caller.bearer(act())
        calls = [caller.unary("Refund", b"17", sent) for _ in range(24)]
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert [r for r in results if not isinstance(r, Exception)] == [CALLER.encode()]
        assert service.orders.seen == [b"17"]


def test_the_names_that_clients_call_us_by_are_required_and_checked() -> None:
    wanted = inspect.signature(GuardInterceptor).parameters["authorities"]
    assert wanted.default is inspect.Parameter.empty
    for wrong in ([], [""], ["Orders.acme.test"], ["orders.acme.test/x/../y"], ["user@orders.acme.test"]):
        with pytest.raises((ValueError, BrokerError)):
            GuardInterceptor(None, authorities=wrong)
