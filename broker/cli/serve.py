"""One broker process, wired together from its configuration."""

import asyncio
import contextlib
import os
import resource
import signal
import ssl
import tempfile
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import structlog
from aiohttp import web

from attestors.contract import Attestor
from attestors.process import ProcessAttestor
from attestors.spire import SpireAttestor
from broker.approvals import Approvals
from broker.cli.config import Config
from broker.cli.serve_evidence import Evidence, open_evidence
from broker.cli.serve_scope import ScopeParts, open_scope, watching
from broker.cli.serve_sessions import SessionParts, open_sessions
from broker.cli.serve_signing import Watches, open_approvals, open_means, signing_attestors
from broker.credentials.keyring import KeyRing
from broker.decision.attest import Attestation
from broker.decision.policy import Policy
from broker.decision.quota import Quota
from broker.decision.store import PolicyStore
from broker.edges.grpc_approvals import ApprovalsService
from broker.edges.grpc_peer import Identifier
from broker.edges.grpc_revocation import RevocationCalls
from broker.edges.grpc_scope import ScopeService
from broker.edges.grpc_server import MAX_CONNECTIONS, ActionBrokerService, GrpcServer
from broker.edges.grpc_sessions import SessionCalls
from broker.edges.http_app import build_app, build_operations_app
from broker.edges.http_approvals import ApprovalEndpoints
from broker.edges.http_asking import add_asking
from broker.edges.http_server import HttpServer
from broker.edges.metrics import Metrics
from broker.edges.readiness import Readiness
from broker.errors import BrokerError
from broker.exchange import MAX_CALLERS, Exchange
from broker.identity.identify import entitlements
from broker.identity.peer import read_process
from broker.identity.same_pids import SamePids
from broker.identity.server_tls import ServerTls
from broker.identity.spiffe_id import SpiffeId
from broker.identity.spire_broker_api import AttestorEntitlements, SpireBrokerApi
from broker.identity.unix_front import Limits, UnixFront
from broker.identity.workload_api import WorkloadApi
from broker.ledger.checkpoint import Checkpointer
from broker.ledger.records import PolicyChanged
from broker.ledger.store import Ledger
from broker.operate import Operators
from broker.recheck import Recheck
from broker.sign import Signing

MAINTAIN_S: Final = 5.0  # how often keys are looked after; far below the time that a new key is published ahead
READY_S: Final = 0.5  # how often health and gauges are brought up to date
GRACE_S: Final = 5.0

_log = structlog.get_logger(__name__)


def utc_now() -> datetime:
    """The clock. Read here, at the entry point, and passed on."""
    return datetime.now(UTC)


class Broker:
    """A running broker. `grpc_port` and `http_port` are the ports that were got, also where 0 was asked for."""

    def __init__(
        self,
        config: Config,
        exchange: Exchange,
        metrics: Metrics,
        readiness: Readiness,
        signing: Signing,
        approvals: Approvals,
        watches: Watches,
        evidence: Evidence,
        sessions: SessionParts,
        scope: ScopeParts,
    ) -> None:
        self.config, self.exchange, self.metrics, self.readiness = config, exchange, metrics, readiness
        self.signing, self.approvals, self.watches, self.evidence = signing, approvals, watches, evidence
        self.sessions, self.scope = sessions, scope
        self.grpc_port: int | None = None
        self.http_port: int | None = None
        self.operations_port: int | None = None


