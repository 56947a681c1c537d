"""Agents' sessions as steps of a group commit, as in operations.py: scored, bound to a key, moved by security events.

Rows only lead to records, as in approvals.py: whose session it is, how risky and whose key is read from the chain each
time. At each start the rows are written anew from the records (recovery.py); a session that is out of their reach is
unknown then, and who names it is refused.

A score goes up whenever somebody says so. It comes down by a word that is younger than what it takes back: an event
that was late, or is shown again in another epoch, lowers nothing.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, ClassVar, Final, Literal, TypeVar

import apsw
from msgspec import Struct, structs

from attestors.session import HIGH, LEVELS, Level
from broker.errors import Reason, Refused
from broker.identity.event_age import EVENT_AGE, EVENT_AHEAD
from broker.ledger import records
from broker.ledger.scope_records import SecurityEvent, SessionBound, SessionScored
from broker.ledger.transaction import Transaction, microseconds, seconds_up

LIVES: Final = timedelta(hours=24)
"""After its last score a session is forgotten."""
EVENT_KEPT: Final = EVENT_AGE + 2 * EVENT_AHEAD
"""That an event was taken is known for longer than it could be shown again."""

Effect = Literal["scored", "none", "unknown", "another_principal", "stale", "not_lowered"]
"""What came of a security event. none: nothing here rests on what it tells, or it tells what was known. unknown: no
such session, and none that it makes. stale: it would lower a score that is younger. not_lowered: its transmitter may
not."""
_Kind = TypeVar("_Kind", SessionScored, SessionBound, SecurityEvent)


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionRow:
    """A session that is known. principal: "" where it was revoked before anybody said whose it is. key: "" until bound.

    said_at: as of when its level is; of a word it is `scored_at`. event: that scored it last, "" for a word.
    """

    session: str
    principal: str
    level: Level
    key: str
    scored_at: datetime
    said_at: datetime
    event: str

    @property
    def ends_at(self) -> datetime:
        """When it is forgotten unless it is scored again."""
        return self.scored_at + LIVES

    def is_lowered_by(self, level: Level) -> bool:
        """Whether that is less than its own."""
        return LEVELS.index(level) < LEVELS.index(self.level)


_Judged = tuple[Effect, list[tuple[SessionScored, SessionRow | None]]]
"""What comes of an event, and the scores to write with what each was before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """What came of an event. repeated: it was taken before, and nothing came of it now.

    sessions: that it scored, of a repeated one those whose score is still its own: nobody may have heard of it then.
    """

    effect: Effect
    sessions: tuple[str, ...] = ()
    repeated: bool = False


class Score(Struct, frozen=True, gc=False):
    """Scores a session, and makes it where it is unknown: as it is then.

    Covered, so that no copy of the store in which it is less risky can be put back unseen.
    scored: `key` is filled in here. lowers: whether it may, as far as that was decided.
    """

    covered: ClassVar[bool] = True
    scored: SessionScored
    lowers: bool

    def apply(self, tx: Transaction) -> SessionRow:
        """See the class. Raises: Refused DENIED for another's session, and where it would lower and may not."""
        scored, known = self.scored, find(tx, self.scored.session, self.scored.at)
        if known is not None and known.principal not in ("", scored.principal):
            raise Refused(Reason.DENIED, f"session {scored.session} belongs to another principal")
        if known is not None and known.is_lowered_by(scored.level) and not self.lowers:
            raise Refused(Reason.DENIED, f"session {scored.session} was scored {known.level} meanwhile: score it again")
        return _write(tx, scored, known)


