"""broker.client over mutual TLS: a real Workload API, a real handshake, tokens bound to the certificate shown."""

import asyncio
import hashlib
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

import grpc
import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from support.agents import WorkloadServer, clock, jwt_update, serving, x509_update
from support.pki import CA, snapshot
from support.processes import until
from support.wire_broker import ISSUER, WireBroker

from broker._proto.actionbroker.v1 import broker_pb2_grpc
from broker.action import Action
from broker.client import Client, Invalid, Reason, Refused, Unavailable
from broker.credentials.jose import b64url
from broker.identity.workload_api import WorkloadApi

BROKER = "spiffe://acme.test/action-broker"
CALLER = "spiffe://acme.test/build/agent"
ORDERS = "spiffe://acme.test/service/orders"
NOW = clock()
ACME = CA("acme.test", now=NOW)
OTHER = CA("other.test", now=NOW)
TRUSTED = snapshot(ACME.bundle())
ACTION = Action("orders.refund", "https://orders.acme.test/v1/orders/17", ORDERS, {"amount": 30})


def thumbprint(chain):
    return b64url(hashlib.sha256(chain[0]).digest())


@pytest.fixture
async def agent(tmp_path):
    server = WorkloadServer(f"unix:{tmp_path}/agent.sock")
    server.first = ACME.svid(CALLER)
    server.x509, server.jwt_bundles = x509_update(server.first, ACME), jwt_update(acme_test=b'{"keys":[]}')
    await server.start()
    yield server
    await server.stop()


@asynccontextmanager
async def broker_at(wire, svid=None, trusted=TRUSTED):
    def register(server):
        broker_pb2_grpc.add_ActionBrokerServicer_to_server(wire, server)

    async with serving(svid or ACME.svid(BROKER), trusted, register) as target:
        yield target


@pytest.fixture
async def wire():
    return WireBroker(on_unix=False)


def client_of(target, agent, **more):
    return Client.mtls(target, **({"broker_id": BROKER, "workload_api": agent.target} | more))


async def test_a_token_is_bound_to_the_certificate_that_was_shown_and_keeps_it(wire, agent):
    async with broker_at(wire) as target, client_of(target, agent) as client:
        token = await client.request_action(ACTION)
    claims = wire.verify(token.access_token)
    assert claims.cnf.jkt is None
    assert claims.cnf.x5t_s256 == thumbprint(token.svid.chain) == thumbprint(agent.first.chain)
    assert (token.token_type, token.key) == ("Bearer", None)
    assert token.http_headers("POST", ACTION.resource) == {"authorization": f"Bearer {token.access_token}"}
    assert str(agent.first.key_pkcs8) not in repr(token)
    assert token.is_usable()
    assert not token.is_usable(token.expires_at)


async def test_stream_and_batch_are_bound_to_the_certificate_as_well(wire, agent):
    async with broker_at(wire) as target, client_of(target, agent) as client, client.stream() as stream:
        [batched] = await client.request_many([ACTION])
        streamed = await stream.request_action(ACTION)
    assert thumbprint(batched.svid.chain) == thumbprint(streamed.svid.chain) == thumbprint(agent.first.chain)
    assert wire.challenges == 0


async def test_after_a_rotation_new_tokens_are_bound_to_the_new_certificate_and_old_ones_keep_theirs(wire, agent):
    second = ACME.svid(CALLER)
    async with (
        WorkloadApi(agent.target) as api,
        broker_at(wire) as target,
        client_of(target, agent, workload_api=api) as client,
        client.stream() as stream,
    ):
        before, streamed_before = await client.request_action(ACTION), await stream.request_action(ACTION)
        seen = asyncio.Event()
        api.subscribe(lambda _: seen.set())
        agent.x509 = x509_update(second, ACME)
        agent.say()
        await seen.wait()
        after, streamed_after = await client.request_action(ACTION), await stream.request_action(ACTION)
        for token in (before, streamed_before):
            assert thumbprint(token.svid.chain) == thumbprint(agent.first.chain)
            assert token.is_usable()
        for token in (after, streamed_after):
            assert thumbprint(token.svid.chain) == thumbprint(second.chain)


async def test_rotation_under_load_fails_no_request(wire, agent):
    done = 0

    async def load(client, enough):
        nonlocal done
        while not enough.is_set():
            token = await client.request_action(ACTION)
            assert wire.verify(token.access_token).cnf.x5t_s256 == thumbprint(token.svid.chain)
            done += 1

    async with broker_at(wire) as target, client_of(target, agent) as client:
        enough = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            for _ in range(4):
                group.create_task(load(client, enough))
            for _ in range(5):
                reached = done + 20
                await until(lambda reached=reached: done >= reached, "twenty more tokens")
                agent.x509 = x509_update(ACME.svid(CALLER), ACME)
                agent.say()
            enough.set()
    assert done >= 100


