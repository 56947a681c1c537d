"""`action-broker dev`: one process, SPIRE's protocols, and nobody else's folder."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.cli import COMMAND, clean_environment, cli
from support.dev_broker import CALLER, REFUND, DevBroker, dev_broker
from support.processes import script

AMOUNT = ("--parameters", '{"amount": 30}')


@pytest.fixture(scope="module")
def dev() -> Iterator[DevBroker]:
    with dev_broker() as found:
        yield found


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder with a short name: socket paths are short."""
    with tempfile.TemporaryDirectory(prefix="ab-") as name:
        yield Path(name)


def test_a_stranger_gets_a_token_with_what_dev_printed_and_nothing_else(dev: DevBroker) -> None:
    ran = dev.exec_as("/support/agent", *COMMAND, "request", *REFUND, *AMOUNT)
    assert (ran.code, ran.err) == (0, "")
    assert "allowed orders.refund" in ran.out
    assert cli("request", *REFUND, *AMOUNT, **dev.environment).code == 3  # the same, without an identity


def test_what_it_says_of_itself_is_there(dev: DevBroker) -> None:
    for name in ("folder", "entries", "policy", "ledger", "checkpoint"):
        assert Path(dev.shown[name]).exists(), name
    assert dev.shown["broker_id"] == "spiffe://dev.test/action-broker"
    assert dev.folder.stat().st_mode & 0o777 == 0o755
    assert Path(dev.shown["ledger"]).parent.stat().st_mode & 0o777 == 0o700
    assert Path(dev.shown["entries"]).stat().st_mode & 0o777 == 0o600


def test_the_policy_it_begins_with_passes_its_own_tests(dev: DevBroker) -> None:
    assert cli("policy", "test", dev.shown["policy"], "--json").value == {"passed": 5, "failed": []}


def test_it_is_loud_about_being_for_development(dev: DevBroker) -> None:
    (warning,) = [entry for entry in map(str, dev.log.read_text().splitlines()) if "EMBEDDED TRUST DOMAIN" in entry]
    assert '"level": "warning"' in warning


