"""Scope.Watch over mutual TLS: who is told, what, for how long, and who is cut off."""

import asyncio
import contextlib

import grpc
import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from support.pki import CA, JwtAuthority, jwks
from support.processes import until
from support.signing_calls import UNLIMITED
from support.whole_broker import ORDERS, Whole, dialled, utc_now, whole_broker
from support.wires import Watcher, ended, told, watcher

from broker._proto.actionbroker.v1 import scope_pb2, scope_pb2_grpc
from broker.edges import grpc_scope
from broker.errors import Reason
from broker.guard.keys import parse_key_set
from broker.ledger.records import Refusal

DENIED = grpc.StatusCode.PERMISSION_DENIED
OTHER = "spiffe://acme.test/service/other"
SHARED = "https://orders.acme.test"


async def test_a_watcher_is_told_about_its_own_audiences_and_about_no_others() -> None:
    with whole_broker(audiences={SHARED: [ORDERS]}) as whole:
        async with watcher(whole) as orders, watcher(whole, "service/other") as other:
            (snapshot,) = await told(orders.watch(ORDERS))
            assert (snapshot.snapshot.first, snapshot.snapshot.last) == (True, True)
            assert len(parse_key_set(snapshot.key_set)) == 1
            assert await told(orders.watch(ORDERS, SHARED))
            assert await told(other.watch(OTHER))
            for wrong in ((ORDERS,), (OTHER, ORDERS), (SHARED,)):
                assert await ended(other.watch(*wrong)) == (Reason.WRONG_AUDIENCE, DENIED), wrong
            await until(lambda: len(_refusals(whole)) == 3, "each of them is written down, soon after the answer")
        assert set(_refusals(whole)) == {(OTHER, Reason.WRONG_AUDIENCE, "watch")}


def _refusals(whole: Whole) -> list[tuple[str, str, str]]:
    return [(one.principal, one.reason, one.stage) for one in whole.records() if isinstance(one, Refusal)]


@pytest.mark.parametrize(
    "audiences",
    [(), (ORDERS, ORDERS), tuple(f"https://{number}.acme.test" for number in range(17)), ("orders",), ("",)],
    ids=["none", "one twice", "too many", "no URI", "nothing"],
)
async def test_a_watcher_names_its_audiences_in_one_way(audiences: tuple[str, ...]) -> None:
    with whole_broker(audiences={f"https://{number}.acme.test": [ORDERS] for number in range(17)}) as whole:
        async with watcher(whole) as orders:
            reason, code = await ended(orders.watch(*audiences))
            assert (reason, code) == (Reason.MALFORMED, grpc.StatusCode.INVALID_ARGUMENT)
            assert await told(orders.watch(*(f"https://{number}.acme.test" for number in range(16))))


async def test_who_has_no_certificate_or_one_of_nobody_knows_whom_is_told_nothing() -> None:
    """Invariant 5."""
    with whole_broker() as whole:
        stranger = CA("elsewhere.test", now=utc_now())
        ours = whole.domain.svid("service/orders")
        bundles = dict(ours.bundles)
        for own in (stranger.svid("spiffe://elsewhere.test/x").own(), CA(now=utc_now()).svid(ORDERS).own()):
            async with dialled(whole.broker.grpc_port, ours.__class__(own=own, bundles=bundles, revision=1)) as wire:
                _, code = await ended(Watcher(wire.channel).watch(ORDERS))
                assert code is grpc.StatusCode.UNAVAILABLE  # the handshake refused it
        async with whole.wire() as wire:  # the Unix socket, without a proof of any key
            call = scope_pb2_grpc.ScopeStub(wire.channel).Watch(
                scope_pb2.WatchRequest(audiences=[ORDERS], spiffe_id=ORDERS)
            )
            assert await ended(call) == (Reason.NONCE_REQUIRED, grpc.StatusCode.UNAUTHENTICATED)
        async with watcher(whole) as orders:
            assert await told(orders.watch(ORDERS))


async def test_a_watcher_whose_svid_ends_is_told_nothing_more() -> None:
    """Invariant 3: an identity that has ended is none, on an open stream as well."""
    with whole_broker() as whole:
        async with watcher(whole, seconds=3) as brief, watcher(whole) as lasting:
            call, other = brief.watch(ORDERS), lasting.watch(ORDERS)
            assert await told(call)
            assert await told(other)
            assert await ended(call) == (Reason.EXPIRED, DENIED)
            assert await told(other)


