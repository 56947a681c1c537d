"""What opening a store finds out and writes down: a new epoch where it was put back, "unknown" for open intents.

The index tables only repeat what the records say, and nothing but the file's mode protects them. So what they say of
redemptions, refused credentials, bound keys, approvals and sessions is written anew from the records at each start: a
row that somebody deleted or changed comes back. Of what stands (standing.py) there are no rows. Who can write the file
while the broker runs can still make it accept a second redemption, another key for an assertion that he holds or for a
session, an earlier score, or approvals that were withdrawn or used up, until the next start; then the records show
both, and `ledger verify` says so of redemptions and of approvals that were used twice or after a withdrawal.
"""

import secrets
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import apsw
import msgspec
from msgspec import Struct

from broker.errors import Unavailable
from broker.ledger import chain, records, sessions, standing
from broker.ledger.checkpoint import Checkpoint
from broker.ledger.operations import KEEP_S, close_as_unknown
from broker.ledger.schema import unavailable
from broker.ledger.transaction import Head, Transaction, microseconds, seconds_up

_READ_BACK = timedelta(hours=1, seconds=KEEP_S)
"""As long as an assertion may live (identity/strict.py); action tokens live for minutes."""
_READ_BACK_RECORDS = 2_000_000
"""Seconds of reading, and ten minutes of all that one broker can record."""
_APPROVAL_TABLES = ("approval_requests", "approvals", "consumptions")
_APPROVAL_KINDS = ("approval_asked", "approved", "approval_withdrawn")
_RECENT = frozenset({"redemption", "key_bound", "security_event", "scope_refused"})
_ApprovalEvent = (
    records.ApprovalAsked | records.Approved | records.ApprovalWithdrawn | records.Intent | records.BreakGlass
)


class _Peek(Struct, frozen=True):
    """What tells an intent from its outcome, whatever else a record holds."""

    kind: str
    intent: int = 0
    expires_at: datetime | None = None


_peek = msgspec.json.Decoder(_Peek).decode


class _When(Struct, frozen=True):
    kind: str
    at: datetime
    approval: str = ""


_when = msgspec.json.Decoder(_When).decode


def load(connection: apsw.Connection, path: Path) -> tuple[bytes, Head, dict[int, int]]:
    """The ledger's id, its head, and the open intents (see Transaction.open). A new store gets its id here.

    Raises: Unavailable when head and last record do not belong together, or a record cannot be read.
    Not checked: the rest of the chain; `verify` reads it all.
    """
    connection.execute(
        "INSERT INTO ledger SELECT 1, ?1, 0, ?2, 0, 0, 1, 0, 0, 0 WHERE NOT EXISTS (SELECT 1 FROM ledger)",
        _new_ledger(),
    )
    row: Any = connection.execute("SELECT id, seq, head, epoch, epoch_since, open_from FROM ledger").fetchone()
    ledger_id, seq, head, epoch, since, open_from = row
    last = connection.execute("SELECT seq, hash FROM records ORDER BY seq DESC LIMIT 1").fetchone()
    if (last or (0, chain.genesis(ledger_id))) != (seq, head):
        raise unavailable(
            f"the ledger {path} is damaged: its head is not its last record. Keep the file as evidence, see "
            "`action-broker ledger verify`, then put a good copy back or start with a new store"
        )
    still_open: dict[int, int] = {}
    for number, body in connection.execute("SELECT seq, body FROM records WHERE seq >= ? ORDER BY seq", (open_from,)):
        try:
            found = _peek(body)
        except msgspec.DecodeError as error:
            raise _damaged(number, path) from error
        if found.kind == "intent" and found.expires_at is not None:
            still_open[number] = seconds_up(found.expires_at)
        elif found.kind == "outcome":
            still_open.pop(found.intent, None)
    try:
        newest = standing.last(connection)
    except standing.Damaged as error:
        raise _damaged(error.seq, path) from error
    return ledger_id, Head(seq=seq, hash=head, epoch=epoch, since=since, standing=newest), still_open


def _damaged(number: int, path: Path) -> Unavailable:
    return unavailable(f"record {number} of the ledger {path} is damaged: see `action-broker ledger verify`")


