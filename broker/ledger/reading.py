"""Reads a ledger without writing to it, also while a broker writes: for `ledger show`, `tail`, `export`, `verify`.

A few hundred rows at a time, each time anew: no read holds the writer's WAL back, and memory stays bounded.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import apsw

from broker.ledger import records, schema

PAGE_ROWS = 512


@dataclass(frozen=True, slots=True)
class Row:
    """A record as it lies in the store. hash: the chain's head after it. Not checked: that it is."""

    seq: int
    hash: bytes
    body: bytes

    def record(self) -> records.Record:
        """Raises: msgspec.DecodeError (ValidationError included) when it is none that this release knows."""
        return records.decode(self.body)


def read(path: Path, after: int = 0, limit: int | None = None) -> Iterator[Row]:
    """The records after `after`, oldest first, at most `limit`, as far as there are any now.

    Raises: FileNotFoundError; Unavailable when it is no ledger; apsw.Error when it cannot be read.
    """
    connection = schema.open_readonly(path)
    try:
        yield from _rows(connection, after, limit)
    finally:
        connection.close(True)


def _rows(connection: apsw.Connection, after: int, limit: int | None) -> Iterator[Row]:
    left = limit
    while left is None or left > 0:
        wanted = PAGE_ROWS if left is None else min(PAGE_ROWS, left)
        page: list[Any] = connection.execute(
            "SELECT seq, hash, body FROM records WHERE seq > ? ORDER BY seq LIMIT ?", (after, wanted)
        ).fetchall()
        for row in page:
            yield Row(*row)
        if len(page) < wanted:
            return
        after = page[-1][0]
        left = None if left is None else left - wanted


def last_seq(path: Path) -> int:
    """The last record's number, 0 where there is none. Raises: as `read`."""
    connection = schema.open_readonly(path)
    try:
        return int(connection.execute("SELECT coalesce(max(seq), 0) FROM records").get)
    finally:
        connection.close(True)


def tail(path: Path, pause: Callable[[], bool], after: int = 0) -> Iterator[Row]:
    """The records after `after`, then those that come, until `pause` says False.

    pause: waits a moment and says whether to go on; called whenever there is nothing new.
    Raises: as `read`.
    """
    connection = schema.open_readonly(path)
    try:
        seen = -1
        while True:
            version = int(connection.pragma("data_version"))
            if version != seen:  # cheaper than a query: it only changes when another connection has committed
                seen = version
                for row in _rows(connection, after, None):
                    after = row.seq
                    yield row
            elif not pause():
                return
    finally:
        connection.close(True)