async def test_a_watcher_whose_trust_domain_is_trusted_no_more_is_told_nothing_more() -> None:
    """Invariant 5: a bundle that is gone ends what it vouched for, on an open stream as well."""
    theirs = "spiffe://other.test/service/orders"
    with whole_broker() as whole:
        foreign = CA("other.test", now=utc_now())
        bundle = b"".join(one.public_bytes(Encoding.DER) for one in foreign.bundle().x509_authorities)
        whole.domain.federate("other.test", bundle, jwks(JwtAuthority().jwk()))
        ours = whole.domain.svid("service/orders")
        snapshot = ours.__class__(own=foreign.svid(theirs).own(), bundles=dict(ours.bundles), revision=1)
        async with dialled(whole.broker.grpc_port, snapshot) as wire, watcher(whole) as lasting:
            other = lasting.watch(ORDERS)
            assert await told(other)
            call = await _watching(Watcher(wire.channel), theirs)
            whole.domain.unfederate("other.test")
            assert await ended(call) == (Reason.UNAUTHENTICATED, grpc.StatusCode.UNAUTHENTICATED)
            assert await told(other)


async def _watching(foreign: Watcher, audience: str) -> object:
    """The call, once the broker trusts its domain."""
    async with asyncio.timeout(20):
        while True:
            call = foreign.watch(audience)
            try:
                await told(call)
            except grpc.aio.AioRpcError:
                await asyncio.sleep(0.02)
            else:
                return call


@pytest.mark.parametrize("guards", [True, False], ids=["a guard", "nobody's guard"])
async def test_no_caller_takes_all_places_of_watchers(*, guards: bool) -> None:
    """Who holds as many as one may is refused one more, and all others are not."""
    most = grpc_scope.MAX_WATCHERS_OF_ONE if guards else grpc_scope.MAX_IDLE_WATCHERS_OF_ONE
    with whole_broker(limits=UNLIMITED) as whole:
        async with watcher(whole) as orders, watcher(whole, "service/other") as other, whole.wire() as wire:
            if guards:
                assert await wire.token("orders.longest"), "somebody asks credentials for it"
            calls = []
            for _ in range(most):
                calls.append(orders.watch(ORDERS))
                assert await told(calls[-1])
            async with watcher(whole) as more:  # another connection of the same
                assert await ended(more.watch(ORDERS)) == (Reason.QUOTA, grpc.StatusCode.RESOURCE_EXHAUSTED)
                assert await told(other.watch(OTHER))
                calls.pop().cancel()
                await until(lambda: _places(whole) == most, "a place is free again")
                assert await told(more.watch(ORDERS))


async def test_who_guards_nothing_takes_no_place_of_a_guard() -> None:
    """Any workload may watch its own name. However many do, whoever guards something still listens."""
    each, whole_lot = grpc_scope.MAX_IDLE_WATCHERS_OF_ONE, grpc_scope.MAX_IDLE_WATCHERS
    with whole_broker(limits=UNLIMITED) as whole:
        async with contextlib.AsyncExitStack() as stack:
            orders = await stack.enter_async_context(watcher(whole))
            wire = await stack.enter_async_context(whole.wire())
            assert await wire.token("orders.longest"), "somebody asks credentials for orders"
            idle = []
            for number in range(whole_lot // each):
                name = f"service/idle-{number}"
                one = await stack.enter_async_context(watcher(whole, name))
                idle += [one.watch(f"spiffe://acme.test/{name}") for _ in range(each)]
                for call in idle[-each:]:
                    assert await told(call)
            late = await stack.enter_async_context(watcher(whole, "service/late"))
            refused = await ended(late.watch("spiffe://acme.test/service/late"))
            assert refused == (Reason.QUOTA, grpc.StatusCode.RESOURCE_EXHAUSTED)
            assert await told(orders.watch(ORDERS))


def _places(whole: Whole) -> int:
    """How many watch."""
    status, page = whole.get("/metrics")
    assert status == 200
    (line,) = [line for line in page.splitlines() if line.startswith("action_broker_scope_watchers ")]
    return int(float(line.split()[1]))
