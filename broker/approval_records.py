"""What the ledger says of requests that wait for approval, as approvers, callers and the attestor see it.

An approval counts while the policies that let its approver give it stand as they were: take one away, or change it, and
what it gave counts no more. Not looked at again: a `forbid` that came since, and what let those policies apply to the
approver then (its entry, its groups, what SPIRE said of it). To be rid of such an approval, have its approver withdraw
it, or change the policy that gave it.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Literal

import rfc8785

from attestors import approval
from attestors.contract import AttestationUnavailable
from broker.approval_text import Request
from broker.decision.policy import Policy
from broker.decision.store import PolicyStore
from broker.errors import BrokerError, Reason, Refused
from broker.ledger.approvals import ApprovalRow, ApprovalSeen
from broker.ledger.store import Ledger

APPROVE: Final = "broker.approve"


def rules_digest(policy: Policy, names: Sequence[str]) -> str:
    """SHA-256 (hex) over RFC 8785 JSON of these rules' texts by their names; "" where one does not apply to approving.

    Annotations, comments and spaces are text as well: whoever changes them has approvals given again.
    """
    piece = policy.slice(APPROVE)
    texts = {} if piece is None else {rule.id: rule.text for rule in piece.rules}
    if not names or not texts.keys() >= set(names):
        return ""
    return hashlib.sha256(rfc8785.dumps({name: texts[name] for name in names})).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """A request as approvers and its caller see it. text: what it said when it was laid down (approval_text.py).

    expires_at: when it is forgotten unless it is asked again. state: "used" once its approvals gave a credential.
    approvals: those that count now, as far as their policies stand; none once they are used.
    """

    request: Request
    text: str
    asked_at: datetime
    expires_at: datetime
    state: Literal["waiting", "used"]
    approvals: tuple[ApprovalSeen, ...] = ()


class RecordedApprovals:
    """The ledger as the source of the `approval` attestor, and as `Approvals` reads it. policies: those in force."""

    def __init__(self, ledger: Ledger, policies: PolicyStore) -> None:
        self._ledger, self._policies = ledger, policies

    async def current(self, request_digest: str, now: datetime, credential: str) -> Sequence[approval.ApprovalSeen]:
        """See attestors.approval.ApprovalSource."""
        try:
            found = await self._standing(request_digest, now, credential)
        except BrokerError as error:
            raise AttestationUnavailable("what was approved cannot be read") from error
        return [approval.ApprovalSeen(by=one.approver, expires_at=one.expires_at) for one in found]

    def subscribe(self, changed: Callable[[str], None]) -> Callable[[], None]:
        """See attestors.approval.ApprovalSource. A change of policies is not told here: PolicyStore tells it."""
        return self._ledger.subscribe_approvals(changed, uses=False)

    async def find(self, digest: str, now: datetime) -> Shown | None:
        """One request as it is now, also for a minute after it ended. Raises: Refused(REVOKED), Unavailable."""
        row = await self._ledger.approval_request(digest)
        return None if row is None else _shown(row, await self._standing(digest, now, ""))

    async def waiting(self, now: datetime) -> Sequence[Shown]:
        """All that wait, the oldest first, without their approvals. Raises: Refused(REVOKED), Unavailable."""
        return [_shown(row, ()) for row in await self._ledger.pending(now)]

    async def _standing(self, digest: str, now: datetime, credential: str) -> tuple[ApprovalSeen, ...]:
        """Those that the ledger counts, and whose policies are in force unchanged."""
        found = await self._ledger.approvals(digest, now, credential)
        policy = self._policies.current
        return tuple(
            one for one in found if one.rules_sha256 and one.rules_sha256 == rules_digest(policy, one.policies)
        )


def _shown(row: ApprovalRow, approvals: tuple[ApprovalSeen, ...]) -> Shown:
    """Raises: Refused(REVOKED) where the record names another request than the digest that approvals are given to."""
    asked, action = row.asked, row.asked.to_action()
    if approval.request_digest(action.digest.hex(), asked.principal, asked.request_id) != asked.request_digest:
        raise Refused(Reason.REVOKED, "a request's record was changed: run `action-broker ledger verify`")
    return Shown(
        request=Request(
            digest=asked.request_digest, action=action, principal=asked.principal, request_id=asked.request_id
        ),
        text=asked.text,
        asked_at=asked.at,
        expires_at=asked.expires_at,
        state="used" if row.used_by else "waiting",
        approvals=approvals,
    )