def test_people_are_shown_how_to_use_it(short: Path) -> None:
    with subprocess.Popen(
        [*COMMAND, "dev", "--folder", str(short / "dev")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=clean_environment(),
    ) as process:
        shown = ""
        while "Ctrl-C" not in shown:
            line = process.stdout.readline()
            assert line, shown
            shown += line
        process.terminate()
        code = process.wait(20)
    assert code == 0
    assert "For development only" in shown
    for name in ("ACTION_BROKER_ISSUER", "ACTION_BROKER_UNIX__SOCKET", "SPIFFE_ENDPOINT_SOCKET"):
        assert f"export {name}=" in shown
    assert "dev exec" in shown
    assert str(short / "dev") in shown


def test_the_environment_of_a_real_broker_does_not_reach_it(short: Path) -> None:
    real = {
        "ACTION_BROKER_ISSUER": "https://broker.real.test",
        "ACTION_BROKER_STATE_FOLDER": str(short / "real-state"),
        "ACTION_BROKER_SPIRE__WORKLOAD_API": "unix:///run/spire/real.sock",
        "ACTION_BROKER_POLICY_FOLDER": str(short / "real-policy"),
    }
    with dev_broker(short / "dev", **real) as dev:
        assert dev.shown["issuer"] == "https://broker.dev.test"
        assert dev.shown["ledger"].startswith(str(short / "dev"))
        assert dev.cli_as("/support/agent", "request", *REFUND, *AMOUNT).code == 0
    assert not (short / "real-state").exists()


def test_a_policy_of_ones_own_is_taken_and_a_broken_one_is_not(short: Path) -> None:
    own = short / "own"
    assert cli("policy", "init", own, "--operator", "spiffe://dev.test/me").code == 0
    with dev_broker(short / "dev", "--policy", own) as dev:
        assert dev.shown["policy"] == str(own)
        assert not (short / "dev" / "policy").exists()
    (own / "operators.cedar").write_text("permit (everything);")
    ran = cli("dev", "--folder", short / "dev", "--policy", own, "--json")
    assert ran.code == 2
    assert "operators.cedar:1" in ran.value["error"]


def test_it_ends_when_it_is_told_to_and_what_a_kill_leaves_behind_is_in_nobodys_way(short: Path) -> None:
    ledgers = set()
    for number, code in ((signal.SIGTERM, 0), (signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 0)):
        with dev_broker(short / "dev") as dev:
            assert dev.cli_as("/support/agent", "request", *REFUND, *AMOUNT).code == 0
            assert dev.stop(number) == code
            ledgers.add(dev.shown["ledger"])
    assert len(ledgers) == 3  # the trust domain's keys were new each time, and so the old ledgers' vouch for nothing


def test_two_do_not_share_a_folder(dev: DevBroker) -> None:
    ran = cli("dev", "--folder", dev.folder, "--json")
    assert ran.code == 4
    assert "another embedded trust domain runs in this folder" in ran.value["error"]
    assert dev.cli_as("/support/agent", "request", *REFUND, *AMOUNT).code == 0  # the first one is unharmed


def test_a_folder_that_could_be_somebody_elses_work_is_refused(short: Path) -> None:
    real, link, writable = short / "real", short / "link", short / "writable"
    real.mkdir()
    link.symlink_to(real)
    writable.mkdir()
    writable.chmod(0o777)
    for folder, why in ((link, "not a folder"), (writable, "can be written by others")):
        for arguments in (("dev",), ("dev", "exec", "--id", "/x", "--folder", folder, "--", "true")):
            ran = cli("--json", *arguments, *(() if "exec" in arguments else ("--folder", folder)))
            assert ran.code == 2
            assert why in ran.value["error"]
    assert not list(real.iterdir())


def test_another_users_folder_is_refused(short: Path) -> None:
    theirs = Path("/usr")
    if os.geteuid() == 0:
        theirs = short / "theirs"
        theirs.mkdir()
        os.chown(theirs, 1600, 1600)
    before = sorted(theirs.iterdir())
    ran = cli("dev", "--folder", theirs)
    assert ran.code == 2
    assert f"belongs to uid {theirs.stat().st_uid}" in ran.err
    assert sorted(theirs.iterdir()) == before


def test_a_folder_whose_sockets_would_have_too_long_names_is_refused(short: Path) -> None:
    ran = cli("dev", "--folder", short / ("x" * 70))
    assert ran.code == 2
    assert "choose a shorter --folder" in ran.err
    assert not list(short.iterdir())


def test_exec_becomes_the_program_with_its_own_identity_and_exit_code(dev: DevBroker) -> None:
    ran = dev.exec_as(
        "/build/agent", sys.executable, "-c", "import os, sys; print(os.environ['SPIFFE_ENDPOINT_SOCKET']); sys.exit(7)"
    )
    assert (ran.code, ran.out.strip()) == (7, dev.environment["SPIFFE_ENDPOINT_SOCKET"])


@pytest.mark.parametrize(
    ("spiffe_id", "why"),
    [
        ("spiffe://other.test/x", "the SPIFFE ID is not spiffe://dev.test/something"),
        ("/spire/agent/x", "/spire/ is kept"),
        ("/a//b", "path"),
        ("nobody", "SPIFFE ID"),
    ],
)
def test_exec_gives_no_identity_that_the_trust_domain_does_not(dev: DevBroker, spiffe_id: str, why: str) -> None:
    ran = dev.exec_as(spiffe_id, "true")
    assert ran.code == 2
    assert why in ran.err


def test_exec_says_what_is_missing(dev: DevBroker, short: Path) -> None:
    ran = dev.exec_as("/x", "no-such-program-anywhere")
    assert (ran.code, "no-such-program-anywhere: No such file" in ran.err) == (2, True)
    ran = cli("dev", "exec", "--folder", short / "nothing", "--id", "/x", "--", "true")
    assert (ran.code, "start `action-broker dev` first" in ran.err) == (4, True)
    (short / "idle" / "trust").mkdir(parents=True)
    ran = cli("dev", "exec", "--folder", short / "idle", "--id", "/x", "--", "true")
    assert (ran.code, "start it with `action-broker dev`" in ran.err) == (4, True)


def test_an_entry_holds_for_one_process_until_it_is_deleted(dev: DevBroker) -> None:
    ask = (*COMMAND, "request", *REFUND, *AMOUNT)
    becomes = "os.environ.update(eval(hear())); hear(); os.execv(sys.argv[1], sys.argv[1:])"
    for delete_first, code in ((False, 0), (True, 3)):
        with script(becomes, *ask) as child:
            ran = cli("dev", "--folder", dev.folder, "entry", "create", "--id", CALLER, "--pid", child.pid, "--json")
            assert ran.code == 0
            if delete_first:
                entry = ran.value["entry_id"]
                assert cli("dev", "entry", "delete", "--folder", dev.folder, entry, "--json").value == {
                    "deleted": entry
                }
            child.tell(repr(dev.environment))
            child.tell()
            assert child.process.wait(30) == code


def test_entries_that_cannot_be_are_refused(dev: DevBroker) -> None:
    create = ("dev", "entry", "create", "--folder", dev.folder, "--json", "--id", "/x")
    for arguments, why in (
        ((), "either --pid or"),
        (("--pid", 1, "--selector", "unix:uid:1"), "either --pid or"),
        (("--pid", 2**22 - 1), "there is no process"),
        (("--selector", "docker:label:x"), "a selector is none of"),
    ):
        ran = cli(*create, *arguments)
        assert ran.code == 2
        assert why in ran.value["error"]
    ran = cli("dev", "entry", "delete", "--folder", dev.folder, "0" * 32, "--json")
    assert (ran.code, ran.value) == (2, {"error": "no such entry"})
