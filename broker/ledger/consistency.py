"""Whether records agree with one another, for what the broker itself would never write.

A redemption uses up the credential of an intent before it, and is the only one; an outcome is of an intent before it.
These hold whatever the clock did. They break when somebody wrote to the index tables of a running broker: what it then
did wrong stands in its records.

Intents that are neither used up nor ended are remembered, the last `REMEMBERED` of each; what is not among them is
looked up in the store, so memory stays bounded and nothing is missed.
"""

from enum import StrEnum
from typing import TypeVar

import apsw
import msgspec
from msgspec import Struct

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")

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


_peek = msgspec.json.Decoder(_Peek).decode


class Consistency:
    """Reads along, record by record from the first."""

    def __init__(self, connection: apsw.Connection, remembered: int = REMEMBERED) -> None:
        self._connection, self._remembered = connection, remembered
        self._unended: dict[int, None] = {}
        self._single: dict[str, bool] = {}  # jti of a single-use credential -> redeemed

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
        elif record.kind == "outcome":
            self._outcome(seq, record.intent)
        elif record.kind == "redemption":
            self._redemption(seq, record.jti)

    def _remember(self, what: dict[_Key, _Value], key: _Key, value: _Value) -> None:
        what[key] = value
        if len(what) > self._remembered:
            del what[next(iter(what))]

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
