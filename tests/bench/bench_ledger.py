"""What the ledger costs, and that it costs the same when it is large.

An append is what a request asks of it: an intent, awaited durable, and its outcome, not awaited; 32 callers at a time.
The same is done to a ledger of ten million rows and to an empty one, in turns, on the same disk. The large one is built
once, kept in the user's cache folder, and simply grows by what is measured.
"""

import asyncio
import os
import secrets
import shutil
import statistics
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import uvloop
from support.ledger_records import checkpointer, intent, open_ledger, outcome

from broker.ledger import chain, records, schema
from broker.ledger.store import Ledger
from broker.ledger.verify import verify

CONCURRENT = 32
SIZES = {"small": (20_000, 320, 3), "full": (10_000_000, 4_000, 25)}  # rows, requests in a run, pairs of runs
ROW_BYTES = 270  # on the disk, of the rows that fill the large ledger
CHUNK = 50_000


def utc_now() -> datetime:
    """The clock."""
    return datetime.now(UTC)


async def _run(ledger: Ledger, requests: int) -> tuple[float, float]:
    """Seconds a request took, and CPU seconds of it."""
    made = [intent(secrets.token_hex(16), epoch=ledger.epoch, now=utc_now()) for _ in range(requests)]
    done = outcome(1, utc_now())
    left = iter(made)

    async def caller() -> None:
        for one in left:
            seq = await ledger.record_intent(one)
            ledger.append_later(msgspec.structs.replace(done, intent=seq))

    started, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(caller() for _ in range(CONCURRENT)))
    return (time.perf_counter() - started) / requests, (time.process_time() - cpu) / requests


async def _compare(large: Path, empty: Path, requests: int, pairs: int) -> list[dict[str, Any]]:
    async with await open_ledger(large, utc_now) as filled, await open_ledger(empty, utc_now) as fresh:
        for ledger in (filled, fresh):  # warm up
            await _run(ledger, requests // 2)
        ratios, costs = [], []
        for number in range(pairs):
            first, second = (filled, fresh) if number % 2 else (fresh, filled)
            taken = {id(first): await _run(first, requests)}
            taken[id(second)] = await _run(second, requests)
            ratios.append(taken[id(filled)][0] / taken[id(fresh)][0])
            costs.append(taken[id(fresh)])
    ratio = statistics.median(ratios)
    told = {"bound": None, "holds": True}
    rate, cpu = 1 / statistics.median(wall for wall, _ in costs), statistics.median(cpu for _, cpu in costs) * 1e6
    return [
        {"name": "ledger_10m_rows_vs_empty", "value": ratio, "unit": "ratio", "bound": 1.2, "holds": ratio <= 1.2},
        {"name": "ledger_requests_rate", "value": rate, "unit": "requests/s", **told},
        {"name": "ledger_request_cpu", "value": cpu, "unit": "us", **told},
    ]


def _fill(folder: Path, rows: int) -> None:
    """Adds outcomes to the ledger in `folder` until it has `rows` records: properly chained, without durability."""
    body = records.encode(outcome(1, datetime(2026, 1, 1, tzinfo=UTC)))
    connection = schema.open_writable(folder / "ledger.db")
    connection.pragma("journal_mode", "off")
    connection.pragma("synchronous", "off")
    row: Any = connection.execute("SELECT seq, head FROM ledger").fetchone()
    seq, head = row
    while seq < rows:
        chunk = []
        for number in range(seq + 1, min(seq + CHUNK, rows) + 1):
            head = chain.link(head, number, body)
            chunk.append((number, head, body))
        with connection:
            connection.executemany("INSERT INTO records VALUES (?, ?, ?)", chunk)
        seq = chunk[-1][0]
    connection.execute("UPDATE ledger SET seq = ?, head = ?, open_from = ?", (seq, head, seq + 1))
    connection.pragma("journal_mode", "wal")
    connection.close()


async def _make(folder: Path) -> None:
    """A ledger as a first start leaves it."""
    async with await open_ledger(folder, utc_now):
        pass


def _build(folder: Path, rows: int) -> None:
    asyncio.run(_make(folder))
    _fill(folder, rows)


def _forget_credentials(folder: Path) -> None:
    """Empties the index of live credentials: what earlier runs left in it is not what is compared."""
    connection = schema.open_writable(folder / "ledger.db")
    connection.execute("DELETE FROM credentials")
    connection.close()


def _cached(rows: int) -> Path:
    """The folder of the large ledger, built when it is not there yet."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "action-broker"
    folder = cache / f"ledger-{rows}-rows-schema-{len(schema.MIGRATIONS)}"
    if folder.exists():
        _forget_credentials(folder)
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    wanted = rows * ROW_BYTES
    if shutil.disk_usage(cache).free < 2 * wanted:
        sys.exit(f"{cache} needs {2 * wanted / 1e9:.0f} GB free for a ledger of {rows} rows: set XDG_CACHE_HOME")
    sys.stderr.write(f"building a ledger of {rows} rows in {folder}: once, about a minute\n")
    with tempfile.TemporaryDirectory(dir=cache) as partial:  # under its name only when it is whole
        whole = Path(partial) / "whole"
        whole.mkdir()
        _build(whole, rows)
        whole.rename(folder)
    return folder


def _verify_rate(folder: Path) -> dict[str, Any]:
    started = time.perf_counter()
    report = verify(folder / "ledger.db", folder / "checkpoint", str(checkpointer(folder).verifier_key))
    if not report.good:
        raise RuntimeError(f"the measured ledger does not verify: {report.finding}")
    rate = report.size / (time.perf_counter() - started)
    return {"name": "ledger_verify_rate", "value": rate, "unit": "rows/s", "bound": None, "holds": True}


def measure(size: str) -> list[dict[str, Any]]:
    """size: "small" for a run that only shows it works, "full" for figures."""
    rows, requests, pairs = SIZES[size]
    large = _cached(rows) if size == "full" else None
    with tempfile.TemporaryDirectory(dir=large.parent if large else None) as scratch:  # the same disk
        empty = Path(scratch) / "empty"
        empty.mkdir()
        if large is None:
            large = Path(scratch) / "large"
            large.mkdir()
            _build(large, rows)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            found = runner.run(_compare(large, empty, requests, pairs))
        return [*found, _verify_rate(empty)]
