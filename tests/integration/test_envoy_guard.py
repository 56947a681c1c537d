"""`action-broker guard` between a real Envoy and a whole broker: it runs as the service, and follows scope."""

import asyncio
import contextlib
import json
import os
import signal
import stat
import subprocess
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from support.cli import COMMAND, clean_environment, cli
from support.dev_broker import CALLER, ORDER, SERVICE, DevBroker, dev_broker
from support.envoy import DEPLOY, Answer, Edge, fronting
from support.envoy_calls import now
from support.pki import CA
from support.processes import PATIENCE_S, until

from broker._proto.envoy.service.auth.v3 import external_auth_pb2, external_auth_pb2_grpc
from broker.action import Action
from broker.cli.dev_entries import create, delete, selector
from broker.client import ActionToken, Client

HOST = "orders.dev.test"
RULES = f"""
[[rules]]
method = "POST"
path = "/orders/{{order}}/refund"
action = "orders.refund"
resource = "https://{HOST}/orders/{{order}}"
parameters = {{ amount = "body:/amount" }}

[[rules]]
method = "POST"
path = "/orders/{{order}}/careful"
action = "orders.refund"
resource = "https://{HOST}/orders/{{order}}"
parameters = {{ amount = "body:/amount" }}
check = true
"""


@dataclass
class GuardProcess:
    """shown: what it said of itself as JSON."""

    process: subprocess.Popen[str]
    log: Path
    shown: dict[str, Any]

    async def get(self, path: str) -> tuple[int, str]:
        """What its operations listener answers."""
        url = f"http://127.0.0.1:{self.shown['operations_port']}{path}"
        async with aiohttp.ClientSession() as http, http.get(url) as response:
            return response.status, await response.text()

    async def until_ready(self) -> None:
        """Returns once it knows what is in scope."""
        await until(lambda: self.said("ready"), "it is ready")
        assert (await self.get("/readyz"))[0] == 200

    def refusals(self, correlation_id: str) -> list[str]:
        """The reasons that the log has under this id."""
        entries = map(json.loads, self.log.read_text().splitlines())
        return [one["reason"] for one in entries if one.get("correlation_id") == correlation_id]

    def stop(self) -> int:
        """Ends it as an init system does. Its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE_S)

    def said(self, event: str) -> list[dict[str, Any]]:
        """The log's entries of this name so far."""
        return [one for one in map(json.loads, self.log.read_text().splitlines()) if one.get("event") == event]


def configuration(edge: Edge, dev: DevBroker, broker: str) -> Path:
    file = edge.folder / "guard.toml"
    file.write_text(
        f'issuer = "{dev.shown["issuer"]}"\naudience = "{SERVICE}"\nauthorities = ["{HOST}"]\n'
        f'listen = "unix://{edge.socket}"\noperations_listen = "127.0.0.1:0"\n[broker]\n{broker}\n{RULES}'
    )
    return file


@contextlib.contextmanager
def guarding(
    edge: Edge, dev: DevBroker, broker: str, path: str = "/service/orders", *, changes: Mapping[str, str] | None = None
) -> Iterator[GuardProcess]:
    """`action-broker guard`, as the workload with this path: the service. changes: of its configuration."""
    log, file = edge.folder / "guard.log", configuration(edge, dev, broker)
    for theirs, mine in (changes or {}).items():
        file.write_text(file.read_text().replace(theirs, mine))
    command = [*dev.command_as(path), *COMMAND, "--json", "guard", "--config", str(file)]
    with (
        log.open("w") as out,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=out, text=True, env=clean_environment()) as process,
    ):
        try:
            line = process.stdout.readline()
            assert line, log.read_text()
            yield GuardProcess(process, log, json.loads(line))
        finally:
            process.kill()


def behind_socket(dev: DevBroker) -> str:
    return f'target = "unix://{dev.socket}"'