def _new_ledger() -> tuple[bytes, bytes]:
    ledger_id = secrets.token_bytes(32)
    return ledger_id, chain.genesis(ledger_id)


def recover(tx: Transaction, ledger_id: bytes, last: tuple[Checkpoint, bytes] | None, now: datetime) -> None:
    """Adds what opening has to say.

    That is a new epoch where `last`, the checkpoint outside and its note, asks for one; the outcome "unknown" of each
    intent that was left open; that the broker started.
    """
    why = _new_epoch_because(tx, last)
    if why:
        epoch = max(tx.epoch, last[0].epoch if last else 0) + 1
        note = last[1].decode() if last else ""
        tx.start_epoch(epoch, now)
        # What the keys signed, and what was approved, no longer counts.
        for table in ("keys", *_APPROVAL_TABLES, "sessions"):
            tx.connection.execute(f"DELETE FROM {table}")  # noqa: S608 - ours
        tx.add(records.encode(records.EpochStarted(at=now, epoch=epoch, detail=why, checkpoint=note)))
    if now.timestamp() < int(tx.connection.execute("SELECT credentials_forgotten FROM ledger").get):
        # The clock was set back, and what was refused of credentials that live again may be forgotten: none verifies.
        tx.connection.execute("DELETE FROM keys")
    for seq in tx.open:
        close_as_unknown(tx, seq, now)
    started = records.Started(at=now, ledger=ledger_id.hex(), epoch=tx.epoch, standing=tx.standing)
    tx.add(records.encode(started))


def restore_index(connection: apsw.Connection, path: Path, now: datetime) -> None:
    """Writes the rows of redemptions, bindings, approvals and sessions anew, as the records of the last hour have them.

    Of approvals and sessions also as those before have them, back to the oldest that has a row: what used it up, took
    it back or scored it again comes after it. One that is older than what can be read is forgotten: nothing would say
    whether it still counts.

    Raises: Unavailable when one of these cannot be read.
    """
    forgotten = int(connection.execute("SELECT bindings_forgotten FROM ledger").get)
    events: list[tuple[int, _ApprovalEvent]] = []
    of_sessions: list[tuple[int, sessions.SessionEvent]] = []
    for number, body in _last_records(connection, path, now):
        try:
            record = records.decode(body)
            if isinstance(record, records.Redemption):
                connection.execute(
                    "INSERT OR REPLACE INTO redemptions SELECT ?, jti, ?, ?, ?, ?, expires_at FROM credentials"
                    " WHERE jti = ?",
                    (
                        number,
                        record.by,
                        bytes.fromhex(record.idempotency_sha256),
                        bytes.fromhex(record.content_sha256),
                        microseconds(record.at),
                        record.jti,
                    ),
                )
            elif isinstance(record, records.KeyBound):
                expires_at = seconds_up(record.expires_at or record.at + _READ_BACK)
                if expires_at > forgotten:
                    connection.execute(
                        "INSERT OR REPLACE INTO bindings VALUES (?, ?, ?, ?)",
                        (number, bytes.fromhex(record.assertion_sha256), record.jkt, expires_at),
                    )
            elif isinstance(record, records.ScopeRefused):
                connection.executemany(
                    "INSERT OR REPLACE INTO refused SELECT jti, ?, expires_at + ? FROM credentials WHERE jti = ?",
                    [(number, KEEP_S, jti) for jti in record.jtis],
                )
            elif isinstance(record, _ApprovalEvent):
                events.append((number, record))
            elif isinstance(record, sessions.SessionEvent):
                of_sessions.append((number, record))
        except (msgspec.DecodeError, ValueError) as error:
            raise _damaged(number, path) from error
    _restore_approvals(connection, events)
    sessions.restore(connection, reversed(of_sessions))


def _restore_approvals(connection: apsw.Connection, events: list[tuple[int, _ApprovalEvent]]) -> None:
    """events: the latest first."""
    connection.execute("DELETE FROM approvals")
    if events:
        for table in ("approval_requests", "consumptions"):
            connection.execute(f"DELETE FROM {table} WHERE seq >= ?", (events[-1][0],))  # noqa: S608 - ours
    for number, event in reversed(events):
        _again(connection, number, event)


