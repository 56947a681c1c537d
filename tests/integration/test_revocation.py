"""Revoking, standing denials and break-glass on a whole broker, with a guard that hears its feed."""

import os
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from support.operating import CLOSED, EMERGENCY_POLICY, EMERGENCY_SCHEMA, WHY, why
from support.processes import Child, running, until
from support.receiving import claims_of
from support.scoped import Receiver, receiver
from support.trust_domain import TESTS
from support.whole_broker import AGENT, OPERATOR, ORDERS, POLICIES, RESOURCE, Whole, serving, whole_broker

from broker._proto.actionbroker.v1 import scope_pb2, scope_pb2_grpc
from broker.client import ActionToken, Client
from broker.errors import ApprovalRequired, Reason
from broker.ledger.records import BreakGlass, Intent, Operated, Refusal, ScopeRefused, StandingDenial, StandingLifted
from broker.ledger.verify import verify

EMERGENCIES = {**POLICIES, "emergency.cedarschema": EMERGENCY_SCHEMA, "emergency.cedar": EMERGENCY_POLICY}
REQUEST_ID = "emergency-number-one"


@pytest.fixture(scope="module")
def whole() -> Iterator[Whole]:
    with whole_broker(EMERGENCIES) as found:
        yield found


@asynccontextmanager
async def roles(whole: Whole) -> AsyncIterator[tuple[Receiver, Client, Client]]:
    """A service with a guard, an agent, an operator."""
    async with receiver(whole) as orders, whole.client(AGENT) as agent, whole.client(OPERATOR) as operator:
        yield orders, agent, operator


async def read(client: Client, name: str = "orders.read") -> ActionToken:
    return await client.request(name, RESOURCE, ORDERS)


async def test_a_revoked_workload_is_refused_at_the_guard_and_at_the_broker_until_it_is_lifted(whole: Whole) -> None:
    async with roles(whole) as (orders, agent, operator), whole.client(ORDERS) as another:
        dead, spared = await read(agent), await read(another)
        assert await orders.refused(dead) == await orders.refused(spared) == ""
        done = await operator.scope.revoke(principal=AGENT, standing=True, reason="its node was broken into")
        assert (done.hits, [one.jti for one in done.credentials]) == (1, [claims_of(dead.access_token).jti])
        await orders.hears(dead.access_token, "revoked")
        assert await orders.refused(dead) == Reason.REVOKED
        assert await why(orders.client.check(dead.access_token, dead.action)) == Reason.REVOKED
        assert await why(read(agent)) == Reason.REVOKED
        assert await orders.refused(spared) == ""
        (entry,) = await operator.scope.standing()
        assert (entry.id, entry.kind, entry.principal, entry.by) == (done.standing_id, "denial", AGENT, OPERATOR)
        assert (entry.reason, entry.until) == ("its node was broken into", None)

        await operator.scope.lift(entry.id, reason="built anew")
        assert await operator.scope.standing() == ()
        assert await orders.refused(await read(agent)) == ""
        assert await orders.refused(dead) == Reason.REVOKED, "refused is final"
        denial = await whole.recorded(done.correlation_id, StandingDenial)
        refused = await whole.recorded(done.correlation_id, ScopeRefused)
        assert (denial.id, refused.cause) == (entry.id, f"standing:{entry.id}")
        assert await whole.recorded(done.correlation_id, Operated)


@pytest.mark.parametrize(
    ("chosen", "hit"),
    [
        ({"principal": "spiffe://acme.test/build/"}, {"read", "long"}),
        ({"action": "orders.long"}, {"long"}),
        ({"trust_domain": "acme.test"}, {"read", "long", "another"}),
        ({"jti": "read"}, {"read"}),
    ],
    ids=str,
)
async def test_guards_refuse_what_was_selected_and_nothing_else(
    whole: Whole, chosen: dict[str, str], hit: set[str]
) -> None:
    async with roles(whole) as (orders, agent, operator), whole.client(ORDERS) as another:
        await operator.scope.revoke(trust_domain="acme.test")  # what other tests left
        tokens = {"read": await read(agent), "long": await read(agent, "orders.long"), "another": await read(another)}
        jtis = {name: claims_of(token.access_token).jti for name, token in tokens.items()}
        chosen = {key: jtis[value] if key == "jti" else value for key, value in chosen.items()}
        dry = await operator.scope.revoke(**chosen, dry_run=True)
        assert {one.jti for one in dry.credentials} == {jtis[name] for name in hit}
        assert {(one.principal, one.resource) for one in dry.credentials} <= {(AGENT, RESOURCE), (ORDERS, RESOURCE)}
        for token in tokens.values():
            assert await orders.refused(token) == "", "a dry run changes nothing"
        tokens = {"read": await read(agent), "long": await read(agent, "orders.long"), "another": await read(another)}
        if "jti" in chosen:
            chosen = {"jti": claims_of(tokens["read"].access_token).jti}
        await operator.scope.revoke(**chosen)
        for name in hit:
            await orders.hears(tokens[name].access_token, "revoked")
        for name in tokens.keys() - hit:
            assert await orders.refused(tokens[name]) == ""
        assert await why(read(agent, "orders.long")) == "", "without a denial the next one is given"


