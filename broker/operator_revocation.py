"""What operators refuse beside policy: credentials that are live, and, by standing denials, those that would be given.

A denial counts before it is looked what is live, so of a mint and a denial one comes first: what was decided before and
is not recorded yet comes to nothing (scope.py), and what is recorded is among what is refused. Without one, whoever was
revoked would be given the next credential in a millisecond.

What is begun is done to its end, whether or not who asked waits for it. To deny is safe: a denial that the store has
not taken yet counts all the same, and is offered to it again until it has.
"""

import asyncio
import contextlib
import secrets
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, TypeVar

import structlog

from broker.decision.decide import Grant
from broker.errors import BrokerError, Invalid, Reason, Refused, Unavailable
from broker.exchange import Caller, Exchange
from broker.in_time import REQUEST_TIMEOUT_S, InTime
from broker.ledger.records import StandingDenial, StandingLifted
from broker.ledger.scope_store import ScopeStore
from broker.operate import OPERATE, Operators
from broker.operator_orders import Order, Selection, check_reason
from broker.scope.case import AT_ONCE
from broker.scope.deciding import Deciding
from broker.scope.live import Live
from broker.scope.refusing import AGAIN_S
from broker.scope.standing import Entry, denies
from broker.scope.suspension import Common

MAX_SHOWN: Final = 100
MAX_STANDING: Final = 1000
"""Denials and permits: each decision looks at all of them, which takes a tenth of a millisecond."""

_T = TypeVar("_T")
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Revoked:
    """What was refused, or would be. first: of `hits`, at most `MAX_SHOWN`. standing_id: of the denial, "" for none."""

    hits: int
    first: Sequence[Live]
    standing_id: str = ""


