"""What a token costs beside its transport: the stages of a request, against an empty RPC on the same server.

Identify, decide with 20 policies in the slice, record the intent durably, sign, record the outcome; no attestor I/O.
The stages run in the server's process, 32 at a time; the empty RPC comes over mutual TLS from this process, 32 at a
time. Both are the server's CPU, user and system, of all its threads; interleaved, the median of pairs.

Told beside it: the same request over mutual TLS, where client and server compete for the machine.
"""

import asyncio
import statistics
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import uvloop
from support.measured import MeasuredServer

from broker._proto.actionbroker.v1 import action_pb2, broker_pb2, broker_pb2_grpc

CONCURRENT = 32
SIZES = {"small": (200, 3), "full": (2000, 9)}  # calls in a run, pairs of runs

Call = Callable[[], Awaitable[Any]]


async def _run(server: MeasuredServer, call: Call, calls: int) -> float:
    """Server CPU seconds of one call."""
    left = iter(range(calls))

    async def caller() -> None:
        for _ in left:
            await call()

    before = server.cpu()
    await asyncio.gather(*(caller() for _ in range(CONCURRENT)))
    return (server.cpu() - before) / calls


async def _measure(server: MeasuredServer, size: str) -> list[dict[str, Any]]:
    calls, pairs = SIZES[size]
    async with server.channel() as channel:
        stub = broker_pb2_grpc.ActionBrokerStub(channel)
        request = broker_pb2.RequestActionTokenRequest(
            action=action_pb2.Action(
                name="orders.refund",
                resource="https://orders.acme.test/v1/orders/17",
                audience="spiffe://acme.test/service/orders",
                parameters='{"amount": 30}',
            )
        )
        bare = channel.unary_unary("/bench.Empty/Call")
        payload = request.SerializeToString()

        async def empty() -> None:
            await bare(payload)

        async def token() -> None:
            await stub.RequestActionToken(request)

        for call in (empty, token):  # warm up
            await _run(server, call, calls // 4)
        server.ask(str(calls // 4))
        costs = [
            (await _run(server, empty, calls), server.ask(str(calls))["cpu"] / calls, await _run(server, token, calls))
            for _ in range(pairs)
        ]
    without, alone, whole = (statistics.median(column) for column in zip(*costs, strict=True))
    stages = statistics.median(stages / empty for empty, stages, _ in costs)
    told = {"bound": None, "holds": True}
    return [
        {"name": "stages_per_empty_rpc", "value": stages, "unit": "ratio", "bound": 2.0, "holds": stages <= 2.0},
        {"name": "stages_cpu", "value": alone * 1e6, "unit": "us", **told},
        {"name": "empty_rpc_cpu", "value": without * 1e6, "unit": "us", **told},
        {"name": "action_token_rpc_cpu", "value": whole * 1e6, "unit": "us", **told},
    ]


def measure(size: str) -> list[dict[str, Any]]:
    """size: "small" for a run that only shows it works, "full" for figures."""
    with (
        tempfile.TemporaryDirectory() as folder,
        MeasuredServer("support.stages_server", Path(folder)) as server,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        return runner.run(_measure(server, size))