async def test_a_denial_of_an_action_stands_against_everybody_until_it_ends(whole: Whole) -> None:
    async with roles(whole) as (_, agent, operator), whole.client(ORDERS) as another:
        ends = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=2)
        done = await operator.scope.revoke(action="orders.charge", standing=True, until=ends)
        for client in (agent, another):
            assert await why(read(client, "orders.charge")) == Reason.REVOKED
            assert await why(read(client)) == ""
        assert [one.until for one in await operator.scope.standing()] == [ends]
        await until(lambda: datetime.now(UTC) >= ends, "it ends")
        assert await why(read(agent, "orders.charge")) == ""
        assert done.standing_id not in [one.id for one in await operator.scope.standing()]


async def test_who_is_no_operator_revokes_sees_lifts_and_breaks_nothing(whole: Whole) -> None:
    async with roles(whole) as (orders, agent, operator):
        entry = (await operator.scope.revoke(action="orders.brief", standing=True)).standing_id
        token = await read(agent)
        for call in (
            agent.scope.revoke(principal=AGENT, standing=True),
            agent.scope.revoke(principal=AGENT, dry_run=True),
            agent.scope.standing(),
            agent.scope.lift(entry),
            agent.scope.break_glass(
                AGENT, CLOSED, RESOURCE, until=_soon(), reason=WHY, request_id="asked-by-no-operator"
            ),
        ):
            assert await why(call) == Reason.DENIED
        assert await orders.refused(token) == ""
        assert [one.id for one in await operator.scope.standing()] == [entry]
        await operator.scope.lift(entry)
    stages = {one.stage for one in whole.records() if isinstance(one, Refusal) and one.principal == AGENT}
    assert {"revoke", "standing", "break_glass"} <= stages


async def test_what_cannot_be_read_is_malformed_and_in_the_ledger(whole: Whole) -> None:
    out_of_range = scope_pb2.RevokeRequest(standing=True, spiffe_id=OPERATOR)
    out_of_range.selection.principal = AGENT
    out_of_range.until.seconds = 10**15
    nothing = scope_pb2.RevokeRequest(spiffe_id=OPERATOR)
    emergency = scope_pb2.BreakGlassRequest(spiffe_id=OPERATOR, principal=AGENT, action=CLOSED, request_id=REQUEST_ID)
    async with whole.wire() as wire:
        wire.stub = scope_pb2_grpc.ScopeStub(wire.channel)
        prove = wire.proof
        wire.proof = lambda method, **changes: prove(  # type: ignore[method-assign] - of another service
            method, **{"url": f"https://broker.acme.test/actionbroker.v1.Scope/{method}", **changes}
        )
        for method, message in (("Revoke", out_of_range), ("Revoke", nothing), ("BreakGlass", emergency)):
            said = await wire.ask(method, message)
            assert said.reason == Reason.MALFORMED
            assert (await whole.recorded(said.correlation_id, Refusal)).principal == OPERATOR


@contextmanager
def approver(whole: Whole, name: str) -> Iterator[Child]:
    """In a process of its own, by the name approvers/NAME."""
    command = (sys.executable, "-m", "support.approver", whole.broker.socket)
    with running(*command, env={**os.environ, "PYTHONPATH": f"{TESTS}:{TESTS.parent}"}) as child:
        whole.domain.entry(f"approvers/{name}", child.pid)
        yield child


async def approve(child: Child, digest: str) -> str:
    child.tell(f"approve {digest}")
    return await child.line()


def _soon() -> datetime:
    return datetime.now(UTC).replace(microsecond=0) + timedelta(minutes=10)


