"""A charge that must not happen twice: two replicas of a service, one single-use token, and a broker that is killed."""

import asyncio

from support.shop import CHARGE, say, shop
from support.whole_broker import AGENT, ORDERS, RESOURCE, serving, whole_broker

from broker.errors import Reason
from broker.ledger.records import Redemption


async def test_two_replicas_charge_once() -> None:
    with whole_broker() as whole:
        async with (
            whole.client(AGENT) as agent,
            whole.client(ORDERS) as service,
            shop(whole, broker=service) as one,
            shop(whole, broker=service) as other,
        ):
            token, second = [await agent.request("orders.charge", RESOURCE, ORDERS) for _ in range(2)]
            say("The policy says @single_use: the service redeems the token at the broker before it charges.")
            answers = await asyncio.gather(*[replica.ask(CHARGE, "17", token) for replica in (one, other) * 4])
            assert sorted(answers) == [Reason.ALREADY_USED] * 7 + ["done"]
            assert len(one.done) + len(other.done) == 1
            say("Eight calls at once at two replicas: one is done, seven are already_used.")

            whole.broker.kill()
            assert await one.ask(CHARGE, "17", second) == Reason.BROKER_UNREACHABLE
            say("The broker is killed. Another charge: refused, since nobody can say that it is the first.")
            with serving(whole.broker.folder / "broker.toml", whole.domain) as whole.broker:
                assert await other.ask(CHARGE, "17", token) == Reason.ALREADY_USED
                assert await one.ask(CHARGE, "17", second) == "done"
                say("It is back with its ledger: the first token stays used, the second is good.")
            redemptions = [record for record in whole.records() if isinstance(record, Redemption)]
            assert len(redemptions) == len({record.jti for record in redemptions}) == 2
