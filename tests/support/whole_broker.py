"""A whole broker beside an embedded trust domain, both in processes of their own, and callers that send what they like.

This process is the caller: it has several SPIFFE IDs, so each call names the one that it acts as.
"""

import asyncio
import os
import resource
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self, TypeVar

import grpc
from google.rpc import error_details_pb2, status_pb2
from support.broker import ISSUER, RunningBroker, folder_for, write_config
from support.processes import PATIENCE_S, Child, running, until
from support.trust_domain import TESTS, TrustDomainProcess, trust_domain

from broker._proto.actionbroker.v1 import action_pb2, broker_pb2, broker_pb2_grpc
from broker.client import Client
from broker.credentials.dpop import ProofKey
from broker.errors import Reason
from broker.identity.spiffe_id import SpiffeId
from broker.identity.tls_dial import SpiffeDialer
from broker.identity.trust import TrustSnapshot
from broker.ledger.reading import read
from broker.ledger.records import Event, Intent, Record, Refusal
from broker.status import CORRELATION_ID, DETAILS, DOMAIN

_R = TypeVar("_R", bound=Event)
SERVICE = "actionbroker.v1.ActionBroker"
BROKER = "spiffe://acme.test/action-broker"
AGENT = "spiffe://acme.test/build/agent"
ORDERS = "spiffe://acme.test/service/orders"
OPERATOR = "spiffe://acme.test/operator"
RESOURCE = "https://orders.acme.test/orders/17"
HIDDEN = "hidden-policy-name"
"""In the names of policies: no caller may ever see it."""

SCHEMA = """
action "orders.read", "orders.once", "orders.charge", "orders.brief", "orders.long", "orders.longest", "orders.closed"
  appliesTo { principal: [Workload], resource: [Resource], context: {} };
action "orders.refund" appliesTo {
  principal: [Workload], resource: [Resource], context: { spire: Spire, parameters: { amount: Long } }
};
action "orders.attested" appliesTo {
  principal: [Workload], resource: [Resource], context: { spire: Spire, process: Process }
};
"""
POLICY = """
@id("hidden-policy-name-read") @reuse("ttl") permit (principal, action == Action::"orders.read", resource);
@id("hidden-policy-name-once") permit (principal, action == Action::"orders.once", resource);
@id("hidden-policy-name-charge") @single_use @max_ttl("300s")
permit (principal, action == Action::"orders.charge", resource);
@id("hidden-policy-name-brief") @reuse("ttl") @max_ttl("1s")
permit (principal, action == Action::"orders.brief", resource);
@id("hidden-policy-name-long") @reuse("ttl") @max_ttl("200s")
permit (principal, action == Action::"orders.long", resource);
@id("hidden-policy-name-longest") @reuse("ttl") @max_ttl("300s")
permit (principal, action == Action::"orders.longest", resource);
@id("hidden-policy-name-refund") permit (
  principal == Workload::"spiffe://acme.test/build/agent", action == Action::"orders.refund", resource
) when { context.parameters.amount <= 50 };
@id("hidden-policy-name-attested") permit (principal, action == Action::"orders.attested", resource)
when { context.process.uid >= 0 };
@id("hidden-policy-name-operators") permit (
  principal == Workload::"spiffe://acme.test/operator", action == Action::"broker.operate", resource
);
"""
POLICIES = {"orders.cedarschema": SCHEMA, "orders.cedar": POLICY}


def utc_now() -> datetime:
    return datetime.now(UTC)


def act(name: str = "orders.read", *, parameters: str = "", **changes: str) -> action_pb2.Action:
    """An action that the policy permits, with these fields changed."""
    if name == "orders.refund":
        parameters = parameters or '{"amount": 5}'
    fields = {"resource": RESOURCE, "audience": ORDERS} | changes
    return action_pb2.Action(name=name, parameters=parameters, **fields)


def request(name: str = "orders.read", *, spiffe_id: str = AGENT, **changes: str) -> Any:
    return broker_pb2.RequestActionTokenRequest(action=act(name, **changes), spiffe_id=spiffe_id)


@dataclass(frozen=True)
class Said:
    """How a call ended. message: the answer, None where it failed."""

    code: grpc.StatusCode
    details: str
    trailers: Mapping[str, str | bytes]
    message: Any = None

    @property
    def reason(self) -> str:
        """Of our ErrorInfo; empty where there is none."""
        for packed in self.rich.details:
            info = error_details_pb2.ErrorInfo()
            if packed.Unpack(info) and info.domain == DOMAIN:
                return info.reason
        return ""

    @property
    def rich(self) -> status_pb2.Status:
        return status_pb2.Status.FromString(bytes(self.trailers.get(DETAILS, b"")))

    @property
    def correlation_id(self) -> str:
        return str(self.trailers.get(CORRELATION_ID, ""))

    @property
    def retry_after_s(self) -> float:
        for packed in self.rich.details:
            retry = error_details_pb2.RetryInfo()
            if packed.Unpack(retry):
                return retry.retry_delay.ToTimedelta().total_seconds()
        return 0.0


