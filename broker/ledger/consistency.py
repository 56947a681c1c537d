"""Whether records agree with one another, for what the broker itself would never write.

A redemption uses up the credential of an intent before it, and is the only one; an outcome is of an intent before it;
approvals of a request are used up by one intent, and again by its children at most, each time after all whom it names
gave theirs in the same epoch and before one of them took it back; a break-glass permit uses up those of two approvers
or more; and what a broker that starts believes to stand (standing.py) is what its records say. These hold whatever the
clock did. They break when somebody wrote to the index tables of a running broker: what it then did wrong stands in its
records.

Intents that are neither used up nor ended, and requests for approval, are remembered, the last `REMEMBERED` of each;
what is not among them is looked up in the store, so memory stays bounded and nothing is missed.
"""

from enum import StrEnum
from typing import TypeVar

import apsw
import msgspec
from msgspec import Struct

from broker.ledger import standing
from broker.ledger.scope_records import FEWEST_APPROVERS

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")
_ABOUT_WHAT_STANDS = standing.KINDS | standing.NOTES

REMEMBERED = 250_000
"""More than one broker mints while a single-use token lives for a minute; some 50 MB."""


class Fault(StrEnum):
    """What is wrong with a ledger."""

    CHANGED = "changed"
    GAP = "gap"
    TRUNCATED = "truncated"
    HEAD_MISMATCH = "head_mismatch"
    UNREADABLE = "unreadable"
    BEHIND_CHECKPOINT = "behind_checkpoint"
    FORKED = "forked"
    REDEEMED_TWICE = "redeemed_twice"
    NO_INTENT = "no_intent"
    APPROVAL_USED_TWICE = "approval_used_twice"
    NO_APPROVAL = "no_approval"
    STANDING_LOST = "standing_lost"


class FoundFault(Exception):
    """A fault, at record `seq`."""

    def __init__(self, fault: Fault, seq: int, detail: str) -> None:
        super().__init__(detail)
        self.fault, self.seq, self.detail = fault, seq, detail


class _Peek(Struct, frozen=True, gc=False):
    """What is needed of any record. A kind that a later release added has none of it."""

    kind: str = ""
    intent: int = 0
    jti: str = ""
    use: str = ""
    approval: str = ""
    parent: str = ""
    request_digest: str = ""
    by: str = ""
    approvers: tuple[str, ...] = ()
    id: str = ""
    before: int = 0
    standing: int = 0


_peek = msgspec.json.Decoder(_Peek).decode


class _Request(Struct, frozen=True, gc=False):
    """What a request is: who approved it and did not take that back, and the `jti` of the intent that used it up."""

    by: tuple[str, ...] = ()
    used_by: str = ""

    def after(self, record: _Peek) -> "_Request":
        """What it is after this record of it."""
        others = tuple(one for one in self.by if one != record.by)
        match record.kind:
            case "approval_asked":  # after a use: then everything about it had been forgotten
                return _ASKED if self.used_by else self
            case "approved":
                return _Request(by=(*others, record.by), used_by=self.used_by)
            case "approval_withdrawn":
                return _Request(by=others, used_by=self.used_by)
            case "intent" | "break_glass":
                return _Request(by=self.by, used_by=self.used_by or record.jti or record.id)
            case _:
                return self

    def is_used_by_another(self, record: _Peek) -> bool:
        """Whether its approvals gave another credential than the parent of this intent."""
        return self.used_by not in {"", record.parent}

    def may_be_used(self, record: _Peek) -> bool:
        """Whether this intent may be."""
        counted = record.approvers and set(record.approvers) <= set(self.by)
        return bool(counted) and not self.is_used_by_another(record)


_ASKED = _Request()


