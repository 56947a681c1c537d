"""Scope of a broker process: what was live when the last one ended, who watches what, and the feed."""

import asyncio
import contextlib
import hmac
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import structlog

from attestors.contract import Attestor, FactKey, Facts
from broker import break_glass
from broker.again import Again
from broker.break_glass import Emergencies
from broker.decision.decide import BREAK_GLASS, facts_digest
from broker.errors import Invalid, Unavailable
from broker.exchange import Exchange
from broker.ledger.operations import Evidence
from broker.ledger.records import BreakGlass, Intent
from broker.ledger.scope_store import ScopeStore
from broker.operator_revocation import Revocations
from broker.scope.case import BOUNDS, Bounds, Cause
from broker.scope.deciding import Deciding
from broker.scope.feed import Feed
from broker.scope.live import live_of
from broker.scope.scope import Follow
from broker.scope.suspension import Common
from broker.scope.watch import Watch

PROVE_S: Final = 0.5
"""How often the store is read to prove that what guards know is all there is; guards hear of each."""

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScopeParts:
    """What belongs together."""

    again: Again
    deciding: Deciding
    feed: Feed
    store: ScopeStore
    watch: Watch
    revocations: Revocations
    emergencies: Emergencies

    async def close(self) -> None:
        """Waits for what operators began."""
        await self.emergencies.close()
        await self.revocations.close()


async def open_scope(
    exchange: Exchange,
    attestors: Mapping[str, Attestor],
    follow: Follow,
    clock: Callable[[], datetime],
    bounds: Bounds = BOUNDS,
) -> ScopeParts:
    """Scope as the store has it. All that is live is suspended until it has been decided again.

    Nobody watched while no broker ran, so anything may have changed. Raises: Unavailable.
    """
    store, feed, again = ScopeStore(exchange.ledger.submit, exchange.ledger.append_later), Feed(), Again(exchange)
    exchange.scope.follow = follow
    deciding = Deciding(exchange.scope, store, feed, again, clock, bounds)
    watch = Watch(
        exchange.scope,
        deciding,
        attestors,
        clock,
        policy=exchange.policies.current,
        snapshot=exchange.snapshot(),
    )
    exchange.policies.subscribe(watch.offer_policy)
    await _restore(exchange, store, feed, deciding, clock())
    feed.offer_keys(exchange.keyring.key_set())
    return ScopeParts(
        again=again,
        deciding=deciding,
        feed=feed,
        store=store,
        watch=watch,
        revocations=Revocations(exchange, deciding, store),
        emergencies=Emergencies(exchange, store),
    )


async def _restore(exchange: Exchange, store: ScopeStore, feed: Feed, deciding: Deciding, now: datetime) -> None:
    kept, scope = await store.kept(now), exchange.scope
    scope.forget(now)  # nothing yet: from now on it knows how time passes
    for jti, (reason, _) in kept.refused.items():
        scope.restore(jti, reason)
    for entry in kept.standing:
        scope.standing.add(entry)
        if isinstance(entry, BreakGlass):
            break_glass.tell(entry)
    for seq, intent, evidence in kept.lives:
        live = live_of(intent, _facts(intent, evidence), permit=_permit(intent), seq=seq)
        if scope.is_refused(live.jti):
            feed.refuse([live], kept.refused[live.jti][0])
        elif live.ends > now:
            scope.live.add(live)
    for live in scope.live:
        if scope.is_refused(live.parent):  # a broker that was killed between the two
            deciding.note(Cause(name=f"parent:{live.parent}", key=FactKey(f"parent:{live.parent}"), at_once=True))
    if len(scope.live):
        actions = frozenset(live.action for live in scope.live)
        deciding.note(Cause(name="restart", common=Common(), actions=actions, at_once=True))
    _log.info("scope_restored", live=len(scope.live), refused=len(kept.refused), standing=len(kept.standing))


def _facts(intent: Intent, evidence: Mapping[str, Evidence]) -> dict[str, Facts]:
    """What was kept of evidence, as far as it is what the intent was decided on."""
    found = {name: one.facts(name) for name, one in evidence.items()}
    return {name: facts for name, facts in found.items() if _is_of(intent, facts)}


def _is_of(intent: Intent, facts: Facts) -> bool:
    try:
        digest = f"sha256:{facts_digest(facts).hex()}"
    except Invalid:  # no attestor said this
        return False
    return hmac.compare_digest(intent.facts.get(facts.attestor, ""), digest)


def _permit(intent: Intent) -> str:
    return next((name.removeprefix(BREAK_GLASS) for name in intent.policies if name.startswith(BREAK_GLASS)), "")


@contextlib.asynccontextmanager
async def watching(
    parts: ScopeParts, exchange: Exchange, clock: Callable[[], datetime], prove_s: float = PROVE_S
) -> AsyncIterator[Callable[[], Coroutine[Any, Any, None]]]:
    """While the block lasts, changes are heard of, decided and told.

    Gives what waits for as long as that goes on, and raises what ended it: a broker that hears nothing must not serve.
    """
    tasks = [
        asyncio.create_task(parts.deciding.run(), name="scope deciding"),
        asyncio.create_task(parts.watch.run(), name="scope watch"),
        asyncio.create_task(_prove(parts, exchange, clock, prove_s), name="scope proof"),
    ]

    async def goes_on() -> None:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()

    try:
        yield goes_on
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def _prove(parts: ScopeParts, exchange: Exchange, clock: Callable[[], datetime], every_s: float) -> None:
    """Tells guards up to when they know everything; while the store does not answer, nothing, and they soon refuse."""
    while True:
        as_of = clock()
        try:
            await parts.store.prove()
            if not parts.deciding.refusing.unrecorded:
                parts.feed.offer_keys(exchange.keyring.key_set())
                parts.feed.forget(exchange.scope.is_refused)
                parts.feed.proven(as_of)
        except Unavailable as error:
            _log.warning("scope_not_proven", why=error.detail)
        await asyncio.sleep(every_s)
