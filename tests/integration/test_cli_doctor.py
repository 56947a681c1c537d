"""`doctor`: each thing that operators get wrong is found, beside all that is right, with what mends it."""

import json
import os
import socket
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import apsw
import pytest
from support.cli import cli

from broker.cli.config import load
from broker.cli.dev_entries import selector
from broker.cli.doctor import examine
from broker.cli.doctor_finding import Finding
from broker.decision.policy_init import policy_init
from broker.dev.server import DevTrustDomain
from broker.identity.spiffe_id import SpiffeId
from broker.ledger.checkpoint import Checkpointer
from broker.ledger.records import PolicyChanged
from broker.ledger.store import Ledger

ISSUER = "https://broker.dev.test"
BROKER = "spiffe://dev.test/action-broker"


def now() -> datetime:
    return datetime.now(UTC)


class Place:
    """A folder with everything that a broker needs, all of it right. `config` changes what its TOML says."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.policy, self.state, self.file = folder / "policy", folder / "state", folder / "broker.toml"
        policy_init(self.policy, SpiffeId.parse("spiffe://dev.test/operator"))
        self.state.mkdir(mode=0o700)
        (folder / "outside").mkdir()
        self.config()

    def config(self, **changes: Any) -> None:
        values = {
            "issuer": ISSUER,
            "trust_domain": "dev.test",
            "state_folder": str(self.state),
            "policy_folder": str(self.policy),
            "spire.workload_api": f"unix://{self.folder}/td/workload.sock",
            "spire.broker_api": f"unix://{self.folder}/td/broker.sock",
            "unix.socket": str(self.folder / "action-broker.sock"),
            "ledger.checkpoint_file": str(self.folder / "outside" / "checkpoint"),
        } | {key.replace("__", "."): value for key, value in changes.items()}
        self.file.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()))

    @asynccontextmanager
    async def trust_domain(self, spiffe_id: str | None = BROKER, **options: Any) -> AsyncIterator[DevTrustDomain]:
        """One in which this process has this ID."""
        async with DevTrustDomain(self.folder / "td", now, **options) as domain:
            if spiffe_id is not None:
                domain.create_entry(spiffe_id, [selector(os.getpid())])
            yield domain

    async def ledger(self, at: datetime, records: int = 3) -> None:
        """Writes one, and its checkpoint."""
        config = load(self.file)
        checkpointer = Checkpointer(config.checkpoint_key_file, config.checkpoint_file, config.ledger_name)
        async with await Ledger.open(config.ledger_file, checkpoint=checkpointer, clock=lambda: at) as ledger:
            for number in range(records):
                await ledger.append(PolicyChanged(at=at, revision=str(number)))

    async def look(self) -> dict[str, list[Finding]]:
        """What doctor finds, by what it looked at."""
        found: dict[str, list[Finding]] = {}
        for finding in await examine(load(self.file), now()):
            assert finding.verdict == "ok" or finding.fix, finding
            found.setdefault(finding.what, []).append(finding)
        return found


@pytest.fixture
def place() -> Iterator[Place]:
    with tempfile.TemporaryDirectory(prefix="ab-") as name:
        yield Place(Path(name))


def broken(found: dict[str, list[Finding]]) -> dict[str, Finding]:
    return {what: one for what, findings in found.items() for one in findings if one.verdict == "broken"}


async def test_where_all_is_right_nothing_is_broken(place: Place) -> None:
    await place.ledger(now())
    async with place.trust_domain():
        found = await place.look()
    assert broken(found) == {}
    looked_at = {
        "kernel",
        "agent socket",
        "own SVID",
        "clock",
        "Broker API socket",
        "Broker API permission",
        "policy",
        "store",
    }
    assert looked_at | {"checkpoint", "broker socket"} == set(found)
    assert "--verifier-key broker.dev.test+" in found["checkpoint"][0].detail
    assert [one.verdict for one in found["broker socket"]] == ["warning"]  # no broker runs: doctor comes before it


async def test_an_agent_that_is_not_there_or_does_not_listen(place: Place) -> None:
    found = broken(await place.look())
    assert "is not there" in found["agent socket"].detail
    assert "Start spire-agent" in found["agent socket"].fix
    (place.folder / "td").mkdir()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(place.folder / "td" / "workload.sock"))
    assert "nobody listens" in broken(await place.look())["agent socket"].detail
    (place.folder / "td" / "workload.sock").unlink()
    (place.folder / "td" / "workload.sock").write_text("")
    assert "is not a socket" in broken(await place.look())["agent socket"].detail


async def test_a_process_without_an_entry(place: Place) -> None:
    async with place.trust_domain(None):
        found = broken(await place.look())
    assert "no registration entry matches us" in found["own SVID"].detail
    assert "spire-server entry create" in found["own SVID"].fix
    assert f"unix:uid:{os.geteuid()}" in found["own SVID"].fix


async def test_a_trust_domain_that_is_not_the_configured_one(place: Place) -> None:
    place.config(trust_domain="acme.test")
    async with place.trust_domain():
        found = broken(await place.look())
    assert f"we are {BROKER}, but trust_domain is acme.test" in found["own SVID"].detail
    assert "Set trust_domain" in found["own SVID"].fix


async def test_a_broker_that_the_agent_does_not_know_as_one(place: Place) -> None:
    async with place.trust_domain(BROKER, broker_path="/another-broker"):
        found = broken(await place.look())
    assert set(found) == {"Broker API permission"}
    assert f'brokers = [{{ id = "{BROKER}"' in found["Broker API permission"].fix


async def test_a_broker_api_that_is_switched_off(place: Place) -> None:
    place.config(spire__broker_api=f"unix://{place.folder}/td/none.sock")
    async with place.trust_domain():
        found = broken(await place.look())
    assert "experimental.broker.socket_path" in found["Broker API socket"].fix


async def test_a_policy_that_is_broken_or_not_there(place: Place) -> None:
    (place.policy / "bad.cedar").write_text("permit (everything);")
    found = broken(await place.look())
    assert "bad.cedar:1" in found["policy"].detail
    assert "policy validate" in found["policy"].fix
    place.config(policy_folder=str(place.folder / "nothing"))
    found = broken(await place.look())
    assert "cannot be read" in found["policy"].detail
    assert str(place.folder / "nothing") in found["policy"].fix


async def test_a_store_that_was_tampered_with_or_cannot_be_read(place: Place) -> None:
    await place.ledger(now())
    file = load(place.file).ledger_file
    whole = file.read_bytes()
    connection = apsw.Connection(str(file))
    connection.execute("UPDATE records SET body = CAST(replace(body, '1', '2') AS BLOB) WHERE seq = 2")
    connection.close()
    assert "changed at record 2" in broken(await place.look())["store"].detail
    file.write_bytes(b"not a database" * 100)
    assert "cannot be read" in broken(await place.look())["store"].detail
    file.write_bytes(whole)
    assert "store" not in broken(await place.look())


async def test_a_store_that_is_behind_its_checkpoint(place: Place) -> None:
    await place.ledger(now(), records=1)
    file = load(place.file).ledger_file
    older = file.read_bytes()
    await place.ledger(now(), records=5)
    assert "store" not in broken(await place.look())
    file.write_bytes(older)
    assert "behind_checkpoint" in broken(await place.look())["store"].detail


async def test_a_checkpoint_whose_key_is_lost_or_open_to_others(place: Place) -> None:
    await place.ledger(now())
    key = load(place.file).checkpoint_key_file
    key.chmod(0o644)
    assert "open to others" in broken(await place.look())["checkpoint"].detail
    key.unlink()
    assert "Put the key file back" in broken(await place.look())["checkpoint"].fix


async def test_a_clock_that_stepped_back_since_the_last_record(place: Place) -> None:
    await place.ledger(now() + timedelta(minutes=5))
    found = broken(await place.look())
    assert "in our future" in found["clock"].detail
    assert "NTP" in found["clock"].fix


@pytest.mark.parametrize("shift", [timedelta(hours=-1), timedelta(hours=2)])
async def test_a_clock_that_does_not_go_with_spires(place: Place, shift: timedelta) -> None:
    async with place.trust_domain():
        findings = [one async for one in _identity_at(place, now() + shift)]
        fine = [one async for one in _identity_at(place, now())]
    assert [one.verdict for one in findings if one.what == "clock"] == ["broken"]
    assert [one.verdict for one in fine if one.what == "clock"] == ["ok"]


async def _identity_at(place: Place, at: datetime) -> AsyncIterator[Finding]:
    for finding in await examine(load(place.file), at):
        yield finding


async def test_a_state_folder_that_others_can_read_and_a_checkpoint_beside_its_ledger(place: Place) -> None:
    place.state.chmod(0o755)
    place.config(ledger__checkpoint_file=str(place.state / "checkpoint"))
    await place.ledger(now())
    found = await place.look()
    assert "chmod 0700" in " ".join(one.fix for one in found["store"])
    assert "another disk" in " ".join(one.fix for one in found["checkpoint"])


def test_the_command_says_it_in_words_and_as_json(place: Place) -> None:
    people = cli("doctor", "--config", place.file)
    assert people.code == 3
    assert "agent socket" in people.out
    assert "→ Start spire-agent" in people.out
    ran = cli("doctor", "--config", place.file, "--json")
    assert ran.code == 3
    verdicts = {one["what"]: one["verdict"] for one in ran.value["findings"]}
    assert (verdicts["agent socket"], verdicts["policy"]) == ("broken", "ok")


def test_all_mistakes_of_a_configuration_come_in_one_report(place: Place) -> None:
    place.config(issuer="http://broker.dev.test/path", grpc__listen="nowhere", limits__burst=0, unix__sokcet="/x")
    ran = cli("doctor", "--config", place.file, "--json", ACTION_BROKER_TRUST_DOMAIN="Not A Domain")
    (finding,) = ran.value["findings"]
    assert (ran.code, finding["what"], finding["verdict"]) == (3, "configuration", "broken")
    for key in ("issuer", "grpc.listen", "limits.burst", "unix.sokcet", "trust_domain"):
        assert f"  {key}: " in finding["detail"], key
