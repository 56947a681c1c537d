"""Giving back, introspection and AuthZEN at a whole broker: what is asked over HTTP, and what a guard hears of it."""

import asyncio
import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlencode

import aiohttp
from support.asking import INTROSPECT, ONE, REVOKE
from support.scoped import receiver
from support.whole_broker import AGENT, BROKER, ORDERS, RESOURCE, Whole, serving, utc_now, whole_broker

from broker.client import ActionToken, Client
from broker.identity.spiffe_id import SpiffeId
from broker.identity.tls_dial import SpiffeDialer
from broker.ledger.records import ScopeRefused

FORM = "application/x-www-form-urlencoded"


async def post(whole: Whole, path: str, body: Mapping[str, Any], *, by: str, json_body: bool = False) -> Any:
    """The answer to who has this SVID: its JSON, or its status where it is none."""
    snapshot = whole.domain.svid(by.removeprefix("spiffe://acme.test/"))
    dialer = SpiffeDialer(f"127.0.0.1:{whole.broker.http_port}", SpiffeId.parse(BROKER), lambda: snapshot, utc_now)
    try:
        connector = aiohttp.UnixConnector((await dialer.start()).removeprefix("unix:"))
        async with aiohttp.ClientSession(connector=connector) as session:
            data = json.dumps(body) if json_body else urlencode(body)
            headers = {"Content-Type": "application/json" if json_body else FORM}
            async with session.post(f"http://broker{path}", data=data, headers=headers) as response:
                text = await response.text()
                return json.loads(text) if text.startswith("{") else response.status
    finally:
        await dialer.close()


async def read(agent: Client) -> ActionToken:
    return await agent.request("orders.longest", RESOURCE, ORDERS)


def evaluation(token: ActionToken) -> dict[str, Any]:
    return {
        "subject": {"type": "workload", "id": AGENT},
        "action": {"name": "orders.longest"},
        "resource": {"type": "order", "id": RESOURCE},
        "context": {"access_token": token.access_token},
    }


async def says(whole: Whole, token: ActionToken) -> list[Any]:
    """What the two ways to ask say of it."""
    introspected = await post(whole, INTROSPECT, {"token": token.access_token}, by=ORDERS)
    evaluated = await post(whole, ONE, evaluation(token), by=ORDERS, json_body=True)
    return [introspected["active"], evaluated["decision"]]


async def test_what_its_holder_gives_back_is_refused_at_a_guard_that_hears_the_feed() -> None:
    with whole_broker() as whole:
        async with receiver(whole) as orders, whole.client(AGENT) as agent:
            given_back, spared = await read(agent), await read(agent)
            assert [await orders.refused(one) for one in (given_back, spared)] == ["", ""]
            assert await says(whole, given_back) == [True, True]
            form = {"token": given_back.access_token}
            assert await post(whole, REVOKE, form, by=ORDERS) == 200, "a stranger hears nothing"
            assert await post(whole, INTROSPECT, form, by="spiffe://acme.test/stranger") == {"active": False}
            assert await says(whole, given_back) == [True, True]
            assert await orders.refused(given_back) == ""

            assert await post(whole, REVOKE, form, by=AGENT) == 200
            await orders.hears(given_back.access_token, "revoked")
            assert await orders.refused(given_back) == "revoked"
            assert await says(whole, given_back) == [False, False]
            assert await orders.refused(spared) == ""
            assert await says(whole, spared) == [True, True]
            [record] = [one for one in whole.records() if isinstance(one, ScopeRefused)]
            assert (record.cause, record.by) == ("holder", AGENT)


async def test_what_was_given_back_does_not_come_back_with_a_broker_that_was_killed() -> None:
    with whole_broker() as whole:
        async with whole.client(AGENT) as agent:
            given_back, spared = await read(agent), await read(agent)
        assert await post(whole, REVOKE, {"token": given_back.access_token}, by=AGENT) == 200
        whole.broker.process.kill()
        whole.broker.process.wait()
        with serving(whole.broker.folder / "broker.toml", whole.domain) as again:
            whole.broker.http_port = again.http_port
            async with asyncio.timeout(20):
                while not (await says(whole, spared))[0]:  # what is live is decided again first
                    assert await says(whole, given_back) == [False, False]
            found = [await says(whole, one) for one in (given_back, spared)]
            assert found == [[False, False], [True, True]]
