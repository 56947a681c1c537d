"""`doctor`: looks at each thing that operators get wrong, and says how to mend it.

Run it as the user and on the node that the broker runs as. It starts nothing, writes nothing and asks nobody but the
SPIRE agent and, for its socket, a running broker.
"""

import asyncio
import os
import socket
import stat
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

import apsw
import click
from cryptography import x509
from rich.markup import escape

from broker.cli import config as configuration
from broker.cli.config import Config
from broker.cli.log import configure_log
from broker.cli.output import REFUSED, Output, pass_output
from broker.decision.findings import PolicyError
from broker.decision.policy import PolicyDocuments
from broker.errors import BrokerError, Refused
from broker.identity.peer import look, require_peer_pidfd
from broker.identity.spire_broker_api import SpireBrokerApi
from broker.identity.trust import OwnSvid, TrustSnapshot
from broker.identity.workload_api import WorkloadApi
from broker.ledger import reading
from broker.ledger.checkpoint import Checkpointer
from broker.ledger.verify import verify

AGENT_S = 5.0
_CAP_SYS_PTRACE = 19  # capabilities(7): to see which program another user's process runs
MAX_VERIFIED = 128 * 1024 * 1024  # bytes of a ledger; about a second's work
Verdict = Literal["ok", "warning", "broken"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at. fix: what to do, empty where all is well."""

    what: str
    verdict: Verdict
    detail: str
    fix: str = ""


def _ok(what: str, detail: str) -> Finding:
    return Finding(what=what, verdict="ok", detail=detail)


def _broken(what: str, detail: str, fix: str) -> Finding:
    return Finding(what=what, verdict="broken", detail=detail, fix=fix)


def _warning(what: str, detail: str, fix: str) -> Finding:
    return Finding(what=what, verdict="warning", detail=detail, fix=fix)


def _socket(what: str, target: str, fix: str) -> Finding:
    """Whether somebody listens there and lets us in."""
    path = Path(target.removeprefix("unix://").removeprefix("unix:"))
    try:
        if not stat.S_ISSOCK(path.stat().st_mode):
            return _broken(what, f"{path} is not a socket", fix)
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(2)
            probe.connect(str(path))
    except FileNotFoundError:
        return _broken(what, f"{path} is not there", fix)
    except PermissionError:
        return _broken(
            what, f"uid {os.geteuid()} may not connect to {path}", f"Let the broker's user or group in. {fix}"
        )
    except OSError as error:
        return _broken(what, f"nobody listens on {path} ({error.strerror or error})", fix)
    return _ok(what, str(path))


def _kernel() -> Finding:
    """Whether this kernel and our rights let us know callers by their process."""
    what = "kernel"
    try:
        require_peer_pidfd()
        look(os.getpid())
        rights = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapEff:"))
    except BrokerError as error:
        return _broken(what, error.detail, "The Unix socket needs Linux 6.5, and a /proc of its own PID namespace.")
    if not int(rights.split()[1], 16) >> _CAP_SYS_PTRACE & 1:
        return _warning(
            what,
            f"without CAP_SYS_PTRACE only processes of uid {os.geteuid()} can be told apart on the Unix socket",
            "Run the broker as root or with CAP_SYS_PTRACE, unless all callers are of its own user.",
        )
    return _ok(what, "callers on the Unix socket can be told apart")


async def _identity(config: Config, now: datetime) -> AsyncIterator[Finding]:
    """The agent's sockets, our own SVID, the clock beside it, and the Broker API's permission."""
    agent = _socket(
        "agent socket", config.spire.workload_api, "Start spire-agent, or set spire.workload_api to its socket_path."
    )
    yield agent
    if agent.verdict != "ok":
        return
    async with WorkloadApi(config.spire.workload_api) as workload_api:
        snapshot = await _first_snapshot(workload_api)
        if snapshot is None:
            yield _broken(
                "own SVID",
                workload_api.last_error or "the agent did not answer",
                f"Create an entry for the broker: spire-server entry create -parentID NODE -spiffeID "
                f"spiffe://{config.trust_domain}/action-broker -selector unix:uid:{os.geteuid()}",
            )
            return
        if snapshot.own is None:
            yield _broken("own SVID", "none", "Create a registration entry for the broker.")
            return
        for finding in _own(config, snapshot.own, now):
            yield finding
        if config.spire.broker_api.startswith("unix:"):
            found = _socket(
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
        yield _broken(
            "own SVID",
            f"we are {own.spiffe_id}, but trust_domain is {config.trust_domain}",
            "Set trust_domain to the agent's, or point spire.workload_api at the right agent.",
        )
    elif own.not_after <= now:
        yield _broken("own SVID", f"ended {own.not_after:%F %T} UTC", "Look at the agent's log: it could not renew it.")
    else:
        yield _ok("own SVID", f"{own.spiffe_id}, for {int((own.not_after - now).total_seconds())} s more")
    # The agent has just handed it out, so its times tell whether our clock goes with SPIRE's.
    begins = x509.load_der_x509_certificate(own.chain[0]).not_valid_before_utc
    if not begins <= now < own.not_after:
        detail = f"our own SVID is for {begins:%F %T} to {own.not_after:%F %T} UTC, and here it is {now:%F %T}"
        yield _broken("clock", detail, "Compare `date -u` here and on the SPIRE server; run NTP on both.")
    else:
        yield _ok("clock", f"{now:%F %T} UTC goes with SPIRE's")


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
            return _broken(what, error.detail, fix)
        except BrokerError as error:
            return _broken(what, f"{error.detail}; {api.last_error or ''}".rstrip("; "), fix)
    known_as = ", ".join(str(one.spiffe_id) for one in found)
    if own.spiffe_id not in {one.spiffe_id for one in found}:
        return _foreign_pids(what, known_as)
    return _ok(what, f"granted; this process is {known_as}")


def _foreign_pids(what: str, known_as: str) -> Finding:
    return _broken(
        what,
        f"the agent knows PID {os.getpid()}, which is ours, as {known_as}",
        "Run the broker in the agent's PID namespace (Kubernetes: hostPID: true).",
    )


def _policy(config: Config) -> Finding:
    try:
        found = PolicyDocuments.load(config.policy_folder)
    except PolicyError as error:
        return _broken("policy", str(error), f"action-broker policy validate {config.policy_folder}")
    missing = found.attestors - {"spire", "process"}
    if missing:
        return _broken(
            "policy",
            f"policies name attestors that are not here: {', '.join(sorted(missing))}",
            "Actions that need them are refused. Take them out of the policies.",
        )
    return _ok("policy", f"{len(found.rules)} policies, revision {found.revision}")


def _store(config: Config, now: datetime) -> Iterator[Finding]:
    folder = config.state_folder
    if not folder.is_dir():
        yield _warning("store", f"{folder} is not there yet", f"The broker makes it, if it may: mkdir -m 0700 {folder}")
        return
    if folder.stat().st_mode & 0o077:
        yield _warning("store", f"{folder} is open to others", f"chmod 0700 {folder}")
    if not os.access(folder, os.W_OK | os.X_OK):
        yield _broken(
            "store", f"uid {os.geteuid()} may not write to {folder}", f"chown it to the broker's user: {folder}"
        )
        return
    file = config.ledger_file
    if not file.exists():
        yield _ok("store", f"{file} will be made at the first start")
        return
    try:
        last = reading.last_seq(file)
        rows = list(reading.read(file, after=last - 1))
        at = rows[-1].record().at if rows else now
    except (BrokerError, apsw.Error, ValueError, OSError) as error:
        yield _broken(
            "store", f"{file} cannot be read: {error}", "action-broker ledger verify says what is wrong with it."
        )
        return
    if at > now + timedelta(seconds=5):
        yield _broken(
            "clock", f"the ledger's last record is of {at:%F %T} UTC, in our future", "Run NTP: the clock stepped back."
        )
    space = os.statvfs(folder)
    free = space.f_bavail * space.f_frsize
    if free < 256 * 1024 * 1024:
        yield _warning(
            "store", f"{free // 2**20} MiB free in {folder}", "Make room: when the disk is full nothing is minted."
        )
    yield from _chain(config, last)
    if config.checkpoint_file.parent == file.parent:
        yield _warning(
            "checkpoint",
            f"{config.checkpoint_file} lies beside the ledger",
            "Set ledger.checkpoint_file to another disk: who restores or cuts the ledger would restore both.",
        )


def _chain(config: Config, last: int) -> Iterator[Finding]:
    """The ledger against itself and against its outside checkpoint, where that does not take minutes."""
    file, key, known = config.ledger_file, None, None
    if config.checkpoint_key_file.exists():
        try:
            checkpointer = Checkpointer(config.checkpoint_key_file, config.checkpoint_file, config.ledger_name)
            key, known = checkpointer.verifier_key, checkpointer.read()
        except BrokerError as error:
            yield _broken("checkpoint", error.detail, "The broker does not start before this is mended.")
            return
    elif config.checkpoint_file.exists():
        yield _broken(
            "checkpoint",
            f"{config.checkpoint_file} is there, and the key that signed it, {config.checkpoint_key_file}, is not",
            "Put the key file back: the broker would make a new key, and then not believe the checkpoint.",
        )
        return
    if file.stat().st_size <= MAX_VERIFIED:
        outside = (config.checkpoint_file, str(key)) if known else (None, None)
        try:
            finding = verify(file, *outside).finding
        except (BrokerError, OSError, ValueError) as error:
            yield _broken("store", f"{file} cannot be verified: {error}", "action-broker ledger verify")
            return
        if finding is not None:
            yield _broken(
                "store",
                f"{file}: {finding.fault} at record {finding.seq}: {finding.detail}",
                "Keep a copy of it for whoever looks into this, then put a backup back: the broker starts a new epoch.",
            )
            return
    yield _ok("store", f"{file}, {last} records")
    if key is not None:
        yield _ok("checkpoint", f"verify with --checkpoint {config.checkpoint_file} --verifier-key {key}")


def _front(config: Config) -> Finding:
    if config.unix.socket is None:
        return _ok("broker socket", "not configured")
    found = _socket("broker socket", str(config.unix.socket), "Start the broker: action-broker serve")
    return found if found.verdict == "ok" else _warning(found.what, found.detail, found.fix)


async def examine(config: Config, now: datetime) -> list[Finding]:
    """All findings, in the order in which to mend them."""
    found = [_kernel(), *[finding async for finding in _identity(config, now)]]
    rest: list[Callable[[], Iterator[Finding]]] = [
        lambda: iter((_policy(config),)),
        lambda: _store(config, now),
        lambda: iter((_front(config),)),
    ]
    for examined in rest:
        found += examined()
    return found


@click.command()
@click.option("--config", "file", type=click.Path(path_type=Path), help="TOML; default /etc/action-broker/broker.toml.")
@pass_output
def doctor(output: Output, file: Path | None) -> None:
    """Look at each thing that is easily got wrong, and say how to mend it. Exit code 3 when something is broken."""
    try:
        config = configuration.load(file)
        configure_log("error", as_json=False)  # what the streams would warn of is among the findings
        found = asyncio.run(examine(config, datetime.now(UTC)))
    except configuration.ConfigError as error:
        found = [_broken("configuration", str(error), "Mend the file; docs/api.md lists all keys.")]
    output.value({"findings": [asdict(finding) for finding in found]})
    marks = {"ok": "[green]ok[/]     ", "warning": "[yellow]warning[/]", "broken": "[red]broken[/] "}
    for finding in found:
        output.say(f"{marks[finding.verdict]} {finding.what}: {escape(finding.detail)}")
        if finding.fix:
            output.say(f"        → {escape(finding.fix)}")
    if any(finding.verdict == "broken" for finding in found):
        raise SystemExit(REFUSED)
