"""The thread's half of the store: owns the connection, commits groups of operations, keeps the outside checkpoint.

Synchronous, and used by one thread at a time. What is in memory (the head, the open intents) changes only after the
commit that it describes; after a commit of unknown fate it is read again from the file.

Which window remains behind the outside checkpoint: an answer to what is `covered` (what uses a credential or approvals
up, takes an approval back, or binds a key) leaves only after a checkpoint covers it, so a store that was put back and
lacks one is always seen. Any other record may be up to `every_s` (1 s) older than its checkpoint, or older while the
checkpoint cannot be written, which `problem` says. A store put back to within that window lacks intents, approvals and
stored answers at most: what is unknown is refused where the store is asked.
"""

import contextlib
import os
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path

import apsw

from broker.errors import Reason, Refused, Unavailable
from broker.ledger import recovery, schema
from broker.ledger.checkpoint import Checkpointer
from broker.ledger.operations import Operation
from broker.ledger.schema import unavailable
from broker.ledger.transaction import Head, Transaction


class Writer:
    """Opens the store and recovers it: see recovery.py for what that adds.

    clock: aware UTC now, for records that the broker writes by itself. ticks: seconds of a clock that only goes on.
    every_s: the outside checkpoint is written at most this often, apart from answers that wait for it.

    Raises: Unavailable, saying what to do, when the store is in use, damaged or not writable, or its checkpoint cannot
    be verified. Holds: the lock file, the connection; `close` gives both back.
    """

    def __init__(
        self,
        path: Path,
        checkpointer: Checkpointer,
        clock: Callable[[], datetime],
        ticks: Callable[[], float],
        every_s: float,
    ) -> None:
        self._path, self._checkpointer, self._clock, self._ticks, self._every_s = (
            path,
            checkpointer,
            clock,
            ticks,
            every_s,
        )
        self.store_problem: str | None = None
        self.checkpoint_problem: str | None = None
        self.checkpointed = 0
        self._to_cover = 0
        self._tried_at = ticks()
        self._attempted: Head | None = None  # set while the fate of a commit is unknown
        try:
            self._lock = schema.lock(path)
            try:
                self._connect_and_recover()
            except BaseException:
                os.close(self._lock)
                raise
        except (apsw.Error, OSError) as error:
            raise unavailable(f"cannot open the ledger {path}: {error}; see `action-broker doctor`") from error

    def _connect_and_recover(self) -> None:
        self._connection = schema.open_writable(self._path)
        try:
            self.ledger_id, self.head, self.open = recovery.load(self._connection, self._path)
            last = self._checkpointer.read()
            tx = self._begin()
            with self._connection:
                recovery.restore_index(self._connection, self._path, self._clock())
                recovery.recover(tx, self.ledger_id, last, self._clock())
                tx.flush()
            self._settle(tx)
            self._checkpoint()  # before any answer: from now on this store is the one that counts
        except BaseException:
            self._connection.close(True)
            raise

    @property
    def problem(self) -> str | None:
        """Why nothing, or not everything, can be recorded now; None when all is well."""
        return self.store_problem or self.checkpoint_problem

    def commit(self, group: Sequence[Operation]) -> list[object]:
        """Does all of `group` in one transaction: for each its answer, or the BrokerError it ends in.

        An operation that conflicts with a row already there fails alone; a full disk or another fault of the store
        fails the group, changes nothing, and is tried anew with the next group.
        """
        try:
            answers = self._attempt(group)
        except apsw.ConstraintError as error:
            if len(group) > 1:
                return [self.commit([operation])[0] for operation in group]
            return [Refused(Reason.ALREADY_USED, f"already recorded: {error}")]
        except (apsw.Error, OSError, Unavailable) as error:
            self.store_problem = f"the ledger {self._path} cannot be written: {error}"
            return [unavailable(self.store_problem) for _ in group]  # one each: raising an error changes it
        self.store_problem = None
        return self._cover(group, answers)

    def _attempt(self, group: Sequence[Operation]) -> list[object]:
        if self._attempted is not None:
            self._reconnect(self._attempted)
        tx = self._begin()
        self._connection.execute("BEGIN")
        try:
            answers = [_apply(operation, tx) for operation in group]
            tx.flush()
            self._attempted = tx.reached()
            self._connection.execute("COMMIT")
        except apsw.Error as error:
            with contextlib.suppress(apsw.Error):
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
            if isinstance(error, apsw.ConstraintError | apsw.FullError) and not self._connection.in_transaction:
                self._attempted = None  # rolled back for certain
            else:
                self._attempted = tx.reached()
            raise
        except BaseException:
            self._connection.execute("ROLLBACK")
            self._attempted = None
            raise
        self._attempted = None
        self._settle(tx)
        return answers

    def _begin(self) -> Transaction:
        return Transaction(
            connection=self._connection,
            seq=self.head.seq,
            head=self.head.hash,
            epoch=self.head.epoch,
            since=self.head.since,
            standing=self.head.standing,
            open=self.open,
        )

    def _settle(self, tx: Transaction) -> None:
        if tx.records:
            self.head = tx.reached()
            self.open.update(tx.opened)
            for seq in tx.closed:
                self.open.pop(seq, None)
        self._to_cover = max(self._to_cover, tx.cover)

    def _reconnect(self, attempted: Head) -> None:
        """After a fault: what the file says now must be what we knew, with or without the last group."""
        self._connection.close(True)
        self._connection = schema.open_writable(self._path)
        _, head, still_open = recovery.load(self._connection, self._path)
        if head not in (self.head, attempted):
            raise unavailable("the store was changed by somebody else while it was open: restart the broker")
        self.head, self.open, self._attempted = head, still_open, None

    def _cover(self, group: Sequence[Operation], answers: list[object]) -> list[object]:
        if self._to_cover <= self.checkpointed or not any(operation.covered for operation in group):
            return answers
        try:
            self._checkpoint()
        except Unavailable as error:
            return [
                unavailable(error.detail) if operation.covered else answer
                for operation, answer in zip(group, answers, strict=True)
            ]
        return answers

    def checkpoint_if_due(self) -> None:
        """Writes the outside checkpoint if there is something new and the last try was long enough ago."""
        if self.head.seq > self.checkpointed and self._ticks() - self._tried_at >= self._every_s:
            with contextlib.suppress(Unavailable):  # `problem` says it
                self._checkpoint()

    def _checkpoint(self) -> None:
        self._tried_at = self._ticks()
        try:
            self._checkpointer.write(self.head.seq, self.head.hash, self.head.epoch, self._clock())
        except OSError as error:
            self.checkpoint_problem = (
                f"the checkpoint {self._checkpointer.out_file} cannot be written: {error.strerror}"
            )
            raise unavailable(self.checkpoint_problem) from error
        self.checkpoint_problem, self.checkpointed = None, self.head.seq

    def close(self) -> None:
        """Writes the last checkpoint and gives everything back."""
        try:
            if self.head.seq > self.checkpointed:
                with contextlib.suppress(Unavailable):  # a store that is ahead of its checkpoint is no harm
                    self._checkpoint()
        finally:
            self._connection.close(True)
            os.close(self._lock)


def _apply(operation: Operation, tx: Transaction) -> object:
    try:
        return operation.apply(tx)
    except Refused as refused:
        return refused
