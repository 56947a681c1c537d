"""Refuses credentials for good: here at once, then durably, then at guards."""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from typing import Final, Protocol

import structlog

from attestors.contract import FactKey
from broker.errors import BrokerError, Reason
from broker.ledger.records import ScopeRefused
from broker.ledger.scope_records import MAX_REFUSED
from broker.scope.feed import Feed
from broker.scope.live import Live
from broker.scope.scope import Scope

AGAIN_S: Final = 0.25
"""Between two tries to do what the store, or a source of facts, does not let us."""

WARN_EACH_S: Final = 10.0

_log = structlog.get_logger(__name__)


class Keeper(Protocol):
    """The ledger, as far as this needs it."""

    async def refuse(self, refused: ScopeRefused, ends: Sequence[int]) -> int:
        """Durable when it returns. ends: until when each refusal is kept. Raises: Unavailable."""


class Refusing:
    """One for each broker process. unrecorded: how many refusals the store has not taken yet, so guards know less."""

    def __init__(self, scope: Scope, keeper: Keeper, feed: Feed, clock: Callable[[], datetime]) -> None:
        self._scope, self._keeper, self._feed, self._clock = scope, keeper, feed, clock
        self._untold: dict[str, asyncio.Future[None]] = {}  # refused here, and not durable yet
        self._warned_at = float("-inf")

    @property
    def unrecorded(self) -> int:
        """How many refusals the store has not taken yet."""
        return len(self._untold)

    def untold(self, jtis: Iterable[str]) -> list[asyncio.Future[None]]:
        """Of these, what is done when guards have heard of each that is refused, and does not count yet."""
        return list({self._untold[jti] for jti in jtis if jti in self._untold})

    async def refuse(
        self,
        lives: Iterable[Live],
        reason: Reason,
        cause: str,
        *,
        by: str = "",
        detail: str = "",
        correlation_id: str = "",
    ) -> int:
        """How many were not refused before. cause, by, detail: for the ledger. All are durable when it returns.

        Goes on to its end where who asked goes away. While the store cannot be written guards hear nothing, and soon
        believe nothing: `as_of` grows old.
        """
        lives = list(lives)
        before = self.untold(one.jti for one in lives)
        found = self._scope.refuse(lives, reason)
        keeping = []
        for start in range(0, len(found), MAX_REFUSED):
            part = found[start : start + MAX_REFUSED]
            record = ScopeRefused(
                at=self._clock(),
                correlation_id=correlation_id,
                jtis=tuple(one.jti for one in part),
                reason=reason,
                cause=cause,
                by=by,
                detail=detail,
            )
            kept = asyncio.ensure_future(self._keep(record, part))
            self._untold |= dict.fromkeys(record.jtis, kept)
            keeping.append(kept)
        for one in found:
            if self._scope.live.dependents(FactKey(f"parent:{one.jti}")):
                self._scope.tell(FactKey(f"parent:{one.jti}"))
        await asyncio.shield(asyncio.gather(*keeping, *before))
        return len(found)

    async def _keep(self, record: ScopeRefused, lives: Sequence[Live]) -> None:
        ends = [int(one.expires_at) + 1 for one in lives]
        while True:
            try:
                await self._keeper.refuse(record, ends)
            except Exception as error:  # noqa: BLE001 -- whatever the store does, a refusal is kept until it takes it
                self._warn(error)
                await asyncio.sleep(AGAIN_S)
            else:
                break
        self._feed.refuse(lives, record.reason)
        for one in lives:
            del self._untold[one.jti]

    def _warn(self, error: Exception) -> None:
        """Once in a while: each of them is tried again."""
        now = asyncio.get_running_loop().time()
        if now >= self._warned_at + WARN_EACH_S:
            self._warned_at = now
            why = error.detail if isinstance(error, BrokerError) else f"{type(error).__name__}: {error}"
            _log.warning("refusals_not_recorded", why=why, count=self.unrecorded)
