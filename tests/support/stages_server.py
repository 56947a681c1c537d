"""A broker that gives action tokens, in a process of its own, for measuring (measured_server.py).

Answers an empty line with its CPU seconds so far, a number with the CPU seconds of so many requests made right here,
without a transport. usage: python -m support.stages_server FOLDER
"""

import asyncio
import sys
from functools import partial
from pathlib import Path

import uvloop
from support.measured_server import ISSUER, Measured, measured, now, obey

from broker.action import Action
from broker.edges.grpc_peer import correlation_id
from broker.exchange import KeyProof

CALLER = "spiffe://acme.test/build/w7"
POLICIES_IN_SLICE = 20
CONCURRENT = 32
# 20 policies that all could apply to the action, one of which does: the slice of the budget.
POLICIES = {
    "p.cedarschema": 'action "orders.refund" appliesTo { principal: [Workload], resource: [Resource],'
    " context: { parameters: { amount: Long } } };",
    "p.cedar": "\n".join(
        f'@id("p{n}") @max_ttl("60s") permit (principal == Workload::"spiffe://acme.test/build/w{n}",'
        f' action == Action::"orders.refund", resource in Resource::"https://orders.acme.test/v1")'
        " when { context.parameters.amount < 100 };"
        for n in range(POLICIES_IN_SLICE)
    ),
}


async def main(folder: Path) -> None:
    async with measured(folder, CALLER, POLICIES) as found:
        await obey(partial(_stages, found))


async def _stages(found: Measured, requests: str) -> dict[str, float]:
    """Everything between reading a request and writing its answer, 32 at a time."""
    proof = KeyProof(proof=None, method="POST", url=ISSUER, binding="mtls")
    left = iter(range(int(requests)))

    def asked() -> Action:
        return Action.parse(
            "orders.refund",
            "https://orders.acme.test/v1/orders/17",
            "spiffe://acme.test/service/orders",
            '{"amount": 30}',
        )

    async def caller() -> None:
        for _ in left:
            moment, correlation = now(), correlation_id()
            identified = found.exchange.identify_certificate(found.chain, proof, moment, correlation)
            await found.exchange.request(identified, asked, moment, correlation)

    await asyncio.gather(*(caller() for _ in range(CONCURRENT)))
    return {}


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(Path(sys.argv[1])))
