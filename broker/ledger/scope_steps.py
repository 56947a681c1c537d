"""What becomes of credentials after they were given, as steps of a group commit (operations.py)."""

import contextlib
from dataclasses import dataclass
from datetime import datetime
from typing import ClassVar

import msgspec
from msgspec import Struct

from broker.errors import Reason
from broker.ledger import records, standing
from broker.ledger.approvals import Counted
from broker.ledger.operations import KEEP_S, Evidence
from broker.ledger.scope_records import BreakGlass, StandingDenial, StandingLifted
from broker.ledger.standing import StandingEntry
from broker.ledger.transaction import Transaction, seconds_up


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What a process finds when it starts.

    lives: sequence number, intent and its stored evidence by attestor, also of what expired less than `KEEP_S` ago:
    that it is refused has to be known a little longer. refused: `jti` to reason and until when it is kept, seconds
    since 1970.
    """

    lives: tuple[tuple[int, records.Intent, dict[str, Evidence]], ...]
    refused: dict[str, tuple[Reason, float]]
    standing: tuple[StandingEntry, ...]


class RefuseCredentials(Struct, frozen=True, gc=False):
    """Records that credentials count no more: the record's sequence number. ends: when each expires."""

    covered: ClassVar[bool] = False
    body: bytes
    jtis: tuple[str, ...]
    ends: tuple[int, ...]

    def apply(self, tx: Transaction) -> int:
        """See the class."""
        seq = tx.add(self.body)
        tx.connection.executemany(
            "INSERT OR IGNORE INTO refused VALUES (?, ?, ?)",
            [(jti, seq, ends + KEEP_S) for jti, ends in zip(self.jtis, self.ends, strict=True)],
        )
        return seq


class Deny(Struct, frozen=True, gc=False):
    """Keeps a standing denial. Covered: no copy of the store without it can be put back unseen."""

    covered: ClassVar[bool] = True
    denial: StandingDenial

    def apply(self, tx: Transaction) -> int:
        """See the class."""
        return standing.add(tx, self.denial)


class Permit(Struct, frozen=True, gc=False):
    """Keeps a break-glass permit, and uses up the approvals of its request. Covered, as `AppendApprovedIntent`."""

    covered: ClassVar[bool] = True
    permit: BreakGlass

    def apply(self, tx: Transaction) -> int:
        """See the class. Raises: Refused APPROVAL_REQUIRED where they are used up, or one ended or was withdrawn."""
        permit = self.permit
        counted = Counted(digest=permit.approval, approvers=permit.approvers, credential="", at=permit.at.timestamp())
        counted.require(tx)
        seq = standing.add(tx, msgspec.structs.replace(permit, epoch=tx.epoch))
        row = (seq, permit.approval, permit.id, seconds_up(permit.until))
        tx.connection.execute("INSERT INTO consumptions VALUES (?, ?, ?, ?)", row)
        return seq


class Lift(Struct, frozen=True, gc=False):
    """Ends one of them. Covered. Not checked: that there is one; asked again it is recorded again."""

    covered: ClassVar[bool] = True
    lifted: StandingLifted

    def apply(self, tx: Transaction) -> int:
        """See the class."""
        return standing.add(tx, self.lifted)


class Prove(Struct, frozen=True, gc=False):
    """Reads the store: how many records there are. What it answers was so when it was asked, or later."""

    covered: ClassVar[bool] = False

    def apply(self, tx: Transaction) -> int:
        """See the class. Raises: apsw.Error."""
        return int(tx.connection.execute("SELECT seq FROM ledger").get)


class FindKept(Struct, frozen=True, gc=False):
    """What a process finds when it starts. Blocks the ledger for a second where 100,000 credentials are live."""

    covered: ClassVar[bool] = False
    now: datetime

    def apply(self, tx: Transaction) -> Kept:
        """See the class. Raises: msgspec.DecodeError where a record cannot be read; Refused as standing.py says."""
        moment = self.now.timestamp()
        execute = tx.connection.execute
        evidence: dict[int, dict[str, Evidence]] = {}
        for seq, attestor, body in execute("SELECT seq, attestor, facts FROM evidence WHERE expires_at > ?", (moment,)):
            with contextlib.suppress(msgspec.DecodeError):  # not what we wrote: then there is none
                evidence.setdefault(seq, {})[attestor] = msgspec.json.decode(body, type=Evidence)
        lives = []
        for seq, body in execute(
            "SELECT c.seq, body FROM credentials c JOIN records r ON r.seq = c.seq"
            " WHERE c.epoch = ? AND c.expires_at > ? ORDER BY c.seq",
            (tx.epoch, moment - KEEP_S),
        ):
            record = records.decode(body)
            if isinstance(record, records.Intent):
                lives.append((seq, record, evidence.get(seq, {})))
        refused = {}
        for jti, ends, body in execute(
            "SELECT jti, f.expires_at, body FROM refused f JOIN records r ON r.seq = f.seq WHERE f.expires_at > ?",
            (moment,),
        ):
            record = records.decode(body)
            reason = record.reason if isinstance(record, records.ScopeRefused) else Reason.REVOKED
            refused[jti] = reason, float(ends)
        found = standing.entries(tx.body, tx.standing, tx.epoch, self.now)
        return Kept(lives=tuple(lives), refused=refused, standing=found)
