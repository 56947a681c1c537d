"""actionbroker.v1.Approvals as gRPC clients meet it: over mutual TLS, over the Unix socket, and with an ID token."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
from structlog.testing import capture_logs
from support.approving import (
    REQUEST_ID,
    WORKLOADS,
    Approving,
    approving,
    digest_of,
    publish,
)
from support.oidc import CLIENT_ID, OidcServer, oidc_server
from support.pki import snapshot
from support.processes import until
from support.whole_broker import AGENT, ISSUER, Said, Wire, dialled

from attestors.approval import request_digest
from broker._proto.actionbroker.v1 import approvals_pb2, approvals_pb2_grpc
from broker.action import Action
from broker.decision.quota import Quota
from broker.edges import grpc_approvals
from broker.edges.grpc_approvals import MAX_WAITS_OF_ONE, SERVICE, ApprovalsService
from broker.edges.grpc_peer import Identifier
from broker.edges.metrics import Metrics
from broker.edges.places import Registrar
from broker.errors import ApprovalRequired, Reason
from broker.identity.id_token import IdTokens
from broker.identity.oidc_issuer import IssuerSettings, OidcIssuer
from broker.identity.server_tls import ServerTls
from broker.identity.unix_front import UnixFront
from broker.ledger.records import ApprovalWithdrawn, Approved, CountedRefusals, Refusal

PERSON_POLICY = """
@id("people-of-the-issuer") permit (
  principal is Person in Issuer::"{issuer}", action == Action::"broker.approve", resource
) when {{ context has person && context.person.groups.contains("release-managers") }};
"""


class ApprovalsWire(Wire):
    """One connection to the service."""

    def __init__(self, target: str, *, proves: bool) -> None:
        super().__init__(target, proves=proves)
        self.stub = approvals_pb2_grpc.ApprovalsStub(self.channel)

    def proof(self, method: str, **changes: Any) -> str:
        return super().proof(method, **{"url": f"{ISSUER}/{SERVICE}/{method}"} | changes)


@dataclass
class Stage:
    """The service, and connections to it by who they are of."""

    desk: Approving
    service: ApprovalsService
    oidc: OidcServer
    port: int
    socket: str
    stack: AsyncExitStack
    wires: dict[str, ApprovalsWire] = field(default_factory=dict)

    async def wire(self, name: str) -> ApprovalsWire:
        """Over mutual TLS."""
        if name not in self.wires:
            parts = self.desk.parts
            own = parts.authority.svid(WORKLOADS[name]).own()
            trust = snapshot(parts.authority.bundle(parts.signer), own=own)
            dialler = await self.stack.enter_async_context(dialled(self.port, trust))
            made = ApprovalsWire("unix:unused", proves=False)
            await made.channel.close()
            made.channel = dialler.channel
            made.stub = approvals_pb2_grpc.ApprovalsStub(made.channel)
            self.wires[name] = made
        return self.wires[name]

    async def ask(self, name: str, method: str, message: Any) -> Said:
        return await (await self.wire(name)).ask(method, message)

    async def lay_down(self) -> None:
        """The agent's request waits from now on."""
        with pytest.raises(ApprovalRequired):
            await self.desk.ask()

    async def refusals(self) -> list[tuple[Reason, str]]:
        records = await self.desk.parts.records()
        return [(one.reason, one.stage) for one in records if isinstance(one, Refusal)]


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    async with made_stage(tmp_path) as found:
        yield found


