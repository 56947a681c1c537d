"""The ledger as the rest of the broker sees it: await an append, and it is on the disk.

Cancelling who awaits does not cancel what was asked: it is done whole, or, when the store fails, not at all.
"""

import asyncio
import contextlib
import hashlib
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import msgspec
import structlog

from attestors.contract import Facts
from broker.errors import Reason, Refused, Unavailable
from broker.ledger import approvals, operations, records, spending
from broker.ledger.approvals import ApprovalRow, ApprovalSeen, Counted
from broker.ledger.checkpoint import Checkpointer
from broker.ledger.group import GroupCommit, Limits
from broker.ledger.operations import CredentialRow, Operation
from broker.ledger.spending import Redeemed, Spent
from broker.ledger.writer import Writer

Current = Callable[[], bool]
_log = structlog.get_logger(__name__)
_DEFAULT_LIMITS = Limits()


class Ledger:
    """One open store. Make it with `open`; every method belongs to the event loop that did.

    Every method that waits raises Unavailable(LEDGER_UNAVAILABLE) when the store cannot be written or too much waits
    already; the next call tries again by itself.

    Holds: a thread, the store's lock, timers; `close` (or `async with`) gives them back.
    """

    def __init__(self, writer: Writer, clock: Callable[[], datetime], limits: Limits) -> None:
        self._writer, self._clock, self._limits = writer, clock, limits
        self._loop = asyncio.get_running_loop()
        self._groups = GroupCommit(writer, limits)
        self._counts: Counter[Reason] = Counter()
        self._counted_since = clock()
        self._counts_due = self._loop.time() + limits.counts_s
        self._subscribers: dict[Callable[[str], None], bool] = {}
        self._noted = 0
        self._closed = False
        self._timer = self._loop.call_later(limits.maintain_s, self._tick)

    @classmethod
    async def open(
        cls,
        path: Path,
        *,
        checkpoint: Checkpointer,
        clock: Callable[[], datetime],
        limits: Limits = _DEFAULT_LIMITS,
    ) -> Self:
        """Opens or makes the store at `path` and recovers it.

        A store that is behind its outside checkpoint, has another history, or has records and no checkpoint starts a
        new epoch: no credential of an earlier one counts (DESIGN invariant 7). Intents that were left without outcome
        get "unknown".

        Raises: Unavailable, saying what to do, when it is open elsewhere, damaged or not writable, or when the
        checkpoint cannot be verified.
        """
        writer = await asyncio.to_thread(Writer, path, checkpoint, clock, time.monotonic, limits.maintain_s)
        return cls(writer, clock, limits)

    @property
    def epoch(self) -> int:
        """Which epoch an intent belongs to now."""
        return self._writer.head.epoch

    @property
    def size(self) -> int:
        """How many records are durable."""
        return self._writer.head.seq

    @property
    def epoch_since(self) -> datetime:
        """When the epoch started. After a restore, key bindings of assertions issued before it may be lost."""
        return operations.moment(self._writer.head.since)

    def health(self) -> str | None:
        """Why not everything can be recorded now; None when all is well."""
        return self._writer.problem

    async def append(self, record: records.Record) -> int:
        """Its sequence number, once it is durable. Raises: Unavailable; Refused(ALREADY_USED) for a `jti` known."""
        return cast("int", await self._groups.submit(self._operation(record)))

    def submit(self, operation: Operation, *, uses: str = "") -> asyncio.Future[Any]:
        """Its answer, once it is durable: for the parts of the ledger that have files of their own.

        uses: the digest of the request whose approvals it uses up.
        """
        future = self._groups.submit(operation)
        if uses:
            future.add_done_callback(lambda done: self._tell(done, uses, use=True))
        return future

    def record_intent(
        self, intent: records.Intent, *, current: Current | None = None, evidence: tuple[Facts, ...] = ()
    ) -> asyncio.Future[int]:
        """The same, typed for what must be awaited before a key is used (DESIGN invariant 1).

        The credential is live from then on: `credential` finds it, `redeem` uses it up. A future, so that who goes away
        can still learn what became of it: shield it. What `append` raises is raised here or when it is awaited; also
        Refused APPROVAL_REQUIRED where the approvals that it uses up gave another credential, or one of them counts no
        more. The intent that uses up approvals is covered by a checkpoint outside, too, before it is there.
        current: whether what it was decided on still holds, read in the ledger's thread; where not, Refused SUPERSEDED.
        evidence: facts of it that nobody can look at again, to be kept as long as it lives.
        """
        step = self._append_intent(intent, records.encode(intent), current, evidence)
        return self.submit(step, uses=intent.approval)

    def append_later(self, record: records.Record) -> None:
        """With the next commit, at most 10 ms from now; kept while the store cannot be written.

        Where too much waits it is lost: a refusal is then counted, an outcome becomes "unknown" after expiry.
        A change of policy comes before every intent that is recorded after this call.
        """
        if self._groups.submit_later(self._operation(record)):
            return
        if isinstance(record, records.Refusal):
            self.count_refusal(record.reason)
        else:
            _log.warning("ledger_record_lost", record=type(record).__name__, correlation_id=record.correlation_id)

    def count_refusal(self, reason: Reason, n: int = 1) -> None:
        """Counts what strangers were refused: one record at most every 10 s, whatever they send."""
        self._counts[reason] += n

    def _operation(self, record: records.Record) -> Operation:
        body = records.encode(record)
        if isinstance(record, records.Intent):
            return self._append_intent(record, body)
        if isinstance(record, records.Outcome):
            return operations.AppendOutcome(body=body, intent=record.intent)
        if isinstance(record, records.PolicyChanged):
            return operations.AppendAhead(body=body)
        return operations.Append(body=body)

    def _append_intent(
        self, intent: records.Intent, body: bytes, current: Current | None = None, evidence: tuple[Facts, ...] = ()
    ) -> operations.AppendIntent:
        if intent.epoch != self.epoch:
            raise ValueError("an intent is of the ledger's own epoch: read `epoch` when deciding")
        return approvals.append_intent(intent, body, current, evidence)

    async def credential(self, jti: str) -> CredentialRow | None:
        """The credential with this id if it counts in this epoch, until 60 s after its expiry. Not checked: expiry."""
        return cast("CredentialRow | None", await self._groups.submit(operations.FindCredential(jti=jti)))

    async def redeem(
        self,
        jti: str,
        idempotency_id: str,
        caller: str,
        content_sha256: bytes,
        *,
        now: datetime,
        correlation_id: str,
        counted: Counted | None = None,
    ) -> Redeemed:
        """Uses the credential up: once in the world (DESIGN invariant 7).

        content_sha256: of what the caller asked to redeem. The same caller, id and content get the first answer again
        until the credential expires. The answer is durable, and covered by a checkpoint outside, before it returns.
        counted: where it was decided again on approvals.

        Raises: Refused ALREADY_USED; EXPIRED; REVOKED where the store knows no such credential of this epoch;
        APPROVAL_REQUIRED.
        """
        question = spending.Question(
            jti=jti, caller=caller, idempotency_id=idempotency_id, content_sha256=content_sha256, now=now
        )
        operation = spending.Redeem(question=question, correlation_id=correlation_id, counted=counted)
        return cast("Redeemed", await self._groups.submit(operation))

    async def spend(  # noqa: PLR0913 -- a question, and what is recorded where it is the first
        self,
        jti: str,
        idempotency_id: str,
        caller: str,
        content_sha256: bytes,
        *,
        intent: records.Intent | None,
        now: datetime,
        correlation_id: str,
        current: Current | None = None,
        evidence: tuple[Facts, ...] = (),
    ) -> Spent:
        """Uses a grant up and records the intent of what it is spent on, both or neither: once in the world.

        intent: its `parent` is `jti`; None where the grant is spent by a refusal. Asked again by the same caller with
        the same id and content it records nothing, and has the stored answer if there is one. Durable, and covered by a
        checkpoint outside, before it returns.

        Raises: as `redeem`, and Refused APPROVAL_REQUIRED as `record_intent`.
        """
        if intent is not None and intent.parent != jti:
            raise ValueError("the parent of an intent is the grant that is spent on it")
        question = spending.Question(
            jti=jti, caller=caller, idempotency_id=idempotency_id, content_sha256=content_sha256, now=now
        )
        appended = None if intent is None else self._append_intent(intent, records.encode(intent), current, evidence)
        operation = spending.Spend(question=question, intent=appended, correlation_id=correlation_id)
        future = self.submit(operation, uses="" if intent is None else intent.approval)
        return cast("Spent", await asyncio.shield(future))  # who asked may go away; who waits is told all the same

    async def find_answer(
        self, jti: str, idempotency_id: str, caller: str, content_sha256: bytes, now: datetime
    ) -> bytes | None:
        """The answer that was stored for this very question; None while nobody has spent the grant.

        Raises: as `redeem`; Refused ALREADY_USED also where it was spent and no answer was stored.
        """
        question = spending.Question(
            jti=jti, caller=caller, idempotency_id=idempotency_id, content_sha256=content_sha256, now=now
        )
        return cast("bytes | None", await self._groups.submit(spending.FindAnswer(question=question)))

    async def store_answer(self, jti: str, answer: bytes, outcome: records.Outcome) -> None:
        """Keeps the answer of a spent grant until the grant has expired, with the outcome, durably.

        answer: public values only; it lies in the store as it is. outcome: of the intent that was recorded with the
        spend; the answer's hash is added to it.

        Raises: Refused REVOKED where the grant is not spent, ALREADY_USED where it has an answer.
        """
        hashed = msgspec.structs.replace(outcome, answer_sha256=hashlib.sha256(answer).hexdigest())
        await self._groups.submit(
            spending.StoreAnswer(body=records.encode(hashed), intent=outcome.intent, jti=jti, answer=answer)
        )

    # -- approvals ---------------------------------------------------------------------------------------------------

    def subscribe_approvals(self, callback: Callable[[str], None], *, uses: bool = True) -> Callable[[], None]:
        """Calls back with a request's digest after each change of it here that is durable. Not told: what expires.

        uses: also where its approvals were used up, which changes nothing for what used them. Returns what ends it.
        """
        self._subscribers[callback] = uses

        def end() -> None:
            self._subscribers.pop(callback, None)

        return end

    async def ask_approval(self, asked: records.ApprovalAsked) -> None:
        """Keeps a request for approvers to see. The same one again is kept longer, or changes nothing.

        Raises: Refused QUOTA where 64 of its principal wait, ALREADY_USED where its approvals gave a credential.
        """
        _require_short_lived(asked)
        await self._change(approvals.Ask(asked=asked, body=records.encode(asked)), asked.request_digest)

    async def approval_request(self, digest: str) -> ApprovalRow | None:
        """The request with this digest, until 60 s after its expiry. Not checked: expiry."""
        return cast("ApprovalRow | None", await self._groups.submit(approvals.FindRequest(digest=digest)))

    async def pending(self, now: datetime) -> tuple[ApprovalRow, ...]:
        """The requests that wait, the oldest first, at most 1,000."""
        return cast("tuple[ApprovalRow, ...]", await self._groups.submit(approvals.FindPending(now=now)))

    async def approve(self, approved: records.Approved) -> ApprovalSeen:
        """Keeps an approval; another one by the same approver takes its place. Not checked: who it is.

        Raises: Refused EXPIRED where no such request waits, ALREADY_USED where its approvals gave a credential.
        """
        _require_short_lived(approved)
        operation = approvals.Approve(approved=approved, body=records.encode(approved))
        return cast("ApprovalSeen", await self._change(operation, approved.request_digest))

    async def withdraw(self, withdrawn: records.ApprovalWithdrawn) -> bool:
        """Takes an approval back: it counts no more, for what it gave neither. False, and no record, where none did.

        Durable, and covered by a checkpoint outside, before it returns.
        """
        operation = approvals.Withdraw(withdrawn=withdrawn, body=records.encode(withdrawn))
        return cast("bool", await self._change(operation, withdrawn.request_digest))

    async def approvals(self, digest: str, now: datetime, credential: str) -> tuple[ApprovalSeen, ...]:
        """The approvals that count; none where they gave another credential than `credential` (its `jti`, or "")."""
        operation = approvals.FindApprovals(digest=digest, credential=credential, now=now)
        return cast("tuple[ApprovalSeen, ...]", await self._groups.submit(operation))

    def _change(self, operation: Operation, digest: str) -> asyncio.Future[Any]:
        future = self._groups.submit(operation)
        future.add_done_callback(lambda done: self._tell(done, digest))
        return asyncio.shield(future)  # who asked may go away; who waits is told all the same

    def _tell(self, done: asyncio.Future[Any], digest: str, *, use: bool = False) -> None:
        """Also where it failed: a commit whose checkpoint could not be written has changed it all the same."""
        if done.cancelled() or isinstance(done.exception(), Refused):
            return
        for callback, uses in tuple(self._subscribers.items()):
            if uses or not use:
                self._loop.call_soon(callback, digest)

    async def bind_key(
        self, assertion_sha256: bytes, jkt: str, expires_at: datetime, *, now: datetime, correlation_id: str
    ) -> str:
        """The thumbprint of the key that the assertion is bound to, durably: `jkt` if it is the first, else another's.

        expires_at: the assertion's own; the binding is kept at least so long.
        """
        operation = operations.BindKey(
            assertion_sha256=assertion_sha256, jkt=jkt, expires_at=expires_at, now=now, correlation_id=correlation_id
        )
        return cast("str", await self._groups.submit(operation))

    async def publish_key(self, kid: str, record: bytes, serve_until: datetime, now: datetime) -> None:
        """Keeps the SVID-signed record of a public key, durably; a second one of the same `kid` replaces the first."""
        await self._groups.submit(operations.PublishKey(kid=kid, record=record, serve_until=serve_until, now=now))

    async def retire_keys(self, serve_until: datetime, keep: int) -> None:
        """Serves the keys there are until `serve_until` at the latest, and `keep` of them at most, durably."""
        await self._groups.submit(operations.RetireKeys(serve_until=serve_until, keep=keep))

    async def published_keys(self, now: datetime) -> Sequence[bytes]:
        """All records whose `serve_until` has not passed. Not checked: their signatures; credentials/ does."""
        return cast("tuple[bytes, ...]", await self._groups.submit(operations.FindKeys(now=now)))

    def _tick(self) -> None:
        self._timer = self._loop.call_later(self._limits.maintain_s, self._tick)
        now = self._clock()
        if self._loop.time() >= self._counts_due:
            self._counts_due = self._loop.time() + self._limits.counts_s
            self._write_counts(now)
            size = self._writer.checkpointed
            if size > self._noted:  # something was recorded since the last note of this kind, beyond the note itself
                note = operations.AppendNote(note=records.Checkpointed(at=now, size=size))
                self._submit(note, self._checkpoint_noted)
        self._maintain(now)

    def _write_counts(self, now: datetime) -> None:
        if self._counts:
            counted = records.CountedRefusals(at=now, since=self._counted_since, counts=dict(self._counts))
            self._counts.clear()
            self.append_later(counted)
        self._counted_since = now

    def _maintain(self, now: datetime) -> None:
        operation = operations.Maintain(now=now, probe=self._writer.store_problem is not None)
        self._submit(operation, lambda more: self._maintain(now) if more and not self._closed else None)

    def _checkpoint_noted(self, seq: int) -> None:
        self._noted = seq

    def _submit(self, operation: Operation, then: Callable[[Any], None]) -> None:
        def done(future: asyncio.Future[Any]) -> None:
            if not future.cancelled() and future.exception() is None:  # what failed comes again with the next tick
                then(future.result())

        with contextlib.suppress(Unavailable):
            self._groups.submit(operation).add_done_callback(done)

    async def close(self) -> None:
        """Writes down what is still in memory, that the broker stopped, and the last checkpoint."""
        if self._closed:
            return
        self._closed = True
        self._timer.cancel()
        now = self._clock()
        self._write_counts(now)
        self.append_later(records.Stopped(at=now))
        await self._groups.close()
        await asyncio.to_thread(self._writer.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


def _require_short_lived(record: records.ApprovalAsked | records.Approved) -> None:
    if record.expires_at - record.at > records.MAX_APPROVAL:
        raise ValueError("an approval, or a request for some, counts for a day at most")