class Wire:
    """One connection, and one key unless `proves` is False: sends whatever it is told, keeps the nonces it is given."""

    def __init__(self, target: str, *, proves: bool = True) -> None:
        self.key = ProofKey()
        self._proves = proves
        options = [("grpc.default_authority", "localhost"), ("grpc.use_local_subchannel_pool", 1)]
        self.channel = grpc.aio.insecure_channel(target, options)
        self.stub = broker_pb2_grpc.ActionBrokerStub(self.channel)
        self.nonce: str | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.channel.close()

    def proof(self, method: str, **changes: Any) -> str:
        """A proof with the newest nonce. changes: `nonce`, `url`, `key`, `now`."""
        made = {"key": self.key, "url": f"{ISSUER}/{SERVICE}/{method}", "now": utc_now(), "nonce": self.nonce} | changes
        return made["key"].prove("POST", made["url"], made["now"], nonce=made["nonce"])

    async def send(self, method: str, message: Any, proofs: Sequence[str] = (), **options: Any) -> Said:
        """One call with exactly these proofs."""
        call = getattr(self.stub, method)(
            message, metadata=[("dpop", proof) for proof in proofs], timeout=options.get("timeout", 15)
        )
        try:
            answer = await call
        except grpc.aio.AioRpcError as error:
            return self._said(error.code(), error.details() or "", error.trailing_metadata())
        return self._said(grpc.StatusCode.OK, "", await call.trailing_metadata(), answer)

    def _said(self, code: grpc.StatusCode, details: str, metadata: Any, message: Any = None) -> Said:
        trailers = dict(metadata or ())
        self.nonce = trailers.get("dpop-nonce", self.nonce)
        return Said(code, details, trailers, message)

    async def ask(self, method: str, message: Any, **options: Any) -> Said:
        """One call as a good client makes it, asked again where a nonce was wanted."""
        proofs = [self.proof(method)] if self._proves else []
        said = await self.send(method, message, proofs, **options)
        if said.reason == Reason.NONCE_REQUIRED:
            said = await self.send(method, message, [self.proof(method)], **options)
        return said

    async def token(self, name: str = "orders.read", **changes: Any) -> str:
        """A token for an action that the policy permits."""
        said = await self.ask("RequestActionToken", request(name, **changes))
        assert said.code is grpc.StatusCode.OK, (said.details, said.reason)
        return said.message.token.access_token

    async def reason(self, name: str = "orders.read", **changes: str) -> str:
        """Why there is no token; empty where there is one."""
        return (await self.ask("RequestActionToken", request(name, **changes))).reason

    async def check(self, token: str, name: str = "orders.read", *, spiffe_id: str = ORDERS, **changes: str) -> str:
        """What Check says: "" for yes, else the reason."""
        asked = broker_pb2.CheckRequest(token=token, action=act(name, **changes), spiffe_id=spiffe_id)
        said = await self.ask("Check", asked)
        if said.message is None:
            return said.reason
        assert said.message.allowed is (not said.message.reason)
        return said.message.reason

    async def redeem(self, token: str, idempotency_id: str, *, spiffe_id: str = ORDERS, **changes: str) -> Said:
        asked = broker_pb2.RedeemRequest(
            token=token, action=act("orders.charge", **changes), idempotency_id=idempotency_id, spiffe_id=spiffe_id
        )
        return await self.ask("Redeem", asked)