@asynccontextmanager
async def made_stage(tmp_path: Path) -> AsyncIterator[Stage]:
    async with AsyncExitStack() as stack:
        oidc = await stack.enter_async_context(oidc_server(tmp_path / "oidc"))
        settings = IssuerSettings(issuer=oidc.issuer, audience=CLIENT_ID, ca_file=str(oidc.ca_file))
        people = IdTokens({oidc.issuer: OidcIssuer(settings)})
        more = PERSON_POLICY.format(issuer=oidc.issuer)
        desk = await stack.enter_async_context(approving(tmp_path, people=people, more_policy=more))
        exchange, private = desk.parts.exchange, tmp_path / "private"
        private.mkdir(mode=0o700)
        front = UnixFront(tmp_path / "s", private / "grpc")
        service = ApprovalsService(
            desk.desk, exchange, identifier=Identifier(exchange, front.peer), metrics=Metrics(), clock=desk.now
        )
        server = grpc.aio.server()
        registrar = cast("grpc.aio.Server", Registrar(server, 100, cast("Any", None)))
        approvals_pb2_grpc.add_ApprovalsServicer_to_server(service, registrar)
        server.add_insecure_port(f"unix:{private / 'grpc'}")
        port = server.add_secure_port("127.0.0.1:0", ServerTls(desk.parts.trust).grpc_credentials())
        await server.start()
        await front.start()
        found = Stage(desk, service, oidc, port, str(tmp_path / "s"), stack)
        stack.push_async_callback(server.stop, 0)
        stack.push_async_callback(front.close)
        yield found


def show(digest: str, **more: str) -> Any:
    return approvals_pb2.ShowApprovalRequest(request_digest=digest, **more)


def approve(digest: str, **more: Any) -> Any:
    return approvals_pb2.ApproveRequest(request_digest=digest, **more)


def withdraw(digest: str, **more: str) -> Any:
    return approvals_pb2.WithdrawRequest(request_digest=digest, **more)


def recomputed(message: Any) -> str:
    """As an approver's client computes the digest, from the fields alone."""
    action = Action.parse(
        message.action.name, message.action.resource, message.action.audience, message.action.parameters
    )
    return request_digest(action.digest.hex(), message.principal, message.request_id)


async def test_an_approver_sees_what_the_digest_is_over_approves_it_and_takes_it_back(stage: Stage) -> None:
    await stage.lay_down()
    digest = stage.desk.digest
    (pending,) = (await stage.ask("ann", "Pending", approvals_pb2.PendingApprovalsRequest())).message.requests
    shown = (await stage.ask("ann", "Show", show(digest))).message
    assert shown == pending
    assert (shown.request_digest, recomputed(shown), shown.state) == (digest, digest, "waiting")
    assert (shown.principal, shown.request_id, shown.action_digest) == (AGENT, REQUEST_ID, publish().digest.hex())
    assert AGENT in shown.text
    said = await stage.ask("ann", "Approve", approve(digest, reason="read it", valid_for_s=60))
    given = said.message.approval
    assert (given.by, given.reason) == (WORKLOADS["ann"], "read it")
    assert given.expires_at.seconds - given.approved_at.seconds == 60
    assert said.correlation_id == said.message.correlation_id
    assert [one.by for one in (await stage.ask("bob", "Show", show(digest))).message.approvals] == [WORKLOADS["ann"]]
    assert (await stage.ask("ann", "Withdraw", withdraw(digest, reason="a mistake"))).message.correlation_id
    assert not (await stage.ask("bob", "Show", show(digest))).message.approvals
    records = await stage.desk.parts.records()
    (approved,) = [one for one in records if isinstance(one, Approved)]
    (withdrawn,) = [one for one in records if isinstance(one, ApprovalWithdrawn)]
    assert (approved.correlation_id, approved.method) == (said.correlation_id, "mtls")
    assert (withdrawn.by, withdrawn.reason) == (WORKLOADS["ann"], "a mistake")


async def test_who_may_not_is_told_a_reason_and_nothing_else(stage: Stage) -> None:
    await stage.lay_down()
    digest, never = stage.desk.digest, digest_of(request_id="never-asked-so-far")
    attempts = [
        ("agent", "Approve", approve(digest), Reason.DENIED),
        ("stranger", "Approve", approve(digest), Reason.DENIED),
        ("stranger", "Show", show(digest), Reason.DENIED),
        ("stranger", "Show", show(never), Reason.DENIED),
        ("ann", "Approve", approve(never), Reason.DENIED),
        ("ann", "Withdraw", withdraw(digest), Reason.DENIED),
        ("ann", "Approve", approve("x"), Reason.MALFORMED),
        ("ann", "Approve", approve(digest, reason="x" * 501), Reason.MALFORMED),
        ("ann", "Approve", approve(digest, valid_for_s=86401), Reason.MALFORMED),
    ]
    for name, method, message, reason in attempts:
        said = await stage.ask(name, method, message)
        assert (said.reason, said.details, said.message) == (reason, reason, None)
        assert said.correlation_id
    assert not (await stage.ask("stranger", "Pending", approvals_pb2.PendingApprovalsRequest())).message.requests
    expected = [(reason, method.lower()) for _, method, _, reason in attempts]
    assert await stage.refusals() == [
        (Reason.APPROVAL_REQUIRED, "request"),
        *expected,
        (Reason.DENIED, "pending"),
    ]


