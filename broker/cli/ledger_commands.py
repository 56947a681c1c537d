"""`ledger verify|show|tail|export`: reads the SQLite file itself, so it works when no broker runs."""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import apsw
import click
from rich.markup import escape

from broker.cli.output import REFUSED, UNAVAILABLE, USAGE, Output, pass_output, printable
from broker.errors import BrokerError
from broker.ledger import reading
from broker.ledger.reading import Row
from broker.ledger.verify import verify as verify_ledger

POLL_S = 0.2
FILE = click.option(
    "--file", type=click.Path(path_type=Path, dir_okay=False), help="The ledger; else the configured one."
)
CONFIG = click.option("--config", "config_file", type=click.Path(path_type=Path), help="The broker's TOML.")


@click.group()
def ledger() -> None:
    """Verify and read what happened.

    With --json, `show` and `tail` write one JSON value a line, one for each record, as `export` always does.
    """


def _file(output: Output, file: Path | None, config_file: Path | None) -> Path:
    if file is None:
        from broker.cli import config as configuration  # noqa: PLC0415 - takes as long as all else; seldom needed

        try:
            file = configuration.load(config_file).ledger_file
        except configuration.ConfigError as error:
            output.fail(f"--file was not given, and the configuration does not help:\n{error}", USAGE)
    if not file.is_file():
        output.fail(f"{file} is not there: name the ledger with --file", USAGE)
    return file


@ledger.command()
@FILE
@CONFIG
@click.option("--checkpoint", type=click.Path(path_type=Path, dir_okay=False), help="A checkpoint kept outside.")
@click.option("--verifier-key", help="Whose checkpoints are believed: NAME+ID+KEY, as `doctor` prints it.")
@pass_output
def verify(
    output: Output, file: Path | None, config_file: Path | None, checkpoint: Path | None, verifier_key: str | None
) -> None:
    """Find any change, gap or truncation. Only a checkpoint from outside proves that nothing was cut off or rewritten.

    Exit code 3 when something is wrong.
    """
    path = _file(output, file, config_file)
    if (checkpoint is None) != (verifier_key is None):
        output.fail(
            "--checkpoint and --verifier-key go together: a checkpoint counts only signed by a key you know", USAGE
        )
    try:
        report = verify_ledger(path, checkpoint, verifier_key)
    except (BrokerError, OSError, ValueError, apsw.Error) as error:
        output.fail(f"cannot verify: {error}", UNAVAILABLE)
    finding = report.finding
    output.value(
        {
            "good": report.good,
            "records": report.size,
            "epoch": report.epoch,
            "head": report.head.hex(),
            "checkpoint_records": report.checkpoint_size,
            "finding": None
            if finding is None
            else {"fault": finding.fault, "record": finding.seq, "detail": finding.detail},
        }
    )
    if finding is not None:
        output.say(f"[red]{finding.fault}[/] at record {finding.seq}: {escape(finding.detail)}")
        raise SystemExit(REFUSED)
    output.say(f"[green]good[/]: {report.size} records, epoch {report.epoch}, head {report.head.hex()[:16]}…")
    if report.checkpoint_size:
        output.say(f"a checkpoint from outside vouches for the first {report.checkpoint_size}")
    else:
        output.say("no checkpoint was given: this does not prove that nothing was cut off the end")


def _line(row: Row) -> str:
    """One record for people: number, time, kind, and what matters of it."""
    values: dict[str, Any] = json.loads(row.body)
    kind, at = values.pop("kind"), str(values.pop("at"))[:19].replace("T", " ")
    action = values.get("action")
    what = action.get("action") if isinstance(action, dict) else action
    parts = [values.get("principal"), what, values.get("resource"), values.get("reason"), values.get("result")]
    told = " ".join(escape(printable(str(part))) for part in parts if part)
    if not told:
        told = " ".join(f"{name}={escape(printable(str(value)))}" for name, value in values.items() if value != "")
    return f"{row.seq:>8}  {at}  {kind:<18} {told}"


def _print(output: Output, rows: Iterator[Row]) -> None:
    for row in rows:
        if output.as_json:
            click.echo(json.dumps({"seq": row.seq, "hash": row.hash.hex(), **json.loads(row.body)}))
        else:
            output.console.print(_line(row))


@ledger.command()
@FILE
@CONFIG
@click.option("--last", default=20, show_default=True, help="How many records.")
@click.option("--correlation", help="All records with this correlation id.")
@click.option("--jti", help="All records about this credential.")
@pass_output
def show(
    output: Output, file: Path | None, config_file: Path | None, last: int, correlation: str | None, jti: str | None
) -> None:
    """Show records: the last ones, or those of one request or credential."""
    path = _file(output, file, config_file)
    if correlation is None and jti is None:
        _print(output, reading.read(path, after=max(0, reading.last_seq(path) - last)))
        return
    wanted = [(name, value) for name, value in (("correlation_id", correlation), ("jti", jti)) if value]
    found = 0
    for row in reading.read(path):
        values = json.loads(row.body)
        if all(values.get(name) == value for name, value in wanted):
            found += 1
            _print(output, iter((row,)))
    if not found:
        output.fail("no such record", REFUSED)


@ledger.command()
@FILE
@CONFIG
@pass_output
def tail(output: Output, file: Path | None, config_file: Path | None) -> None:
    """Follow the ledger until interrupted."""
    path = _file(output, file, config_file)

    def pause() -> bool:
        sys.stdout.flush()
        time.sleep(POLL_S)
        return True

    try:
        _print(output, reading.tail(path, pause, after=max(0, reading.last_seq(path) - 10)))
    except KeyboardInterrupt:
        return


@ledger.command()
@FILE
@CONFIG
@click.option("--after", default=0, help="Begin behind this record.")
@pass_output
def export(output: Output, file: Path | None, config_file: Path | None, after: int) -> None:
    """Write all records as JSON lines, each with its number and chain hash."""
    path = _file(output, file, config_file)
    for row in reading.read(path, after=after):
        sys.stdout.write(json.dumps({"seq": row.seq, "hash": row.hash.hex(), "record": json.loads(row.body)}) + "\n")
