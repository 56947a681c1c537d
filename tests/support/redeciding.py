"""An exchange around which scope is as `serve` wires it, and outside sources that say what a test wants them to."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from support.exchanging import CORRELATION, Exchanging, act, exchanging
from support.lives import Reader
from support.processes import until
from support.whole_broker import AGENT, ORDERS

from attestors.approval import ApprovalAttestor
from attestors.contract import AttestationFailed, AttestationRequest, Attestor, FactKey, Facts, Process
from broker.approval_records import RecordedApprovals
from broker.cli.serve_scope import ScopeParts, open_scope, watching
from broker.credentials.action_token import Confirmation
from broker.decision.attest import Attestation
from broker.exchange import Caller, Issued
from broker.ledger.records import Record, ScopeRefused
from broker.presented import Presented
from broker.scope.case import BOUNDS, Bounds
from broker.scope.live import Live
from broker.scope.scope import Follow

SCHEMA = """
action "orders.read", "orders.once", "orders.closed" appliesTo {
  principal: [Workload], resource: [Resource], context: {}
};
action "orders.ticketed", "orders.also" appliesTo {
  principal: [Workload], resource: [Resource],
  context: { ticket?: Ticket, session?: Session, kubernetes?: { state: String }, ci?: { state: String } }
};
action "orders.charge" appliesTo { principal: [Workload], resource: [Resource], context: {} };
"""
POLICY = """
@id("read") @reuse("ttl") @max_ttl("300s")
permit (principal, action in [Action::"orders.read", Action::"orders.once"], resource);
@id("ticketed") @reuse("ttl") @max_ttl("300s") permit (principal, action == Action::"orders.ticketed", resource)
when { context has ticket && context.ticket.state == "open" };
@id("also") @reuse("ttl") @max_ttl("300s") permit (principal, action == Action::"orders.also", resource);
@id("charge") @single_use permit (principal, action == Action::"orders.charge", resource);
"""
ASKS_FOR_PODS = """
@id("pods") forbid (principal, action == Action::"orders.also", resource)
unless { context has kubernetes && context.kubernetes.state == "open" };
"""
"""For `orders.also`; to be added."""
POLICIES = {"orders.cedarschema": SCHEMA, "orders.cedar": POLICY}
SHORT = Bounds(blind_s=0.4, again_s=0.05, patience_s=0.01)
"""So that what takes five seconds takes less than one."""


class Source:
    """A ticket system, where sessions are scored, a cluster or a CI with a job, as attestors. What it says is a test's.

    said: values by id, instead of the usual ones. lives_s: how long an answer holds, by id; else until it changes.
    fails: errors by id, raised when asked about it. holds: by id, what an answer waits for. before, meanwhile: are
    called while it is asked, before and after it knows its answer. lost: see `blind`.
    """

    def __init__(self, name: str = "ticket") -> None:
        self.name = name
        self.said: dict[str, Mapping[str, Any]] = {}
        self.lives_s: dict[str, float] = {}
        self.fails: dict[str, Exception] = {}
        self.holds: dict[str, asyncio.Event] = {}
        self.before: list[Callable[[], object]] = []
        self.meanwhile: list[Callable[[], object]] = []
        self.lost: dict[str, float] = {}
        self.looks: Counter[str] = Counter()
        self.watched = 0  # how often a watch was begun
        self.refuses_to_watch: Exception | None = None
        self._told: asyncio.Queue[str | Exception | None] = asyncio.Queue()

    async def attest(self, request: AttestationRequest, now: datetime) -> Facts | None:
        named = {"ticket": request.ticket, "session": request.session}.get(self.name, "job")
        if not named:
            return None
        self.looks[named] += 1
        found = await self._answer(named)
        key = FactKey(f"{self.name}:{named}")
        ends = now + timedelta(seconds=self.lives_s[named]) if named in self.lives_s else None
        return Facts(attestor=self.name, key=key, values=found, attested_at=now, expires_at=ends)

    async def _answer(self, named: str) -> Mapping[str, Any]:
        if named in self.holds:
            await self.holds[named].wait()
        await _called(self.before)
        values = {"state": "open", "level": "LOW", **self.said.get(named, {})}
        error = self.fails.get(named)
        await _called(self.meanwhile)
        if error is not None:
            raise error
        if values["state"] == "closed" or values["level"] == "HIGH":
            raise AttestationFailed(f"{named} is {values}")
        if self.name == "session":
            return {"id": named, "level": values["level"], "scored_at": 1}
        if self.name in {"kubernetes", "ci"}:
            return {"state": values["state"]}
        return {"system": "desk", "id": named, "authorises": [], "authorised_by": "", "state": values["state"]}

    async def watch(self) -> AsyncIterator[FactKey]:
        self.watched += 1
        if self.refuses_to_watch is not None:
            raise self.refuses_to_watch
        while (told := await self._told.get()) is not None:
            if isinstance(told, Exception):
                raise told
            yield FactKey(f"{self.name}:{told}")

    def tell(self, *told: str | Exception | None) -> None:
        """What its watch says: ids that changed, an error that ends it, None for its end."""
        for one in told:
            self._told.put_nowait(one)

    def closes(self, *named: str) -> None:
        """And says so."""
        for one in named:
            self.said[one] = {"state": "closed", "level": "HIGH"}
        self.tell(*named)

    async def closes_heard(self, found: "Redeciding", *named: str) -> None:
        """The same, and the broker has heard of it when this returns."""
        before = found.parts.exchange.scope.heard
        self.closes(*named)
        await until(lambda: found.parts.exchange.scope.heard >= before + len(named), "the broker hears of it")

    def blind(self) -> Mapping[str, float]:
        return dict(self.lost)


async def _called(hooks: list[Callable[[], object]]) -> None:
    for one in tuple(hooks):
        done = one()
        if asyncio.iscoroutine(done):
            await done


def follow_nothing(_: Process) -> None:
    """For callers that are no processes."""


@dataclass
class Redeciding:
    """The parts, for tests to turn."""

    parts: Exchanging
    scope: ScopeParts
    sources: Mapping[str, Source]
    readers: dict[str, Reader] = field(default_factory=dict)

    async def token(
        self, action: str = "orders.read", *, ticket: str = "", session: str = "", key: str = "", **asked: Any
    ) -> Live:
        """A credential. key: the thumbprint that it is bound to."""
        issued = await self.issued(action, ticket=ticket, session=session, key=key, **asked)
        found = self.parts.exchange.scope.live.get(issued.claims.jti)
        assert found is not None, "what was issued is live"
        return found

    async def issued(
        self,
        action: str = "orders.read",
        *,
        ticket: str = "",
        session: str = "",
        key: str = "",
        audience: str = ORDERS,
        caller: Caller | None = None,
    ) -> Issued:
        """Raises: BrokerError."""
        asker = caller or self.caller(key)
        shown = Presented(ticket=ticket, session=session)
        wanted = act(action, audience)
        return await self.parts.exchange.request(asker, lambda: wanted, self.parts.now(), CORRELATION, shown)

    def caller(self, key: str = "", spiffe_id: str = AGENT) -> Caller:
        found = self.parts.caller(spiffe_id)
        if not key:
            return found
        thumbprint = key.ljust(43, "A")
        identity = replace(found.identity, confirmation=thumbprint)
        return Caller(identity=identity, confirmation=Confirmation(jkt=thumbprint))

    def says(self, one: Live) -> str:
        """Why a guard that has heard all refuses it; "" where it does not."""
        reader = self.readers.setdefault(one.audience, Reader(self.scope.feed, one.audience))
        reader.now = self.parts.now()
        self.scope.feed.proven(reader.now)  # as if the store had been read this moment
        return reader.catch_up().says(one)

    async def becomes(self, one: Live, reason: str) -> None:
        """Waits until a guard says this of it."""
        await until(lambda: self.says(one) == reason, f"{reason!r}, not {self.says(one)!r}")

    async def settled(self) -> None:
        """Waits until nothing is being decided any more."""
        await until(lambda: self.scope.deciding.idle, "all is decided")

    async def policy(self, text: str) -> None:
        """Puts this in force."""
        self.parts.write_policy(text)
        await self.parts.exchange.policies.reload()

    async def records(self) -> list[Record]:
        return await self.parts.records()

    async def refusals(self) -> list[ScopeRefused]:
        """Those in the ledger, which is closed for it."""
        return [one for one in await self.records() if isinstance(one, ScopeRefused)]


@asynccontextmanager
async def redeciding(
    folder: Path,
    *sources: Source,
    bounds: Bounds = BOUNDS,
    policies: Mapping[str, str] = POLICIES,
    follow: Follow = follow_nothing,
    watched: bool = True,
    prove_s: float = 0.02,
    before: Exchanging | None = None,
    ahead: timedelta = timedelta(),
    **others: Attestor,
) -> AsyncIterator[Redeciding]:
    """One in `folder`, which may have a ledger already: then of the trust domain of the one `before`.

    watched: whether changes are heard of and decided. ahead: of the real clock.
    """
    by_name = {one.name: one for one in sources}
    attestors: dict[str, Attestor] = {**by_name, **others}
    async with exchanging(folder, policies=policies, before=before) as parts:
        parts.ahead = ahead
        attestors["approval"] = ApprovalAttestor(RecordedApprovals(parts.exchange.ledger, parts.exchange.policies))
        parts.exchange.attestation = Attestation(attestors, 2.0)
        scope = await open_scope(parts.exchange, attestors, follow, parts.now, bounds)
        found = Redeciding(parts, scope, by_name)
        if not watched:
            yield found
            return
        async with watching(scope, parts.exchange, parts.now, prove_s) as goes_on:
            ended = asyncio.ensure_future(goes_on())
            await until(lambda: all(one.watched for one in sources), "all are watched")
            yield found
            assert not ended.done(), ended.exception()
            ended.cancel()