class TakeEvent(Struct, frozen=True, gc=False):
    """Takes a security event token, once, with what comes of it. Covered, as `Score`, and so that it stays taken.

    event: `effect` is filled in here. scored: what it says, None where it says nothing of a session; without a
    `session` it is about all of its principal's, and raises them only. lowers: whether its transmitter may.
    """

    covered: ClassVar[bool] = True
    event: SecurityEvent
    issued_at: datetime
    scored: SessionScored | None = None
    lowers: bool = True

    def apply(self, tx: Transaction) -> Taken:
        """See the class. Raises: Refused EXPIRED where it may have been taken, and that been forgotten."""
        event = self.event
        row = tx.connection.execute("SELECT seq FROM events WHERE event = ?", (event.event,)).fetchone()
        if row is not None and _is_of_event(tx, row[0], event.event):
            return Taken(effect="none", sessions=self._still_scored(tx), repeated=True)
        forgotten = int(tx.connection.execute("SELECT events_forgotten FROM ledger").get)
        if seconds_up(self.issued_at - EVENT_AHEAD + EVENT_KEPT) <= forgotten:
            raise Refused(Reason.EXPIRED, "the event may have been taken before the clock was set back: send a new one")
        effect, scores = self._judge(tx)
        tx.cover = tx.add(records.encode(structs.replace(event, effect=effect)))
        _keep_event(tx.connection, tx.cover, event)
        for scored, known in scores:
            _write(tx, scored, known)
        return Taken(effect=effect, sessions=tuple(scored.session for scored, _ in scores))

    def _still_scored(self, tx: Transaction) -> tuple[str, ...]:
        said = self.scored
        if said is None:
            return ()
        of = [said.session] if said.session else _sessions_of(tx, said.principal)
        known = [one for session in of if (one := find(tx, session, said.at)) is not None]
        return tuple(one.session for one in known if one.event == self.event.event)

    def _judge(self, tx: Transaction) -> _Judged:
        said = self.scored
        if said is None:
            return "none", []
        if not said.session:
            return self._judge_all(tx, said)
        known = find(tx, said.session, said.at)
        if known is not None:
            effect = self._judge_known(tx, said, known)
            said = structs.replace(said, principal=said.principal or known.principal)
        elif said.level == HIGH or (said.principal and not self._is_of_earlier_epoch(tx)):
            effect = "scored"
        else:
            effect = "unknown"
        return effect, [(said, known)] if effect == "scored" else []

    def _judge_known(self, tx: Transaction, said: SessionScored, known: SessionRow) -> Effect:
        if known.principal and said.principal not in ("", known.principal):
            return "another_principal"
        if not known.is_lowered_by(said.level):
            return "scored"
        if not self.lowers:
            return "not_lowered"
        is_younger = said.said_at is not None and said.said_at > known.said_at
        return "scored" if is_younger and not self._is_of_earlier_epoch(tx) else "stale"

    def _judge_all(self, tx: Transaction, said: SessionScored) -> _Judged:
        if not said.principal:
            return "unknown", []
        of = _sessions_of(tx, said.principal)
        found = [known for session in of if (known := find(tx, session, said.at)) is not None]
        raised = [one for one in found if LEVELS.index(said.level) > LEVELS.index(one.level)]
        effect: Effect = "scored" if raised else "none" if found else "unknown"
        return effect, [(structs.replace(said, session=one.session), one) for one in raised]

    def _is_of_earlier_epoch(self, tx: Transaction) -> bool:
        """What was said after it may be lost with the store that was put back."""
        return tx.epoch > 1 and microseconds(self.issued_at) < tx.since


class Bind(Struct, frozen=True, gc=False):
    """Binds the first key that names a session to it: the session as it is then, None where it is unknown.

    Nothing is bound to one that is HIGH, or another's, or has a key. Covered: of two keys one comes first, for good.
    """

    covered: ClassVar[bool] = True
    bound: SessionBound

    def apply(self, tx: Transaction) -> SessionRow | None:
        """See the class."""
        bound = self.bound
        known = find(tx, bound.session, bound.at)
        if known is None or known.key or known.level == HIGH or known.principal != bound.principal:
            return known
        tx.cover = tx.add(records.encode(bound))
        _keep_bound(tx.connection, tx.cover, bound)
        return find(tx, bound.session, bound.at)


class FindSession(Struct, frozen=True, gc=False):
    """The session with this id, None where it is unknown or forgotten."""

    covered: ClassVar[bool] = False
    session: str
    now: datetime

    def apply(self, tx: Transaction) -> SessionRow | None:
        """See the class. Raises: Refused REVOKED where its row leads to no such record."""
        return find(tx, self.session, self.now)