class Consistency:
    """Reads along, record by record from the first."""

    def __init__(self, connection: apsw.Connection, remembered: int = REMEMBERED) -> None:
        self._connection, self._remembered = connection, remembered
        self._unended: dict[int, None] = {}
        self._single: dict[str, bool] = {}  # jti of a single-use credential -> redeemed
        self._approvals: dict[str, _Request] = {}  # by their digests
        self._epoch_from = 0
        self._standing = 0  # the last record about what stands

    def see(self, seq: int, body: bytes) -> None:
        """Takes the next record. Raises: FoundFault, apsw.Error."""
        try:
            record = _peek(body)
        except msgspec.DecodeError as error:
            raise FoundFault(Fault.UNREADABLE, seq, f"record {seq} is chained, and is no record: {error}") from error
        if record.kind == "intent":
            self._remember(self._unended, seq, None)
            if record.use == "single":
                self._remember(self._single, record.jti, False)
            if record.approval:
                self._approval_used(seq, record)
        elif record.kind == "outcome":
            self._outcome(seq, record.intent)
        elif record.kind == "redemption":
            self._redemption(seq, record.jti)
        elif record.kind in _ABOUT_WHAT_STANDS:
            self._stands(seq, record)
        elif record.request_digest:
            self._approval(seq, record)
        elif record.kind == "epoch_started":
            self._approvals.clear()
            self._epoch_from = seq

    def _remember(self, what: dict[_Key, _Value], key: _Key, value: _Value) -> None:
        what[key] = value
        if len(what) > self._remembered:
            del what[next(iter(what))]

    def _stands(self, seq: int, record: _Peek) -> None:
        named = record.before if record.kind in standing.KINDS else record.standing
        if named != self._standing:
            raise FoundFault(
                Fault.STANDING_LOST,
                seq,
                f"record {seq} takes {named} for the last about what stands, not {self._standing}",
            )
        if record.kind in standing.KINDS:
            self._standing = seq
        if record.kind == "break_glass":
            if len(set(record.approvers)) < FEWEST_APPROVERS:
                raise FoundFault(Fault.NO_APPROVAL, seq, f"record {seq} permits what fewer than two approved")
            self._approval_used(seq, record)

    def _outcome(self, seq: int, intent: int) -> None:
        if intent in self._unended:
            del self._unended[intent]
            return
        # Forgotten, or ended twice: "unknown" after a jump of the clock, and then with what was known.
        row = self._connection.execute("SELECT body FROM records WHERE seq = ? AND seq < ?", (intent, seq)).fetchone()
        if row is None or _peek(row[0]).kind != "intent":
            raise FoundFault(Fault.NO_INTENT, seq, f"record {seq} is the outcome of {intent}, which is no intent")

    def _redemption(self, seq: int, jti: str) -> None:
        redeemed: bool | None = self._single.get(jti)
        if redeemed is None:
            redeemed = self._look_back(seq, jti)
        if redeemed is None:
            raise FoundFault(Fault.NO_INTENT, seq, f"record {seq} redeems {jti}, which no intent is for")
        if redeemed:
            raise FoundFault(Fault.REDEEMED_TWICE, seq, f"record {seq} redeems {jti} a second time")
        self._remember(self._single, jti, True)

    def _look_back(self, seq: int, jti: str) -> bool | None:
        """Whether `jti` was redeemed before record `seq`; None where it was never intended. Reads the whole store."""
        found: bool | None = None
        rows = self._connection.execute(
            "SELECT body FROM records WHERE seq < ? AND instr(body, CAST(? AS BLOB)) ORDER BY seq", (seq, jti)
        )
        for (body,) in rows:
            record = _peek(body)
            if record.jti == jti and record.kind == "redemption":
                return True
            if record.jti == jti and record.kind == "intent":
                found = False
        return found

    def _approval(self, seq: int, record: _Peek) -> None:
        digest = record.request_digest
        before = self._approvals.get(digest)
        if before is None:
            before = _ASKED if record.kind == "approval_asked" else self._look_back_at_request(seq, digest)
        self._remember(self._approvals, digest, before.after(record))

    def _approval_used(self, seq: int, record: _Peek) -> None:
        digest = record.approval
        before = self._approvals.get(digest, _ASKED)
        if not before.may_be_used(record):  # or it was forgotten
            before = self._look_back_at_request(seq, digest)
        if before.is_used_by_another(record):
            raise FoundFault(Fault.APPROVAL_USED_TWICE, seq, f"record {seq} uses the approvals of {digest} again")
        if not before.may_be_used(record):
            raise FoundFault(
                Fault.NO_APPROVAL, seq, f"record {seq} uses approvals of {digest} that do not stand in this epoch"
            )
        self._remember(self._approvals, digest, before.after(record))

    def _look_back_at_request(self, seq: int, digest: str) -> _Request:
        """What became of a request before record `seq`, in its epoch. Reads the whole store."""
        state = _ASKED
        rows = self._connection.execute(
            "SELECT body FROM records WHERE seq > ? AND seq < ? AND instr(body, CAST(? AS BLOB)) ORDER BY seq",
            (self._epoch_from, seq, digest),
        )
        for (body,) in rows:
            record = _peek(body)
            if digest in (record.request_digest, record.approval):
                state = state.after(record)
        return state