async def test_a_person_approves_with_an_id_token_and_needs_no_other_identity(stage: Stage) -> None:
    await stage.lay_down()
    digest = stage.desk.digest
    async with ApprovalsWire(f"unix:{stage.socket}", proves=False) as wire:
        token = stage.oidc.id_token(digest)
        said = await wire.ask("Approve", approve(digest, id_token=token))
        assert said.message.approval.by == f"{stage.oidc.issuer}/subject/dS0xNw"
        assert (await wire.ask("Show", show(digest, id_token=token))).message.approvals
        bad = [
            (digest, stage.oidc.id_token(digest_of(caller=WORKLOADS["other"])), Reason.UNAUTHENTICATED),
            (digest, stage.oidc.id_token(digest, auth_time=1), Reason.EXPIRED),
            (digest, stage.oidc.id_token(digest, aud="another"), Reason.WRONG_AUDIENCE),
            (digest, "no token", Reason.MALFORMED),
            ("no digest", stage.oidc.id_token("no digest"), Reason.MALFORMED),
        ]
        for wanted, shown, reason in bad:
            assert (await wire.ask("Approve", approve(wanted, id_token=shown))).reason == reason
        both = await wire.ask("Approve", approve(digest, id_token=token, spiffe_id=WORKLOADS["ann"]))
        assert both.reason == Reason.MALFORMED
        stage.oidc.person = {"sub": "u-18", "groups": ["visitors"]}
        assert (await wire.ask("Approve", approve(digest, id_token=stage.oidc.id_token(digest)))).reason == "denied"
        without = await wire.send("Approve", approve(digest))
        assert without.reason == Reason.NONCE_REQUIRED, "then it is the process that has to show who it is"
        assert (await wire.ask("Withdraw", withdraw(digest, id_token=token))).message.correlation_id
        stage.desk.parts.exchange.attestations = Quota(0.001, 1, 10)
        await wire.ask("Show", show(digest, id_token=token))
        assert (await wire.ask("Show", show(digest, id_token=token))).reason == Reason.QUOTA
    records = await stage.desk.parts.records()
    assert token not in repr(records)
    (approved,) = [one for one in records if isinstance(one, Approved)]
    assert (approved.method, len(approved.evidence_sha256)) == ("id-token", 64)
    counts = [one.counts for one in records if isinstance(one, CountedRefusals)]
    assert sum(sum(one.values()) for one in counts) == len(bad) + 3


async def test_a_process_approves_over_the_unix_socket_with_a_proof_for_this_very_method(stage: Stage) -> None:
    await stage.lay_down()
    digest = stage.desk.digest
    stage.desk.parts.ids = [WORKLOADS["ann"]]
    async with ApprovalsWire(f"unix:{stage.socket}", proves=True) as wire:
        assert (await wire.ask("Show", show(digest))).message.request_digest == digest
        for method, url in (("Approve", f"{ISSUER}/{SERVICE}/Show"), ("Approve", f"{ISSUER}/other.Service/Approve")):
            said = await wire.send(method, approve(digest), [wire.proof(method, url=url)])
            assert said.reason == Reason.INVALID_PROOF
        assert (await wire.ask("Approve", approve(digest))).message.approval.by == WORKLOADS["ann"]
        stage.desk.parts.ids = [WORKLOADS["bob"], AGENT]
        said = await wire.ask("Approve", approve(digest, spiffe_id=WORKLOADS["bob"]))
        assert said.reason == Reason.DENIED, "the process may act as the request's caller, too"


