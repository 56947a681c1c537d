"""Suspends credentials until they have been decided again: here and at guards at once, and not for good."""

import asyncio
import itertools
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Protocol

from broker.ledger.records import Suspended, SuspensionEnded
from broker.scope.feed import Feed
from broker.scope.live import Live
from broker.scope.refusing import Refusing
from broker.scope.scope import Scope
from broker.scope.suspension import BY_NAME, Common, Suspension


class Noter(Protocol):
    """The ledger, as far as this needs it."""

    def append_later(self, record: Suspended | SuspensionEnded) -> None:
        """With the next commit."""


class Suspending:
    """One for each broker process."""

    def __init__(
        self, scope: Scope, noter: Noter, feed: Feed, refusing: Refusing, clock: Callable[[], datetime]
    ) -> None:
        self._scope, self._noter, self._feed, self._refusing, self._clock = scope, noter, feed, refusing, clock
        self._numbers = itertools.count(1)
        scope.entered_while_suspended = self._released_at_once

    def begin(self, cause: str, lives: Sequence[Live], common: Common | None) -> Suspension:
        """They are refused until each is decided. Told at once; it is not final, so nothing waits for the store."""
        suspension = Suspension.of(next(self._numbers), cause, lives, common or self._one_caller(lives))
        self._scope.suspensions[suspension.id] = suspension
        self._feed.suspend(suspension)
        self._noter.append_later(Suspended(at=self._clock(), suspension=suspension.id, cause=cause, count=len(lives)))
        return suspension

    def _one_caller(self, lives: Sequence[Live]) -> Common | None:
        """Where they are many, and all that one workload has: that names them."""
        principals = {one.principal for one in lives}
        if len(lives) <= BY_NAME or len(principals) > 1:
            return None
        (principal,) = principals
        return Common(principal=principal) if len(self._scope.live.select(principal=principal)) == len(lives) else None

    def release(self, suspension: Suspension, lives: Sequence[Live]) -> None:
        """They were decided, and count; or are refused by now."""
        for one in lives:
            suspension.waiting.pop(one.jti, None)
        kept = [one for one in lives if not self._scope.is_refused(one.jti)]
        suspension.untold += self._refusing.untold(one.jti for one in lives)
        suspension.refused += len(lives) - len(kept)
        if kept and suspension.waiting:
            self._feed.release(suspension.id, kept)

    def end(self, suspension: Suspension) -> None:
        """Nothing of it waits any more. While guards have not heard of all that is refused, it goes on for them."""
        untold = [one for one in suspension.untold if not one.done()]
        if untold:
            ending = asyncio.gather(*untold, return_exceptions=True)
            ending.add_done_callback(lambda _: self.end(suspension))
            return
        self._scope.suspensions.pop(suspension.id, None)
        self._feed.release(suspension.id, (), all_left=True)
        ended = SuspensionEnded(at=self._clock(), suspension=suspension.id, refused=suspension.refused)
        self._noter.append_later(ended)

    def _released_at_once(self, suspension: Suspension, live: Live) -> None:
        self._feed.release(suspension.id, (live,))
