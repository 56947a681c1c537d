"""An exchange where publishing and signing a release want two approvals, the desk that gives them, and approvers."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path

from support.exchanging import CORRELATION, Exchanging, exchanging
from support.whole_broker import AGENT, ISSUER

from attestors.approval import ApprovalAttestor, request_digest
from broker.action import Action
from broker.approval_records import RecordedApprovals
from broker.approval_text import Texts
from broker.approvals import Approvals, People
from broker.decision.attest import Attestation
from broker.errors import Reason, Refused
from broker.exchange import Issued, Presented
from broker.identity.id_token import VerifiedPerson
from broker.identity.identify import Identified
from broker.identity.person import PersonId
from broker.ledger.approvals import ApprovalSeen

LOGIN = "https://login.acme.test"
OTHER = "spiffe://acme.test/build/other"
REPOSITORY = "https://git.acme.test/shop"
REQUEST_ID = "request-number-one"
WORKLOADS = {"agent": AGENT, "other": OTHER, "stranger": "spiffe://acme.test/stranger"} | {
    name: f"spiffe://acme.test/approvers/{name}" for name in ("ann", "bob", "carol")
}
PEOPLE = {"dora": ("release-managers",), "emil": ("release-managers",), "visitor": ()}

SCHEMA = """
action "release.publish" appliesTo {
  principal: [Workload], resource: [Resource],
  context: { approval: Approval, parameters: { environment: String, notes?: String } }
};
action "release.sign" appliesTo {
  principal: [Workload], resource: [Resource], context: { approval: Approval, parameters: { signing: Signing } }
};
"""
POLICY = """
@id("two-approvals") @single_use permit (principal, action == Action::"release.publish", resource)
when { context.approval.count >= 2 };
@id("two-approvals-sign") permit (principal, action == Action::"release.sign", resource)
when { context.approval.count >= 2 };
@id("approvers") permit (
  principal in Path::"spiffe://acme.test/approvers", action == Action::"broker.approve",
  resource in Resource::"https://git.acme.test/shop"
) when { ["release.publish", "release.sign"].contains(context.parameters.action) };
@id("builders-approve-each-other") permit (
  principal in Path::"spiffe://acme.test/build", action == Action::"broker.approve",
  resource in Resource::"https://git.acme.test/shop"
);
@id("release-managers") permit (
  principal in Issuer::"https://login.acme.test", action == Action::"broker.approve",
  resource in Resource::"https://git.acme.test/shop"
) when { context has person && context.person.groups.contains("release-managers") };
"""
POLICIES = {"release.cedarschema": SCHEMA, "release.cedar": POLICY}


def publish(environment: str = "production", resource: str = REPOSITORY, **more: object) -> Action:
    """What is to be approved."""
    return Action("release.publish", resource, ISSUER, {"environment": environment, **more})


def digest_of(action: Action | None = None, caller: str = AGENT, request_id: str = REQUEST_ID) -> str:
    """Of the request."""
    return request_digest((action or publish()).digest.hex(), caller, request_id)


@dataclass
class Approving:
    """The parts, for tests to turn."""

    parts: Exchanging
    desk: Approvals
    digest: str = field(default_factory=digest_of)

    def now(self) -> datetime:
        return self.parts.now()

    def who(self, name: str) -> Identified:
        """A workload over mutual TLS, or a person who just logged in."""
        if name in WORKLOADS:
            return self.parts.caller(WORKLOADS[name]).identity
        now = self.now()
        return VerifiedPerson(
            person=PersonId(issuer=LOGIN, subject=name),
            groups=PEOPLE[name],
            email=f"{name}@acme.test",
            auth_time=now,
            issued_at=now,
            expires_at=now + timedelta(minutes=5),
            token_sha256=b"\x11" * 32,
        ).identified()

    async def ask(self, action: Action | None = None, caller: str = "agent", request_id: str = REQUEST_ID) -> Issued:
        """A token, or why not."""
        asker = replace(self.parts.caller(), identity=self.who(caller))
        return await self.parts.exchange.request(
            asker, lambda: action or publish(), self.now(), CORRELATION, Presented(request_id=request_id)
        )

    async def why_not(self, credential: str = "", *, request_id: str = REQUEST_ID) -> Reason | None:
        """Why the agent's request is not granted now, or that credential of it not again."""
        shown = Presented(request_id=request_id, credential=credential)
        try:
            await self.parts.exchange.decide(self.who("agent"), publish(), self.now(), shown)
        except Refused as error:
            return error.reason
        return None

    async def approve(
        self, by: str, digest: str = "", *, why: str = "looked at it", valid_for_s: int = 0
    ) -> ApprovalSeen:
        return await self.desk.approve(self.who(by), digest or self.digest, why, valid_for_s, self.now(), CORRELATION)

    async def withdraw(self, by: str, digest: str = "", *, why: str = "a mistake") -> None:
        await self.desk.withdraw(self.who(by), digest or self.digest, why, self.now(), CORRELATION)


@asynccontextmanager
async def approving(
    folder: Path,
    *,
    texts: Texts | None = None,
    people: People | None = None,
    more_policy: str = "",
    burst: int = 1000,
) -> AsyncIterator[Approving]:
    """One in `folder`."""
    policies = POLICIES | {"more.cedar": more_policy}
    async with exchanging(folder, policies=policies, burst=burst) as parts:
        exchange = parts.exchange
        source = RecordedApprovals(exchange.ledger, exchange.policies)
        exchange.attestation = Attestation({"approval": ApprovalAttestor(source)}, 2.0)
        desk = Approvals(exchange, texts or Texts(), people)
        exchange.desk = desk
        yield Approving(parts, desk)
