"""Why a request would be allowed or refused: which scope line or condition of each policy does not hold.

For operators only: it tells what policies say and what facts they saw.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cedarpy import Schema

from attestors.contract import Facts
from broker.action import Action
from broker.decision.decide import granted_by, reason_of_missing
from broker.decision.expressions import conjuncts
from broker.decision.pieces import ALL, EMPTY, ask_pieces, text_of
from broker.decision.policy import Policy, Slice
from broker.decision.question import Question, asked_signer, put
from broker.decision.rules import Rule
from broker.errors import Reason, Refused
from broker.identity.person import Principal


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyExplanation:
    """One policy. failed: its scope lines and conditions that do not hold, as Cedar text.

    A permit that holds and does not give the signer that is asked for is not satisfied either: `failed` says what it
    gives.
    """

    id: str
    effect: Literal["permit", "forbid"]
    satisfied: bool
    failed: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """The answer to Explain; its names are those of the wire.

    attestors: whose facts the action needs. missing: those of them that were not given.
    errors: each of them refuses by itself.
    """

    allowed: bool
    reason: Reason | None
    policy_revision: str
    policies: tuple[PolicyExplanation, ...] = ()
    attestors: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    errors: tuple[str, ...] = ()


def explain(policy: Policy, principal: Principal, action: Action, facts: Mapping[str, Facts]) -> Explanation:
    """A dry run of `decide`, without its limits in time; it makes no grant.

    Raises: Invalid as `decide` does. Not checked: when the facts expire.
    """
    part = policy.slice(action.name)
    if part is None:
        error = f"no schema declares {action.name}"
        return Explanation(
            allowed=False, reason=Reason.UNKNOWN_ACTION, policy_revision=policy.revision, errors=(error,)
        )
    missing = tuple(sorted(part.attestors - facts.keys()))
    try:
        question = put(part, principal, action, facts)
    except Refused as error:
        if error.reason is not Reason.DENIED:
            raise
        return _denied(policy, part, missing, (error.detail,))
    required = part.required - facts.keys()
    answer = question.ask(part.policies, part.schema)
    # A question that does not fit the schema refuses as a whole; what each policy would have said still helps.
    schema = None if answer.undecided else part.schema
    holds = ask_pieces(question, schema, [{**rule.form, "effect": "permit"} for rule in part.rules])
    satisfied = frozenset(rule.id for rule, one in zip(part.rules, holds, strict=True) if one)
    allowed = answer.allowed and not required and bool(granted_by(part, answer, action))
    return Explanation(
        allowed=allowed,
        reason=None if allowed else reason_of_missing(required),
        policy_revision=policy.revision,
        policies=tuple(
            _explain_rule(rule, question, schema, asked_signer(action), satisfied=rule.id in satisfied)
            for rule in part.rules
        ),
        attestors=tuple(sorted(part.attestors)),
        missing=missing,
        errors=answer.errors,
    )


def _denied(policy: Policy, part: Slice, missing: tuple[str, ...], errors: tuple[str, ...]) -> Explanation:
    return Explanation(
        allowed=False,
        reason=Reason.DENIED,
        policy_revision=policy.revision,
        attestors=tuple(sorted(part.attestors)),
        missing=missing,
        errors=errors,
    )


def _explain_rule(
    rule: Rule, question: Question, schema: Schema | None, signer: str | None, *, satisfied: bool
) -> PolicyExplanation:
    gives = rule.effect == "forbid" or rule.obligations.gives(signer)
    failed = [] if satisfied else list(_failed(list(_pieces(rule)), question, schema))
    if not gives:
        failed.append(f"it gives the signer {' or '.join(sorted(rule.obligations.signers))}, not {signer}")
    return PolicyExplanation(id=rule.id, effect=rule.effect, satisfied=satisfied and gives, failed=tuple(failed))


def _failed(pieces: Sequence["_Piece"], question: Question, schema: Schema | None) -> Iterator[str]:
    broken: set[int] = set()
    for piece, holds in zip(pieces, ask_pieces(question, schema, [piece.form for piece in pieces]), strict=True):
        if holds:
            continue
        # `context has x && context.x …` without x: the second part only repeats, as an error, what the first says.
        if holds is not None or piece.condition not in broken:
            yield piece.text
        if piece.condition is not None:
            broken.add(piece.condition)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """A part of a rule as a policy of its own. condition: which `when` or `unless` it is from; None for the scope."""

    form: Mapping[str, Any]
    condition: int | None

    @property
    def text(self) -> str:
        """The one part that says something, in Cedar's own writing."""
        text = text_of(self.form)
        if self.condition is not None:
            return text.removeprefix("permit(principal, action, resource)").strip()
        inside = text.removeprefix("permit(").removesuffix(")")
        return (
            inside.removeprefix("principal, ")
            .removeprefix("action, ")
            .removesuffix(", resource")
            .removesuffix(", action")
        )


def _pieces(rule: Rule) -> Iterator[_Piece]:
    for scope in ("principal", "action", "resource"):
        if rule.form[scope] != ALL:
            yield _Piece(form={**EMPTY, scope: rule.form[scope]}, condition=None)
    for index, condition in enumerate(rule.form["conditions"]):
        # `unless { a || b }` is `unless { a } unless { b }`: it is split where it can be.
        for body in conjuncts(condition["body"], "&&" if condition["kind"] == "when" else "||"):
            piece = {"kind": condition["kind"], "body": body}
            yield _Piece(form={**EMPTY, "conditions": [piece]}, condition=index)
