"""`ledger verify|show|tail|export` on what a broker wrote: read without a broker, believed no further than proved."""

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import apsw
import pytest
from support.cli import COMMAND, clean_environment, cli
from support.dev_broker import REFUND, dev_broker

AMOUNT = ("--parameters", '{"amount": 30}')

CUT = """
DELETE FROM records WHERE seq > 2;
UPDATE ledger SET seq = 2, head = (SELECT hash FROM records WHERE seq = 2);
"""


@dataclass
class Written:
    """A ledger at rest, its checkpoint, and one token that is on record."""

    ledger: Path
    checkpoint: Path
    verifier_key: str
    token: dict[str, Any]

    def copy(self, folder: Path) -> Path:
        return Path(shutil.copy(self.ledger, folder / "ledger.sqlite"))

    def verify(self, file: Path, *, outside: bool = True) -> Any:
        """The exit code and what was said."""
        checkpoint = ("--checkpoint", self.checkpoint, "--verifier-key", self.verifier_key) if outside else ()
        ran = cli("ledger", "verify", "--file", file, *checkpoint, "--json")
        return ran.code, ran.value


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Written]:
    folder = tmp_path_factory.mktemp("ledger")
    with dev_broker() as dev:
        token = dev.cli_as("/support/agent", "request", *REFUND, *AMOUNT, "--json").value
        assert dev.stop() == 0
        ledger, checkpoint = (shutil.copy(dev.shown[name], folder) for name in ("ledger", "checkpoint"))
        yield Written(Path(ledger), Path(checkpoint), dev.shown["verifier_key"], token)


def change(file: Path, sql: str) -> None:
    connection = apsw.Connection(str(file))
    connection.execute(sql)
    connection.close()


def test_an_untouched_ledger_is_good_and_a_checkpoint_says_how_far_that_is_proved(written: Written) -> None:
    code, found = written.verify(written.ledger)
    assert (code, found["good"], found["finding"]) == (0, True, None)
    assert found["checkpoint_records"] == found["records"] > 0
    code, found = written.verify(written.ledger, outside=False)
    assert (code, found["good"], found["checkpoint_records"]) == (0, True, 0)
    people = cli("ledger", "verify", "--file", written.ledger)
    assert (people.code, "does not prove that nothing was cut off" in people.out) == (0, True)


@pytest.mark.parametrize(
    ("sql", "outside", "fault"),
    [
        ("UPDATE records SET body = CAST(replace(body, '/17', '/18') AS BLOB) WHERE seq > 2", False, "changed"),
        ("DELETE FROM records WHERE seq = 2", False, "gap"),
        ("DELETE FROM records WHERE seq = (SELECT max(seq) FROM records)", False, "truncated"),
        (CUT, True, "behind_checkpoint"),
    ],
)
def test_a_change_a_gap_and_a_truncation_are_found(
    written: Written, tmp_path: Path, sql: str, fault: str, *, outside: bool
) -> None:
    file = written.copy(tmp_path)
    change(file, sql)
    code, found = written.verify(file, outside=outside)
    assert (code, found["good"], found["finding"]["fault"]) == (3, False, fault)


def test_only_a_checkpoint_from_outside_shows_a_careful_truncation(written: Written, tmp_path: Path) -> None:
    file = written.copy(tmp_path)
    change(file, CUT)
    assert written.verify(file, outside=False)[0] == 0
    assert written.verify(file)[0] == 3


def test_what_is_no_ledger_or_no_checkpoint_is_not_called_good(written: Written, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not a database, and long enough to be looked at" * 10)
    code, found = written.verify(tmp_path / "text", outside=False)
    assert code in {3, 4}
    assert "good" not in found or not found["good"]
    assert cli("ledger", "verify", "--file", tmp_path / "none").code == 2
    assert cli("ledger", "verify", "--file", written.ledger, "--checkpoint", written.checkpoint).code == 2
    forged = tmp_path / "checkpoint"
    forged.write_bytes(written.checkpoint.read_bytes().replace(b"\n", b"0\n", 2))
    arguments = ("--checkpoint", forged, "--verifier-key", written.verifier_key)
    ran = cli("ledger", "verify", "--file", written.ledger, *arguments, "--json")
    assert (ran.code, "cannot verify" in ran.value["error"]) == (4, True)


def test_one_requests_records_are_found_by_what_its_caller_got(written: Written) -> None:
    by_correlation = cli(
        "ledger", "show", "--file", written.ledger, "--correlation", written.token["correlation_id"], "--json"
    )
    intent, outcome = by_correlation.lines
    assert (intent["kind"], outcome["kind"], outcome["result"]) == ("intent", "outcome", "issued")
    assert intent["action_digest"] == written.token["action_digest"]
    (again,) = cli("ledger", "show", "--file", written.ledger, "--jti", intent["jti"], "--json").lines
    assert again == intent
    ran = cli("ledger", "show", "--file", written.ledger, "--jti", "unheard-of", "--json")
    assert (ran.code, ran.value) == (3, {"error": "no such record"})
    people = cli("ledger", "show", "--file", written.ledger)
    assert (people.code, "orders.refund" in people.out) == (0, True)


def test_an_export_has_every_record_and_no_credential(written: Written) -> None:
    ran = cli("ledger", "export", "--file", written.ledger)
    records = ran.lines
    assert [one["seq"] for one in records] == list(range(1, len(records) + 1))
    assert written.verify(written.ledger)[1]["head"] == records[-1]["hash"]
    assert "eyJ" not in ran.out
    assert written.token["access_token"].rpartition(".")[2] not in ran.out
    assert len(cli("ledger", "export", "--file", written.ledger, "--after", len(records) - 1).lines) == 1


def test_tail_shows_what_comes_while_it_is_watched() -> None:
    with dev_broker() as dev:
        tail = subprocess.Popen(
            [*COMMAND, "--json", "ledger", "tail", "--file", dev.shown["ledger"]],
            stdout=subprocess.PIPE,
            text=True,
            env=clean_environment(),
        )
        with tail:
            try:
                assert json.loads(tail.stdout.readline())["seq"] == 1  # it is watching
                token = dev.cli_as("/support/agent", "request", *REFUND, *AMOUNT, "--json").value
                found: dict[str, Any] = {}
                while found.get("correlation_id") != token["correlation_id"]:
                    found = json.loads(tail.stdout.readline())
                assert found["kind"] == "intent"
                tail.send_signal(signal.SIGINT)
                assert tail.wait(20) == 0
            finally:
                tail.kill()


def test_without_a_file_the_configured_one_is_read(written: Written, tmp_path: Path) -> None:
    config = tmp_path / "broker.toml"
    config.write_text(
        'issuer = "https://broker.dev.test"\ntrust_domain = "dev.test"\n'
        f"[ledger]\nfile = {json.dumps(os.fspath(written.ledger))}\n"
    )
    assert cli("ledger", "verify", "--config", config).code == 0
    ran = cli("ledger", "verify", "--config", tmp_path / "none.toml", "--json")
    assert (ran.code, "--file was not given" in ran.value["error"]) == (2, True)
