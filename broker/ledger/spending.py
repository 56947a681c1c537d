"""Using up what counts once, as steps of a group commit: a token is redeemed, a signing grant spent on a signature.

The same caller, idempotency id and content get the first answer again until the credential expires; anybody or anything
else finds it used. An answer that is kept lies beside the ledger; its hash is in the outcome, and its row leads there,
so who can write the file cannot give another one.
"""

import hashlib
from dataclasses import dataclass
from datetime import datetime
from typing import ClassVar, Literal

from msgspec import Struct

from broker.errors import Reason, Refused
from broker.ledger import records
from broker.ledger.approvals import Counted
from broker.ledger.operations import AppendIntent, AppendOutcome, moment
from broker.ledger.transaction import Transaction, microseconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Redeemed:
    """A redemption. repeated: the same caller asked again with the same idempotency id and content."""

    redeemed_at: datetime
    repeated: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """A grant that is used up. repeated: by this very question before; then nothing was recorded.

    intent_seq: of the intent that was recorded with it. answer: the first one, where it was stored.
    """

    intent_seq: int | None
    repeated: bool
    answer: bytes | None


class Question(Struct, frozen=True, gc=False):
    """Who asks to use up which credential, for what."""

    jti: str
    caller: str
    idempotency_id: str
    content_sha256: bytes
    now: datetime

    @property
    def idempotency(self) -> bytes:
        """SHA-256 of the idempotency id."""
        return hashlib.sha256(self.idempotency_id.encode()).digest()

    def find(self, tx: Transaction) -> tuple[datetime | None, int]:
        """When this question used it up before, None while nobody has; and when the credential expires.

        Raises: Refused REVOKED, EXPIRED or ALREADY_USED.
        """
        credential = tx.connection.execute(
            "SELECT epoch, expires_at FROM credentials WHERE jti = ?", (self.jti,)
        ).fetchone()
        # The batch's own intents are not looked at: nobody holds a credential whose intent is not yet durable.
        if credential is None or credential[0] != tx.epoch:
            raise Refused(Reason.REVOKED, "no credential of this epoch has this id")
        if self.now.timestamp() >= credential[1]:
            raise Refused(Reason.EXPIRED, "the credential has expired")
        found = tx.connection.execute(
            "SELECT caller, idempotency, content, redeemed_at FROM redemptions WHERE jti = ?", (self.jti,)
        ).fetchone()
        if found is not None and found[:3] != (self.caller, self.idempotency, self.content_sha256):
            raise Refused(Reason.ALREADY_USED, "redeemed before, by another caller, id or content")
        return None if found is None else moment(found[3]), credential[1]

    def use_up(self, tx: Transaction, expires_at: int, result: Literal["used", "refused"], correlation_id: str) -> None:
        """Records that it is used up. Its answer then waits for a checkpoint outside."""
        record = records.Redemption(
            at=self.now,
            correlation_id=correlation_id,
            jti=self.jti,
            by=self.caller,
            idempotency_sha256=self.idempotency.hex(),
            content_sha256=self.content_sha256.hex(),
            result=result,
        )
        tx.cover = tx.add(records.encode(record))
        tx.connection.execute(
            "INSERT INTO redemptions VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                tx.cover,
                self.jti,
                self.caller,
                self.idempotency,
                self.content_sha256,
                microseconds(self.now),
                expires_at,
            ),
        )


class Redeem(Struct, frozen=True, gc=False):
    """Uses a single-use credential up, once in the world."""

    covered: ClassVar[bool] = True
    question: Question
    correlation_id: str
    counted: Counted | None

    def apply(self, tx: Transaction) -> Redeemed:
        """See the class. Raises: Refused REVOKED, EXPIRED, ALREADY_USED or APPROVAL_REQUIRED."""
        before, expires_at = self.question.find(tx)
        if before is not None:
            return Redeemed(redeemed_at=before, repeated=True)
        if self.counted is not None:
            self.counted.require(tx)
        self.question.use_up(tx, expires_at, "used", self.correlation_id)
        return Redeemed(redeemed_at=self.question.now, repeated=False)


class Spend(Struct, frozen=True, gc=False):
    """Uses a grant up, and adds the intent of what it is spent on; none where it is spent by a refusal."""

    covered: ClassVar[bool] = True
    question: Question
    intent: AppendIntent | None
    correlation_id: str

    def apply(self, tx: Transaction) -> Spent:
        """See the class. Raises: as `Redeem`, and as the intent does."""
        before, expires_at = self.question.find(tx)
        if before is not None:
            return Spent(intent_seq=None, repeated=True, answer=_answer(tx, self.question.jti))
        seq = None if self.intent is None else self.intent.apply(tx)  # refuses, if it does, before any change
        self.question.use_up(tx, expires_at, "refused" if self.intent is None else "used", self.correlation_id)
        return Spent(intent_seq=seq, repeated=False, answer=None)


class FindAnswer(Struct, frozen=True, gc=False):
    """The stored answer to this very question; None while nobody has spent the grant."""

    covered: ClassVar[bool] = False
    question: Question

    def apply(self, tx: Transaction) -> bytes | None:
        """See the class. Raises: as `Redeem`; ALREADY_USED also where it was spent and no answer was stored."""
        before, _ = self.question.find(tx)
        if before is None:
            return None
        answer = _answer(tx, self.question.jti)
        if answer is None:
            raise Refused(Reason.ALREADY_USED, "spent before, and its answer was never stored")
        return answer


class StoreAnswer(AppendOutcome, frozen=True, gc=False):
    """Adds the outcome of what a grant was spent on, and keeps the answer as long as the redemption."""

    jti: str
    answer: bytes

    def apply(self, tx: Transaction) -> int:
        """See the class. Raises: Refused REVOKED where it is not spent."""
        found = tx.connection.execute("SELECT expires_at FROM redemptions WHERE jti = ?", (self.jti,)).fetchone()
        if found is None:
            raise Refused(Reason.REVOKED, "an answer is kept for a grant that is spent")
        seq = AppendOutcome.apply(self, tx)
        tx.connection.execute("INSERT INTO answers VALUES (?, ?, ?, ?)", (seq, self.jti, self.answer, found[0]))
        return seq


def _answer(tx: Transaction, jti: str) -> bytes | None:
    row = tx.connection.execute("SELECT seq, answer FROM answers WHERE jti = ?", (jti,)).fetchone()
    if row is None:
        return None
    outcome = _decode(tx.body(row[0]))
    intent = _decode(tx.body(outcome.intent)) if isinstance(outcome, records.Outcome) else None
    if (
        not isinstance(outcome, records.Outcome)
        or not isinstance(intent, records.Intent)
        or intent.parent != jti
        or outcome.answer_sha256 != hashlib.sha256(row[1]).hexdigest()
    ):
        raise Refused(
            Reason.REVOKED, "a stored answer is not the one that was recorded: run `action-broker ledger verify`"
        )
    return bytes(row[1])


def _decode(body: bytes | None) -> records.Record | None:
    return None if body is None else records.decode(body)