def find(tx: Transaction, session: str, now: datetime) -> SessionRow | None:
    """The same inside a step."""
    row = tx.connection.execute("SELECT principal, scored, bound FROM sessions WHERE id = ?", (session,)).fetchone()
    if row is None:
        return None
    scored = _record(tx, row[1], SessionScored)
    bound = _record(tx, row[2], SessionBound) if row[2] else None
    if any(one and (one.session != session or one.principal != row[0]) for one in (scored, bound)):
        raise _no_record()
    if scored.at + LIVES <= now:
        return None
    return _row(scored, scored.key if bound is None else bound.key)


def _sessions_of(tx: Transaction, principal: str) -> list[str]:
    rows: list[Any] = tx.connection.execute(
        "SELECT id FROM sessions WHERE principal = ? ORDER BY id", (principal,)
    ).fetchall()
    return [session for (session,) in rows]


def _record(tx: Transaction, seq: int, kind: type[_Kind]) -> _Kind:
    body = tx.body(seq)
    record = records.decode(body) if body is not None else None
    if not isinstance(record, kind):
        raise _no_record()
    return record


def _no_record() -> Refused:
    return Refused(Reason.REVOKED, "a session's row leads to no record of its own: run `action-broker ledger verify`")


def _is_of_event(tx: Transaction, seq: int, event: str) -> bool:
    """A row that somebody made up keeps no event from being taken."""
    body = tx.body(seq)
    record = records.decode(body) if body is not None else None
    return isinstance(record, SecurityEvent) and record.event == event


def _write(tx: Transaction, scored: SessionScored, known: SessionRow | None) -> SessionRow:
    """Adds a score. It is as of no earlier than the last: what was said before that one lowers neither."""
    said_at = scored.said_at or scored.at
    if known is not None:
        scored = structs.replace(scored, key=known.key)
        said_at = max(said_at, known.said_at)
    if said_at != scored.at:
        scored = structs.replace(scored, said_at=said_at)
    tx.cover = tx.add(records.encode(scored))
    _keep_scored(tx.connection, tx.cover, scored)
    return _row(scored, scored.key)


def _row(scored: SessionScored, key: str) -> SessionRow:
    return SessionRow(
        session=scored.session,
        principal=scored.principal,
        level=scored.level,
        key=key,
        scored_at=scored.at,
        said_at=scored.said_at or scored.at,
        event=scored.event,
    )


def _keep_scored(connection: apsw.Connection, seq: int, scored: SessionScored) -> None:
    connection.execute(
        "INSERT OR REPLACE INTO sessions VALUES (?, ?, ?, 0, ?)",
        (scored.session, scored.principal, seq, seconds_up(scored.at + LIVES)),
    )


def _keep_bound(connection: apsw.Connection, seq: int, bound: SessionBound) -> None:
    connection.execute("UPDATE sessions SET bound = ? WHERE id = ?", (seq, bound.session))


def _keep_event(connection: apsw.Connection, seq: int, event: SecurityEvent) -> None:
    ends = seconds_up(event.at + EVENT_KEPT)
    connection.execute("INSERT OR REPLACE INTO events VALUES (?, ?, ?)", (event.event, seq, ends))


SessionEvent = SessionScored | SessionBound | SecurityEvent
KINDS: Final = ("session_scored", "session_bound")


def restore(connection: apsw.Connection, events: Iterable[tuple[int, SessionEvent]]) -> None:
    """Writes the rows anew from these records, the oldest first. Sessions of which none is among them are unknown."""
    connection.execute("DELETE FROM sessions")
    for seq, event in events:
        match event:
            case SessionScored():
                _keep_scored(connection, seq, event)
            case SessionBound():
                _keep_bound(connection, seq, event)
            case SecurityEvent():
                _keep_event(connection, seq, event)


def prune(connection: apsw.Connection, before: int, rows: int) -> bool:
    """Deletes at most `rows` sessions, and as many events, that ended before: whether there may be more."""
    more = False
    for table, key in (("sessions", "id"), ("events", "event")):
        gone = connection.execute(
            f"DELETE FROM {table} WHERE {key} IN"  # noqa: S608 - texts from the line above
            f" (SELECT {key} FROM {table} WHERE expires_at < ? ORDER BY expires_at LIMIT ?) RETURNING expires_at",
            (before, rows),
        ).fetchall()
        more |= len(gone) == rows
        if gone and table == "events":
            connection.execute("UPDATE ledger SET events_forgotten = max(events_forgotten, ?)", max(gone))
    return more