def over_mtls(dev: DevBroker) -> str:
    api = dev.environment["SPIFFE_ENDPOINT_SOCKET"]
    return f'target = "{dev.shown["grpc"]}"\nid = "{dev.shown["broker_id"]}"\nworkload_api = "{api}"'


@pytest.fixture
async def edge(tmp_path: Path) -> AsyncIterator[Edge]:
    async with fronting(tmp_path, CA(now=now())) as found:
        yield found


@pytest.fixture(scope="module")
def dev() -> Iterator[DevBroker]:
    with dev_broker() as found:
        yield found


@contextlib.asynccontextmanager
async def agent(dev: DevBroker) -> AsyncIterator[tuple[Client, str]]:
    """A client as the support agent, which this process is while its entry lasts; and the entry's id."""
    entries = Path(dev.shown["entries"])
    entry = await asyncio.to_thread(create, entries, CALLER, [selector(os.getpid())])
    async with Client.unix(dev.socket, issuer=dev.shown["issuer"]) as client:
        yield client, entry


async def act(edge: Edge, token: ActionToken, amount: int = 30, path: str = "/orders/17/refund") -> Answer:
    """What the service's client is answered."""
    sent = [("host", HOST), *token.http_headers("POST", f"https://{HOST}{path}").items()]
    connector = aiohttp.TCPConnector(ssl=edge.tls())
    async with (
        aiohttp.ClientSession(connector=connector) as http,
        http.post(edge.origin + path, headers=sent, json={"amount": amount}) as response,
    ):
        return Answer.of(response.status, response.headers, await response.read())


async def refund(client: Client, amount: int = 30) -> ActionToken:
    return await client.request("orders.refund", ORDER, SERVICE, {"amount": amount})


async def refusal(edge: Edge, tokens: Iterable[ActionToken], *, after: str | None = None) -> str:
    """The reason of the first refusal but `after`, while one token after the other is shown. Each counts once."""
    async with asyncio.timeout(PATIENCE_S):
        for token in tokens:
            answer = await act(edge, token)
            if answer.status != 200 and answer.body["reason"] != after:
                return str(answer.body["reason"])
            await asyncio.sleep(0.05)
    raise AssertionError("there are no more tokens")


async def unused(client: Client) -> list[ActionToken]:
    """As many tokens as one asks for at once; they live for a minute."""
    action = Action("orders.refund", ORDER, SERVICE, {"amount": 30})
    answers = await client.request_many([action] * 256)
    assert all(isinstance(one, ActionToken) for one in answers)
    return [one for one in answers if isinstance(one, ActionToken)]


@pytest.mark.parametrize("reach", [behind_socket, over_mtls])
async def test_it_admits_what_the_broker_granted_and_refuses_it_when_its_reasons_end(
    dev: DevBroker, edge: Edge, reach: Callable[[DevBroker], str]
) -> None:
    with guarding(edge, dev, reach(dev)) as guard:
        async with agent(dev) as (client, entry):
            await guard.until_ready()
            token = await refund(client)
            assert (await act(edge, token, 31)).body["reason"] == "out_of_scope"
            assert (await act(edge, token)).status == 200
            assert edge.seen[0].values("x-action-broker-principal") == [CALLER]
            again = await act(edge, token)
            assert again.body["reason"] == "already_used"
            await until(lambda: guard.refusals(again.body["correlation_id"]) == ["already_used"], "it is in the log")
            assert (await act(edge, await refund(client), path="/orders/17/careful")).status == 200
            tokens = iter(await unused(client))
            assert (await act(edge, next(tokens))).status == 200
            await asyncio.to_thread(delete, Path(dev.shown["entries"]), entry)
            reason = await refusal(edge, tokens, after="suspended")
            assert reason == "not_attested"
            metrics = (await guard.get("/metrics"))[1]
            assert 'action_broker_guard_requests_total{outcome="not_attested"} 1.0' in metrics
            assert "action_broker_guard_scope_fresh 1.0" in metrics
        assert guard.stop() == 0


