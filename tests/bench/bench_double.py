"""A signing grant redeemed twice at the same instant, from two connections: exactly one wins, every time.

Both calls are written to their connections in one turn of the event loop, by the same caller and key, each with an
idempotency id of its own. Won means: a signature came back. Afterwards the ledger is read, which must tell the same.
"""

import asyncio
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import grpc
import uvloop
from support.measured import MeasuredServer
from support.measured_signing import grant_request, sign_request

from broker._proto.actionbroker.v1 import broker_pb2_grpc
from broker.errors import Reason
from broker.ledger.reading import read
from broker.ledger.records import Intent, Outcome, Redemption

GRANTS = {"small": 100, "full": 10_000}
AT_ONCE = 16  # grants, so twice as many redemptions

Stub = broker_pb2_grpc.ActionBrokerStub


async def _redeem(stub: Stub, grant: str) -> bytes | Reason:
    """The signature, or why there is none."""
    try:
        return (await stub.Sign(sign_request(grant))).signature
    except grpc.aio.AioRpcError as error:
        return Reason(error.details())


async def _redeemed_twice(server: MeasuredServer, grants: int) -> int:
    """How many of the grants gave one signature, and one refusal because of it."""
    left, good = iter(range(grants)), 0
    async with server.channel() as one, server.channel() as other:
        stubs = Stub(one), Stub(other)

        async def caller() -> None:
            nonlocal good
            for number in left:
                granted = await stubs[number % 2].RequestSigningGrant(grant_request())
                # Each is first as often as the other.
                pair = stubs if number % 4 < 2 else stubs[::-1]
                answers = await asyncio.gather(*(_redeem(stub, granted.grant.grant) for stub in pair))
                signatures = [answer for answer in answers if isinstance(answer, bytes) and answer]
                good += len(signatures) == 1 and Reason.ALREADY_USED in answers

        await asyncio.gather(*(caller() for _ in range(AT_ONCE)))
    return good


def _recorded(ledger: Path) -> int:
    """How many grants the ledger says were spent once, on one signature that was made. 0 where one was spent twice."""
    parents, spent, issued, acts = Counter[str](), Counter[str](), Counter[int](), dict[int, str]()
    for row in read(ledger):
        match row.record():
            case Intent(credential="signature", parent=parent):
                parents[parent] += 1
                acts[row.seq] = parent
            case Redemption(jti=jti):
                spent[jti] += 1
            case Outcome(result="issued", intent=intent) if intent in acts:
                issued[intent] += 1
    once = all(count == 1 for counted in (parents, spent, issued) for count in counted.values())
    return len(issued) if once and parents.keys() == spent.keys() else 0


def measure(size: str) -> list[dict[str, Any]]:
    """size: "small" for a run that only shows it works, "full" for ten thousand."""
    grants = GRANTS[size]
    with (
        tempfile.TemporaryDirectory() as name,
        MeasuredServer("support.signing_server", Path(name)) as server,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        good = runner.run(_redeemed_twice(server, grants))
        recorded = _recorded(Path(name) / "ledger.sqlite")
    found = min(good, recorded)
    return [
        {"name": "double_redemptions", "value": found, "unit": "won once", "bound": grants, "holds": found == grants}
    ]
