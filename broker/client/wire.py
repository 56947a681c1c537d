"""Our values to and from the messages of the API; tokens have a file of their own."""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Self

import msgspec

from broker._proto.actionbroker.v1 import action_pb2, broker_pb2
from broker.action import Action


def to_wire(action: Action) -> action_pb2.Action:
    """An action as a message. It was validated when it was made."""
    parameters = msgspec.json.encode(action.parameters).decode() if action.parameters else ""
    return action_pb2.Action(
        name=action.name, resource=action.resource, audience=action.audience, parameters=parameters
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Redeemed:
    """A single-use token is now used up. idempotency_id: give it again to get this same answer again."""

    redeemed_at: datetime
    idempotency_id: str
    correlation_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyExplanation:
    """One policy of the action. effect: "permit" or "forbid". failed: what did not hold, as Cedar text."""

    id: str
    effect: str
    satisfied: bool
    failed: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """How the broker would decide. Nothing was minted.

    reason: why not; "" when allowed. attestors: those that a policy for the action names; missing: those of them that
    have nothing to say here. errors: evaluation and validation errors, each of which refuses.
    """

    allowed: bool
    reason: str
    policy_revision: str
    policies: tuple[PolicyExplanation, ...]
    attestors: tuple[str, ...]
    missing: tuple[str, ...]
    errors: tuple[str, ...]

    @classmethod
    def read(cls, answer: broker_pb2.ExplainResponse) -> Self:
        """From the wire."""
        return cls(
            allowed=answer.allowed,
            reason=answer.reason,
            policy_revision=answer.policy_revision,
            policies=tuple(
                PolicyExplanation(id=one.id, effect=one.effect, satisfied=one.satisfied, failed=tuple(one.failed))
                for one in answer.policies
            ),
            attestors=tuple(answer.attestors),
            missing=tuple(answer.missing),
            errors=tuple(answer.errors),
        )


def redeemed(answer: broker_pb2.RedeemResponse, idempotency_id: str) -> Redeemed:
    """From the wire."""
    return Redeemed(
        redeemed_at=answer.redeemed_at.ToDatetime(tzinfo=UTC),
        idempotency_id=idempotency_id,
        correlation_id=answer.correlation_id,
    )