async def test_who_waits_hears_each_change_as_it_happens_until_the_request_is_used(stage: Stage) -> None:
    await stage.lay_down()
    digest = stage.desk.digest
    wire = await stage.wire("agent")
    states = wire.stub.Wait(approvals_pb2.WaitForApprovalRequest(request_digest=digest), timeout=20)
    first = await states.read()
    assert (recomputed(first), len(first.approvals)) == (digest, 0)
    await stage.ask("ann", "Approve", approve(digest))
    assert [one.by for one in (await states.read()).approvals] == [WORKLOADS["ann"]]
    await stage.ask("bob", "Approve", approve(digest))
    assert len((await states.read()).approvals) == 2
    assert await stage.desk.ask()
    assert (await states.read()).state == "used"
    assert await states.read() is grpc.aio.EOF
    assert await states.code() is grpc.StatusCode.OK


async def test_nobody_waits_for_anothers_request(stage: Stage) -> None:
    await stage.lay_down()
    for name in ("ann", "other", "stranger"):
        wire = await stage.wire(name)
        states = wire.stub.Wait(approvals_pb2.WaitForApprovalRequest(request_digest=stage.desk.digest), timeout=20)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await states.read()
        assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
        assert refused.value.details() == Reason.DENIED
    assert (await stage.refusals())[1:] == [(Reason.DENIED, "wait")] * 3


async def test_a_caller_holds_so_many_waits_and_gives_them_back_by_going(stage: Stage) -> None:
    await stage.lay_down()
    wire = await stage.wire("agent")
    wanted = approvals_pb2.WaitForApprovalRequest(request_digest=stage.desk.digest)
    open_ones = [wire.stub.Wait(wanted, timeout=60) for _ in range(MAX_WAITS_OF_ONE)]
    for states in open_ones:
        assert await states.read()
    over = wire.stub.Wait(wanted, timeout=60)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await over.read()
    assert (refused.value.code(), refused.value.details()) == (grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.QUOTA)
    open_ones[0].cancel()
    held = stage.service._held._held
    await until(lambda: held[AGENT] == MAX_WAITS_OF_ONE - 1, "the one who went gave its place back")
    again = wire.stub.Wait(wanted, timeout=60)
    assert await again.read()
    for states in (*open_ones[1:], again):
        states.cancel()
    await until(lambda: not held.total(), "all gave theirs back")
    assert not stage.desk.parts.exchange.ledger._subscribers


async def test_who_does_not_take_what_it_is_told_is_told_no_more_and_has_its_one_place_until_it_goes(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that opens a wait and never reads."""
    monkeypatch.setattr(grpc_approvals, "PATIENCE_S", 0.2)
    large, held = publish(notes="x" * 3900), stage.service._held._held
    with pytest.raises(ApprovalRequired):
        await stage.desk.ask(large)
    wanted = approvals_pb2.WaitForApprovalRequest(request_digest=digest_of(large))
    async with ApprovalsWire(f"unix:{stage.socket}", proves=True) as wire:
        await wire.ask("Show", show(stage.desk.digest))
        silent = wire.stub.Wait(wanted, metadata=[("dpop", wire.proof("Wait"))], timeout=60)
        waiting = stage.desk.parts.exchange.ledger._subscribers
        await until(lambda: bool(waiting), "it waits")
        told = 0
        while waiting and told < 8000:  # until all is full that lies between
            await stage.desk.approve("ann" if told % 2 else "bob", digest_of(large), why="x" * 500)
            told += 1
        await until(lambda: not waiting, "it is told no more")
        assert held[AGENT] == 1, "or else it could come again and again, and hold a call of the server's each time"
        silent.cancel()
        await until(lambda: not held[AGENT], "it went")


async def test_what_breaks_inside_is_internal_and_tells_nothing(stage: Stage) -> None:
    await stage.lay_down()
    stage.desk.desk._records = cast("Any", None)
    with capture_logs() as logs:
        said = await stage.ask("ann", "Show", show(stage.desk.digest))
    assert (said.code, said.reason) == (grpc.StatusCode.INTERNAL, "")
    assert "NoneType" not in said.details
    assert [log for log in logs if log["event"] == "request_failed" and log["correlation_id"] == said.correlation_id]
