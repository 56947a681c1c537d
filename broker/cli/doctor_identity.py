"""`doctor` on who we are and whom we can tell apart: the kernel, the SPIRE agent, our own SVID, the Broker API."""

import asyncio
import os
import socket
import stat
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from cryptography import x509

from broker.cli.config import Config
from broker.cli.doctor_finding import Finding, broken, ok, warning
from broker.errors import BrokerError, Refused
from broker.identity.peer import look, require_peer_pidfd
from broker.identity.spire_broker_api import SpireBrokerApi
from broker.identity.trust import OwnSvid, TrustSnapshot
from broker.identity.workload_api import WorkloadApi

AGENT_S: Final = 5.0
_CAP_SYS_PTRACE: Final = 19  # capabilities(7): to see which program another user's process runs


def look_at_socket(what: str, target: str, fix: str) -> Finding:
    """Whether somebody listens there and lets us in."""
    path = Path(target.removeprefix("unix://").removeprefix("unix:"))
    try:
        if not stat.S_ISSOCK(path.stat().st_mode):
            return broken(what, f"{path} is not a socket", fix)
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(2)
            probe.connect(str(path))
    except FileNotFoundError:
        return broken(what, f"{path} is not there", fix)
    except PermissionError:
        return broken(
            what, f"uid {os.geteuid()} may not connect to {path}", f"Let the broker's user or group in. {fix}"
        )
    except OSError as error:
        return broken(what, f"nobody listens on {path} ({error.strerror or error})", fix)
    return ok(what, str(path))


def kernel() -> Finding:
    """Whether this kernel and our rights let us know callers by their process."""
    what = "kernel"
    try:
        require_peer_pidfd()
        look(os.getpid())
        rights = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapEff:"))
    except BrokerError as error:
        return broken(what, error.detail, "The Unix socket needs Linux 6.5, and a /proc of its own PID namespace.")
    if not int(rights.split()[1], 16) >> _CAP_SYS_PTRACE & 1:
        return warning(
            what,
            f"without CAP_SYS_PTRACE only processes of uid {os.geteuid()} can be told apart on the Unix socket",
            "Run the broker as root or with CAP_SYS_PTRACE, unless all callers are of its own user.",
        )
    return ok(what, "callers on the Unix socket can be told apart")


async def identity(config: Config, now: datetime) -> AsyncIterator[Finding]:
    """The agent's sockets, our own SVID, the clock beside it, and the Broker API's permission."""
    agent = look_at_socket(
        "agent socket", config.spire.workload_api, "Start spire-agent, or set spire.workload_api to its socket_path."
    )
    yield agent
    if agent.verdict != "ok":
        return
    async with WorkloadApi(config.spire.workload_api) as workload_api:
        snapshot = await _first_snapshot(workload_api)
        if snapshot is None:
            yield broken(
                "own SVID",
                workload_api.last_error or "the agent did not answer",
                f"Create an entry for the broker: spire-server entry create -parentID NODE -spiffeID "
                f"spiffe://{config.trust_domain}/action-broker -selector unix:uid:{os.geteuid()}",
            )
            return
        if snapshot.own is None:
            yield broken("own SVID", "none", "Create a registration entry for the broker.")
            return
        for finding in _own(config, snapshot.own, now):
            yield finding
        if config.spire.broker_api.startswith("unix:"):
            found = look_at_socket(
                "Broker API socket",
                config.spire.broker_api,
                "Set experimental.broker.socket_path in the agent's configuration (SPIRE 1.15.2 or newer), and "
                "spire.broker_api to it. SPIRE makes the socket root:root 0775: the broker needs gid 0.",
            )
            yield found
            if found.verdict != "ok":
                return
        yield await _broker_api(config, workload_api, snapshot.own)


async def _first_snapshot(workload_api: WorkloadApi) -> TrustSnapshot | None:
    """None when the agent says nothing for a while, or no. It is asked again after a no: it may just have started."""
    try:
        async with asyncio.timeout(AGENT_S):
            waiting = asyncio.ensure_future(workload_api.ready())
            while not waiting.done() and "no registration entry" not in (workload_api.last_error or ""):
                await asyncio.wait([waiting], timeout=0.1)
            await asyncio.wait([waiting], timeout=0.5)
            if waiting.done():
                return waiting.result()
            waiting.cancel()
    except TimeoutError:
        pass
    return None


def _own(config: Config, own: OwnSvid, now: datetime) -> Iterator[Finding]:
    if own.spiffe_id.trust_domain.name != config.trust_domain:
        yield broken(
            "own SVID",
            f"we are {own.spiffe_id}, but trust_domain is {config.trust_domain}",
            "Set trust_domain to the agent's, or point spire.workload_api at the right agent.",
        )
    elif own.not_after <= now:
        yield broken("own SVID", f"ended {own.not_after:%F %T} UTC", "Look at the agent's log: it could not renew it.")
    else:
        yield ok("own SVID", f"{own.spiffe_id}, for {int((own.not_after - now).total_seconds())} s more")
    # The agent has just handed it out, so its times tell whether our clock goes with SPIRE's.
    begins = x509.load_der_x509_certificate(own.chain[0]).not_valid_before_utc
    if not begins <= now < own.not_after:
        detail = f"our own SVID is for {begins:%F %T} to {own.not_after:%F %T} UTC, and here it is {now:%F %T}"
        yield broken("clock", detail, "Compare `date -u` here and on the SPIRE server; run NTP on both.")
    else:
        yield ok("clock", f"{now:%F %T} UTC goes with SPIRE's")


async def _broker_api(config: Config, workload_api: WorkloadApi, own: OwnSvid) -> Finding:
    what = "Broker API permission"
    prefix = config.spire.agent_path
    api = SpireBrokerApi(
        config.spire.broker_api,
        workload_api.snapshot,
        lambda: datetime.now(UTC),
        agent=lambda found: found.path.startswith(prefix),
    )
    fix = (
        f'Add to the agent: experimental {{ broker {{ brokers = [{{ id = "{own.spiffe_id}", allowed_reference_types = '
        '[{ type_url = "type.googleapis.com/spiffe.broker.WorkloadPIDReference" }] }] } }'
    )
    async with api:
        try:
            found = await api.fetch(os.getpid())
        except Refused as error:
            if "no identity issued" in error.detail:  # the agent looked; but it gave this very process an SVID before
                return _foreign_pids(what, "nobody")
            return broken(what, error.detail, fix)
        except BrokerError as error:
            return broken(what, f"{error.detail}; {api.last_error or ''}".rstrip("; "), fix)
    known_as = ", ".join(str(one.spiffe_id) for one in found)
    if own.spiffe_id not in {one.spiffe_id for one in found}:
        return _foreign_pids(what, known_as)
    return ok(what, f"granted; this process is {known_as}")


def _foreign_pids(what: str, known_as: str) -> Finding:
    return broken(
        what,
        f"the agent knows PID {os.getpid()}, which is ours, as {known_as}",
        "Run the broker in the agent's PID namespace (Kubernetes: hostPID: true).",
    )
