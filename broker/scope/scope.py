"""What the flow asks of scope: may this be recorded, does that still count. No I/O.

A credential goes through it so:

    heard ──► look at facts, decide ──► enter ──► intent durable ──► confirm ──► sign
                                          │ changed since `heard`?     │ changed since `enter`?
                                          └── superseded               └── superseded

From `enter` on, a change finds it. `Live.is_current` is looked at once more inside the transaction that makes the
intent durable, so that one which commits was decided on what then was still current.
"""

import asyncio
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Final

from attestors.contract import AttestationFailed, AttestationUnavailable, FactKey, Process
from broker.decision.obligations import LONGEST_TTL
from broker.errors import Reason, Refused, Unavailable
from broker.scope.changes import Changes
from broker.scope.live import Live, LiveSet
from broker.scope.standing import Standing
from broker.scope.steady import Steady
from broker.scope.suspension import Suspension

GRACE_S: Final = 10.0
"""How long after its expiry a refusal is kept: leeway of guards (5 s) and skew of their clocks (5 s)."""
LONGEST_S: Final = LONGEST_TTL.total_seconds() + GRACE_S
"""After so long nothing is left to refuse, whatever the clock did: no credential lives longer than that."""

Follow = Callable[[Process], None]


def _follow_nothing(_: Process) -> None:
    """Where no process is watched."""


class Scope:
    """One for each broker process.

    follow: watches a process from now on; raises AttestationFailed where it is gone or another. told: is called with
    each fact key that changed, or may have.
    """

    def __init__(self) -> None:
        self.live = LiveSet()
        self.standing = Standing()
        self.follow: Follow = _follow_nothing
        self.told: Callable[[FactKey], None] = lambda _: None
        self.entered_while_suspended: Callable[[Suspension, Live], None] = lambda *_: None
        self.suspensions: dict[int, Suspension] = {}
        self._changes = Changes()
        self._steady = Steady(LONGEST_S)
        self._refused: dict[str, tuple[Reason, float]] = {}  # and until when, by the event loop; in that order

    @property
    def heard(self) -> int:
        """How many changes were heard of. Read it before the first look at any fact."""
        return self._changes.heard

    def tell(self, key: FactKey) -> None:
        """The fact changed, or may have. What is about to be recorded on it will not be."""
        self._changes.note(key, asyncio.get_running_loop().time())
        for live in self.live.dependents(key):
            if not live.seq:
                live.changed = True
        self.told(key)

    def changed_since(self, heard: int, keys: Iterable[FactKey]) -> bool:
        """Whether one of these changed, or may have, after the first `heard` changes."""
        return self._changes.any_since(heard, keys)

    def enter(self, live: Live, heard: int, now: datetime) -> None:
        """It was decided on what was so after `heard` changes, and is about to be recorded.

        Raises: Refused with SUPERSEDED where something changed since; with NOT_ATTESTED where its process is gone; with
        REVOKED where a denial stands against it. Unavailable.
        """
        self._steady.at(now, asyncio.get_running_loop().time())
        self.standing.require(live.principal, live.action, now)
        if self._changes.any_since(heard, live.keys):
            raise Refused(Reason.SUPERSEDED, "what it was decided on changed meanwhile")
        if live.parent:
            self.require(live.parent)
        if live.process is not None:
            self.keep_following(live.process)
        self.live.add(live)

    def keep_following(self, process: Process) -> None:
        """Watches the process of a credential. Raises: Refused(NOT_ATTESTED), Unavailable."""
        try:
            self.follow(process)
        except AttestationFailed as error:
            raise Refused(Reason.NOT_ATTESTED, str(error)) from error
        except AttestationUnavailable as error:
            raise Unavailable(Reason.ATTESTATION_UNAVAILABLE, str(error)) from error

    def confirm(self, live: Live, seq: int) -> None:
        """Its intent is durable. Raises: Refused(SUPERSEDED), and forgets it, where something changed meanwhile."""
        if live.changed:
            self.leave(live)
            raise Refused(Reason.SUPERSEDED, "what it was decided on changed while it was recorded")
        live.seq = seq
        for suspension in self.suspensions.values():
            if suspension.fits(live):  # named with others by what they have in common, and decided after them
                self.entered_while_suspended(suspension, live)

    def leave(self, live: Live) -> None:
        """Nothing came of it."""
        self.live.remove(live.jti)

    def require(self, jti: str) -> None:
        """Raises: Refused where the credential is refused for good, Unavailable(SUSPENDED) where that is being decided.

        Not checked: that there is one with this id; the ledger knows.
        """
        found = self._refused.get(jti)
        if found is not None:
            raise Refused(found[0], "refused since: its reasons ended")
        if any(jti in one.waiting for one in self.suspensions.values()):
            raise Unavailable(Reason.SUSPENDED, "something it rests on changed, and it is being decided again")

    def is_refused(self, jti: str) -> bool:
        """Whether it is refused for good."""
        return jti in self._refused

    def refuse(self, lives: Iterable[Live], reason: Reason) -> list[Live]:
        """From now on they are refused here; those that were not before. Whoever calls it records and tells it."""
        found = [one for one in lives if one.jti not in self._refused]
        for one in found:
            self._refused[one.jti] = reason, LONGEST_S + asyncio.get_running_loop().time()
            one.changed = True
        return found

    def supersede(self, entering: Iterable[Live]) -> None:
        """These are about to be recorded, and what they were decided on holds no more: nothing comes of them."""
        for live in entering:
            live.changed = True

    def lift(self, entry_id: str) -> None:
        """A standing denial or a permit counts no more; what a permit gave is decided again."""
        self.standing.remove(entry_id)
        self.tell(FactKey(f"standing:{entry_id}"))

    def withdrawn(self, approval: str, by: str) -> None:
        """Who approved the request with this digest took that back: a permit that it gave counts no more."""
        for permit in self.standing.given_by(approval, by):
            self.lift(permit.id)

    def restore(self, jti: str, reason: Reason) -> None:
        """It was refused before this process started."""
        self._refused[jti] = reason, LONGEST_S + asyncio.get_running_loop().time()

    def forget(self, now: datetime) -> None:
        """Forgets what has ended. What stood until now and gave credentials is told as changed.

        No more of it than time has passed by a clock that never jumps (steady.py). A refusal is forgotten by that clock
        alone, when nothing that was given before it can still live: were it forgotten by `now`, a clock that goes ahead
        and back would make its credential good again.
        """
        monotonic = asyncio.get_running_loop().time()
        now = self._steady.at(now, monotonic)
        self.live.forget(now)
        while self._refused and next(iter(self._refused.values()))[1] <= monotonic:
            del self._refused[next(iter(self._refused))]
        for entry in self.standing.forget(now):
            self.tell(FactKey(f"standing:{entry.id}"))
