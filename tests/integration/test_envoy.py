"""The guard behind a real Envoy, by the configuration that is shipped: deploy/envoy/envoy.yaml and guard.toml."""

import json
from collections.abc import AsyncIterator
from datetime import timedelta

import aiohttp
import grpc
import pytest
import pytest_asyncio
from support.envoy import HOST, Edge, guarding, serving
from support.envoy_calls import (
    BASE,
    ISSUER,
    LIST,
    REFUND,
    SCOPE,
    TABLE,
    bearer,
    call,
    dpop,
    now,
    read,
    refund,
    rpc,
    token,
)
from support.issuer import AUDIENCE, CALLER, guard_for, x5t
from support.pki import CA, der
from support.processes import until

from broker.action import Action
from broker.errors import Reason

pytestmark = pytest.mark.asyncio(loop_scope="module")

INVALID_TOKEN = 'DPoP error="invalid_token", algs="ES256"'
INVALID_PROOF = 'DPoP error="invalid_dpop_proof", algs="ES256"'
BODY = {"amount": 30}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def envoy(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Edge]:
    guard = await guard_for(ISSUER, clock=now)
    async with serving(guard, TABLE, tmp_path_factory.mktemp("envoy"), CA(now=now())) as edge:
        yield edge


@pytest.fixture
def edge(envoy: Edge) -> Edge:
    """With a service that nothing has reached yet."""
    envoy.seen.clear()
    return envoy


async def test_an_approved_act_reaches_the_service_once_and_its_credential_never(edge: Edge) -> None:
    access = token(refund())
    answer = await call(edge, dpop(access), BODY)
    assert (answer.status, answer.body) == (200, {"done": True})
    (seen,) = edge.seen
    assert (seen.method, seen.path, seen.body) == ("POST", REFUND, b'{"amount": 30}')
    assert seen.values("x-action-broker-principal") == [CALLER]
    assert seen.values("x-action-broker-action") == ["orders.refund"]
    assert seen.values("authorization") == seen.values("dpop") == []
    (await call(edge, dpop(access), BODY)).refused(Reason.ALREADY_USED, INVALID_TOKEN)
    assert len(edge.seen) == 1


async def test_invariant_10_the_access_log_says_who_and_why_not_and_has_no_credential(edge: Edge) -> None:
    """Invariant 10: Envoy's log is one more place that a credential must not get into."""
    access = token(refund())
    sent = dpop(access)
    await call(edge, sent, BODY)
    refusal = await call(edge, sent, BODY)
    await until(lambda: refusal.body["correlation_id"] in edge.log(), "Envoy writes its log")
    yes, no = map(json.loads, edge.log().splitlines()[-2:])
    assert (yes["principal"], yes["action"], yes["status"]) == (CALLER, "orders.refund", 200)
    assert (no["principal"], no["refused"], no["status"]) == (None, "proof_replayed", 401)
    for secret in (access.rpartition(".")[2], sent[1][1].rpartition(".")[2]):
        assert secret not in edge.log()


async def test_invariant_13_another_act_than_approved_is_refused(edge: Edge) -> None:
    """Invariant 13: order, amount, its type, and whatever else the body or the query has."""
    for order, path, body in (
        ("17", REFUND, {"amount": 31}),
        ("17", REFUND, {"amount": "30"}),
        ("17", REFUND, {}),
        ("17", REFUND, {"amount": 30, "Amount": 99}),
        ("17", REFUND, {"amount": 30, "to": "thief"}),
        ("17", REFUND, [30]),
        ("17", f"{REFUND}?amount=99", BODY),
        ("18", REFUND, BODY),
    ):
        headers = dpop(token(refund(order)), path=path.partition("?")[0])
        (await call(edge, headers, body, path=path)).refused(Reason.OUT_OF_SCOPE, SCOPE)
    path, access = "/v1/orders/17", token(read())
    answer = await call(edge, dpop(access, "GET", path), {"x": 1}, method="GET", path=path)
    answer.refused(Reason.OUT_OF_SCOPE, SCOPE)
    assert edge.seen == []
    assert (await call(edge, dpop(access, "GET", path), method="GET", path=path)).status == 200
    ignored = {"amount": 30, "note": "late"}
    assert (await call(edge, dpop(token(refund())), ignored, path=f"{REFUND}?trace=7")).status == 200


async def test_without_a_credential_the_answer_says_which_one_to_bring(edge: Edge) -> None:
    (await call(edge, [], BODY)).refused(Reason.UNAUTHENTICATED, 'DPoP algs="ES256"')
    assert edge.seen == []


async def test_an_expired_token_and_a_foreign_proof_are_refused(edge: Edge) -> None:
    old = token(refund(), now=now() - timedelta(minutes=3))
    (await call(edge, dpop(old), BODY)).refused(Reason.EXPIRED, INVALID_TOKEN)
    access = token(refund())
    for wrong in ({"htm": "GET"}, {"htu": f"{BASE}/v1/orders/18/refund"}, {"htu": f"https://other.test{REFUND}"}):
        (await call(edge, dpop(access, **wrong), BODY)).refused(Reason.INVALID_PROOF, INVALID_PROOF)
    (await call(edge, bearer(access), BODY)).refused(Reason.KEY_MISMATCH, 'Bearer error="invalid_token"')
    assert edge.seen == []
    assert (await call(edge, dpop(access), BODY)).status == 200


