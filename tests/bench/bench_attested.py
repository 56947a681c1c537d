"""A token with a fresh attestation by PID, against what a user would pick instead: a JWT-SVID signed by SPIRE.

Real SPIRE. Both rates come from one client process with 8 requests at a time: the broker's over its Unix socket
(identify by PID, attest, decide, record durably, sign), SPIRE's `FetchJWTSVID` over its Broker API with a new audience
each time, so that its server signs, through the Python client and TLS hop that the broker itself uses. Interleaved.

SPIRE's server signs 500 JWT-SVIDs a second for one agent (`ratelimit { signing = true }`, its default) after a burst
of 500. What a user gets of it is that rate, so the burst is spent before each run. Told beside it: what it signs with
the limit off, and what the agent answers from its cache.
"""

import asyncio
import itertools
import os
import statistics
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import uvloop
from support.broker import ISSUER, folder_for, start, write_config
from support.spire import Spire, broker_api_of

from broker._proto.spiffe_broker import brokerapi_pb2
from broker.client import Client
from broker.identity.spire_broker_api import METADATA, SpireBrokerApi

AT_ONCE = 8
SIZES = {"small": (40, 1), "full": (1500, 5)}  # calls in a run, runs of each
BURST = {"small": AT_ONCE, "full": 600}  # more than SPIRE's limit lets through at once
POLICIES = {
    "orders.cedarschema": 'action "orders.refund" appliesTo { principal: [Workload], resource: [Resource],'
    " context: { spire: Spire, parameters: { amount: Long } } };",
    "orders.cedar": '@id("refunds") permit (principal, action == Action::"orders.refund",'
    ' resource in Resource::"https://orders.acme.test/v1") when { context.parameters.amount <= 50 };',
}

NO_LIMITS = {
    "requests_per_second": 100_000.0,
    "burst": 1_000_000,
    "attestations_per_second_per_uid": 100_000.0,
    "attestation_burst_per_uid": 1_000_000,
}

Call = Callable[[], Awaitable[Any]]


async def _rate(call: Call, calls: int) -> float:
    left = iter(range(calls))

    async def caller() -> None:
        for _ in left:
            await call()

    started = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(AT_ONCE)))
    return calls / (time.perf_counter() - started)


def _fetch(api: SpireBrokerApi, audience: Callable[[], str]) -> Call:
    async def call() -> None:
        request = brokerapi_pb2.FetchJWTSVIDRequest(audience=[audience()])
        request.reference.reference.Pack(brokerapi_pb2.WorkloadPIDReference(pid=os.getpid()))
        await api._stub().FetchJWTSVID(request, metadata=METADATA, timeout=10)

    return call


async def _unlimited(spire: Spire, size: str) -> float:
    """What a server without that limit signs."""
    numbers = itertools.count()
    async with broker_api_of(spire) as api:
        signed = _fetch(api, lambda: f"urn:bench:{next(numbers)}")
        await _rate(signed, AT_ONCE)
        return await _rate(signed, SIZES[size][0])


async def _measure(spire: Spire, socket: str, size: str) -> list[dict[str, Any]]:
    calls, runs = SIZES[size]
    numbers = itertools.count()
    async with broker_api_of(spire) as api, Client.unix(socket, issuer=ISSUER) as broker:

        async def token() -> None:
            await broker.request(
                "orders.refund",
                "https://orders.acme.test/v1/orders/17",
                "spiffe://acme.test/service/orders",
                {"amount": 30},
            )

        signed = _fetch(api, lambda: f"urn:bench:{next(numbers)}")
        cached = _fetch(api, lambda: "urn:bench")
        for call in (token, signed, cached):
            await _rate(call, max(AT_ONCE, calls // 4))
        rates = []
        for _ in range(runs):
            ours = await _rate(token, calls)
            await _rate(signed, BURST[size])
            rates.append((ours, await _rate(signed, calls), await _rate(cached, calls)))
    ours, theirs, from_cache = (statistics.median(column) for column in zip(*rates, strict=True))
    ratio = statistics.median(one / other for one, other, _ in rates)
    told = {"bound": None, "holds": True}
    bounded = {"unit": "ratio", "bound": 1.0, "holds": ratio >= 1.0}
    return [
        {"name": "attested_token_rate_vs_spire_signed", "value": ratio, **bounded},
        {"name": "attested_token_rate", "value": ours, "unit": "tokens/s", **told},
        {"name": "spire_signed_rate", "value": theirs, "unit": "JWT-SVIDs/s", **told},
        {"name": "spire_cached_rate", "value": from_cache, "unit": "JWT-SVIDs/s", **told},
    ]


def measure(size: str) -> list[dict[str, Any]]:
    """size: "small" for a run that only shows it works, "full" for figures. Needs SPIRE: tests/tools/build_spire.py."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        with Spire() as spire, folder_for(POLICIES) as folder:
            spire.create_entry("action-broker", uid=os.geteuid())
            config = write_config(Path(folder), spire.workload_api, spire.broker_api, limits=NO_LIMITS)
            with start(config) as running:
                rows = runner.run(_measure(spire, running.socket, size))
        with Spire(sign_limit=False) as spire:
            spire.create_entry("action-broker", uid=os.geteuid())
            unlimited = runner.run(_unlimited(spire, size))
    told = {"name": "spire_unlimited_signed_rate", "value": unlimited, "unit": "JWT-SVIDs/s"}
    return [*rows, {**told, "bound": None, "holds": True}]
