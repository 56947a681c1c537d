"""A broker with many live credentials, in a process of its own, for measuring how fast one that dies is refused.

Everything is real but attestor I/O: SPIRE's word on a child of this process, and a look at a ticket, are here at once.
Commands, one a line:

    fill N            N credentials that nothing of what follows touches
    mint KIND N       N credentials of that kind: their tokens
    change KIND       what they rest on changes: when the broker learned of it, by CLOCK_MONOTONIC
    fan               one message to all streams of /bench.Fan/Listen: when it was written
    idle              waits until everything is decided: when that was
    bare N            N bare Cedar decisions of the many: seconds of CPU for one
    memory N          N live credentials in a set: bytes for one

usage: python -m support.scope_server FOLDER
"""

import asyncio
import gc
import secrets
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import msgspec
import uvloop
from support.measured_server import ISSUER, Measured, measured, now, obey

from attestors.approval import ApprovalAttestor, request_digest
from attestors.contract import AttestationFailed, Attestor, FactKey, Facts, Process
from attestors.json_pointer import Pointer
from attestors.process import ProcessAttestor
from attestors.session import SessionAttestor
from attestors.ticket import TicketAttestor
from attestors.ticket_mapping import Content, TicketMapping, TicketName
from attestors.ticket_reads import Looked, TicketSystem
from broker.action import Action
from broker.approval_records import RecordedApprovals
from broker.credentials.action_token import Confirmation
from broker.decision.question import put
from broker.decision.store import PolicyStore
from broker.edges.grpc_peer import correlation_id
from broker.exchange import Caller, KeyProof, Presented
from broker.identity.identify import Identified
from broker.identity.peer import read_process
from broker.identity.spiffe_id import SpiffeId
from broker.ledger.records import Intent
from broker.ledger.scope_records import Level, SessionScored
from broker.ledger.session_store import Sessions
from broker.ledger.store import Ledger
from broker.scope.live import LiveSet, live_of
from broker.session_records import RecordedSessions

GUARD = "spiffe://acme.test/service/orders"
CALLER_PATH = "spiffe://acme.test/build/agent-"
CALLER = SpiffeId.parse(f"{CALLER_PATH}7")
APPROVER = SpiffeId.parse("spiffe://acme.test/approvers/ann")
NO_PROOF = KeyProof(proof=None, method="POST", url=ISSUER, binding="mtls")
SCHEMA = """
action "many.act" appliesTo {
  principal: [Workload], resource: [Resource], context: { spire: Spire, parameters: { amount: Long } }
};
action "policy.act", "process_exit.act" appliesTo { principal: [Workload], resource: [Resource], context: {} };
action "ticket.act" appliesTo { principal: [Workload], resource: [Resource], context: { ticket: Ticket } };
action "session.act" appliesTo { principal: [Workload], resource: [Resource], context: { session: Session } };
action "approval.act" appliesTo { principal: [Workload], resource: [Resource], context: { approval: Approval } };
"""
OTHERS = """
@id("ticket") @reuse("ttl") permit (principal, action == Action::"ticket.act", resource)
when { context.ticket.authorises.contains("orders") };
@id("session") @reuse("ttl") permit (principal, action == Action::"session.act", resource)
when { context.session.level == "LOW" };
@id("process") @reuse("ttl") permit (principal, action == Action::"process_exit.act", resource);
@id("approval") @reuse("ttl") permit (principal, action == Action::"approval.act", resource)
when { context.approval.count >= 1 };
@id("approvers") permit (
  principal in Path::"spiffe://acme.test/approvers", action == Action::"broker.approve", resource
);
"""


def policy(turn: int, *, permits: bool) -> str:
    """turn: names the permits of the many, 20 in their slice. permits: whether there is one for the kind `policy`."""
    many = "\n".join(
        f'@id("many{turn}-{n}") @reuse("ttl") @max_ttl("300s") permit (principal == Workload::"{CALLER_PATH}{n}",'
        ' action == Action::"many.act", resource in Resource::"https://orders.acme.test/orders")'
        f' when {{ context.spire.ids.contains("{CALLER_PATH}{n}") && context.parameters.amount < 100 }};'
        for n in range(20)
    )
    hit = '@id("policy") @reuse("ttl") permit (principal, action == Action::"policy.act", resource);'
    return f"{many}\n{hit if permits else ''}\n{OTHERS}"


def act(kind: str) -> Action:
    parameters = {"amount": 30} if kind == "many" else {}
    return Action(f"{kind}.act", "https://orders.acme.test/orders/17", GUARD, parameters)


class Desk:
    """A ticket system without a wire: what a look at it shows, at once."""

    def __init__(self) -> None:
        self.closed: set[str] = set()

    async def look(self, name: TicketName) -> Looked:
        if str(name) in self.closed:
            return AttestationFailed("closed")
        return Content(state="open", authorises=("orders",), authorised_by="ann")