async def test_a_client_closes_at_once_even_if_a_call_from_before_a_rotation_hangs(wire, agent):
    async with WorkloadApi(agent.target) as api, broker_at(wire) as target:
        client = await client_of(target, agent, workload_api=api).__aenter__()
        hanging = asyncio.create_task(client.request("hang", ACTION.resource, ORDERS, deadline_s=60))
        await until(lambda: wire.calls["RequestActionToken"], "the broker has the request")
        link = client._opened.link
        agent.x509 = x509_update(ACME.svid(CALLER), ACME)
        agent.say()
        await until(lambda: link.generation == 2, "the client follows the rotation")
        assert await client.request_action(ACTION)
        assert not hanging.done()
        async with asyncio.timeout(2):
            await client.__aexit__(None, None, None)
            with pytest.raises(Unavailable, match="the client was closed"):
                await hanging


async def test_the_call_to_the_service_shows_the_certificate_that_the_token_is_bound_to(wire, agent):
    shown = []

    def register(server):
        async def refund(request, context):
            shown.append(context.auth_context()["x509_pem_cert"][0])
            return b"refunded by " + dict(context.invocation_metadata())["authorization"][:6].encode()

        handler = grpc.unary_unary_rpc_method_handler(refund)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("acme.Orders", {"Refund": handler}),))

    async with (
        WorkloadApi(agent.target) as api,
        broker_at(wire) as target,
        serving(ACME.svid(ORDERS), TRUSTED, register) as orders,
        client_of(target, agent, workload_api=api) as client,
    ):
        token = await client.request_action(ACTION)
        seen = asyncio.Event()
        api.subscribe(lambda _: seen.set())
        agent.x509 = x509_update(ACME.svid(CALLER), ACME)
        agent.say()
        await seen.wait()
        async with client.service_channel(token, orders) as channel:
            metadata = token.grpc_metadata("/acme.Orders/Refund", authority="orders.acme.test")
            answer = await channel.unary_unary("/acme.Orders/Refund")(b"", metadata=metadata)
        assert answer == b"refunded by Bearer"
        assert shown == [agent.first.leaf.public_bytes(Encoding.PEM)]
        # A server that is not the token's audience gets neither call nor token.
        async with client.service_channel(token, target) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await channel.unary_unary("/acme.Orders/Refund")(b"", metadata=metadata)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_with_a_key_of_its_own_tokens_are_bound_to_that_instead(wire, agent):
    async with broker_at(wire) as target, client_of(target, agent, proof_for=ISSUER) as client:
        token = await client.request_action(ACTION)
    assert (token.token_type, token.svid) == ("DPoP", None)
    assert wire.verify(token.access_token).cnf.jkt == token.key.jkt
    assert wire.challenges == 1


@pytest.mark.parametrize("name", ["spiffe://acme.test/action-brokers", "spiffe://acme.test/build/agent"])
async def test_a_server_with_another_name_gets_no_request(wire, agent, name):
    async with broker_at(wire, ACME.svid(name)) as target, client_of(target, agent) as client:
        with pytest.raises(Unavailable, match=f"the server is {name}, expected {BROKER}"):
            await client.request_action(ACTION)
    assert not wire.calls


async def test_a_server_that_another_domain_vouches_for_gets_no_request(wire, agent):
    async with broker_at(wire, OTHER.svid(BROKER)) as target, client_of(target, agent) as client:
        with pytest.raises(Unavailable, match="trust bundle"):
            await client.request_action(ACTION)
    assert not wire.calls


async def test_a_broker_that_does_not_take_our_certificate_is_explained(wire, agent):
    trusted = snapshot(OTHER.bundle())
    async with broker_at(wire, trusted=trusted) as target, client_of(target, agent) as client:
        with pytest.raises(Unavailable, match="may not accept our SVID"):
            await client.request_action(ACTION)
    assert not wire.calls


async def test_without_a_workload_api_entering_says_so_in_time(wire, tmp_path):
    client = Client.mtls("127.0.0.1:1", broker_id=BROKER, workload_api=f"unix:{tmp_path}/none", deadline_s=0.3)
    with pytest.raises(Unavailable, match="Is the SPIRE agent running") as unavailable:
        await client.__aenter__()
    assert unavailable.value.reason is Reason.IDENTITY_UNAVAILABLE


async def test_an_svid_that_has_ended_asks_for_nothing(wire, agent):
    agent.x509 = x509_update(ACME.svid(CALLER, lifetime=timedelta(seconds=-1)), ACME)
    async with broker_at(wire) as target, client_of(target, agent) as client:
        with pytest.raises(Unavailable, match="our own SVID has expired"):
            await client.request_action(ACTION)
    assert not wire.calls


async def test_a_refusal_over_mutual_tls_is_a_refusal(wire, agent):
    async with broker_at(wire) as target, client_of(target, agent) as client:
        with pytest.raises(Refused) as refused:
            await client.request("refuse.denied", ACTION.resource, ORDERS)
    assert refused.value.reason is Reason.DENIED


@pytest.mark.parametrize("broker_id", ["acme.test/action-broker", "spiffe://ACME.test/x", "https://acme.test", ""])
def test_a_broker_id_that_is_none_is_found_at_once(broker_id):
    with pytest.raises(Invalid):
        Client.mtls("127.0.0.1:1", broker_id=broker_id, workload_api="unix:/none")


async def test_a_unix_client_has_no_certificate_to_show(wire, tmp_path):
    async with Client.unix(str(Path(tmp_path) / "s"), issuer=ISSUER) as client:
        with pytest.raises(RuntimeError, match="no certificate"):
            client.service_channel(None, "127.0.0.1:1")
