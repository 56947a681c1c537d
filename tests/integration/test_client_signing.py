"""The client's signing and approval calls against a broker that signs: answers, waiting, lost answers, bad ones."""

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Iterator
from concurrent import futures
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from support.broker import ISSUER
from support.signing import AGENT, ALICE, BOB, CONTENT, SigningBroker, digests, signing_broker

from broker._proto.actionbroker.v1 import action_pb2, approvals_pb2, approvals_pb2_grpc, broker_pb2_grpc, signing_pb2
from broker.action import canonical_json
from broker.artifacts import HEX_DIGITS
from broker.client import Client
from broker.client.approvals import PendingRequest
from broker.client.faults import NeedsApproval, Unreachable
from broker.client.signing import digests_of, signing_action
from broker.errors import ApprovalRequired, Invalid, Reason, Refused
from broker.ledger.records import Intent


@pytest.fixture(scope="module")
def broker() -> Iterator[SigningBroker]:
    with signing_broker() as found:
        yield found


async def asked(broker: SigningBroker, agent: Client, **action: Any) -> tuple[str, str]:
    """A new request that waits: its digest and its request id."""
    request_id = secrets.token_urlsafe(24)
    with pytest.raises(ApprovalRequired) as lacking:
        await agent.signing.grant(broker.action(**action), [broker.builder.envelope()], request_id=request_id)
    return lacking.value.request_digest, request_id


# -- grants and signatures -------------------------------------------------------------------------------------------


async def test_what_lacks_an_approval_says_what_to_approve_and_what_approvers_read(broker: SigningBroker) -> None:
    async with broker.client() as agent:
        request_id = secrets.token_urlsafe(24)
        with pytest.raises(NeedsApproval) as lacking:
            await agent.signing.grant(broker.action(), [broker.builder.envelope()], request_id=request_id)
    error = lacking.value
    assert isinstance(error, Refused)
    assert (error.reason, error.code) == (Reason.APPROVAL_REQUIRED, "approval_required")
    assert error.correlation_id
    assert f"action-broker approve {error.request_digest}" in error.detail
    assert "release.sign" in error.text


async def test_a_lost_answer_is_fetched_again_by_its_id_and_there_is_one_signature(broker: SigningBroker) -> None:
    async with broker.client() as agent:
        grant = await broker.granted(agent, broker.action(), (broker.builder.envelope(),), ALICE)
        first = await agent.signing.sign(grant, idempotency_id="a-lost-answer-fetched-1")
        again = await agent.signing.sign(grant, idempotency_id="a-lost-answer-fetched-1")
        assert again.signature == first.signature
        with pytest.raises(Refused) as used:
            await agent.signing.sign(grant)
        assert used.value.reason is Reason.ALREADY_USED
    by_grant = [one for one in broker.whole.records() if isinstance(one, Intent) and one.parent == grant.grant_id]
    assert [one.credential for one in by_grant] == ["signature"]


async def test_what_the_transport_would_cut_off_is_not_sent(broker: SigningBroker) -> None:
    envelope = broker.builder.envelope()
    async with broker.client() as agent:
        with pytest.raises(Invalid, match="bytes together"):
            await agent.signing.grant(broker.action(), [b"x" * 500_000] * 3)
        with pytest.raises(ApprovalRequired):
            await agent.signing.grant(broker.action(), [b"x" * 500_000, envelope], request_id="a-request-that-fits")


async def test_no_secret_is_in_what_is_printed(broker: SigningBroker) -> None:
    async with broker.client() as agent:
        grant = await broker.granted(agent, broker.action(), (broker.builder.envelope(),), ALICE)
    assert grant.grant_id in repr(grant)
    for secret in (grant.grant, grant.csr_nonce):
        assert secret not in repr(grant)


async def test_an_artifact_is_named_by_its_sha256_and_by_others_where_they_are_asked_for(tmp_path: Path) -> None:
    """Provenance seldom gives more, and what it does not give is refused."""
    large = bytes(3 * 1024 * 1024 + 1)
    for name, content in (("app", CONTENT), ("large", large)):
        (tmp_path / name).write_bytes(content)
        assert digests_of(tmp_path / name) == {"sha256": digests(content)["sha256"]}
        assert digests_of(tmp_path / name, HEX_DIGITS) == digests(content)