DESK = Desk()


def attestors(ledger: Ledger, policies: PolicyStore) -> dict[str, Attestor]:
    mapping = TicketMapping(
        state=Pointer.parse("/state"),
        open_states=frozenset({"open"}),
        authorises=Pointer.parse("/authorises"),
    )
    system = TicketSystem(source=DESK, mapping=mapping, poll_s=3600)
    found: dict[str, Attestor] = {
        "process": ProcessAttestor(read_process),
        "approval": ApprovalAttestor(RecordedApprovals(ledger, policies)),
        "session": SessionAttestor(RecordedSessions(SESSIONS.setdefault("all", Sessions(ledger.submit)))),
        "ticket": TicketAttestor({"desk": system}, DESK.look),
    }
    ATTESTORS.update(found)
    return found


SESSIONS: dict[str, Sessions] = {}
ATTESTORS: dict[str, Any] = {}


async def entitled(process: Process, moment: datetime) -> Facts:
    """What SPIRE would say of a process, at once."""
    key = FactKey(f"spire:{process.pid}:{process.start_time}")
    return Facts(attestor="spire", key=key, values={"ids": [str(CALLER)]}, attested_at=moment)


class Driver:
    """Does what it is told."""

    def __init__(self, found: Measured, folder: Path) -> None:
        self._found, self._policy = found, folder / "policy"
        self._children: list[subprocess.Popen[bytes]] = []
        self._waiting: list[str] = []
        self._session = self._ticket = ""
        self._lasting: Process | None = None
        self._turn = 0
        self._fan: set[asyncio.Event] = set()

    async def obey(self, command: str) -> Mapping[str, Any]:
        word, *rest = command.split()
        does = {
            "fill": self._fill,
            "mint": self._minted,
            "change": self._changed,
            "fan": self._fan_out,
            "idle": self._idle,
            "bare": self._bare,
            "memory": self._memory,
        }
        return await does[word](*rest)

    async def _fill(self, count: str) -> Mapping[str, Any]:
        await self._mint("many", int(count))
        return {}

    async def _minted(self, kind: str, count: str) -> Mapping[str, Any]:
        return {"tokens": await self._mint(kind, int(count))}

    async def _changed(self, kind: str) -> Mapping[str, Any]:
        return {"learned": await self._change(kind)}

    async def _fan_out(self) -> Mapping[str, Any]:
        at = time.monotonic()
        for event in self._fan:
            event.set()
        return {"written": at}

    async def _idle(self) -> Mapping[str, Any]:
        while not self._found.scope.deciding.idle:  # noqa: ASYNC110 - its tasks run here
            await asyncio.sleep(0.001)
        return {"at": time.monotonic(), "live": len(self._found.exchange.scope.live)}

    def _caller(self, process: Process | None = None, principal: SpiffeId = CALLER) -> Caller:
        known = self._found.exchange.identify_certificate(self._found.chain, NO_PROOF, now(), correlation_id()).identity
        identity = replace(known, principal=principal)
        if process is not None:
            key = FactKey(f"spire:{process.pid}:{process.start_time}")
            spire = Facts(attestor="spire", key=key, values={"ids": [str(CALLER)]}, attested_at=now())
            identity = Identified(
                principal=CALLER,
                transport="unix",
                expires_at=known.expires_at,
                process=process,
                confirmation="key",
                known={"spire": spire},
            )
        return Caller(identity=identity, confirmation=Confirmation(jkt=secrets.token_urlsafe(32)))

    async def _mint(self, kind: str, count: int) -> list[str]:
        if kind == "policy":
            await self._write(permits=True)
        if kind == "session":
            self._session = secrets.token_hex(8)
            await self._score("LOW")
        if kind == "ticket":
            self._ticket = secrets.token_hex(4)
        caller = self._caller()
        if kind == "process_exit":
            caller = self._caller(self._child())
        if kind == "many":
            self._lasting = self._lasting or self._child()
            caller = self._caller(self._lasting)
        at_once = asyncio.Semaphore(32)

        async def one() -> str:
            async with at_once:
                return await self._one(kind, caller)

        return await asyncio.gather(*(one() for _ in range(count)))

    async def _one(self, kind: str, caller: Caller) -> str:
        exchange, presented = self._found.exchange, Presented()
        action = act(kind)
        if kind == "session":
            presented = Presented(session=self._session)
        if kind == "ticket":
            presented = Presented(ticket=f"desk:{self._ticket}")
        if kind == "approval":
            presented = Presented(request_id=secrets.token_urlsafe(16))
            principal = str(caller.identity.principal)
            digest = request_digest(action.digest.hex(), principal, presented.request_id)
            await self._found.desk.needed(caller.identity, action, presented.request_id, now(), correlation_id())
            approver = self._caller(principal=APPROVER).identity
            await self._found.desk.approve(approver, digest, "bench", 0, now(), correlation_id())
            self._waiting.append(digest)
        return (await exchange.request(caller, lambda: action, now(), correlation_id(), presented)).token

    def _child(self) -> Process:
        child = subprocess.Popen(["sleep", "600"], stdout=subprocess.DEVNULL)
        self._children.append(child)
        return read_process(child.pid)

    async def _change(self, kind: str) -> float:
        match kind:
            case "process_exit":
                child = self._children.pop()
                at = time.monotonic()
                child.send_signal(signal.SIGKILL)
                child.wait()
                return at
            case "approval":
                digests, self._waiting = self._waiting, []
                approver = self._caller(principal=APPROVER).identity
                learned: list[float] = []
                end = self._found.exchange.ledger.subscribe_approvals(lambda _: learned.append(time.monotonic()))
                await asyncio.gather(
                    *(self._found.desk.withdraw(approver, one, "bench", now(), correlation_id()) for one in digests)
                )
                end()
                return learned[0]
            case "session":
                learned = []
                end = SESSIONS["all"].subscribe(lambda _: learned.append(time.monotonic()))
                await self._score("HIGH")
                await asyncio.sleep(0)
                end()
                return learned[0]
            case "ticket":
                DESK.closed.add(f"desk:{self._ticket}")
                at = time.monotonic()
                ATTESTORS["ticket"].tell("desk", self._ticket)
                return at
            case "policy":
                return await self._write(permits=False)
            case "all":  # permits the many by another name, so that each is decided, and all stay
                self._turn += 1
                return await self._write(permits=True)
        raise ValueError(kind)

    async def _score(self, level: Level) -> None:
        scored = SessionScored(
            at=now(), session=self._session, principal=str(CALLER), level=level, by=str(APPROVER), policies=("bench",)
        )
        await SESSIONS["all"].score(scored, lowers=True)

    async def _write(self, *, permits: bool) -> float:
        """Puts another policy in force; when the broker learned of it, which is after it was compiled."""
        learned: list[float] = []
        policies = self._found.exchange.policies
        policies._listeners.insert(0, lambda _: learned.append(time.monotonic()))
        (self._policy / "p.cedar").write_text(policy(self._turn, permits=permits))
        await policies.reload()
        policies._listeners.pop(0)
        return learned[0] if learned else time.monotonic()

    async def _bare(self, count: str) -> Mapping[str, Any]:
        policy = self._found.exchange.policies.current
        part = policy.slice("many.act")
        action = act("many")
        facts = next(live.facts for live in self._found.exchange.scope.live if live.action == "many.act")
        started = time.perf_counter()
        for _ in range(int(count)):
            assert put(part, CALLER, action, facts).ask(part.policies, part.schema).allowed
        return {"seconds": (time.perf_counter() - started) / int(count)}

    async def _memory(self, count: str) -> Mapping[str, Any]:
        live = next(iter(self._found.exchange.scope.live))
        intent = Intent(
            at=now(),
            jti="",
            principal=live.principal,
            action=msgspec.Raw(live.canonical),
            action_digest="0" * 64,
            cnf={"jkt": "k" * 43},
            use="once",
            expires_at=now() + timedelta(seconds=60),
            epoch=1,
            policies=("p",),
            policy_revision=live.policy_revision,
            facts={},
            method="mtls",
            key_id="k" * 43,
        )
        gc.collect()
        tracemalloc.start()
        lives = LiveSet()
        for number in range(int(count)):
            facts = {
                "spire": Facts(
                    attestor="spire",
                    key=FactKey(f"spire:{number // 100}:1"),
                    values={"ids": [live.principal]},
                    attested_at=intent.at,
                )
            }
            one = msgspec.structs.replace(intent, jti=secrets.token_urlsafe(24))
            lives.add(live_of(msgspec.json.decode(msgspec.json.encode(one), type=Intent), facts, seq=number))
        used, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return {"bytes": used / int(count)}

    async def listen(self, _: bytes, __: Any) -> AsyncIterator[bytes]:
        """The bare fan-out: one message to whoever listens, whenever it is told to."""
        event = asyncio.Event()
        self._fan.add(event)
        try:
            yield b"hello"
            while True:
                await event.wait()
                event.clear()
                yield b"x" * 200
        finally:
            self._fan.discard(event)

    def close(self) -> None:
        for child in self._children:
            child.kill()
            child.wait()


async def main(folder: Path) -> None:
    policies = {"p.cedarschema": SCHEMA, "p.cedar": policy(0, permits=True)}
    async with measured(folder, GUARD, policies, attestors=attestors, entitlements=entitled) as found:
        driver = Driver(found, folder)
        listen = grpc.unary_stream_rpc_method_handler(driver.listen)
        fan = grpc.method_handlers_generic_handler("bench.Fan", {"Listen": listen})
        found.server._server.add_generic_rpc_handlers((fan,))
        try:
            await obey(driver.obey)
        finally:
            driver.close()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(Path(sys.argv[1])))
