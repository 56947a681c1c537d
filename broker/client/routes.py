"""The two ways to the broker: as a process behind a Unix socket, or with an X.509-SVID over mutual TLS."""

import asyncio
import os
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Final

import grpc

from broker.client.link import Link, authority_of
from broker.client.token import Holder
from broker.credentials.dpop import ProofKey
from broker.errors import Reason, Unavailable
from broker.identity.spiffe_id import SpiffeId
from broker.identity.tls_dial import SpiffeDialer
from broker.identity.trust import OwnSvid, TrustSnapshot
from broker.identity.unix_dial import UnixDialer
from broker.identity.workload_api import WorkloadApi

GRACE_S: Final = 30.0  # for calls on a connection that shows our previous SVID; its last token lives longer than that


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """An open way to the broker. workload_api: None over a Unix socket."""

    link: Link
    holder: Holder
    workload_api: WorkloadApi | None = None


def _now() -> datetime:
    return datetime.now(UTC)


@asynccontextmanager
async def unix(path: str, *, issuer: str, server_uids: Collection[int] | None) -> AsyncIterator[Route]:
    """Over the broker's Unix socket, which only a process of one of these users may serve."""
    allowed = frozenset(server_uids if server_uids is not None else (0, os.geteuid()))
    holder = Holder(ProofKey())
    link = Link(UnixDialer(path, allowed=allowed), where=path, authority=authority_of(issuer), key=holder.key)
    await link.open()
    try:
        yield Route(link=link, holder=holder)
    finally:
        await link.close()


@asynccontextmanager
async def mtls(
    target: str, *, broker_id: SpiffeId, workload_api: WorkloadApi | str, proof_for: str | None, seconds: float
) -> AsyncIterator[Route]:
    """Over TCP, as who the Workload API says we are, to the broker with exactly this SPIFFE ID.

    proof_for: the issuer, when tokens are to be bound to a key of ours instead of to our certificate.

    Raises: Unavailable when the Workload API says nothing for `seconds`.
    """
    if isinstance(workload_api, str):
        async with (
            WorkloadApi(workload_api) as own,
            mtls(target, broker_id=broker_id, workload_api=own, proof_for=proof_for, seconds=seconds) as route,
        ):
            yield route
        return
    presented = (await _ready(workload_api, seconds)).own
    holder = Holder(ProofKey() if proof_for else None)

    def snapshot() -> TrustSnapshot:
        found = workload_api.snapshot()
        if found.own is not None:
            holder.remember(found.own)  # a connection is made with it, and then tokens are bound to it
        return found

    def follow(found: TrustSnapshot) -> None:
        nonlocal presented
        if found.own != presented:  # the broker refuses an expired SVID also on a connection that was made in time
            presented = found.own
            link.renew(GRACE_S)

    link = Link(
        SpiffeDialer(target, broker_id, snapshot, _now),
        where=target,
        authority=authority_of(proof_for) if proof_for else broker_id.trust_domain.name,
        key=holder.key,
    )
    await link.open()
    unsubscribe = workload_api.subscribe(follow)
    try:
        yield Route(link=link, holder=holder, workload_api=workload_api)
    finally:
        unsubscribe()
        await link.close()


@asynccontextmanager
async def service(
    target: str, *, service_id: SpiffeId, svid: OwnSvid | None, workload_api: WorkloadApi
) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to the service with this SPIFFE ID, as the holder of `svid` (None: of our newest one)."""

    def snapshot() -> TrustSnapshot:
        found = workload_api.snapshot()
        return found if svid is None else replace(found, own=svid)

    dialer = SpiffeDialer(target, service_id, snapshot, _now)
    try:
        options = [("grpc.default_authority", service_id.trust_domain.name), ("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(await dialer.start(), options=options) as channel:
            yield channel
    finally:
        await dialer.close()


async def _ready(workload_api: WorkloadApi, seconds: float) -> TrustSnapshot:
    try:
        async with asyncio.timeout(seconds):
            return await workload_api.ready()
    except TimeoutError:
        why = workload_api.last_error or "it was not asked: enter the WorkloadApi with `async with` first"
        raise Unavailable(
            Reason.IDENTITY_UNAVAILABLE,
            f"no SVID within {seconds:g} s: {why}. Is the SPIRE agent running, and has this process an entry?",
        ) from None
