"""An agent refunds an order: one token for one act, and what becomes of every other attempt."""

import pytest
from support.shop import REFUND, say, shop
from support.whole_broker import AGENT, OPERATOR, ORDERS, RESOURCE, whole_broker

from broker.action import Action
from broker.client import Refused
from broker.errors import Reason
from broker.ledger.records import Intent, Refusal


async def test_an_agent_refunds_thirty_euros_and_not_a_cent_more() -> None:
    with whole_broker() as whole:
        async with shop(whole) as orders, whole.client(AGENT) as agent, whole.client(OPERATOR) as operator:
            say("The agent holds no secret. It asks for a token: refund 30 on order 17.")
            token = await agent.request("orders.refund", RESOURCE, ORDERS, {"amount": 30})
            say(f"SPIRE attested its process, Cedar said yes: a token until {token.expires_at:%H:%M:%S}, bound to its")
            say("key and to nothing but that act.")

            for attempt, what in (("17 31", "31 instead of 30"), ("18 30", "another order")):
                assert await orders.ask(REFUND, attempt, token) == Reason.OUT_OF_SCOPE
                say(f"With that token it tries {what}: out_of_scope.")
            assert await orders.ask(REFUND, "17 30", token) == "done"
            say("It refunds 30 on order 17: done.")
            assert await orders.ask(REFUND, "17 30", token) == Reason.ALREADY_USED
            say("It refunds 30 on order 17 again: already_used.")
            assert orders.done == [(AGENT, "17 30")]

            with pytest.raises(Refused) as refused:
                await agent.request("orders.refund", RESOURCE, ORDERS, {"amount": 51})
            assert refused.value.reason is Reason.DENIED
            say("It asks for a token over 51: denied, and a number to look it up by.")

            asked = Action("orders.refund", RESOURCE, ORDERS, {"amount": 51})
            found = await operator.explain(AGENT, asked, facts={"spire": {"ids": [AGENT]}})
            (failed,) = [clause for one in found.policies for clause in one.failed if "amount" in clause]
            say(f"An operator asks why: {failed}")

        intents = [one for one in whole.records() if isinstance(one, Intent)]
        assert [one.to_action().parameters for one in intents] == [{"amount": 30}]
        (refusal,) = [one for one in whole.records() if isinstance(one, Refusal)]
        assert (refusal.principal, refusal.reason) == (AGENT, Reason.DENIED)
        say("The ledger has the one token that was minted, before it was, and the one that was not.")
