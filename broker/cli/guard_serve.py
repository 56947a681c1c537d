"""One guard process beside a service: what Envoy asks it, and what the broker tells it."""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc
import structlog
from aiohttp import web
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry, generate_latest

from broker._proto.envoy.service.auth.v3 import external_auth_pb2_grpc
from broker.cli.guard_config import GuardConfig, path_of
from broker.client import Client
from broker.edges.http_answers import answer_everything, finish_prepared, json_answer
from broker.edges.http_server import HttpServer
from broker.edges.metrics import CONTENT_TYPE
from broker.guard import Guard, GuardMetrics, ScopeFeed
from broker.guard.envoy import EnvoyAuthorization
from broker.guard.http_request import MAX_BODY
from broker.identity.unix_front import remove_stale
from broker.identity.workload_api import WorkloadApi

AUTHORIZATION: Final = "envoy.service.auth.v3.Authorization"
READY_S: Final = 0.5  # how often health is brought up to date
GRACE_S: Final = 5.0
MAX_CHECKS: Final = 4096  # at once; Envoy is told "unavailable" above it, and refuses
MAX_MESSAGE: Final = MAX_BODY + 256 * 1024  # bytes: a body, headers and a certificate

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Guarding:
    """A running guard. The ports are those that were got, also where 0 was asked for; None where there is none."""

    config: GuardConfig
    feed: ScopeFeed
    port: int | None
    operations_port: int | None


@contextlib.asynccontextmanager
async def guarding(config: GuardConfig) -> AsyncIterator[Guarding]:
    """Starts a guard, yields it while it answers, and ends it in good order.

    It waits for SPIRE without end, and then answers at once: no, until the broker's feed has told what is in scope.

    Raises: OSError where an address cannot be had; Refused, Unavailable.
    """
    async with contextlib.AsyncExitStack() as stack:
        registry = CollectorRegistry()
        broker = await stack.enter_async_context(await _client(stack, config))
        feed = await stack.enter_async_context(ScopeFeed(broker, audiences=[config.audience]))
        guard = Guard(
            issuer=config.issuer,
            audience=config.audience,
            scope=feed,
            broker=broker,
            metrics=GuardMetrics(registry),
        )
        server, healthy, port = await _start(
            EnvoyAuthorization(guard, config.table(), authorities=config.authorities), config
        )
        stack.push_async_callback(server.stop, GRACE_S)
        operations = await _start_operations(stack, config, feed, registry)
        telling = asyncio.create_task(_tell(feed, healthy), name="guard: health")
        try:
            yield Guarding(config=config, feed=feed, port=port, operations_port=operations)
        finally:
            telling.cancel()
            await asyncio.wait([telling])


async def _client(stack: contextlib.AsyncExitStack, config: GuardConfig) -> Client:
    """How the broker is reached. Over the network as soon as SPIRE says who we are."""
    table = config.broker
    if table.socket is not None:
        uids = table.server_uids or None
        return Client.unix(table.socket, issuer=config.issuer, spiffe_id=table.spiffe_id, server_uids=uids)
    api = await stack.enter_async_context(WorkloadApi(str(table.workload_api)))
    while True:
        try:
            async with asyncio.timeout(5):
                await api.ready()
        except TimeoutError:
            _log.warning("waiting_for_identity", socket=table.workload_api, why=api.last_error)
            continue
        return Client.mtls(table.target, broker_id=str(table.id), workload_api=api)


async def _start(
    service: EnvoyAuthorization, config: GuardConfig
) -> tuple[grpc.aio.Server, health.aio.HealthServicer, int | None]:
    options = [
        ("grpc.max_receive_message_length", MAX_MESSAGE),
        ("grpc.max_metadata_size", 16 * 1024),
        ("grpc.so_reuseport", 0),
    ]
    server, healthy = grpc.aio.server(options=options, maximum_concurrent_rpcs=MAX_CHECKS), health.aio.HealthServicer()
    external_auth_pb2_grpc.add_AuthorizationServicer_to_server(service, server)
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    port = _bind(server, config)
    await server.start()
    return server, healthy, port


def _bind(server: grpc.aio.Server, config: GuardConfig) -> int | None:
    """The port, where it is one. Raises: OSError."""
    path = path_of(config.listen)
    umask = None
    if path is not None:
        remove_stale(Path(path))
        umask = os.umask(0o777 & ~int(config.socket_mode, 8))  # nobody else gets in before a chmod could keep them out
    try:
        port = server.add_insecure_port(config.listen if path is None else f"unix:{path}")
    except RuntimeError as error:
        raise OSError(str(error)) from error
    finally:
        if umask is not None:
            os.umask(umask)
    return port if path is None else None


async def _start_operations(
    stack: contextlib.AsyncExitStack, config: GuardConfig, feed: ScopeFeed, registry: CollectorRegistry
) -> int | None:
    if config.operations_listen is None:
        return None
    host, _, port = config.operations_listen.rpartition(":")
    server = HttpServer(_operations(feed, registry), (host.strip("[]"), int(port)), None)
    await server.start()
    stack.push_async_callback(server.close)
    return server.port


def _operations(feed: ScopeFeed, registry: CollectorRegistry) -> web.Application:
    """Health, readiness and metrics, for a listener that only the platform reaches."""

    async def healthz(_: web.Request) -> web.Response:
        return json_answer({"alive": True})

    async def readyz(_: web.Request) -> web.Response:
        problems = _problems(feed)
        return json_answer({"ready": not problems, "problems": problems}, status=503 if problems else 200)

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(body=generate_latest(registry), headers={"Content-Type": CONTENT_TYPE})

    app = web.Application(middlewares=[answer_everything()])
    app.on_response_prepare.append(finish_prepared)
    app.add_routes([web.get("/healthz", healthz), web.get("/readyz", readyz), web.get("/metrics", metrics)])
    return app


def _problems(feed: ScopeFeed) -> list[str]:
    """What keeps it from admitting anybody, in words for operators."""
    return [] if feed.is_fresh else [f"scope feed: {feed.last_error or 'nothing was heard yet'}"]


async def _tell(feed: ScopeFeed, healthy: health.aio.HealthServicer) -> None:
    """Keeps gRPC health true."""
    told: list[str] | None = None
    while True:
        problems = _problems(feed)
        if problems != told:
            told = problems
            status = health_pb2.HealthCheckResponse.NOT_SERVING if problems else health_pb2.HealthCheckResponse.SERVING
            for name in ("", AUTHORIZATION):
                await healthy.set(name, status)
            _log.info("not_ready" if problems else "ready", problems=problems)
        await asyncio.sleep(READY_S)


async def serve(config: GuardConfig, told: Callable[[dict[str, Any]], None] = lambda _: None) -> None:
    """Answers until SIGTERM or SIGINT. told: is given where, once it answers."""
    stop = asyncio.Event()
    async with guarding(config) as running:
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        where = {
            "audience": config.audience,
            "listen": config.listen,
            "port": running.port,
            "operations_port": running.operations_port,
            "pid": os.getpid(),
        }
        _log.info("guarding", **where)
        told(where)
        await stop.wait()
        _log.info("stopping")
