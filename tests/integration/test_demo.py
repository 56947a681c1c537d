"""`action-broker demo`: what a newcomer sees first holds, and would say so if it did not."""

import asyncio
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.cli import COMMAND, clean_environment, cli, run
from support.processes import until

STEPS = 11

# Loaded by every Python that is started with it; breaks the service's memory of tokens that were used.
FORGETFUL = """
import sys
if "broker.cli.demo_roles" in sys.orig_argv and "orders" in sys.orig_argv:
    import broker.guard.once
    broker.guard.once.OnceMemory.take = lambda *_, **__: None
"""


@pytest.fixture
def room() -> Iterator[Path]:
    """A temporary folder for the demo, which has to be empty after it; its processes' commands name it."""
    with tempfile.TemporaryDirectory(prefix="ab-demo-") as name:
        Path(name).chmod(0o777)
        yield Path(name)


def alive(room: Path) -> list[str]:
    """Processes that name this folder."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = file.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it has ended
            continue
        if str(room) in text:
            found.append(text)
    return found


def test_every_step_comes_as_expected_and_nothing_is_left_behind(room: Path) -> None:
    ran = cli("demo", TMPDIR=str(room))
    assert (ran.code, ran.err) == (0, "")
    assert f"All {STEPS} steps came as expected" in ran.out
    assert "OTHERWISE" not in ran.out
    assert "\x1b" not in ran.out  # no colours where there is no terminal
    assert "eyJ" not in ran.out  # no token either
    assert (list(room.iterdir()), alive(room)) == ([], [])


def test_scripts_get_its_steps_as_json(room: Path) -> None:
    ran = cli("demo", "--json", TMPDIR=str(room))
    steps = ran.value
    assert (ran.code, ran.err) == (0, "")
    assert [step["step"] for step in steps] == list(range(1, STEPS + 1))
    assert all(step["ok"] and step["came"] == step["expected"] for step in steps)
    assert {"already_used", "out_of_scope", "denied", "key_mismatch", "not_attested"} <= {s["came"] for s in steps}
    assert "records" in steps[-1]["note"]


def test_it_runs_as_a_user_without_any_rights(room: Path) -> None:
    """As root: in a user namespace where we are uid 1000 without capabilities. As another user: as we are."""
    other = ("unshare", "--user", "--map-user=1000", "--map-group=1000") if os.geteuid() == 0 else ()
    if other and run(*other, "true").code:
        other = ()  # a container that has no user namespaces
    ran = run(*other, *COMMAND, "demo", TMPDIR=str(room), HOME="/nonexistent")
    assert (ran.code, ran.err) == (0, "")
    assert list(room.iterdir()) == []


def test_a_service_that_forgot_what_was_used_would_be_seen(room: Path) -> None:
    with tempfile.TemporaryDirectory() as broken:
        (Path(broken) / "sitecustomize.py").write_text(FORGETFUL)
        ran = cli("demo", "--json", TMPDIR=str(room), PYTHONPATH=broken)
    wrong = [step for step in ran.value if not step["ok"]]
    assert ran.code == 1
    assert [(step["step"], step["expected"], step["came"]) for step in wrong[:1]] == [(2, "already_used", "refunded")]
    assert list(room.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_interrupting_it_ends_all_that_it_started(room: Path, number: signal.Signals) -> None:
    process = subprocess.Popen(
        [*COMMAND, "demo"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=clean_environment(TMPDIR=str(room)),
    )
    with process:
        try:
            asyncio.run(until(lambda: list(room.glob("*/dev/broker.sock")), "the demo has begun"))
            process.send_signal(number)
            assert process.wait(30) == 1
            assert "everything that was started has been ended" in process.stderr.read()
        finally:
            process.kill()
    assert (list(room.iterdir()), alive(room)) == ([], [])


def test_a_temporary_folder_with_a_long_name_is_no_obstacle(room: Path) -> None:
    """Socket names are short (unix(7)), so the demo then works in /tmp."""
    long = room / ("long-" * 20)
    long.mkdir()
    assert cli("demo", "--json", TMPDIR=str(long)).code == 0
    assert list(long.iterdir()) == []
