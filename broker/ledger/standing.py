"""Standing denials and break-glass permits, found in the records alone: there is no table of them.

A denial may stand for years, so it is older than any window that a start could read back. And a row that somebody
deleted or made up would lift a denial, or permit what nobody approved. So each record about what stands names the one
before it, and each note that the broker writes by itself (`Started`, and `Checkpointed` each ten seconds in which
something is recorded) names the last. A start reads back to the last note and from there follows the names; all of it
is in the chain, and `ledger verify` holds it against what stands there.

In a new epoch denials stay: to deny is safe. Permits do not: what was approved counts no more, and they may have been
lifted in what was lost.
"""

from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Final

import apsw
import msgspec
from msgspec import Struct

from broker.errors import Reason, Refused
from broker.ledger import records
from broker.ledger.scope_records import BreakGlass, StandingDenial, StandingLifted
from broker.ledger.transaction import Transaction

StandingEntry = StandingDenial | BreakGlass
KINDS: Final = frozenset({"standing_denial", "standing_lifted", "break_glass"})
NOTES: Final = frozenset({"started", "checkpointed"})
Body = Callable[[int], bytes | None]
"""The record with a number, as `Transaction.body`."""


class _Peek(Struct, frozen=True, gc=False):
    kind: str = ""
    standing: int = 0


_peek = msgspec.json.Decoder(_Peek).decode


class Damaged(Exception):
    """The record with number `seq` cannot be read."""

    def __init__(self, seq: int) -> None:
        super().__init__(f"record {seq} is damaged")
        self.seq = seq


def last(connection: apsw.Connection) -> int:
    """The sequence number of the last record about what stands, 0 where there is none. Raises: Damaged.

    Reads back to the last note: what is recorded in ten seconds, or, while no outside checkpoint can be written, since
    the broker started.
    """
    for seq, body in connection.execute("SELECT seq, body FROM records ORDER BY seq DESC"):
        try:
            found = _peek(body)
        except msgspec.DecodeError as error:
            raise Damaged(seq) from error
        if found.kind in KINDS:
            return int(seq)
        if found.kind in NOTES:
            return found.standing
    return 0


def add(tx: Transaction, record: StandingEntry | StandingLifted) -> int:
    """Adds a record about what stands behind the one before it, to be covered outside: its sequence number."""
    tx.cover = tx.standing = tx.add(records.encode(msgspec.structs.replace(record, before=tx.standing)))
    return tx.cover


def entries(body: Body, newest: int, epoch: int, now: datetime) -> tuple[StandingEntry, ...]:
    """What stands now, the oldest first. newest: as `last` says. Raises: Refused(REVOKED) where records are damaged.

    Reads all that operators ever denied, permitted and lifted: some microseconds for each.
    """
    lifted: set[str] = set()
    found: list[StandingEntry] = []
    for record in _back(body, newest):
        if isinstance(record, StandingLifted):
            lifted.add(record.id)
        elif record.id not in lifted and _stands(record, epoch, now):
            found.append(record)
    return tuple(reversed(found))


def _stands(entry: StandingEntry, epoch: int, now: datetime) -> bool:
    if isinstance(entry, BreakGlass) and entry.epoch != epoch:
        return False
    return entry.until is None or entry.until > now


def _back(body: Body, newest: int) -> Iterator[StandingEntry | StandingLifted]:
    seq = newest
    while seq:
        record = _read(body(seq))
        if record is None or record.before >= seq:
            raise Refused(Reason.REVOKED, f"record {seq} should say what stands: run `action-broker ledger verify`")
        yield record
        seq = record.before


def _read(body: bytes | None) -> StandingEntry | StandingLifted | None:
    try:
        record = None if body is None else records.decode(body)
    except msgspec.DecodeError:
        return None
    return record if isinstance(record, StandingEntry | StandingLifted) else None