def test_an_action_that_signs_names_its_artifacts_once_and_nobody_elses_parameter() -> None:
    made = signing_action(
        "release.sign", "https://releases.acme.test/app", issuer=ISSUER, artifacts=[digests(CONTENT)], purpose="release"
    )
    assert made.audience == ISSUER
    assert made.parameters["signing"]["signer"] == "keyless"
    good = {"issuer": ISSUER, "artifacts": [digests(CONTENT)], "purpose": "release"}
    for change in (
        {"parameters": {"signing": {}}},
        {"artifacts": []},
        {"artifacts": [digests(CONTENT)] * 2},
        {"artifacts": [{"md5": "00"}]},
        {"purpose": "Release"},
        {"signer": "key:"},
    ):
        with pytest.raises(Invalid):
            signing_action("release.sign", "https://releases.acme.test/app", **(good | change))


# -- waiting ---------------------------------------------------------------------------------------------------------


async def test_who_waits_is_told_at_once_of_each_approval_and_can_ask_meanwhile(broker: SigningBroker) -> None:
    async with broker.client() as agent:
        digest, request_id = await asked(broker, agent, environment="production")
        seen: list[tuple[str, ...]] = []
        async with contextlib.aclosing(agent.approvals.wait(digest, 30)) as states:
            async for state in states:
                seen.append(tuple(one.by for one in state.approvals))
                if len(seen) < 3:
                    await broker.approve(digest, (ALICE, BOB)[len(seen) - 1])
                    continue
                # On the same connection, while the call still tells.
                action, provenance = broker.action(environment="production"), [broker.builder.envelope()]
                assert await agent.signing.grant(action, provenance, request_id=request_id)
                break
        assert [len(one) for one in seen] == [0, 1, 2]


async def test_waiting_ends_when_the_request_is_used(broker: SigningBroker) -> None:
    async with broker.client() as agent:
        digest, request_id = await asked(broker, agent)

        async def use() -> None:
            await broker.approve(digest, ALICE)
            await agent.signing.grant(broker.action(), [broker.builder.envelope()], request_id=request_id)

        using = asyncio.create_task(use())
        async with asyncio.timeout(20):
            states = [state async for state in agent.approvals.wait(digest, 3600)]
        await using
    assert states[-1].is_used


async def test_waiting_ends_in_time_and_without_an_error(broker: SigningBroker) -> None:
    async with broker.client() as agent:
        digest, _ = await asked(broker, agent)
        async with asyncio.timeout(10):
            states = [state async for state in agent.approvals.wait(digest, 0.5)]
    assert [len(state.approvals) for state in states] == [0]


async def test_nobody_waits_for_anothers_request(broker: SigningBroker) -> None:
    async with broker.client() as agent, broker.client("spiffe://acme.test/build/own-key-agent") as other:
        digest, _ = await asked(broker, agent)
        for client, which in ((other, digest), (agent, "ab" * 32)):
            with pytest.raises(Refused) as refused:
                await anext(client.approvals.wait(which, 5))
            assert refused.value.reason is Reason.DENIED
        with pytest.raises(Invalid):
            await anext(agent.approvals.wait("not a digest", 5))
        assert not (await anext(agent.approvals.wait(digest, 5))).is_used


async def test_a_client_that_is_closed_waits_no_longer(broker: SigningBroker) -> None:
    started = asyncio.Event()

    async def wait(agent: Client, digest: str) -> None:
        async for _ in agent.approvals.wait(digest, 3600):
            started.set()

    async with broker.client() as agent:
        digest, _ = await asked(broker, agent)
        waiting = asyncio.create_task(wait(agent, digest))
        await started.wait()
    with pytest.raises(Unreachable):
        await asyncio.wait_for(waiting, 10)


async def test_who_gives_up_waiting_leaves_no_call_behind(broker: SigningBroker) -> None:
    async with broker.client() as agent:
        for _ in range(20):  # more than a caller may hold at once
            digest, _ = await asked(broker, agent)
            waiting = agent.approvals.wait(digest, 3600)
            assert await anext(waiting)
            await waiting.aclose()


# -- brokers that cannot be believed ---------------------------------------------------------------------------------


