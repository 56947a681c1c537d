"""One group commit in the making: the records it adds to the chain, and what they change in the index tables."""

from dataclasses import dataclass, field
from datetime import datetime

import apsw

from broker.ledger import chain


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """Where the chain stands.

    since: when the epoch started, microseconds since 1970. standing: the last record about what stands (standing.py).
    """

    seq: int
    hash: bytes
    epoch: int
    since: int
    standing: int


@dataclass(slots=True, kw_only=True)
class Transaction:
    """Collects until `flush`; nothing of it counts before the commit.

    open: intents without outcome as of the last commit, seq -> when its credential expires (seconds since 1970), in
    order of seq. Read only here: `opened` and `closed` are applied after the commit.
    cover: an answer in it must not leave before a checkpoint outside the store covers it.
    """

    connection: apsw.Connection
    seq: int
    head: bytes
    epoch: int
    since: int
    standing: int
    open: dict[int, int]
    records: list[tuple[int, bytes, bytes]] = field(default_factory=list)
    credentials: list[tuple[int, str, int, int]] = field(default_factory=list)
    opened: dict[int, int] = field(default_factory=dict)
    closed: list[int] = field(default_factory=list)
    cover: int = 0

    def add(self, body: bytes) -> int:
        """Chains a record on; its sequence number."""
        self.seq += 1
        self.head = chain.link(self.head, self.seq, body)
        self.records.append((self.seq, self.head, body))
        return self.seq

    def body(self, seq: int) -> bytes | None:
        """The record with this number, of the store or of this group; None where there is none."""
        if self.records and seq >= self.records[0][0]:
            return self.records[seq - self.records[0][0]][2] if seq <= self.seq else None
        row = self.connection.execute("SELECT body FROM records WHERE seq = ?", (seq,)).fetchone()
        return bytes(row[0]) if row else None

    def start_epoch(self, epoch: int, at: datetime) -> None:
        """From here on only credentials of `epoch` count."""
        self.epoch, self.since = epoch, microseconds(at)

    def flush(self) -> None:
        """Writes what was collected. Raises: apsw.Error."""
        if not self.records:
            return
        self.connection.executemany("INSERT INTO records VALUES (?, ?, ?)", self.records)
        if self.credentials:
            self.connection.executemany("INSERT INTO credentials VALUES (?, ?, ?, ?)", self.credentials)
        # Outcomes in this very batch are not subtracted: too low an open_from only means a few more rows to read.
        lowest = next(iter(self.open), None) or next(iter(self.opened), self.seq + 1)
        self.connection.execute(
            "UPDATE ledger SET seq = ?, head = ?, epoch = ?, epoch_since = ?, open_from = ?",
            (self.seq, self.head, self.epoch, self.since, lowest),
        )

    def reached(self) -> Head:
        """Where the chain stands once this is committed."""
        return Head(seq=self.seq, hash=self.head, epoch=self.epoch, since=self.since, standing=self.standing)


_EPOCH = datetime.fromisoformat("1970-01-01T00:00:00+00:00")


def microseconds(moment: datetime) -> int:
    """Since 1970, exactly."""
    gone = moment - _EPOCH
    return (gone.days * 86_400 + gone.seconds) * 1_000_000 + gone.microseconds


def seconds_up(moment: datetime) -> int:
    """Since 1970, rounded up: what is kept until then is never dropped too early."""
    return -(-microseconds(moment) // 1_000_000)
