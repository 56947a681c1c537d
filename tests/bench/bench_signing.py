"""What a signature costs beside its transport: a grant and the signature that it is good for, against two empty RPCs.

Keyless (a key is made, signs once, is certified and dropped), and by a key in SoftHSM2. Identify, attest from memory,
decide, record durably, mint; then all of that again, spend the grant, sign, keep the answer. Left out: what attestors
look for elsewhere, and the timestamp.

All of it over mutual TLS to one server, from this process, 8 at a time, in turns; of the ratios of requests a second
the median. The empty RPCs carry what the others ask.
"""

import asyncio
import math
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop
from support.measured import MeasuredServer
from support.measured_signing import grant_request, sign_request
from support.softhsm import SoftHsm

from broker._proto.actionbroker.v1 import broker_pb2_grpc

AT_ONCE = 8
SIZES = {"small": (24, 3), "full": (400, 11)}  # pairs of calls in a run, rounds of runs
BUDGETS = {"keyless_signature_per_two_empty_rpcs": 3.0, "hsm_signature_per_two_empty_rpcs": 3.5}
SIGNERS = {"keyless_signature": "keyless", "hsm_signature": "key:release"}
EMPTY = "two_empty_rpcs"
TOLD = {"bound": None, "holds": True}

Call = Callable[[], Awaitable[Any]]


@dataclass(frozen=True)
class Run:
    """rate: pairs of calls a second. seconds: how long each took. cpu: the server's seconds, for a pair."""

    rate: float
    seconds: list[float]
    cpu: float


async def _run(server: MeasuredServer, call: Call, calls: int) -> Run:
    left, seconds = iter(range(calls)), []

    async def caller() -> None:
        for _ in left:
            begun = time.perf_counter()
            await call()
            seconds.append(time.perf_counter() - begun)

    cpu, begun = server.cpu(), time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(AT_ONCE)))
    gone = time.perf_counter() - begun
    return Run(rate=calls / gone, seconds=seconds, cpu=(server.cpu() - cpu) / calls)


async def _measure(server: MeasuredServer, size: str) -> list[dict[str, Any]]:
    calls, rounds = SIZES[size]
    async with server.channel() as channel:
        stub, bare = broker_pb2_grpc.ActionBrokerStub(channel), channel.unary_unary("/bench.Empty/Call")
        asked = grant_request()
        granted = await stub.RequestSigningGrant(asked)
        payloads = asked.SerializeToString(), sign_request(granted.grant.grant).SerializeToString()

        async def empty() -> None:
            for payload in payloads:
                await bare(payload)

        def signed(signer: str) -> Call:
            async def call() -> None:
                granted = await stub.RequestSigningGrant(grant_request(signer))
                await stub.Sign(sign_request(granted.grant.grant))

            return call

        kinds = {EMPTY: empty} | {name: signed(signer) for name, signer in SIGNERS.items()}
        for call in kinds.values():  # warm up
            await _run(server, call, calls // 4)
        found = [{name: await _run(server, call, calls) for name, call in kinds.items()} for _ in range(rounds)]
    compared = [row for name in SIGNERS for row in _compared(name, found)]
    return [*compared, *(row for name in kinds for row in _told(name, [one[name] for one in found]))]


def _compared(name: str, found: list[dict[str, Run]]) -> list[dict[str, Any]]:
    rate = statistics.median(one[EMPTY].rate / one[name].rate for one in found)
    cpu = statistics.median(one[name].cpu / one[EMPTY].cpu for one in found)
    row = f"{name}_per_{EMPTY}"
    return [
        {"name": row, "value": rate, "unit": "ratio", "bound": BUDGETS[row], "holds": rate <= BUDGETS[row]},
        {"name": f"{name}_cpu_per_{EMPTY}", "value": cpu, "unit": "ratio", **TOLD},
    ]


def _told(name: str, runs: list[Run]) -> list[dict[str, Any]]:
    seconds = sorted(one for run in runs for one in run.seconds)
    figures = {
        "rate": (statistics.median(run.rate for run in runs), "1/s"),
        "p50": (statistics.median(seconds) * 1e3, "ms"),
        "p99": (seconds[math.ceil(len(seconds) * 0.99) - 1] * 1e3, "ms"),
        "cpu": (statistics.median(run.cpu for run in runs) * 1e6, "us"),
    }
    return [{"name": f"{name}_{what}", "value": value, "unit": unit, **TOLD} for what, (value, unit) in figures.items()]


def measure(size: str) -> list[dict[str, Any]]:
    """size: "small" for a run that only shows it works, "full" for figures."""
    with tempfile.TemporaryDirectory() as name, SoftHsm(Path(name) / "hsm") as hsm:
        hsm.make_key("p256", "release-2026")
        folder = Path(name) / "broker"
        folder.mkdir()
        token = str(hsm.module), hsm.label, str(hsm.pin_file), "release-2026"
        with (
            MeasuredServer("support.signing_server", folder, *token) as server,
            asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
        ):
            return runner.run(_measure(server, size))