async def test_without_the_broker_it_refuses_everybody_and_says_that_it_is_not_ready(edge: Edge) -> None:
    with dev_broker() as dev, guarding(edge, dev, behind_socket(dev)) as guard:
        async with agent(dev) as (client, _):
            await guard.until_ready()
            tokens = iter(await unused(client))
            assert (await act(edge, next(tokens))).status == 200
            dev.process.kill()
            assert await refusal(edge, tokens) == "scope_stale"
        status, body = await guard.get("/readyz")
        assert (status, "scope feed: " in body) == (503, True)
        assert (await guard.get("/healthz"))[0] == 200


async def test_a_guard_of_another_service_hears_nothing_and_admits_nobody(dev: DevBroker, edge: Edge) -> None:
    """Who may hear of an audience's scope is decided by the broker, by who runs the guard."""
    with guarding(edge, dev, behind_socket(dev), "/service/other") as guard:
        async with agent(dev) as (client, _):
            await until(lambda: guard.said("not_ready"), "it says so")
            assert (await act(edge, await refund(client))).body["reason"] == "scope_stale"
            assert edge.seen == []


async def test_it_ends_in_good_order_and_another_one_does_not_take_its_place(dev: DevBroker, edge: Edge) -> None:
    with guarding(edge, dev, behind_socket(dev)) as guard:
        assert stat.S_IMODE(edge.socket.lstat().st_mode) == 0o660
        second = dev.exec_as("/service/orders", *COMMAND, "guard", "--config", edge.folder / "guard.toml")
        assert (second.code, "another server listens here" in second.err) == (4, True)
        assert guard.stop() == 0
        assert guard.said("stopping")
        assert not edge.socket.exists()


async def test_on_a_port_it_tells_its_health_and_a_port_that_is_taken_is_said(dev: DevBroker, edge: Edge) -> None:
    listen = f'listen = "unix://{edge.socket}"'
    with guarding(edge, dev, behind_socket(dev), changes={listen: 'listen = "127.0.0.1:0"'}) as guard:
        await guard.until_ready()
        port = guard.shown["port"]
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            for name in ("", "envoy.service.auth.v3.Authorization"):
                answer = await stub.Check(health_pb2.HealthCheckRequest(service=name))
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
            asked = await external_auth_pb2_grpc.AuthorizationStub(channel).Check(external_auth_pb2.CheckRequest())
            assert asked.denied_response.status.code == 503
        file = edge.folder / "guard.toml"
        file.write_text(file.read_text().replace("127.0.0.1:0", f"127.0.0.1:{port}", 1))
        second = dev.exec_as("/service/orders", *COMMAND, "guard", "--config", file)
        assert (second.code, "cannot start" in second.err) == (4, True)


async def test_one_that_was_killed_leaves_its_socket_to_the_next(dev: DevBroker, edge: Edge) -> None:
    with guarding(edge, dev, behind_socket(dev)) as guard:
        guard.process.kill()
        guard.process.wait(PATIENCE_S)
    assert edge.socket.exists()
    with guarding(edge, dev, behind_socket(dev)) as guard:
        await guard.until_ready()
        async with agent(dev) as (client, _):
            assert (await act(edge, await refund(client))).status == 200


def test_a_configuration_that_does_not_hold_starts_nothing(tmp_path: Path) -> None:
    ran = cli("guard", "--config", tmp_path / "none.toml")
    assert (ran.code, "none.toml is not there" in ran.err) == (2, True)
    (tmp_path / "guard.toml").write_text('issuer = "x"\n')
    ran = cli("guard", "--config", tmp_path / "guard.toml", "--json")
    assert ran.code == 2
    assert ran.value["error"].startswith("4 mistakes in ")
    assert cli("guard", "--check", "--config", DEPLOY / "guard.toml", "--json").value == {"rules": 5, "public": 2}