@contextlib.asynccontextmanager
async def running(config: Config, clock: Callable[[], datetime] = utc_now) -> AsyncIterator[Broker]:
    """Starts a broker, yields it while it serves, and ends it in good order.

    Waits for SPIRE without end, and says so in the log: a broker may come up before its agent.

    Raises: PolicyError, Unavailable or OSError when the folder, the store or an address cannot be used;
    BrokerIdentityError when SPIRE gives us another identity than the configuration says.
    """
    async with contextlib.AsyncExitStack() as stack:
        policies = PolicyStore(config.policy_folder)
        workload_api = await stack.enter_async_context(WorkloadApi(config.spire.workload_api))
        await _first_identity(workload_api, config)
        config.state_folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        checkpoint = Checkpointer(config.checkpoint_key_file, config.checkpoint_file, config.ledger_name)
        ledger = await stack.enter_async_context(
            await Ledger.open(config.ledger_file, checkpoint=checkpoint, clock=clock)
        )
        _record_policies(policies, ledger, clock)
        lifetime = timedelta(seconds=config.limits.signing_key_lifetime_s)
        keyring = KeyRing(ledger, workload_api.snapshot, issuer=config.issuer, lifetime=lifetime)
        await keyring.start(clock())
        api = SpireBrokerApi(
            config.spire.broker_api,
            workload_api.snapshot,
            clock,
            agent=lambda found: found.path.startswith(config.spire.agent_path),
        )
        await stack.enter_async_context(api)
        same_pids = SamePids(AttestorEntitlements(api), workload_api.snapshot)
        spire, process, watches = SpireAttestor(same_pids), ProcessAttestor(read_process), Watches()
        stack.push_async_callback(process.close)
        signing_facts = signing_attestors(config, ledger, policies, workload_api, watches)
        evidence = await open_evidence(stack, config, watches)
        sessions = open_sessions(config, ledger, watches)
        attestors: dict[str, Attestor] = {"spire": spire, "process": process, **signing_facts, **evidence.attestors}
        attestors["session"] = sessions.attestor
        attestation = Attestation(attestors, config.limits.attest_timeout.total_seconds())
        exchange = Exchange(
            issuer=config.issuer,
            snapshot=workload_api.snapshot,
            entitlements=entitlements(spire.look),
            policies=policies,
            attestation=attestation,
            ledger=ledger,
            keyring=keyring,
            quota=Quota(config.limits.requests_per_second, config.limits.burst, MAX_CALLERS),
            attestations=Quota(
                config.limits.attestations_per_second_per_uid, config.limits.attestation_burst_per_uid, MAX_CALLERS
            ),
        )
        approvals = open_approvals(config, exchange)
        signing = Signing(exchange, await open_means(stack, config, clock, watches))
        stack.push_async_callback(signing.close)
        scope = await open_scope(exchange, attestors, process.follow, clock)
        stack.push_async_callback(scope.close)
        workload_api.subscribe(scope.watch.offer_trust)
        scope_goes_on = await stack.enter_async_context(watching(scope, exchange, clock))
        metrics = Metrics()
        readiness = Readiness(exchange=exchange, trust_domain=config.trust_domain)
        broker = Broker(config, exchange, metrics, readiness, signing, approvals, watches, evidence, sessions, scope)
        tls = ServerTls(workload_api.snapshot())
        workload_api.subscribe(tls.offer)
        grpc_server = await _start_grpc(stack, broker, tls, clock)
        await _start_http(stack, broker, tls, clock)
        async with asyncio.TaskGroup() as tasks:
            owned = [
                tasks.create_task(policies.watch()),
                tasks.create_task(watches.watch()),
                tasks.create_task(_maintain(keyring, clock)),
                tasks.create_task(_tell(broker, grpc_server, clock)),
                tasks.create_task(scope_goes_on()),
            ]
            try:
                yield broker
            finally:
                for task in owned:
                    task.cancel()


def _record_policies(policies: PolicyStore, ledger: Ledger, clock: Callable[[], datetime]) -> None:
    """Writes down which policy decides from now on, and each one that comes after it."""

    def record(policy: Policy) -> None:
        ledger.append_later(PolicyChanged(at=clock(), revision=policy.revision))

    record(policies.current)
    policies.subscribe(record)


async def _first_identity(workload_api: WorkloadApi, config: Config) -> None:
    while True:
        try:
            async with asyncio.timeout(5):
                snapshot = await workload_api.ready()
        except TimeoutError:
            _log.warning("waiting_for_identity", socket=config.spire.workload_api, why=workload_api.last_error)
            continue
        if snapshot.own is not None and snapshot.own.spiffe_id.trust_domain.name != config.trust_domain:
            raise BrokerIdentityError(
                f"SPIRE calls us {snapshot.own.spiffe_id}, but trust_domain is {config.trust_domain}: mend one of them"
            )
        return


class BrokerIdentityError(Exception):
    """SPIRE gives us another identity than the configuration says."""


def _audiences(config: Config) -> dict[str, frozenset[str]]:
    """Who speaks for an audience that is no SPIFFE ID."""
    return {audience: frozenset(str(SpiffeId.parse(one)) for one in ids) for audience, ids in config.audiences.items()}


async def _start_grpc(
    stack: contextlib.AsyncExitStack, broker: Broker, tls: ServerTls, clock: Callable[[], datetime]
) -> GrpcServer:
    config, exchange, audiences = broker.config, broker.exchange, _audiences(broker.config)
    private = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="action-broker-")))  # 0700
    front = None
    if config.unix.socket is not None:
        limits = Limits(
            connections=config.unix.max_connections, connections_per_uid=config.unix.max_connections_per_uid
        )
        front = UnixFront(
            config.unix.socket,
            private / "grpc",
            int(config.unix.mode, 8),
            limits=limits,
            on_refused=lambda error: exchange.ledger.count_refusal(error.reason),
        )
        broker.metrics.unix_connections.set_function(lambda: len(front))
    identifier = Identifier(exchange, front.peer if front is not None else lambda _: None)
    service = ActionBrokerService(
        exchange,
        Recheck(exchange, broker.scope.again, broker.scope.deciding, audiences),
        Operators(exchange),
        broker.signing,
        identifier=identifier,
        metrics=broker.metrics,
        clock=clock,
    )
    approvals = ApprovalsService(broker.approvals, exchange, identifier=identifier, metrics=broker.metrics, clock=clock)
    scope = ScopeService(
        exchange,
        broker.scope.feed,
        audiences,
        SessionCalls(broker.sessions.scoring(exchange), identifier),
        RevocationCalls(broker.scope.revocations, broker.scope.emergencies, identifier),
        identifier=identifier,
        metrics=broker.metrics,
        clock=clock,
    )
    broker.metrics.scope_watchers.set_function(lambda: len(scope.watchers))
    broker.metrics.scope_live.set_function(lambda: len(exchange.scope.live))
    standing = exchange.scope.standing
    broker.metrics.break_glass.set_function(standing.permits)
    broker.metrics.standing_denials.set_function(lambda: len(standing) - standing.permits())
    server = GrpcServer(
        service,
        approvals,
        scope,
        max_concurrent=config.grpc.max_concurrent_requests,
        max_connection_age_s=config.grpc.max_connection_age_s,
        max_connections=max(MAX_CONNECTIONS, config.unix.max_connections),
    )
    if front is not None:
        server.listen_unix(str(private / "grpc"))
    if config.grpc.listen is not None:
        try:
            broker.grpc_port = server.listen_tls(config.grpc.listen, tls.grpc_credentials())
        except RuntimeError as error:  # gRPC's own, whatever the reason
            raise OSError(f"grpc.listen: nobody can listen on {config.grpc.listen}: is the port taken?") from error
    await server.start()
    stack.push_async_callback(server.close, GRACE_S)
    if front is not None:
        await front.start()
        stack.push_async_callback(front.close)
    return server


