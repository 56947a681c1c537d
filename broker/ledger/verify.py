"""Reads a whole ledger and says where, if anywhere, it is not what was written.

Without a checkpoint this finds every change, gap and truncation by somebody who cannot compute the chain anew; with a
checkpoint from outside the store also the work of somebody who can. It also finds what a broker was made to do by
somebody who wrote to its index tables while it ran: see consistency.py.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import apsw

from broker.ledger import chain, checkpoint, note, schema
from broker.ledger.consistency import Consistency, Fault, FoundFault
from broker.ledger.reading import PAGE_ROWS

__all__ = ("Fault", "Finding", "Report", "verify")

_FIRST = -(2**63)  # also what was put before record 1 is read


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The first thing that is wrong. seq: the record it was found at."""

    fault: Fault
    seq: int
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What `verify` found. size, head: of the chain as far as it is good. finding: None when all of it is.

    checkpoint_size: how many records a checkpoint vouches for; 0 where none was given.
    """

    size: int
    head: bytes
    epoch: int
    checkpoint_size: int
    finding: Finding | None

    @property
    def good(self) -> bool:
        """Whether nothing is wrong."""
        return self.finding is None


class _Walk:
    """Follows the chain page by page; memory does not grow with the ledger."""

    def __init__(self, connection: apsw.Connection, expected: checkpoint.Checkpoint | None) -> None:
        self.connection, self.expected = connection, expected
        self.seq, self.epoch = 0, 0
        self.head = b""
        self.consistency = Consistency(connection)

    def run(self) -> None:
        """Raises: FoundFault at the first thing that is wrong; apsw.Error."""
        more = True
        while more:
            with self.connection:  # one view of a page and of the head row, also while a broker appends
                known: Any = self.connection.execute("SELECT id, seq, head, epoch FROM ledger").fetchone()
                if known is None:
                    raise FoundFault(
                        Fault.HEAD_MISMATCH, 0, "the store has lost the row that says where the chain ends"
                    )
                if not self.seq:
                    self.head = chain.genesis(known[0])
                more = self._page()
        self._end(known[1], known[2], known[3])

    def _page(self) -> bool:
        rows: list[Any] = self.connection.execute(
            "SELECT seq, hash, body FROM records WHERE seq > ? ORDER BY seq LIMIT ?", (self.seq or _FIRST, PAGE_ROWS)
        ).fetchall()
        head, seq, link, at = self.head, self.seq, chain.link, self.expected.size if self.expected else 0
        see = self.consistency.see
        for number, hashed, body in rows:
            if number != seq + 1:
                raise FoundFault(Fault.GAP, seq + 1, f"record {number} stands where {seq + 1} should")
            following = link(head, number, body)
            if following != hashed:
                raise FoundFault(Fault.CHANGED, number, f"record {number}, or its hash, is not what was written")
            self.seq, self.head = seq, head = number, following
            if number == at and self.expected and following != self.expected.head:
                raise FoundFault(Fault.FORKED, number, f"record {number} is not the one the checkpoint vouches for")
            see(number, body)
        return len(rows) == PAGE_ROWS

    def _end(self, seq: int, head: bytes, epoch: int) -> None:
        self.epoch = epoch
        if self.seq < seq:
            raise FoundFault(Fault.TRUNCATED, self.seq + 1, f"the store said it had {seq} records and has {self.seq}")
        if (self.seq, self.head) != (seq, head):
            raise FoundFault(Fault.HEAD_MISMATCH, self.seq, "the head that the store names is not its last record's")
        if self.expected is None:
            return
        if self.expected.size > self.seq:
            raise FoundFault(
                Fault.BEHIND_CHECKPOINT,
                self.seq + 1,
                f"the checkpoint vouches for {self.expected.size} records and there are {self.seq}: "
                "the end was cut off, or an older copy was put back",
            )
        if self.expected.epoch > epoch:
            raise FoundFault(
                Fault.FORKED, self.seq, f"the checkpoint is of epoch {self.expected.epoch}, the store of {epoch}"
            )


def verify(path: Path, checkpoint_file: Path | None = None, verifier_key: str | None = None) -> Report:
    """Checks every record of the ledger at `path`, read-only, also while a broker writes it.

    checkpoint_file: an outside checkpoint; verifier_key: whose, as `name+id+base64`. Both or neither.

    Raises: FileNotFoundError; ValueError (note.NoteError) when the checkpoint does not verify; Unavailable when it is
    no ledger. Not checked: the index tables, and what the records say beyond consistency.py.
    """
    if (checkpoint_file is None) != (verifier_key is None):
        raise ValueError("a checkpoint needs the key that it is to be verified with, and the key a checkpoint")
    expected = None
    if checkpoint_file is not None and verifier_key is not None:
        # Before the store: what is appended meanwhile only makes the store longer than its checkpoint.
        expected = checkpoint.verify(checkpoint_file.read_bytes(), note.VerifierKey.parse(verifier_key))
    finding = None
    walk = None
    try:
        connection = schema.open_readonly(path)
        try:
            walk = _Walk(connection, expected)
            walk.run()
        finally:
            connection.close(True)
    except FoundFault as found:
        finding = Finding(fault=found.fault, seq=found.seq, detail=found.detail)
    except apsw.Error as error:
        seq = walk.seq if walk else 0
        finding = Finding(
            fault=Fault.UNREADABLE, seq=seq + 1, detail=f"the file cannot be read after record {seq}: {error}"
        )
    return Report(
        size=walk.seq if walk else 0,
        head=walk.head if walk else b"",
        epoch=walk.epoch if walk else 0,
        checkpoint_size=expected.size if expected else 0,
        finding=finding,
    )
