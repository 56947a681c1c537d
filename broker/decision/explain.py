"""Why a request would be allowed or refused: which scope line or condition of each policy does not hold.

For operators only: it tells what policies say and what facts they saw.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from cedarpy import PolicySet, policies_from_json_str

from attestors.contract import Facts
from broker.action import Action
from broker.decision.expressions import conjuncts
from broker.decision.policy import Policy, Slice
from broker.decision.question import Question, put
from broker.decision.rules import Rule
from broker.errors import Reason, Refused
from broker.identity.spiffe_id import SpiffeId

_FAILED_POLICY = re.compile(r"policy `([^`]*)`")  # in Cedar's evaluation errors
_ALL = {"op": "All"}
_EMPTY = {"effect": "permit", "principal": _ALL, "action": _ALL, "resource": _ALL, "conditions": []}


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyExplanation:
    """One policy. failed: its scope lines and conditions that do not hold, as Cedar text."""

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


def explain(policy: Policy, principal: SpiffeId, action: Action, facts: Mapping[str, Facts]) -> Explanation:
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
    answer = question.ask(part.policies, part.schema)
    # A question that does not fit the schema refuses as a whole; what each policy would have said still helps.
    schema = None if answer.undecided else part.schema
    satisfied = frozenset(question.ask(_as_permits(part), schema).policies)
    return Explanation(
        allowed=answer.allowed,
        reason=None if answer.allowed else Reason.DENIED,
        policy_revision=policy.revision,
        policies=tuple(
            _explain_rule(rule, question, part, undecided=answer.undecided, satisfied=satisfied) for rule in part.rules
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


def _as_permits(part: Slice) -> PolicySet:
    """Every rule as a permit: then the answer names each that is satisfied, forbids beside permits."""
    return _policy_set({rule.id: {**rule.form, "effect": "permit"} for rule in part.rules})


def _explain_rule(
    rule: Rule, question: Question, part: Slice, *, undecided: bool, satisfied: frozenset[str]
) -> PolicyExplanation:
    failed: list[str] = []
    if rule.id not in satisfied:
        pieces = list(_pieces(rule))
        parts = _policy_set({str(index): piece.form for index, piece in enumerate(pieces)})
        answer = question.ask(parts, None if undecided else part.schema)
        errors = frozenset(name for error in answer.errors for name in _FAILED_POLICY.findall(error))
        broken: set[int] = set()
        for index, piece in enumerate(pieces):
            if str(index) in answer.policies:
                continue
            # `context has x && context.x …` without x: the second part only repeats, as an error, what the first says.
            if str(index) not in errors or piece.condition not in broken:
                failed.append(piece.text)
            if piece.condition is not None:
                broken.add(piece.condition)
    return PolicyExplanation(id=rule.id, effect=rule.effect, satisfied=rule.id in satisfied, failed=tuple(failed))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """A part of a rule as a policy of its own. condition: which `when` or `unless` it is from; None for the scope."""

    form: dict[str, Any]
    condition: int | None

    @property
    def text(self) -> str:
        """The one part that says something, in Cedar's own writing."""
        document = {"staticPolicies": {"piece": self.form}, "templates": {}, "templateLinks": []}
        text = policies_from_json_str(json.dumps(document)).strip().removesuffix(";")
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
        if rule.form[scope] != _ALL:
            yield _Piece(form={**_EMPTY, scope: rule.form[scope]}, condition=None)
    for index, condition in enumerate(rule.form["conditions"]):
        # `unless { a || b }` is `unless { a } unless { b }`: it is split where it can be.
        for body in conjuncts(condition["body"], "&&" if condition["kind"] == "when" else "||"):
            piece = {"kind": condition["kind"], "body": body}
            yield _Piece(form={**_EMPTY, "conditions": [piece]}, condition=index)


def _policy_set(forms: Mapping[str, Mapping[str, Any]]) -> PolicySet:
    return PolicySet.from_json_str(json.dumps({"staticPolicies": forms, "templates": {}, "templateLinks": []}))