async def _start_http(
    stack: contextlib.AsyncExitStack, broker: Broker, tls: ServerTls, clock: Callable[[], datetime]
) -> None:
    table = broker.config.http
    apart = table.operations_listen is not None
    if table.listen is not None:
        app = build_app(broker.exchange, broker.metrics, broker.readiness, clock, operations=not apart)
        if broker.config.approval.issuers:
            ApprovalEndpoints(broker.approvals, broker.exchange, broker.metrics, clock).add_to(app)
        broker.evidence.add_to(app, broker.exchange, broker.metrics, clock)
        broker.sessions.add_to(app, broker.exchange, broker.metrics, clock)
        deciding = broker.scope.deciding
        recheck = Recheck(broker.exchange, broker.scope.again, deciding, _audiences(broker.config))
        add_asking(app, broker.exchange, recheck, deciding, broker.metrics, clock)
        broker.http_port = await _listen(stack, app, table.listen, tls.http_context())
    if table.operations_listen is not None:
        app = build_operations_app(broker.metrics, broker.readiness, clock)
        broker.operations_port = await _listen(stack, app, table.operations_listen, None)


async def _listen(
    stack: contextlib.AsyncExitStack, app: web.Application, listen: str, tls: ssl.SSLContext | None
) -> int:
    host, _, port = listen.rpartition(":")
    server = HttpServer(app, (host.strip("[]"), int(port)), tls)
    await server.start()
    stack.push_async_callback(server.close)
    return server.port


async def _maintain(keyring: KeyRing, clock: Callable[[], datetime]) -> None:
    while True:
        await asyncio.sleep(MAINTAIN_S)
        try:
            await keyring.maintain(clock())
        except BrokerError as error:  # the ledger or SPIRE is away: readiness says so, and it is tried again
            _log.warning("keys_not_maintained", why=str(error))


async def _tell(broker: Broker, server: GrpcServer, clock: Callable[[], datetime]) -> None:
    """Keeps gRPC health and the gauges true."""
    told: list[str] | None = None
    while True:
        problems = broker.readiness.problems(clock())
        if problems != told:
            told = problems
            await server.set_ready(ready=not problems)
            _log.info("ready" if not problems else "not_ready", problems=problems)
        broker.metrics.ready.set(not problems)
        broker.metrics.ledger_size.set(broker.exchange.ledger.size)
        broker.metrics.policy_failed.set(broker.exchange.policies.last_error is not None)
        own = broker.exchange.snapshot().own
        broker.metrics.svid_seconds.set((own.not_after - clock()).total_seconds() if own else 0)
        await asyncio.sleep(READY_S)


async def serve(config: Config, told: Callable[[Broker], None] = lambda _: None) -> None:
    """Serves until SIGTERM or SIGINT; SIGHUP reloads the policy folder. told: called once it serves."""
    _raise_descriptor_limit()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    async with running(config) as broker:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        reloads: set[asyncio.Task[object]] = set()

        def reload() -> None:
            for work in (broker.exchange.policies.reload(), asyncio.to_thread(broker.watches.reload)):
                task: asyncio.Task[object] = asyncio.ensure_future(work)
                reloads.add(task)
                task.add_done_callback(_told_reload(reloads))

        loop.add_signal_handler(signal.SIGHUP, reload)
        _log.info(
            "serving",
            issuer=config.issuer,
            unix=str(config.unix.socket),
            grpc_port=broker.grpc_port,
            http_port=broker.http_port,
            operations_port=broker.operations_port,
            policy_revision=broker.exchange.policies.current.revision,
            pid=os.getpid(),
        )
        told(broker)
        await stop.wait()
        _log.info("stopping")


def _raise_descriptor_limit() -> None:
    """A connection on the Unix socket takes four descriptors, and the usual soft limit is 1024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _told_reload(reloads: set[asyncio.Task[object]]) -> Callable[[asyncio.Task[object]], None]:
    def done(task: asyncio.Task[object]) -> None:
        reloads.discard(task)
        error = None if task.cancelled() else task.exception()
        _log.info("reload_asked", error=str(error) if error else None)

    return done
