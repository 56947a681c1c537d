"""What can be asked of the store, each as one step of a group commit: `apply(transaction)` gives its answer.

A step either does everything it says or raises Refused before it changed anything; whatever else it raises rolls the
whole group back. Steps of one group see one another's rows.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, ClassVar, Protocol

import msgspec
from msgspec import Struct

from attestors.contract import FactKey, Facts
from broker.errors import Reason, Refused
from broker.ledger import records, sessions
from broker.ledger.transaction import Transaction, seconds_up

KEEP_S = 60
"""Rows of expired credentials stay this much longer: nobody's clock, and no retry, is later than that."""
PRUNE_ROWS = 256
"""Rows that one step may delete: it shares its commit with requests."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CredentialRow:
    """A credential of the current epoch. redeemed_at: None unless it was used up."""

    jti: str
    seq: int
    epoch: int
    expires_at: datetime
    intent: records.Intent
    redeemed_at: datetime | None


class Operation(Protocol):
    """One step. covered: its answer waits until a checkpoint outside the store covers what it wrote or read."""

    covered: ClassVar[bool]

    def apply(self, tx: Transaction) -> object:
        """Does it, inside the transaction. Raises: Refused before any change; apsw.Error."""


class Evidence(Struct, frozen=True, gc=False):
    """Facts that nobody can look at again, as they lie beside the ledger; their hash is in the intent."""

    key: str
    values: dict[str, Any]
    attested_at: datetime
    expires_at: datetime | None

    @classmethod
    def of(cls, facts: Facts) -> "Evidence":
        """These."""
        return cls(facts.key, dict(facts.values), facts.attested_at, facts.expires_at)

    def facts(self, attestor: str) -> Facts:
        """As facts again."""
        return Facts(
            attestor=attestor,
            key=FactKey(self.key),
            values=self.values,
            attested_at=self.attested_at,
            expires_at=self.expires_at,
        )


class Append(Struct, frozen=True, gc=False):
    """Adds a record: its sequence number."""

    covered: ClassVar[bool] = False
    body: bytes

    def apply(self, tx: Transaction) -> int:
        """See the class."""
        return tx.add(self.body)


class AppendNote(Struct, frozen=True, gc=False):
    """Adds a note of what a checkpoint covers: its sequence number."""

    covered: ClassVar[bool] = False
    note: records.Checkpointed

    def apply(self, tx: Transaction) -> int:
        """See the class."""
        return tx.add(records.encode(msgspec.structs.replace(self.note, standing=tx.standing)))


class AppendAhead(Append, frozen=True, gc=False):
    """Adds a record that whatever is asked after it must follow, though nobody awaits it (see group.py)."""


class AppendIntent(Struct, frozen=True, gc=False):
    """Adds an intent and, where it is one, its live credential: the intent's sequence number.

    current: whether what it was decided on still holds; read in the ledger's thread. evidence: of its facts, those that
    nobody can look at again.
    """

    covered: ClassVar[bool] = False
    body: bytes
    jti: str
    epoch: int
    expires_at: int
    live: bool
    current: Callable[[], bool] | None = None
    evidence: tuple[Facts, ...] = ()

    def apply(self, tx: Transaction) -> int:
        """See the class. Raises: Refused SUPERSEDED where what it was decided on has changed."""
        if self.current is not None and not self.current():
            raise Refused(Reason.SUPERSEDED, "what it was decided on changed before it could be recorded")
        seq = tx.add(self.body)
        if self.live:
            tx.credentials.append((seq, self.jti, self.epoch, self.expires_at))
            for facts in self.evidence:
                tx.connection.execute(
                    "INSERT INTO evidence VALUES (?, ?, ?, ?)",
                    (seq, facts.attestor, msgspec.json.encode(Evidence.of(facts)), self.expires_at),
                )
        tx.opened[seq] = self.expires_at
        return seq


class AppendOutcome(Struct, frozen=True, gc=False):
    """Adds the outcome of an intent, which is then no longer open."""

    covered: ClassVar[bool] = False
    body: bytes
    intent: int

    def apply(self, tx: Transaction) -> int:
        """See the class."""
        tx.closed.append(self.intent)
        return tx.add(self.body)


class FindCredential(Struct, frozen=True, gc=False):
    """The credential with this id, if it counts in the current epoch."""

    covered: ClassVar[bool] = False
    jti: str

    def apply(self, tx: Transaction) -> CredentialRow | None:
        """See the class."""
        found = tx.connection.execute(
            "SELECT c.seq, c.epoch, body, redeemed_at FROM credentials c JOIN records r ON r.seq = c.seq"
            " LEFT JOIN redemptions d ON d.jti = c.jti WHERE c.jti = ?",
            (self.jti,),
        ).fetchone()
        if found is None or found[1] != tx.epoch:
            return None
        intent = records.decode(found[2])
        if not isinstance(intent, records.Intent) or intent.jti != self.jti:
            raise Refused(
                Reason.REVOKED, "the credential's row leads to no intent of its own: run `action-broker ledger verify`"
            )
        return CredentialRow(
            jti=self.jti,
            seq=found[0],
            epoch=found[1],
            expires_at=intent.expires_at,
            intent=intent,
            redeemed_at=None if found[3] is None else moment(found[3]),
        )


class BindKey(Struct, frozen=True, gc=False):
    """Binds the first key seen with an assertion to it: the bound key's thumbprint, whoever's it is."""

    covered: ClassVar[bool] = True
    assertion_sha256: bytes
    jkt: str
    expires_at: datetime
    now: datetime
    correlation_id: str

    def apply(self, tx: Transaction) -> str:
        """See the class. Raises: Refused EXPIRED where its binding may have been forgotten."""
        found = tx.connection.execute(
            "SELECT jkt FROM bindings WHERE assertion = ?", (self.assertion_sha256,)
        ).fetchone()
        if found is not None:
            return str(found[0])
        expires_at = seconds_up(self.expires_at)
        if expires_at <= int(tx.connection.execute("SELECT bindings_forgotten FROM ledger").get):
            # It had expired when others like it were forgotten, and now has not: the clock went back.
            raise Refused(
                Reason.EXPIRED, "the JWT-SVID may have been used before the clock was set back: fetch a new one"
            )
        record = records.KeyBound(
            at=self.now,
            correlation_id=self.correlation_id,
            assertion_sha256=self.assertion_sha256.hex(),
            jkt=self.jkt,
            expires_at=self.expires_at,
        )
        tx.cover = tx.add(records.encode(record))
        tx.connection.execute(
            "INSERT INTO bindings VALUES (?, ?, ?, ?)",
            (tx.cover, self.assertion_sha256, self.jkt, expires_at),
        )
        return self.jkt


class PublishKey(Struct, frozen=True, gc=False):
    """Keeps the signed record of a public key; a second one of the same `kid` replaces the first."""

    covered: ClassVar[bool] = False
    kid: str
    record: bytes
    serve_until: datetime
    now: datetime

    def apply(self, tx: Transaction) -> None:
        """See the class."""
        published = records.KeyPublished(
            at=self.now,
            kid=self.kid,
            record_sha256=hashlib.sha256(self.record).hexdigest(),
            serve_until=self.serve_until,
        )
        tx.add(records.encode(published))
        tx.connection.execute(
            "INSERT OR REPLACE INTO keys VALUES (?, ?, ?)", (self.kid, self.record, seconds_up(self.serve_until))
        )


class RetireKeys(Struct, frozen=True, gc=False):
    """Serves the keys there are until `serve_until` at the latest, and of them the last retired `keep` at most."""

    covered: ClassVar[bool] = False
    serve_until: datetime
    keep: int

    def apply(self, tx: Transaction) -> None:
        """See the class."""
        tx.connection.execute("UPDATE keys SET expires_at = min(expires_at, ?)", (seconds_up(self.serve_until),))
        tx.connection.execute(
            "DELETE FROM keys WHERE kid NOT IN (SELECT kid FROM keys ORDER BY expires_at DESC LIMIT ?)", (self.keep,)
        )


class FindKeys(Struct, frozen=True, gc=False):
    """The records of all keys that are still served, in order of `kid`."""

    covered: ClassVar[bool] = False
    now: datetime

    def apply(self, tx: Transaction) -> tuple[bytes, ...]:
        """See the class."""
        rows = tx.connection.execute(
            "SELECT record FROM keys WHERE expires_at > ? ORDER BY kid", (self.now.timestamp(),)
        )
        return tuple(row[0] for row in rows)


class Maintain(Struct, frozen=True, gc=False):
    """Deletes a few expired index rows, and gives intents whose credential ended without outcome theirs: "unknown".

    probe: also writes, to see whether the store can be written again. Its answer: whether more is to be deleted.
    Only the oldest rows are looked at: one that lives longer shields those behind it, at most for its own lifetime.
    The clock may go ahead and back: a redemption stays as long as its credential, which is then unknown, so refused;
    how long the bindings and credentials lived that are gone is remembered: no assertion that ends before that is bound
    anew, and a start before that serves no earlier key, since what was refused may be forgotten (recovery.py).
    """

    covered: ClassVar[bool] = False
    now: datetime
    probe: bool = False

    def apply(self, tx: Transaction) -> bool:
        """See the class."""
        if self.probe:
            tx.connection.execute("UPDATE ledger SET seq = seq")
        before = int(self.now.timestamp()) - KEEP_S
        more = False
        for table, prunable in {
            "credentials": "expires_at < ?1",
            "redemptions": "expires_at < ?1 AND NOT EXISTS (SELECT 1 FROM credentials c WHERE c.jti = redemptions.jti)",
            "bindings": "expires_at < ?1",
            "answers": "expires_at < ?1 AND NOT EXISTS (SELECT 1 FROM redemptions r WHERE r.jti = answers.jti)",
            "approval_requests": "expires_at < ?1",
            "approvals": "expires_at < ?1",
            # That approvals are used up is known as long as one of them could count, or be asked for.
            "consumptions": "expires_at < ?1"
            " AND NOT EXISTS (SELECT 1 FROM approvals a WHERE a.digest = consumptions.digest)"
            " AND NOT EXISTS (SELECT 1 FROM approval_requests r WHERE r.digest = consumptions.digest)",
        }.items():
            gone = tx.connection.execute(
                f"DELETE FROM {table} WHERE seq IN (SELECT seq FROM {table} ORDER BY seq LIMIT {PRUNE_ROWS})"  # noqa: S608 - texts from the lines above
                f" AND {prunable} RETURNING expires_at",
                (before,),
            ).fetchall()
            more |= len(gone) == PRUNE_ROWS
            if gone and table in ("bindings", "credentials"):
                column = f"{table}_forgotten"
                tx.connection.execute(f"UPDATE ledger SET {column} = max({column}, ?)", max(gone))  # noqa: S608 - ours
        more |= sessions.prune(tx.connection, before, PRUNE_ROWS)
        for table in ("keys", "refused", "evidence"):
            tx.connection.execute(f"DELETE FROM {table} WHERE expires_at < ?", (before,))  # noqa: S608 - ours
        for seq, expires_at in tx.open.items():
            if expires_at >= before or len(tx.closed) >= PRUNE_ROWS:
                break
            if seq not in tx.closed:
                close_as_unknown(tx, seq, self.now)
        return more


def close_as_unknown(tx: Transaction, intent: int, now: datetime) -> None:
    """Adds the outcome "unknown" of an intent."""
    outcome = records.Outcome(at=now, intent=intent, result="unknown")
    AppendOutcome(body=records.encode(outcome), intent=intent).apply(tx)


def moment(since_1970: int) -> datetime:
    """Aware UTC, from microseconds since 1970."""
    return datetime.fromtimestamp(since_1970 // 1_000_000, UTC).replace(microsecond=since_1970 % 1_000_000)
