"""broker.client's stream: one call, many tasks, nobody's answer or trouble becomes another's."""

import asyncio

import pytest
from support.processes import until
from support.wire_broker import ISSUER, WireBroker, serve_unix

from broker.action import Action
from broker.client import ActionToken, Client, Reason, Refused, Unavailable

ORDERS = "spiffe://acme.test/service/orders"
REFUND = ("orders.refund", "https://orders.acme.test/v1/orders/17", ORDERS, {"amount": 30})


def act(name: str = "orders.refund", number: int = 17) -> Action:
    return Action(name, f"https://orders.acme.test/v1/orders/{number}", ORDERS)


@pytest.fixture
async def wire(tmp_path):
    async with serve_unix(WireBroker(), tmp_path / "front.sock", tmp_path / "private") as broker:
        yield broker


@pytest.fixture
async def client(wire, tmp_path):
    async with Client.unix(str(tmp_path / "front.sock"), issuer=ISSUER) as opened:
        yield opened
    wire.release.set()


async def test_a_stream_serves_many_tasks_and_mixes_nobody_up(wire, client):
    async with client.stream() as stream:
        tokens = await asyncio.gather(*(stream.request_action(act(number=n)) for n in range(200)))
        again = await asyncio.gather(*(stream.request_action(act(number=n)) for n in range(200)))
    for number, token in enumerate([*tokens, *again]):
        assert wire.verify(token.access_token).action().covers(act(number=number % 200))
    assert wire.streams == 1
    assert wire.challenges <= 64
    assert len({proof.nonce for proof in wire.proofs}) == len(wire.proofs) == 400


async def test_a_refusal_on_a_stream_is_its_askers_alone(client):
    async with client.stream() as stream:
        good, bad = await asyncio.gather(
            stream.request(*REFUND), stream.request_action(act(f"refuse.{Reason.DENIED}")), return_exceptions=True
        )
    assert isinstance(good, ActionToken)
    assert isinstance(bad, Refused)
    assert bad.reason is Reason.DENIED


async def test_who_gives_up_on_a_stream_takes_nobody_along(wire, client):
    async with client.stream() as stream:
        await stream.request_action(act())
        slow = asyncio.create_task(stream.request_action(act("hang", 1)))
        late = stream.request_action(act("hang", 2), deadline_s=0.1)
        patient = asyncio.create_task(stream.request_action(act("hang", 3)))
        with pytest.raises(Unavailable, match=r"within 0\.1 s"):
            await late
        slow.cancel()
        with pytest.raises(asyncio.CancelledError):
            await slow
        wire.release.set()
        assert (await patient).action == act("hang", 3)
        assert await stream.request_action(act())
    assert wire.streams == 1


async def test_a_broken_stream_is_opened_again_and_its_requests_repeated(wire, client):
    async with client.stream() as stream:
        await stream.request_action(act())
        wire.fail_next = 1
        tokens = await asyncio.gather(*(stream.request_action(act(number=n)) for n in range(20)))
        assert [token.action for token in tokens] == [act(number=n) for n in range(20)]
    assert wire.streams == 2


async def test_a_stream_outlives_a_restart_of_the_broker(tmp_path):
    path, folder = tmp_path / "front.sock", tmp_path / "private"
    async with Client.unix(str(path), issuer=ISSUER) as client, client.stream() as stream:
        async with serve_unix(WireBroker(), path, folder):
            await stream.request_action(act())
        with pytest.raises(Unavailable, match="doctor"):
            await stream.request_action(act())
        async with serve_unix(WireBroker(), path, folder):
            assert await stream.request_action(act())


async def test_a_closed_stream_takes_no_request(client):
    async with client.stream() as stream:
        await stream.request_action(act())
    with pytest.raises(RuntimeError, match="async with"):
        await stream.request_action(act())


async def test_a_closed_client_ends_every_call_with_a_reason_and_takes_none(wire, tmp_path):
    client = await Client.unix(str(tmp_path / "front.sock"), issuer=ISSUER).__aenter__()
    async with client.stream() as stream:
        await client.request_action(act())
        waiting = asyncio.gather(
            client.request_action(act("hang")), stream.request_action(act("hang")), return_exceptions=True
        )
        await until(lambda: wire.calls.total() >= 5, "the broker has both requests, after two challenges")
        await client.__aexit__(None, None, None)
        for error in await waiting:
            assert isinstance(error, Unavailable)
            assert "the client was closed" in str(error)
        with pytest.raises(Unavailable, match="the client was closed"):
            await stream.request_action(act())
    wire.release.set()


async def test_closing_a_stream_tells_those_who_wait(wire, client):
    async with client.stream() as stream:
        await stream.request_action(act())
        waiting = asyncio.create_task(stream.request_action(act("hang")))
        await until(lambda: wire.calls["StreamActionTokens"] == 2, "the broker has both messages")
    with pytest.raises((RuntimeError, Unavailable)):
        await waiting