async def test_nobody_is_admitted_without_a_rule_or_under_another_name(edge: Edge) -> None:
    for method, path in (("DELETE", REFUND), ("GET", "/admin"), ("POST", "/healthz"), ("HEAD", "/healthz")):
        assert (await call(edge, dpop(token(refund()), method, path), method=method, path=path)).status == 403
    answer = await call(edge, dpop(token(refund())), BODY, host="evil.test")
    answer.refused(Reason.OUT_OF_SCOPE, SCOPE)
    assert edge.seen == []
    assert (await call(edge, dpop(token(refund())), BODY, host=f"{HOST.upper()}:443")).status == 200


async def test_what_is_public_reaches_the_service_with_its_own_authorization(edge: Edge) -> None:
    assert (await call(edge, [("authorization", "Basic eA==")], method="GET", path="/healthz")).status == 200
    assert edge.seen[0].values("authorization") == ["Basic eA=="]


# -- certificates ------------------------------------------------------------------------------------------------------


async def test_a_certificate_bound_token_counts_on_its_own_connection_alone(edge: Edge) -> None:
    """What a client says of its certificate in x-forwarded-client-cert says nothing."""
    caller, thief = edge.ca.svid(CALLER), edge.ca.svid("spiffe://acme.test/build/thief")
    access = token(refund(), cnf=x5t(der(caller.leaf)))
    told = caller.chain_pem.decode().replace("\n", "%0A").replace(" ", "%20").replace("+", "%2B")
    forged = [("x-forwarded-client-cert", f'Cert="{told}";URI={CALLER}')]
    for svid in (thief, None):
        for more in ([], forged):
            answer = await call(edge, [*bearer(access), *more], BODY, svid=svid)
            answer.refused(Reason.KEY_MISMATCH, 'Bearer error="invalid_token"')
    assert edge.seen == []
    assert (await call(edge, [*bearer(access), *forged], BODY, svid=caller)).status == 200
    assert edge.seen[0].values("x-forwarded-client-cert") == []


async def test_a_certificate_that_nobody_vouches_for_ends_the_connection(edge: Edge) -> None:
    stranger = CA(now=now()).svid(CALLER)
    with pytest.raises(aiohttp.ClientError):
        await call(edge, bearer(token(refund(), cnf=x5t(der(stranger.leaf)))), BODY, svid=stranger)
    assert edge.seen == []


# -- gRPC --------------------------------------------------------------------------------------------------------------


async def test_a_grpc_call_is_admitted_by_its_method_and_told_its_status(edge: Edge) -> None:
    caller = edge.ca.svid(CALLER)
    access = token(LIST, cnf=x5t(der(caller.leaf)))
    unauthenticated, denied = grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED
    assert await rpc(edge, "List", bearer(access)) == (unauthenticated, Reason.KEY_MISMATCH)
    assert await rpc(edge, "Refund", bearer(access), caller) == (denied, Reason.OUT_OF_SCOPE)
    assert await rpc(edge, "List", []) == (unauthenticated, Reason.UNAUTHENTICATED)
    other = token(Action("orders.list", f"{BASE}/v1/other", AUDIENCE))
    assert await rpc(edge, "List", dpop(other, path="/acme.Orders/List")) == (denied, Reason.OUT_OF_SCOPE)
    two = [*bearer(access), *bearer(access)]
    assert await rpc(edge, "List", two, caller) == (grpc.StatusCode.INVALID_ARGUMENT, Reason.MALFORMED)
    assert edge.seen == []
    assert await rpc(edge, "List", bearer(access), caller) == b"done"
    assert edge.seen[0].values("x-action-broker-principal") == [CALLER]
    assert edge.seen[0].values("authorization") == []
    assert await rpc(edge, "List", bearer(access), caller) == (denied, Reason.ALREADY_USED)


async def test_a_proof_is_for_one_grpc_call(edge: Edge) -> None:
    proof = dpop(token(LIST), path="/acme.Orders/List")
    assert await rpc(edge, "List", proof) == b"done"
    assert await rpc(edge, "List", proof) == (grpc.StatusCode.UNAUTHENTICATED, Reason.PROOF_REPLAYED)


async def test_a_grpc_stream_is_admitted_when_it_begins(edge: Edge) -> None:
    """Envoy buffers no body of gRPC: a stream that were first read to its end would never begin."""
    metadata = dpop(token(Action("orders.talk", f"{BASE}/v1/orders", AUDIENCE)), path="/acme.Orders/Talk")
    async with edge.channel() as channel:
        stream = channel.stream_stream("/acme.Orders/Talk")(metadata=metadata)
        for message in (b"one", b"two"):
            await stream.write(message)
            assert await stream.read() == message
        await stream.done_writing()
        assert await stream.code() is grpc.StatusCode.OK
    assert [seen.body for seen in edge.seen] == [b"one", b"two"]


# -- when something is not there ---------------------------------------------------------------------------------------


async def test_invariant_6_without_the_guard_nobody_is_admitted(edge: Edge) -> None:
    """Invariant 6: no answer is a no, for what is public, too; and it mends itself."""
    await edge.guard.stop(None)
    for method, path in (("POST", REFUND), ("GET", "/healthz")):
        assert (await call(edge, dpop(token(refund()), method, path), method=method, path=path)).status == 503
    async with edge.channel() as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary("/acme.Orders/List")(b"all")
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert edge.seen == []
    async with guarding(edge, await guard_for(ISSUER, clock=now), TABLE):
        assert (await call(edge, dpop(token(refund())), BODY)).status == 200
