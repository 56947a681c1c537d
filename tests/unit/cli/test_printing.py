"""What callers sent never moves a reader's cursor, turns its text around or colours it."""

import asyncio
import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from click.testing import CliRunner
from support.ledger_records import checkpointer

from broker.cli.main import main
from broker.cli.output import printable
from broker.errors import Reason
from broker.ledger.records import Refusal
from broker.ledger.store import Ledger

NASTY = "a\x1b[31mred\u202egnp.exe\u200b\x07\nb"


def ledger_with(folder: Path) -> Path:
    async def write() -> None:
        ledger = await Ledger.open(folder / "l.db", checkpoint=checkpointer(folder), clock=lambda: datetime.now(UTC))
        async with ledger:
            now = datetime.now(UTC)
            await ledger.append(
                Refusal(at=now, reason=Reason.DENIED, principal="p", resource=NASTY, edge="unix", stage="request")
            )

    asyncio.run(write())
    return folder / "l.db"


def test_the_ledger_is_shown_without_control_and_direction_characters(tmp_path: Path) -> None:
    file = ledger_with(tmp_path)
    for command in (["show"], ["show", "--json"], ["export"]):
        ran = CliRunner().invoke(main, ["ledger", command[0], "--file", str(file), *command[1:]])
        assert ran.exit_code == 0, ran.output
        assert "gnp.exe" in ran.output
        assert all(one.isprintable() or one == "\n" for one in ran.output), command
        if command != ["show"]:
            values = [json.loads(line) for line in ran.output.splitlines()]
            assert NASTY in [value.get("record", value).get("resource") for value in values]


def test_printable_leaves_readable_text_alone() -> None:
    assert printable("grüße 17 €") == "grüße 17 €"
    assert printable(NASTY) == r"a\x1b[31mred\u202egnp.exe\u200b\x07\nb"


def test_a_log_for_people_escapes_what_it_was_given() -> None:
    code = (
        "import structlog; from broker.cli.log import configure_log\n"
        "configure_log('debug', as_json=False)\n"
        f"structlog.get_logger().info('refused', detail={NASTY!r})"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr
    assert "gnp.exe" in told
    assert all(one.isprintable() for one in told.rstrip("\n"))