@dataclass
class Whole:
    """A broker, the trust domain it lives in, and this process's entries in it by SPIFFE ID."""

    broker: RunningBroker
    domain: TrustDomainProcess
    entries: dict[str, str] = field(default_factory=dict)

    @property
    def target(self) -> str:
        return f"unix:{self.broker.socket}"

    def wire(self) -> Wire:
        """A connection of this process to the Unix socket."""
        return Wire(self.target)

    def client(self, spiffe_id: str = AGENT, **options: Any) -> Client:
        """Our own client, as this process."""
        return Client.unix(self.broker.socket, issuer=ISSUER, spiffe_id=spiffe_id, **options)

    @asynccontextmanager
    async def mtls(self, snapshot: TrustSnapshot, *, proves: bool = False) -> AsyncIterator[Wire]:
        """A connection over mutual TLS of whoever `snapshot` is."""
        async with dialled(self.broker.grpc_port, snapshot, proves=proves) as wire:
            yield wire

    @contextmanager
    def caller(self, path: str = "build/agent") -> Iterator[Child]:
        """A process of its own with this ID alone; see support/caller.py. Its entry ends with it at the latest."""
        environment = {**os.environ, "PYTHONPATH": f"{TESTS}:{TESTS.parent}"}
        with running(sys.executable, "-m", "support.caller", self.broker.socket, env=environment) as child:
            self.entries[f"{path} of {child.pid}"] = self.domain.entry(path, child.pid)
            yield child

    def records(self) -> list[Record]:
        """All that is in the ledger now."""
        return [row.record() for row in read(self.broker.ledger)]

    async def recorded(self, correlation_id: str, kind: type[_R]) -> _R:
        """What the ledger says of one request; waits for it, since it may follow the answer."""
        found: list[_R] = []

        def there() -> bool:
            ours = (one for one in self.records() if one.correlation_id == correlation_id)
            found[:] = [one for one in ours if isinstance(one, kind)]
            return bool(found)

        await until(there, f"the ledger has {correlation_id}")
        return found[-1]

    def intents(self) -> dict[str, Intent]:
        """By jti."""
        return {one.jti: one for one in self.records() if isinstance(one, Intent)}

    def get(self, path: str) -> tuple[int, str]:
        """One page of the operations listener."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.broker.operations_port}{path}", timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    async def not_ready_because(self, why: str) -> None:
        await until(lambda: self.get("/readyz")[0] == 503 and why in self.get("/readyz")[1], f"not ready: {why}")

    async def ready(self) -> None:
        await until(lambda: self.get("/readyz")[0] == 200, "ready again")

    def limit_files(self, size: int) -> None:
        """From now on no file of the broker grows beyond `size` bytes: what a full disk does, without filling one."""
        resource.prlimit(self.broker.process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@asynccontextmanager
async def dialled(port: int, snapshot: TrustSnapshot, *, proves: bool = False) -> AsyncIterator[Wire]:
    dialer = SpiffeDialer(f"127.0.0.1:{port}", SpiffeId.parse(BROKER), lambda: snapshot, utc_now)
    try:
        async with Wire(await dialer.start(), proves=proves) as wire:
            yield wire
    finally:
        await dialer.close()


def launch(config: Path, *, inherits: Sequence[int] = ()) -> RunningBroker:
    """`action-broker serve`, not waited for. Its log is read in a thread of its own."""
    process = subprocess.Popen(
        [sys.executable, "-m", "broker.cli", "--log-level", "debug", "serve", "--config", str(config)],
        stderr=subprocess.PIPE,
        text=True,
        pass_fds=inherits,
    )
    found = RunningBroker(folder=config.parent, process=process)
    found.reader = threading.Thread(target=found.read_log, daemon=True)
    found.reader.start()
    return found


def served(broker: RunningBroker) -> RunningBroker:
    """Waits until it serves."""
    serving = broker.wait_for("serving")
    broker.grpc_port, broker.http_port = serving["grpc_port"], serving["http_port"]
    broker.operations_port = serving["operations_port"]
    return broker


def ended(broker: RunningBroker) -> None:
    """Ends it if it still runs, and lets go of its log."""
    if broker.process.poll() is None:
        broker.process.terminate()
        try:
            broker.process.wait(20)
        except subprocess.TimeoutExpired:
            broker.process.kill()
            broker.process.wait(10)
    broker.reader.join(10)
    broker.process.stderr.close()


@contextmanager
def serving(config: Path, domain: TrustDomainProcess) -> Iterator[RunningBroker]:
    """A broker as a process of the trust domain, until the block ends; it may also be ended inside."""
    broker = launch(config)
    try:
        entry = domain.entry("action-broker", broker.process.pid)
        try:
            yield served(broker)
        finally:
            domain.delete(entry)
    finally:
        ended(broker)


@contextmanager
def whole_broker(
    policies: Mapping[str, str] = POLICIES,
    *,
    x509_seconds: float = 3600,
    jwt_seconds: float = 300,
    **tables: Mapping[str, Any],
) -> Iterator[Whole]:
    """Everything, with this process as AGENT, ORDERS and OPERATOR. tables: of the configuration file."""
    with (
        folder_for(policies) as folder,
        trust_domain(folder / "td", x509_seconds=x509_seconds, jwt_seconds=jwt_seconds) as domain,
    ):
        entries = {
            f"spiffe://acme.test/{path}": domain.entry(path, os.getpid())
            for path in ("build/agent", "service/orders", "operator")
        }
        config = write_config(folder, domain.workload_api, domain.broker_api, **tables)
        with serving(config, domain) as broker:
            yield Whole(broker, domain, entries)


async def eventually(ask: Callable[[], Awaitable[str]], wanted: str) -> None:
    """Asks again and again until the answer is `wanted`."""
    answer = ""
    try:
        async with asyncio.timeout(PATIENCE_S):
            while (answer := await ask()) != wanted:  # noqa: ASYNC110 - another process brings it about
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"never {wanted!r}, but {answer!r}") from None


async def refused(whole: Whole, said: Said, reason: Reason, code: grpc.StatusCode) -> Refusal:
    """Checks the answer; returns what the ledger has of it."""
    assert (said.reason, said.code) == (reason, code)
    return await whole.recorded(said.correlation_id, Refusal)
