"""Approvals of a signature at a running broker: by others, for this very request, once, and while they last."""

import os
import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from support.processes import until
from support.signing import (
    AGENT,
    ALICE,
    BOB,
    CONTENT,
    OPERATOR,
    OWN_KEY_AGENT,
    SigningBroker,
    digests,
    example_policies,
    signing_broker,
)
from support.signing_calls import UNLIMITED, nothing_signed, spent
from support.whole_broker import utc_now

from attestors.approval import request_digest
from broker.action import Action
from broker.client import Client
from broker.client.signing import SigningGrant
from broker.errors import ApprovalRequired, BrokerError, Reason
from broker.ledger.records import ApprovalAsked, ApprovalWithdrawn, Approved, Intent, Refusal

OTHER = b"another artifact\n"


@pytest.fixture(scope="module")
def broker() -> Iterator[SigningBroker]:
    """Left as it was found."""
    with signing_broker(example_policies(), limits=UNLIMITED) as found:
        yield found


@dataclass
class Request:
    """One that waits for approvals. digest: what they are about."""

    broker: SigningBroker
    agent: Client
    action: Action
    request_id: str
    digest: str
    text: str

    async def grant(self, **changes: Any) -> SigningGrant:
        """Asked again, or with one thing changed."""
        asked = {"request_id": self.request_id} | changes
        action, envelope = asked.pop("action", self.action), self.broker.builder.envelope(asked.pop("content", CONTENT))
        return await self.agent.signing.grant(action, (envelope,), **asked)

    async def reason(self, **changes: Any) -> str:
        """Why there is no grant; empty where there is one."""
        try:
            await self.grant(**changes)
        except BrokerError as error:
            return str(error.reason)
        return ""

    async def approve(self, *approvers: str) -> None:
        await self.broker.approve(self.digest, *approvers)


@asynccontextmanager
async def waiting(broker: SigningBroker, environment: str = "staging", **options: Any) -> AsyncIterator[Request]:
    """A request that nobody has approved yet, laid down."""
    async with broker.client() as agent:
        action, request_id = broker.action(environment=environment, **options), secrets.token_urlsafe(24)
        with pytest.raises(ApprovalRequired) as error:
            await agent.signing.grant(action, (broker.builder.envelope(),), request_id=request_id)
        yield Request(broker, agent, action, request_id, error.value.request_digest, error.value.text)


async def test_who_lacks_an_approval_is_told_what_is_to_be_approved(broker: SigningBroker) -> None:
    """And the ledger has it: who asked what, who approved it, and which grant used it up."""
    async with waiting(broker) as request:
        assert request.digest == request_digest(request.action.digest.hex(), AGENT, request.request_id)
        for shown in (AGENT, "release.sign", "staging", "keyless"):
            assert shown in request.text
        with nothing_signed(broker.whole):
            assert await request.reason() == Reason.APPROVAL_REQUIRED, "asking again does not help"
            await request.approve(ALICE)
            grant = await request.grant()
    records = broker.whole.records()
    (asked,) = [one for one in records if isinstance(one, ApprovalAsked) and one.request_digest == request.digest]
    (approved,) = [one for one in records if isinstance(one, Approved) and one.request_digest == request.digest]
    (used,) = [one for one in records if isinstance(one, Intent) and one.approval == request.digest]
    assert (asked.principal, asked.text, approved.by, approved.reason) == (AGENT, request.text, ALICE, "looks good")
    assert used.jti == grant.grant_id


async def test_the_callers_own_approval_does_not_count(broker: SigningBroker) -> None:
    """Whatever policy says: under its own name, and under that of an approver which SPIRE gives the same process."""
    whole = broker.whole
    async with waiting(broker) as request, broker.client(ALICE) as as_alice:
        for client in (request.agent, as_alice):
            if client is as_alice:
                whole.entries[ALICE] = whole.domain.entry("release-managers/alice", os.getpid())
            shown = await shown_to(broker, request.digest)
            with pytest.raises(BrokerError) as error:
                await client.approvals.approve(shown, reason="I say so")
            assert error.value.reason is Reason.DENIED
            refusal = await whole.recorded(error.value.correlation_id, Refusal)
            assert (refusal.stage, refusal.action) == ("approve", "broker.approve")
        whole.domain.delete(whole.entries.pop(ALICE))
        assert await request.reason() == Reason.APPROVAL_REQUIRED
        await request.approve(ALICE)
        assert await request.reason() == ""


async def shown_to(broker: SigningBroker, digest: str) -> Any:
    """The request as its caller sees it, to be able to approve it without being shown it as an approver."""
    async with broker.client() as agent:
        async for found in agent.approvals.wait(digest, 20):
            return found
    raise AssertionError(digest)


async def test_one_approver_counts_once(broker: SigningBroker) -> None:
    """Production wants two: the same one twice is one."""
    async with waiting(broker, "production") as request:
        with nothing_signed(broker.whole):
            for _ in range(3):
                await request.approve(ALICE)
                assert await request.reason() == Reason.APPROVAL_REQUIRED
        await request.approve(BOB)
        assert await request.reason() == ""