async def test_broken_glass_permits_one_thing_by_two_approvals_and_lifted_it_takes_that_with_it(whole: Whole) -> None:
    wanted = {"until": _soon(), "reason": WHY, "request_id": REQUEST_ID}
    with approver(whole, "ann") as ann, approver(whole, "bob") as bob:
        assert [await ann.line(), await bob.line()] == ["ready", "ready"]
        async with roles(whole) as (orders, agent, operator):
            assert await why(read(agent, CLOSED)) == Reason.DENIED
            with pytest.raises(ApprovalRequired) as caught:
                await operator.scope.break_glass(AGENT, CLOSED, RESOURCE, **wanted)
            for said in (OPERATOR, AGENT, CLOSED, RESOURCE, WHY):
                assert said in caught.value.text
            assert await approve(ann, caught.value.request_digest) == "approved"
            assert await why(operator.scope.break_glass(AGENT, CLOSED, RESOURCE, **wanted)) == "approval_required"
            assert await approve(bob, caught.value.request_digest) == "approved"
            permit = await operator.scope.break_glass(AGENT, CLOSED, RESOURCE, **wanted)
            (entry,) = await operator.scope.standing()
            assert (entry.id, entry.kind, entry.resource, entry.until) == (
                permit,
                "break_glass",
                RESOURCE,
                wanted["until"],
            )
            assert "action_broker_break_glass_permits 1.0" in whole.get("/metrics")[1]
            assert whole.broker.wait_for("break_glass")["id"] == permit

            token, spared = await read(agent, CLOSED), await read(agent)
            assert await orders.refused(token) == ""
            assert await why(agent.request(CLOSED, f"{RESOURCE}1", ORDERS)) == Reason.DENIED
            assert await why(read(agent, "orders.sealed")) == Reason.DENIED

            await operator.scope.lift(permit, reason="over")
            await orders.hears(token.access_token, "denied")
            assert await orders.refused(spared) == ""
            assert await why(read(agent, CLOSED)) == Reason.DENIED
            assert "action_broker_break_glass_permits 0.0" in whole.get("/metrics")[1]
    kept = [one for one in whole.records() if isinstance(one, BreakGlass | StandingLifted)][-2:]
    assert [type(one) for one in kept] == [BreakGlass, StandingLifted]
    intents = [one for one in whole.records() if isinstance(one, Intent) and one.policies == (f"break-glass:{permit}",)]
    assert [one.jti for one in intents] == [claims_of(token.access_token).jti]


async def test_broken_glass_outweighs_no_forbid_and_no_denial(whole: Whole) -> None:
    with approver(whole, "ann") as ann, approver(whole, "bob") as bob:
        assert [await ann.line(), await bob.line()] == ["ready", "ready"]
        async with whole.client(AGENT) as agent, whole.client(OPERATOR) as operator:
            for action in ("orders.sealed", "orders.charge"):
                wanted = {"until": _soon(), "reason": WHY, "request_id": f"{REQUEST_ID}-{action.partition('.')[2]}"}
                with pytest.raises(ApprovalRequired) as caught:
                    await operator.scope.break_glass(AGENT, action, RESOURCE, **wanted)
                for child in (ann, bob):
                    assert await approve(child, caught.value.request_digest) == "approved"
                await operator.scope.break_glass(AGENT, action, RESOURCE, **wanted)
            assert await why(read(agent, "orders.sealed")) == Reason.DENIED
            denial = await operator.scope.revoke(action="orders.charge", standing=True)
            assert await why(read(agent, "orders.charge")) == Reason.REVOKED
            for entry in await operator.scope.standing():
                await operator.scope.lift(entry.id)
            assert denial.standing_id
            assert await why(read(agent, "orders.charge")) == "", "the control"


async def test_a_broker_that_was_killed_denies_what_it_denied_and_permits_what_it_permitted(tmp_path: Path) -> None:
    with whole_broker(EMERGENCIES) as whole:
        with approver(whole, "ann") as ann, approver(whole, "bob") as bob:
            assert [await ann.line(), await bob.line()] == ["ready", "ready"]
            async with roles(whole) as (orders, agent, operator):
                dead = await read(agent, "orders.longest")
                await operator.scope.revoke(action="orders.longest", standing=True)
                wanted = {"until": _soon(), "reason": WHY, "request_id": REQUEST_ID}
                with pytest.raises(ApprovalRequired) as caught:
                    await operator.scope.break_glass(AGENT, CLOSED, RESOURCE, **wanted)
                for child in (ann, bob):
                    assert await approve(child, caught.value.request_digest) == "approved"
                permit = await operator.scope.break_glass(AGENT, CLOSED, RESOURCE, **wanted)
                whole.broker.kill()
                with serving(whole.broker.folder / "broker.toml", whole.domain) as again:
                    await orders.hears(dead.access_token, "revoked")
                    assert again.wait_for("break_glass")["id"] == permit
                    assert await why(read(agent, "orders.longest")) == Reason.REVOKED
                    assert await orders.refused(await read(agent, CLOSED)) == ""
                    assert {one.kind for one in await operator.scope.standing()} == {"denial", "break_glass"}
                    assert again.stop() == 0
        assert verify(whole.broker.ledger).good