def _again(connection: apsw.Connection, seq: int, event: _ApprovalEvent) -> None:
    """What this record said when it was written, in the order of the records: the latest counts."""
    execute = connection.execute
    match event:
        case records.ApprovalAsked(request_digest=digest):
            # Nothing is asked again while its use is known: when it was, everything about it had been forgotten.
            if execute("DELETE FROM consumptions WHERE digest = ? RETURNING seq", (digest,)).fetchall():
                execute("DELETE FROM approvals WHERE digest = ?", (digest,))
            ends = seconds_up(event.expires_at)
            execute(
                "INSERT OR REPLACE INTO approval_requests VALUES (?, ?, ?, ?)", (seq, digest, event.principal, ends)
            )
        case records.Approved(request_digest=digest):
            ends = seconds_up(event.expires_at)
            execute("INSERT OR REPLACE INTO approvals VALUES (?, ?, ?, ?)", (seq, digest, event.by, ends))
        case records.ApprovalWithdrawn(request_digest=digest):
            execute("DELETE FROM approvals WHERE digest = ? AND approver = ?", (digest, event.by))
        case records.Intent(approval=digest):
            found = execute("SELECT jti FROM consumptions WHERE digest = ?", (digest,)).fetchone()
            if found is None or found[0] != event.parent:
                ends = seconds_up(event.expires_at)
                execute("INSERT OR REPLACE INTO consumptions VALUES (?, ?, ?, ?)", (seq, digest, event.jti, ends))
        case records.BreakGlass(approval=digest):
            ends = seconds_up(event.until)
            execute("INSERT OR REPLACE INTO consumptions VALUES (?, ?, ?, ?)", (seq, digest, event.id, ends))


def _last_records(connection: apsw.Connection, path: Path, now: datetime) -> Iterator[tuple[int, bytes]]:
    """What concerns the index, the latest first: of two that claim the same, the first stays last."""
    since, same_epoch = None, True
    oldest = connection.execute(
        "SELECT min(seq) FROM (SELECT seq FROM approvals UNION ALL SELECT scored FROM sessions)"
    ).get
    rows = connection.execute("SELECT seq, body FROM records ORDER BY seq DESC LIMIT ?", (_READ_BACK_RECORDS,))
    for number, body in rows:
        try:
            record = _when(body)
            # Also back from the last record's own time, should the clock have been put forward since.
            since = since or min(now, record.at) - _READ_BACK
            recent = record.at >= since
        except (msgspec.DecodeError, TypeError) as error:  # TypeError: a time without a zone
            raise _damaged(number, path) from error
        if not recent and (not same_epoch or oldest is None or number < oldest):
            break
        if record.kind == "epoch_started":
            same_epoch = False  # no approval or session from before it counts
        elif (recent and record.kind in _RECENT) or (
            same_epoch and (record.kind in (*_APPROVAL_KINDS, *sessions.KINDS) or record.approval)
        ):
            yield number, body


def _new_epoch_because(tx: Transaction, last: tuple[Checkpoint, bytes] | None) -> str:
    """Why no credential issued until now may count; empty when the store is at or past its checkpoint."""
    if last is None:
        return "no checkpoint outside: nothing proves that this store is the latest" if tx.seq else "a new ledger"
    checkpoint = last[0]
    if checkpoint.size > tx.seq:
        return f"the store ends at record {tx.seq}, its checkpoint at {checkpoint.size}: it was put back or is another"
    at_size = tx.head
    if checkpoint.size < tx.seq:
        row = tx.connection.execute("SELECT hash FROM records WHERE seq = ?", (checkpoint.size,)).fetchone()
        at_size = row[0] if row else b""
    if at_size != checkpoint.head:
        return f"record {checkpoint.size} is not the one its checkpoint names: the store has another history"
    if checkpoint.epoch > tx.epoch:
        return "the checkpoint is of a later epoch than the store"
    return ""