class ToItsEnd:
    """What goes on when who asked for it goes away. One owner closes it."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[Any]] = set()

    async def run(self, doing: Coroutine[Any, Any, _T]) -> _T:
        """Its answer, for who waits as long as a request may. Raises: Unavailable after that; what it raises."""
        task = asyncio.create_task(doing)
        self._running.add(task)
        task.add_done_callback(self._ended)
        async with InTime(Reason.LEDGER_UNAVAILABLE):
            return await asyncio.shield(task)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            task.exception()  # seen: where who asked went away, nobody else asks for it

    async def close(self) -> None:
        """Waits for what is under way as long as for a request; then it is given up."""
        if self._running:
            _, left = await asyncio.wait(list(self._running), timeout=REQUEST_TIMEOUT_S)
            for task in left:
                task.cancel()


class Revocations:
    """One for each broker process; close it to wait for what is under way."""

    def __init__(self, exchange: Exchange, deciding: Deciding, store: ScopeStore) -> None:
        self._exchange, self._deciding, self._store = exchange, deciding, store
        self._operators, self._to_its_end = Operators(exchange), ToItsEnd()
        self.close = self._to_its_end.close

    async def revoke(self, caller: Caller, asked: Callable[[], Order], now: datetime, correlation_id: str) -> Revoked:
        """Refuses what is selected at every guard, and with a denial what would be given in its place.

        asked: makes the order from what was sent. `hits` counts those that were not refused before. Durable, and told
        to guards, when it returns.

        Raises: Invalid; Refused DENIED for who may not, QUOTA where too much stands; Unavailable, and then it counts
        here and is made durable as soon as the store can be written. Each refusal is in the ledger.
        """
        with self._refusing(caller, "revoke", now, correlation_id):
            order = asked()
            order.require(now)
        grant = await self._operators.authorise(caller, "revoke", now, correlation_id)
        if order.dry_run:
            hits, _ = self._select(order.selection)
            return Revoked(hits=len(hits), first=hits[:MAX_SHOWN])
        with self._refusing(caller, "revoke", now, correlation_id):
            denial = self._denial(order, grant, now, correlation_id) if order.standing else None
            return await self._to_its_end.run(self._revoke(order, denial, str(grant.principal), correlation_id))

    def _denial(self, order: Order, grant: Grant, now: datetime, correlation_id: str) -> StandingDenial:
        """Raises: Invalid where it would deny who makes it, and so nobody might lift it; Refused(QUOTA)."""
        chosen = order.selection
        denial = StandingDenial(
            at=now,
            correlation_id=correlation_id,
            id=new_id(),
            principal=chosen.principal,
            action=chosen.action,
            trust_domain=chosen.trust_domain,
            until=order.until,
            by=str(grant.principal),
            policies=grant.policies,
            policy_revision=grant.policy_revision,
            detail=order.reason,
        )
        if denies(denial, denial.by, OPERATE):
            raise Invalid("it would deny you, too, to lift it: name paths or actions one by one")
        require_room(self._exchange, now)
        return denial

    async def _revoke(self, order: Order, denial: StandingDenial | None, by: str, correlation_id: str) -> Revoked:
        """Up to the first await nothing comes between. Many are suspended first, which waits for no store."""
        scope, deciding, chosen = self._exchange.scope, self._deciding, order.selection
        cause, standing_id = "operator", ""
        keeping: list[Awaitable[object]] = []
        if denial is not None:
            standing_id, cause = denial.id, f"standing:{denial.id}"
            scope.standing.add(denial)
            keeping.append(until_taken(lambda: self._store.deny(denial)))
        hits, entering = self._select(chosen)
        scope.supersede(entering)
        suspension = None
        if len(hits) > AT_ONCE:
            actions = frozenset({chosen.action} if chosen.action else ())
            common = Common(actions=actions, principal=chosen.principal, trust_domain=chosen.trust_domain)
            suspension = deciding.suspending.begin(cause, hits, common)
        _log.warning("revoked", by=by, hits=len(hits), standing=standing_id, correlation_id=correlation_id)
        refusing = deciding.refuse(
            hits, Reason.REVOKED, cause, by=by, detail=order.reason, correlation_id=correlation_id
        )
        await asyncio.gather(*keeping, refusing)  # in this order, and with one commit
        if suspension is not None:
            deciding.suspending.release(suspension, hits)
            deciding.suspending.end(suspension)
        return Revoked(hits=len(hits), first=hits[:MAX_SHOWN], standing_id=standing_id)

    def _select(self, chosen: Selection) -> tuple[list[Live], list[Live]]:
        """Those that are live and not refused yet, and those that are about to be recorded."""
        scope = self._exchange.scope
        found = scope.live.select(
            jti=chosen.jti, principal=chosen.principal, action=chosen.action, trust_domain=chosen.trust_domain
        )
        hits = [one for one in found if one.seq and not scope.is_refused(one.jti)]
        return hits, [one for one in found if not one.seq]

    # -- what stands -------------------------------------------------------------------------------------------------

    async def standing(self, caller: Caller, now: datetime, correlation_id: str) -> Sequence[Entry]:
        """The denials and permits in force, the oldest first. Recorded. Raises: BrokerError."""
        await self._operators.authorise(caller, "standing", now, correlation_id)
        return self._exchange.scope.standing.entries(now)

    async def lift(self, caller: Caller, entry_id: str, reason: str, now: datetime, correlation_id: str) -> None:
        """Ends one of them before its time, durably. What a denial refused stays so; what a permit gave ends with it.

        Raises: Invalid; Refused DENIED for who may not, and where none has this id; Unavailable, as `revoke`.
        """
        with self._refusing(caller, "lift", now, correlation_id):
            check_reason(reason)
        grant = await self._operators.authorise(caller, "revoke", now, correlation_id)
        with self._refusing(caller, "lift", now, correlation_id):
            entry = self._exchange.scope.standing.get(entry_id)
            if entry is None:
                raise Refused(Reason.DENIED, f"nothing stands under the id {entry_id!r:.80}")
            lifted = StandingLifted(
                at=now,
                correlation_id=correlation_id,
                id=entry.id,
                by=str(grant.principal),
                policies=grant.policies,
                policy_revision=grant.policy_revision,
                detail=reason,
            )
            await self._to_its_end.run(self._lift(entry, lifted))

    async def _lift(self, entry: Entry, lifted: StandingLifted) -> None:
        """A permit counts no more at once, a denial once its end is durable."""
        scope = self._exchange.scope
        _log.warning("lifted", by=lifted.by, standing=entry.id, correlation_id=lifted.correlation_id)
        if isinstance(entry, StandingDenial):
            await until_taken(lambda: self._store.lift(lifted))
            scope.lift(entry.id)
        else:
            scope.lift(entry.id)
            await until_taken(lambda: self._store.lift(lifted))

    @contextlib.contextmanager
    def _refusing(self, caller: Caller, stage: str, now: datetime, correlation_id: str) -> Iterator[None]:
        """Writes down how the block ends where that is a refusal."""
        try:
            yield
        except BrokerError as error:
            self._exchange.refused(caller.identity, None, error, now, correlation_id, stage)
            raise


def new_id() -> str:
    """Of a denial or a permit: short enough to type, and met by nobody by chance."""
    return secrets.token_hex(8)


def require_room(exchange: Exchange, now: datetime) -> None:
    """Raises: Refused(QUOTA) where so much stands that every decision would take longer."""
    if len(exchange.scope.standing.entries(now)) >= MAX_STANDING:
        raise Refused(Reason.QUOTA, f"{MAX_STANDING} denials and permits stand: lift some of them first")


async def until_taken(call: Callable[[], Awaitable[_T]]) -> _T:
    """Offers it to the store again until it takes it."""
    while True:
        try:
            return await call()
        except Unavailable as error:
            _log.warning("not_recorded_yet", why=error.detail)
        await asyncio.sleep(AGAIN_S)