class Liar(broker_pb2_grpc.ActionBrokerServicer, approvals_pb2_grpc.ApprovalsServicer):
    """Answers as it is told. breaks: how many streams break off after their first answer."""

    def __init__(self) -> None:
        self.shown = self.request()
        self.streams, self.breaks, self.approvals = 0, 0, 0
        self.grant = signing_pb2.SigningGrant()
        self.signed = signing_pb2.SignResponse()

    def request(self, **changes: Any) -> approvals_pb2.ApprovalRequest:
        """What a broker would tell, with these fields changed."""
        action = signing_action(
            "release.sign", "https://releases.acme.test/app", issuer=ISSUER, artifacts=[digests(CONTENT)], purpose="x"
        )
        wire = action_pb2.Action(
            name=action.name,
            resource=action.resource,
            audience=action.audience,
            parameters=canonical_json(action.parameters, plain=False).decode(),
        )
        fields = {"action": wire, "principal": AGENT, "request_id": "request-number-one"} | changes
        from attestors.approval import request_digest  # noqa: PLC0415

        digest = request_digest(action.digest.hex(), AGENT, "request-number-one")
        now = Timestamp(seconds=1)
        return approvals_pb2.ApprovalRequest(
            **({"request_digest": digest, "asked_at": now, "expires_at": now, "state": "waiting"} | fields)
        )

    def RequestSigningGrant(self, _: Any, __: Any) -> Any:  # noqa: N802
        return signing_pb2.RequestSigningGrantResponse(grant=self.grant)

    def Sign(self, _: Any, __: Any) -> Any:  # noqa: N802
        return self.signed

    def Show(self, _: Any, __: Any) -> Any:  # noqa: N802
        return self.shown

    def Wait(self, _: Any, context: Any) -> Iterator[Any]:  # noqa: N802
        self.streams += 1
        yield self.shown
        if self.streams <= self.breaks:
            context.abort(grpc.StatusCode.UNAVAILABLE, "going away")
        self.shown = self.request(state="used")
        yield self.shown


@asynccontextmanager
async def liar(folder: Path) -> AsyncIterator[tuple[Liar, Client]]:
    served, server = Liar(), grpc.server(futures.ThreadPoolExecutor(4))
    broker_pb2_grpc.add_ActionBrokerServicer_to_server(served, server)
    approvals_pb2_grpc.add_ApprovalsServicer_to_server(served, server)
    server.add_insecure_port(f"unix:{folder}/liar.sock")
    server.start()
    try:
        async with Client.unix(str(folder / "liar.sock"), issuer=ISSUER) as client:
            yield served, client
    finally:
        await asyncio.to_thread(server.stop(0).wait)


async def test_a_stream_that_breaks_off_is_opened_again_and_tells_nothing_twice(tmp_path: Path) -> None:
    async with liar(tmp_path) as (served, client):
        served.breaks = 2
        digest = served.shown.request_digest
        async with asyncio.timeout(20):
            states = [state.is_used async for state in client.approvals.wait(digest, 3600)]
        assert states == [False, True]
        assert served.streams == 3


@pytest.mark.parametrize(
    "changes",
    [
        {"principal": "spiffe://acme.test/another"},
        {"request_id": "request-number-two"},
        {"action": action_pb2.Action(name="release.sign", resource="https://releases.acme.test/b", audience=ISSUER)},
        {"action": action_pb2.Action(name="release.sign", resource="no uri", audience=ISSUER, parameters="{}")},
    ],
    ids=["principal", "request id", "action", "no action"],
)
async def test_what_is_shown_beside_a_digest_of_something_else_is_not_believed(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    async with liar(tmp_path) as (served, client):
        digest = served.shown.request_digest
        assert isinstance(await client.approvals.show(digest), PendingRequest)
        served.shown = served.request(**changes)
        for call in (client.approvals.show(digest), anext(client.approvals.wait(digest, 5))):
            with pytest.raises(Unreachable, match="not usable"):
                await call


async def test_another_request_than_was_asked_for_is_not_believed(tmp_path: Path) -> None:
    async with liar(tmp_path) as (_, client):
        with pytest.raises(Unreachable, match="another request"):
            await client.approvals.show("ab" * 32)


async def test_an_answer_without_content_is_none(tmp_path: Path) -> None:
    action = signing_action(
        "release.sign", "https://releases.acme.test/app", issuer=ISSUER, artifacts=[digests(CONTENT)], purpose="x"
    )
    async with liar(tmp_path) as (served, client):
        with pytest.raises(Unreachable, match="a grant without content"):
            await client.signing.grant(action)
        served.grant.grant = "grant"
        served.grant.expires_at.seconds = 1
        grant = await client.signing.grant(action)
        with pytest.raises(Unreachable, match="a signature without content"):
            await client.signing.sign(grant)
        served.signed = signing_pb2.SignResponse(signature=b"signature", bundle="{}")
        assert (await client.signing.sign(grant)).certificate_chain == ()


async def test_a_broker_that_is_not_there_is_tried_again_and_then_unreachable(tmp_path: Path) -> None:
    async with Client.unix(str(tmp_path / "nothing.sock"), issuer=ISSUER) as client:
        with pytest.raises(Unreachable, match="no broker at"):
            await anext(client.approvals.wait("ab" * 32, 1.0))
