"""Approvals as steps of a group commit, as in operations.py: asked for, given, taken back, used up by one intent.

Rows only lead to records: who approved what, and until when, is read from the chain each time, so a row that somebody
made up counts for nothing. What makes approvals count no more (a withdrawal, a use) is a row that may be deleted; it is
written anew from the records at each start (recovery.py), and `ledger verify` finds approvals that were used twice.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, ClassVar, TypeVar

from msgspec import Struct, structs

from attestors.contract import Facts
from broker.errors import Reason, Refused
from broker.ledger import records, standing
from broker.ledger.operations import AppendIntent
from broker.ledger.transaction import Transaction, seconds_up

MAX_OPEN = 64
"""Requests of one principal that may wait at a time: approvers read them."""
MAX_PENDING = 1_000
"""Requests in one answer."""

_Kind = TypeVar("_Kind", records.ApprovalAsked, records.Approved)


@dataclass(frozen=True, slots=True, kw_only=True)
class ApprovalRow:
    """A request that was asked for. used_by: the `jti` of what its approvals gave; empty while it waits."""

    asked: records.ApprovalAsked
    used_by: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ApprovalSeen:
    """An approval that is neither withdrawn nor expired. approver: a SPIFFE ID or a person's id. reason: its own words.

    policies, rules_sha256: what let it approve, as in `records.Approved`. Not checked here: that they still stand.
    """

    approver: str
    reason: str
    approved_at: datetime
    expires_at: datetime
    method: records.Method
    policies: tuple[str, ...]
    rules_sha256: str


class Ask(Struct, frozen=True, gc=False):
    """Keeps a request, or keeps it longer. Asked again it is only recorded once less than half of its time is left."""

    covered: ClassVar[bool] = False
    asked: records.ApprovalAsked
    body: bytes

    def apply(self, tx: Transaction) -> None:
        """See the class. Raises: Refused ALREADY_USED or QUOTA."""
        asked = self.asked
        if _used_by(tx, asked.request_digest):
            raise Refused(
                Reason.ALREADY_USED, "this request was approved and gave a credential: ask with another request id"
            )
        found = tx.connection.execute(
            "SELECT expires_at FROM approval_requests WHERE digest = ?", (asked.request_digest,)
        ).fetchone()
        left = found[0] - asked.at.timestamp() if found else 0
        if left * 2 > (asked.expires_at - asked.at).total_seconds():
            return
        if left <= 0:
            _require_room(tx, asked)
        tx.connection.execute(
            "INSERT OR REPLACE INTO approval_requests VALUES (?, ?, ?, ?)",
            (tx.add(self.body), asked.request_digest, asked.principal, seconds_up(asked.expires_at)),
        )


def _require_room(tx: Transaction, asked: records.ApprovalAsked) -> None:
    waiting = tx.connection.execute(
        "SELECT count(*) FROM approval_requests r WHERE principal = ? AND expires_at > ?"
        " AND NOT EXISTS (SELECT 1 FROM consumptions c WHERE c.digest = r.digest)",
        (asked.principal, asked.at.timestamp()),
    ).get
    if waiting >= MAX_OPEN:
        raise Refused(Reason.QUOTA, f"{MAX_OPEN} requests of this principal wait for approval: see to those first")


class Approve(Struct, frozen=True, gc=False):
    """Keeps an approval; a second one by the same approver takes the place of its first."""

    covered: ClassVar[bool] = False
    approved: records.Approved
    body: bytes

    def apply(self, tx: Transaction) -> ApprovalSeen:
        """See the class. Raises: Refused EXPIRED where no such request waits, ALREADY_USED."""
        approved = self.approved
        request = _request(tx, approved.request_digest)
        if request is None or approved.at >= request.asked.expires_at:
            raise Refused(Reason.EXPIRED, "no request with this digest waits: have its caller ask again")
        if request.used_by:
            raise Refused(Reason.ALREADY_USED, "the request was approved before, and gave a credential")
        tx.connection.execute(
            "INSERT OR REPLACE INTO approvals VALUES (?, ?, ?, ?)",
            (tx.add(self.body), approved.request_digest, approved.by, seconds_up(approved.expires_at)),
        )
        return _seen(approved)


class Withdraw(Struct, frozen=True, gc=False):
    """Takes an approval back, used up or not: whether there was one that had not ended.

    A break-glass permit that it gave ends with it. Covered, so that no copy of the store in which it still counts can
    be put back unseen.
    """

    covered: ClassVar[bool] = True
    withdrawn: records.ApprovalWithdrawn
    body: bytes

    def apply(self, tx: Transaction) -> bool:
        """See the class."""
        withdrawn = self.withdrawn
        gone = tx.connection.execute(
            "DELETE FROM approvals WHERE digest = ? AND approver = ? AND expires_at > ? RETURNING seq",
            (withdrawn.request_digest, withdrawn.by, withdrawn.at.timestamp()),
        ).fetchall()
        if gone:
            tx.cover = tx.add(self.body)
            self._end_permit(tx)
        return bool(gone)

    def _end_permit(self, tx: Transaction) -> None:
        withdrawn = self.withdrawn
        row: Any = tx.connection.execute(
            "SELECT seq FROM consumptions WHERE digest = ?", (withdrawn.request_digest,)
        ).fetchone()
        body = tx.body(row[0]) if row else None
        permit = records.decode(body) if body is not None else None
        if isinstance(permit, records.BreakGlass) and withdrawn.by in permit.approvers:
            at, correlation_id = withdrawn.at, withdrawn.correlation_id
            standing.add(
                tx, records.StandingLifted(at=at, correlation_id=correlation_id, id=permit.id, by=withdrawn.by)
            )


class Counted(Struct, frozen=True, gc=False):
    """Who were counted when it was decided about a request, and have to count now.

    digest: of the request. credential: the `jti` of what used its approvals up; "" for what is about to.
    """

    digest: str
    approvers: tuple[str, ...]
    credential: str
    at: float

    def require(self, tx: Transaction) -> str:
        """What used them up, "" for nothing. Raises: Refused APPROVAL_REQUIRED where another did, or one has gone."""
        used_by = _used_by(tx, self.digest)
        if used_by not in ("", self.credential):
            raise Refused(Reason.APPROVAL_REQUIRED, "the approvals of this request gave another credential meanwhile")
        rows: list[Any] = tx.connection.execute(
            "SELECT approver FROM approvals WHERE digest = ? AND expires_at > ?", (self.digest, self.at)
        ).fetchall()
        if not set(self.approvers) <= {row[0] for row in rows}:
            raise Refused(Reason.APPROVAL_REQUIRED, "approvals of this request were withdrawn or ended meanwhile")
        return used_by


class AppendApprovedIntent(AppendIntent, frozen=True, kw_only=True, gc=False):
    """Adds an intent that uses up the approvals of a request, all of them: no other intent can.

    Covered, as `Withdraw`: of what is withdrawn and of what is signed, one comes first. A child of the credential that
    used them up names them again.
    """

    covered: ClassVar[bool] = True
    counted: Counted

    def apply(self, tx: Transaction) -> int:
        """See the class. Raises: Refused APPROVAL_REQUIRED where they are used up, or one ended or was withdrawn."""
        used_by = self.counted.require(tx)
        tx.cover = AppendIntent.apply(self, tx)
        if not used_by:
            row = (tx.cover, self.counted.digest, self.jti, self.expires_at)
            tx.connection.execute("INSERT INTO consumptions VALUES (?, ?, ?, ?)", row)
        return tx.cover


def append_intent(
    intent: records.Intent, body: bytes, current: Callable[[], bool] | None, evidence: tuple[Facts, ...]
) -> AppendIntent:
    """The step that adds this intent, whose bytes are `body`, and uses up the approvals that it names."""
    if bool(intent.approval) != bool(intent.approvers):
        raise ValueError("an intent names the request whose approvals it uses, and who gave them, or neither")
    plain = AppendIntent(
        body=body,
        jti=intent.jti,
        epoch=intent.epoch,
        expires_at=seconds_up(intent.expires_at),
        live=intent.is_live,
        current=current,
        evidence=evidence,
    )
    if not intent.approval:
        return plain
    counted = Counted(
        digest=intent.approval, approvers=intent.approvers, credential=intent.parent, at=intent.at.timestamp()
    )
    return AppendApprovedIntent(**structs.asdict(plain), counted=counted)


class FindRequest(Struct, frozen=True, gc=False):
    """The request with this digest, if it is known, whether it ended or not."""

    covered: ClassVar[bool] = False
    digest: str

    def apply(self, tx: Transaction) -> ApprovalRow | None:
        """See the class. Raises: Refused REVOKED where its row leads to no such record."""
        return _request(tx, self.digest)


class FindPending(Struct, frozen=True, gc=False):
    """The requests that wait, the oldest first, at most `MAX_PENDING`."""

    covered: ClassVar[bool] = False
    now: datetime

    def apply(self, tx: Transaction) -> tuple[ApprovalRow, ...]:
        """See the class. Raises: Refused REVOKED where a row leads to no such record."""
        rows: list[Any] = tx.connection.execute(
            "SELECT seq, digest FROM approval_requests r WHERE expires_at > ?"
            " AND NOT EXISTS (SELECT 1 FROM consumptions c WHERE c.digest = r.digest) ORDER BY seq LIMIT ?",
            (self.now.timestamp(), MAX_PENDING),
        ).fetchall()
        return tuple(
            ApprovalRow(asked=_record(tx, seq, records.ApprovalAsked, digest), used_by="") for seq, digest in rows
        )


class FindApprovals(Struct, frozen=True, gc=False):
    """The approvals of a request that count for this credential, or for a new one where `credential` is empty."""

    covered: ClassVar[bool] = False
    digest: str
    credential: str
    now: datetime

    def apply(self, tx: Transaction) -> tuple[ApprovalSeen, ...]:
        """See the class. Raises: Refused REVOKED where a row leads to no such record."""
        if _used_by(tx, self.digest) not in ("", self.credential):
            return ()
        rows: list[Any] = tx.connection.execute(
            "SELECT seq, approver FROM approvals WHERE digest = ? ORDER BY seq", (self.digest,)
        ).fetchall()
        found = [_record(tx, seq, records.Approved, self.digest, approver) for seq, approver in rows]
        return tuple(_seen(approved) for approved in found if approved.expires_at > self.now)


def _used_by(tx: Transaction, digest: str) -> str:
    row = tx.connection.execute("SELECT jti FROM consumptions WHERE digest = ?", (digest,)).fetchone()
    return str(row[0]) if row else ""


def _request(tx: Transaction, digest: str) -> ApprovalRow | None:
    row = tx.connection.execute("SELECT seq FROM approval_requests WHERE digest = ?", (digest,)).fetchone()
    if row is None:
        return None
    return ApprovalRow(asked=_record(tx, row[0], records.ApprovalAsked, digest), used_by=_used_by(tx, digest))


def _record(tx: Transaction, seq: int, kind: type[_Kind], digest: str, approver: str | None = None) -> _Kind:
    body = tx.body(seq)
    record = records.decode(body) if body is not None else None
    if not isinstance(record, kind) or record.request_digest != digest or getattr(record, "by", None) != approver:
        raise Refused(
            Reason.REVOKED, "an approval's row leads to no record of its own: run `action-broker ledger verify`"
        )
    return record


def _seen(approved: records.Approved) -> ApprovalSeen:
    return ApprovalSeen(
        approver=approved.by,
        reason=approved.reason,
        approved_at=approved.at,
        expires_at=approved.expires_at,
        method=approved.method,
        policies=approved.policies,
        rules_sha256=approved.rules_sha256,
    )