async def test_an_approval_is_of_one_request_alone(broker: SigningBroker) -> None:
    """Change a parameter, the artifact, the signer, the id or the caller, and it counts for nothing."""
    async with waiting(broker) as request, broker.client(OWN_KEY_AGENT) as another:
        await request.approve(ALICE)
        other = Request(broker, another, request.action, request.request_id, "", "")
        with nothing_signed(broker.whole):
            for changes in (
                {"action": broker.action(OTHER), "content": OTHER},
                {"action": broker.action(environment="production")},
                {"action": broker.action(resource="https://releases.acme.test/app/2")},
                {"action": broker.action(artifacts=[{"sha256": digests(CONTENT)["sha256"]}])},
                {"request_id": "another-request-id"},
                {"request_id": ""},
            ):
                assert await request.reason(**changes) == Reason.APPROVAL_REQUIRED
            assert await other.reason() == Reason.APPROVAL_REQUIRED, "another caller"
            assert await other.reason(action=broker.action(signer="agent-key")) == Reason.APPROVAL_REQUIRED
        assert await request.reason() == "", "for the one that it is of"


async def test_an_approval_is_good_for_one_grant(broker: SigningBroker) -> None:
    """The next grant wants approvals of its own, under an id of its own."""
    async with waiting(broker) as request:
        await request.approve(ALICE)
        grant = await request.grant()
        with nothing_signed(broker.whole):
            assert await request.reason() == Reason.ALREADY_USED
            assert await broker.tell(BOB, f"approve {request.digest}") == Reason.ALREADY_USED
            assert await request.reason() == Reason.ALREADY_USED
        assert (await request.agent.signing.sign(grant)).signature
        with nothing_signed(broker.whole):
            assert await request.reason() == Reason.ALREADY_USED, "nor after the signature"


async def test_an_approval_that_was_withdrawn_counts_no_more_until_it_is_given_again(broker: SigningBroker) -> None:
    async with waiting(broker) as request:
        await request.approve(ALICE)
        assert await broker.tell(ALICE, f"withdraw {request.digest}") == "withdrawn"
        assert await broker.tell(BOB, f"withdraw {request.digest}") == Reason.DENIED, "he gave none"
        assert await request.reason() == Reason.APPROVAL_REQUIRED
        records = broker.whole.records()
        (one,) = [o for o in records if isinstance(o, ApprovalWithdrawn) and o.request_digest == request.digest]
        assert (one.by, one.reason) == (ALICE, "second thoughts")
        await request.approve(ALICE)
        assert await request.reason() == ""


async def test_an_approval_that_has_expired_counts_no_more(broker: SigningBroker) -> None:
    """Invariant 3: and who waits is told so as it happens."""
    async with waiting(broker) as request:
        assert await broker.tell(ALICE, f"approve {request.digest} 1") == "approved"
        async for found in request.agent.approvals.wait(request.digest, 20):
            if not found.approvals:
                break
        with nothing_signed(broker.whole):
            assert await request.reason() == Reason.APPROVAL_REQUIRED
        await request.approve(ALICE)
        assert await request.reason() == ""


async def test_a_grant_outlives_no_approval_under_it(broker: SigningBroker) -> None:
    """Invariant 3: the first of them that ends ends the grant."""
    async with waiting(broker, "production") as request:
        assert await broker.tell(ALICE, f"approve {request.digest} 2") == "approved"
        await request.approve(BOB)
        grant = await request.grant()
        (approved,) = [
            one
            for one in broker.whole.records()
            if isinstance(one, Approved) and one.request_digest == request.digest and one.by == ALICE
        ]
        assert grant.expires_at <= approved.expires_at
        await until(lambda: utc_now() > grant.expires_at, "it has expired")
        with nothing_signed(broker.whole):
            with pytest.raises(BrokerError) as error:
                await request.agent.signing.sign(grant)
            assert error.value.reason is Reason.EXPIRED
        assert not spent(broker.whole, grant)


async def test_who_may_not_approve_does_not(broker: SigningBroker) -> None:
    """Invariant 6: policy says who, as of every act; what nobody asked for can be approved by nobody."""
    async with waiting(broker) as request, broker.client(OPERATOR) as operator:
        shown = await shown_to(broker, request.digest)
        for call in (operator.approvals.approve(shown), operator.approvals.show(request.digest)):
            with pytest.raises(BrokerError) as error:
                await call
            assert error.value.reason is Reason.DENIED
        assert await operator.approvals.pending() == ()
        assert await broker.tell(ALICE, f"approve {'0' * 64}") == Reason.DENIED
        assert await broker.tell(ALICE, f"approve {request.digest[:-1]}") == Reason.MALFORMED
        assert await broker.tell(ALICE, f"approve {request.digest} 86401") == Reason.MALFORMED
        assert await request.reason() == Reason.APPROVAL_REQUIRED


async def test_nobody_is_asked_for_what_approvals_would_not_help(broker: SigningBroker) -> None:
    async with broker.client() as agent:
        before = int(await broker.tell(ALICE, "pending"))
        request = Request(broker, agent, broker.action(), "r" * 20, "", "")
        for changes, reason in (
            ({"action": broker.action(OTHER)}, Reason.PROVENANCE_REJECTED),
            ({"action": broker.action(environment="elsewhere")}, Reason.DENIED),
            ({"action": broker.action(purpose="test")}, Reason.DENIED),
            ({"action": broker.action(signer="key:release", environment="staging")}, Reason.DENIED),
        ):
            assert await request.reason(**changes) == reason
        assert int(await broker.tell(ALICE, "pending")) == before
        assert await request.reason() == Reason.APPROVAL_REQUIRED
        assert int(await broker.tell(ALICE, "pending")) == before + 1
