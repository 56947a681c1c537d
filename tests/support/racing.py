"""One request on its way to a token, and a change that comes at one moment of it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

from support.exchanging import CORRELATION, act, steps
from support.operating import OPERATOR
from support.pki import CA, snapshot
from support.processes import Child, script
from support.redeciding import Redeciding, Source, redeciding
from support.whole_broker import AGENT, ORDERS

from attestors.approval import request_digest
from attestors.contract import Facts
from attestors.process import ProcessAttestor
from attestors.spire import SpireAttestor
from broker.approval_text import Texts
from broker.approvals import Approvals
from broker.errors import ApprovalRequired
from broker.exchange import Caller, Issued, KeyProof
from broker.identity import identify
from broker.identity.peer import read_process
from broker.ledger.operations import AppendIntent
from broker.ledger.records import Record
from broker.operator_orders import Order, Selection
from broker.presented import Presented
from broker.scope.live import Live

MOMENTS: Final = (
    "identified",  # the caller is known, and nothing else was looked at
    "before a look",
    "after a look",  # whatever it saw, the change comes after it
    "entered",  # decided, and on the way to the ledger
    "before the commit",  # in the ledger's thread
    "checked",  # in its transaction: what it was decided on was still current
    "after the commit",  # durable, and nobody on the event loop knows
    "signed",
)
RACED: Final = "orders.raced"
REQUEST_ID: Final = "request-of-the-race"
SCHEMA = """
action "orders.raced", "orders.bystander" appliesTo {
  principal: [Workload], resource: [Resource],
  context: { ticket?: Ticket, session?: Session, approval?: Approval, spire?: Spire, process?: Process }
};
"""
POLICY = """
@id("raced") @reuse("ttl") @max_ttl("300s") permit (principal, action == Action::"orders.raced", resource)
when { context has ticket && context has approval && context.approval.count >= 1 };
@id("bystander") @reuse("ttl") permit (principal, action == Action::"orders.bystander", resource);
@id("approvers") permit (
  principal in Path::"spiffe://acme.test/approvers", action == Action::"broker.approve", resource
);
@id("operators") permit (
  principal == Workload::"spiffe://acme.test/operator", action == Action::"broker.operate", resource
);
"""
POLICIES = {"orders.cedarschema": SCHEMA, "orders.cedar": POLICY}
ANN = "spiffe://acme.test/approvers/ann"


@dataclass(frozen=True)
class Entitlement:
    """As the SPIRE agent says it."""

    spiffe_id: str
    expires_at: datetime


class Agent:
    """A SPIRE agent: which IDs each process has."""

    def __init__(self) -> None:
        self.ids: dict[int, Sequence[str]] = {}

    async def fetch(self, pid: int) -> Sequence[Entitlement]:
        ends = datetime.now(UTC) + timedelta(seconds=300)
        return [Entitlement(one, ends) for one in self.ids.get(pid, ())]


class Peer:
    """A process on the Unix socket that stays what it is while it is identified."""

    def __init__(self, pid: int) -> None:
        self.process = read_process(pid)

    def unchanged(self) -> None:
        return


@dataclass
class Race:
    """The parts, for tests to turn. at: the moment at which `change` comes, once."""

    found: Redeciding
    desk: Source
    scores: Source
    agent: Agent
    approvals: Approvals
    child: Child
    at: str = ""
    change: Callable[[], Awaitable[None]] | None = None
    came: bool = False
    begun: list["asyncio.Future[Any]"] = field(default_factory=list)

    async def reach(self, moment: str) -> None:
        """The request is here now."""
        if moment == self.at and not self.came and self.change is not None:
            self.came = True
            await self.change()

    def begin(self, doing: Awaitable[Any]) -> None:
        """Goes on by itself: what waits for the ledger cannot be waited for in its thread."""
        self.begun.append(asyncio.ensure_future(doing))

    async def caller(self, *, process: bool) -> Caller:
        """The agent, as a process or by its certificate."""
        exchange, now = self.found.parts.exchange, self.found.parts.now()
        if process:
            peer = Peer(self.child.pid)
            self.agent.ids[self.child.pid] = [AGENT]
            heard = exchange.scope.heard
            identity = await identify.by_process(peer, exchange.entitlements, now, wanted="")
            caller = self.found.parts.caller()
            return replace(caller, identity=replace(identity, heard=heard, confirmation=caller.confirmation.jkt))
        chain = self.found.parts.authority.svid(AGENT).chain
        return exchange.identify_certificate(chain, KeyProof(proof=None, method="", url="", binding=""), now, "c")

    async def approved(self) -> None:
        """Ann says yes to the request."""
        digest = request_digest(act(RACED).digest.hex(), AGENT, REQUEST_ID)
        ann = self.found.parts.caller(ANN).identity
        await self.approvals.approve(ann, digest, "yes", 0, self.found.parts.now(), CORRELATION)

    async def asked(self, *, process: bool) -> Issued:
        """The request, from its first step. Raises: BrokerError."""
        caller = await self.caller(process=process)
        await self.reach("identified")
        issued = await self.request(caller)
        await self.reach("signed")
        return issued

    async def request(self, caller: Caller) -> Issued:
        shown = Presented(request_id=REQUEST_ID, ticket="T-1", session="s-1")
        exchange, wanted = self.found.parts.exchange, act(RACED, ORDERS)
        return await exchange.request(caller, lambda: wanted, self.found.parts.now(), CORRELATION, shown)

    async def records(self) -> list[Record]:
        """Of the ledger, which is closed for it once all that was begun has ended."""
        await asyncio.gather(*self.begun)
        return await self.found.records()

    def live(self, issued: Issued) -> Live | None:
        return self.found.parts.exchange.scope.live.get(issued.claims.jti)

    # -- what may change -----------------------------------------------------------------------------------------------

    async def ticket(self) -> None:
        await self.desk.closes_heard(self.found, "T-1")

    async def session(self) -> None:
        await self.scores.closes_heard(self.found, "s-1")

    async def policy(self) -> None:
        await self.found.policy(POLICY.replace("context has ticket &&", "context has ticket && context has process &&"))

    async def bundle(self) -> None:
        """Our own domain gets another authority, and the one that vouched for the caller is gone."""
        trust = self.found.parts.trust
        successor = CA("acme.test", seed="the next root", now=self.found.parts.now()).bundle()
        self.found.parts.trust = snapshot(successor, own=trust.own, revision=2)
        self.found.scope.watch.offer_trust(self.found.parts.trust)

    async def process(self) -> None:
        self.child.process.kill()
        await asyncio.to_thread(self.child.process.wait)

    async def entry(self) -> None:
        """SPIRE gives the process another identity; who watches hears of it within a second."""
        self.agent.ids[self.child.pid] = ["spiffe://acme.test/another"]

    async def approval(self) -> None:
        digest = request_digest(act(RACED).digest.hex(), AGENT, REQUEST_ID)
        ann = self.found.parts.caller(ANN).identity
        self.begin(self.approvals.withdraw(ann, digest, "no", self.found.parts.now(), CORRELATION))
        await asyncio.sleep(0)

    async def denial(self) -> None:
        order = Order(selection=Selection(principal=AGENT), standing=True, until=None, dry_run=False, reason="now")
        operator = self.found.parts.caller(OPERATOR)
        revoking = self.found.scope.revocations.revoke(operator, lambda: order, self.found.parts.now(), CORRELATION)
        self.begin(revoking)
        await asyncio.sleep(0)

    async def another(self) -> None:
        """Something that this request has nothing to do with."""
        await self.desk.closes_heard(self.found, "T-2")
        await self.scores.closes_heard(self.found, "s-2")
        await self.found.policy(POLICY.replace('@id("bystander") @reuse("ttl")', '@id("bystander")'))


def _hook(race: Race) -> None:
    """Lets the race know where the request is."""
    loop, ledger = asyncio.get_running_loop(), race.found.parts.exchange.ledger
    record, writer = ledger.record_intent, ledger._writer
    commit = writer.commit

    def reach(moment: str) -> None:
        asyncio.run_coroutine_threadsafe(race.reach(moment), loop).result(20)

    def committing(group: Sequence[Any]) -> list[object]:
        ours = any(isinstance(one, AppendIntent) for one in group)
        if ours:
            reach("before the commit")
        answers = commit(group)
        if ours:
            reach("after the commit")
        return answers

    def recording(intent: Any, *, current: Callable[[], bool], evidence: tuple[Facts, ...] = ()) -> Any:
        def checked() -> bool:
            answer = current()
            if answer:
                reach("checked")
            return answer

        async def go() -> int:
            await race.reach("entered")
            return await record(intent, current=checked, evidence=evidence)

        return asyncio.ensure_future(go())

    ledger.record_intent = recording
    writer.commit = committing
    race.desk.before.append(lambda: race.reach("before a look"))
    race.desk.meanwhile.append(lambda: race.reach("after a look"))


@contextlib.asynccontextmanager
async def racing(folder: Path) -> AsyncIterator[Race]:
    """A request that rests on a process, its SPIRE entry, a ticket, a session, an approval, a policy and a bundle."""
    desk, scores, agent = Source(), Source("session"), Agent()
    spire, process = SpireAttestor(agent), ProcessAttestor(read_process)
    with script("tell('ready'); hear()") as child:
        assert await child.line() == "ready"
        async with redeciding(
            folder,
            *(desk, scores),
            policies=POLICIES,
            follow=process.follow,
            spire=spire,
            process=process,
        ) as found:
            exchange = found.parts.exchange
            exchange.entitlements = identify.entitlements(spire.look)
            exchange.desk = desk_of_approvals = Approvals(exchange, Texts())
            race = Race(found, desk, scores, agent, desk_of_approvals, child)
            try:
                with contextlib.suppress(ApprovalRequired):
                    await race.request(await race.caller(process=False))
                await race.approved()
                await steps(50)  # the broker hears of it; from here on of nothing but the change
                _hook(race)
                yield race
            finally:
                await asyncio.gather(*race.begun)
    await process.close()
