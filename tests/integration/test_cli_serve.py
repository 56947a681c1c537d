"""`serve` and its signals: SIGHUP takes a new policy or keeps the old one, SIGTERM ends it, mistakes are said."""

import asyncio
import os
import signal
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.broker import ISSUER, RunningBroker, folder_for, write_config
from support.cli import cli
from support.trust_domain import TrustDomainProcess, trust_domain
from support.whole_broker import ended, launch, serving

from broker.client import Client
from broker.errors import BrokerError

AGENT = "spiffe://acme.test/build/agent"
SCHEMA = 'action "read", "write" appliesTo { principal: [Workload], resource: [Resource], context: {} };'
ACT = ("https://orders.acme.test/orders/17", "spiffe://acme.test/service/orders")


def permit(action: str) -> str:
    return f'@id("one") permit (principal == Workload::"{AGENT}", action == Action::"{action}", resource);'


@dataclass
class Setting:
    folder: Path
    domain: TrustDomainProcess

    def config(self, **tables: Any) -> Path:
        return write_config(self.folder, self.domain.workload_api, self.domain.broker_api, **tables)

    def policy(self, text: str) -> None:
        (self.folder / "policy" / "rules.cedar").write_text(text)

    def fails_to_start(self, config: Path) -> tuple[int, str]:
        """The exit code, and all that was said that is not a log entry."""
        broker = launch(config)
        try:
            entry = self.domain.entry("action-broker", broker.process.pid)
            code = broker.process.wait(30)
            self.domain.delete(entry)
        finally:
            ended(broker)
        return code, "\n".join(entry.get("line", "") for entry in broker.log)


@pytest.fixture(scope="module")
def domain() -> Iterator[Setting]:
    with (
        folder_for({"schema.cedarschema": SCHEMA, "rules.cedar": permit("read")}) as folder,
        trust_domain(folder / "td") as found,
    ):
        found.entry("build/agent", os.getpid())
        yield Setting(folder, found)


@pytest.fixture
def setting(domain: Setting) -> Setting:
    """With the policy that permits `read`."""
    domain.policy(permit("read"))
    return domain


def asked(broker: RunningBroker, action: str) -> str:
    """What this process is answered."""

    async def ask() -> str:
        async with Client.unix(broker.socket, issuer=ISSUER) as client:
            try:
                await client.request(action, *ACT)
            except BrokerError as error:
                return str(error.reason)
            return "allowed"

    return asyncio.run(ask())


def test_sighup_takes_a_new_policy_and_keeps_the_old_one_where_the_new_is_broken(setting: Setting) -> None:
    with serving(setting.config(), setting.domain) as broker:
        assert (asked(broker, "read"), asked(broker, "write")) == ("allowed", "denied")
        setting.policy(permit("write"))
        broker.process.send_signal(signal.SIGHUP)
        broker.wait_for("reload_asked", 2)  # once for policies, once for files
        assert [one["error"] for one in broker.events("reload_asked")] == [None, None]
        assert (asked(broker, "read"), asked(broker, "write")) == ("denied", "allowed")
        setting.policy("permit (everything);")
        broker.process.send_signal(signal.SIGHUP)
        broker.wait_for("reload_asked", 4)
        (error,) = filter(None, (one["error"] for one in broker.events("reload_asked")))
        assert "rules.cedar:1" in error
        assert (asked(broker, "read"), asked(broker, "write")) == ("denied", "allowed")
        assert broker.stop() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_in_good_order_when_it_is_told_to(setting: Setting, number: signal.Signals) -> None:
    with serving(setting.config(), setting.domain) as broker:
        assert asked(broker, "read") == "allowed"
        broker.process.send_signal(number)
        assert broker.process.wait(20) == 0
        broker.wait_for("stopping")
        assert not Path(broker.socket).exists()
        last = cli("ledger", "show", "--file", broker.ledger, "--last", 1, "--json").value
        assert last["kind"] == "stopped"


def test_a_policy_that_is_broken_at_the_start_starts_nothing(setting: Setting) -> None:
    setting.policy("permit (everything);")
    code, said = setting.fails_to_start(setting.config())
    assert code == 2
    assert "the policy folder is not taken" in said
    assert "rules.cedar:1" in said
    assert "Traceback" not in said


def test_an_identity_of_another_trust_domain_starts_nothing(setting: Setting) -> None:
    config = setting.config()
    config.write_text(config.read_text().replace('trust_domain = "acme.test"', 'trust_domain = "other.test"'))
    code, said = setting.fails_to_start(config)
    assert code == 2
    assert "SPIRE calls us spiffe://acme.test/action-broker, but trust_domain is other.test" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("table", ["grpc", "http"])
def test_a_port_that_is_taken_is_said(setting: Setting, table: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, said = setting.fails_to_start(
            setting.config(**{table: {"listen": f"127.0.0.1:{taken.getsockname()[1]}"}})
        )
    assert code == 4
    assert "cannot start" in said
    assert "Traceback" not in said


def test_a_store_that_cannot_be_used_is_said(setting: Setting) -> None:
    garbage = setting.folder / "garbage.sqlite"
    garbage.write_bytes(b"not a database" * 100)
    code, said = setting.fails_to_start(setting.config(ledger={"file": str(garbage)}))
    assert code == 4
    assert "ledger_unavailable" in said
    assert "Traceback" not in said


def test_a_configuration_that_does_not_hold_starts_nothing(tmp_path: Path) -> None:
    ran = cli("serve", "--config", tmp_path / "none.toml")
    assert (ran.code, "none.toml is not there" in ran.err) == (2, True)
    (tmp_path / "broker.toml").write_text('issuer = "x"\n')
    ran = cli("serve", "--config", tmp_path / "broker.toml", "--json")
    assert ran.code == 2
    assert ran.value["error"].startswith("2 mistakes in ")
