"""Parts of a policy, each asked as a policy of its own: what Cedar itself does not tell."""

import json
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

from cedarpy import PolicySet, Schema, policies_from_json_str

from broker.decision.question import Question

ALL: Final = {"op": "All"}
EMPTY: Final[Mapping[str, Any]] = MappingProxyType(
    {"effect": "permit", "principal": ALL, "action": ALL, "resource": ALL, "conditions": []}
)
"""A permit of everything, in Cedar's JSON form, to put one part into."""

_FAILED_POLICY = re.compile(r"policy `([^`]*)`")  # in Cedar's evaluation errors


def ask_pieces(question: Question, schema: Schema | None, forms: Sequence[Mapping[str, Any]]) -> list[bool | None]:
    """Of each permit, in order: whether it holds; None where it cannot be evaluated.

    schema None: without holding the question against it, for explanations only.
    """
    if not forms:
        return []
    answer = question.ask(_policy_set({str(index): form for index, form in enumerate(forms)}), schema)
    hold = frozenset(answer.policies)
    errors = frozenset(name for error in answer.errors for name in _FAILED_POLICY.findall(error))
    return [True if str(index) in hold else None if str(index) in errors else False for index in range(len(forms))]


def text_of(form: Mapping[str, Any]) -> str:
    """One policy in Cedar's own writing, without its semicolon."""
    document = {"staticPolicies": {"piece": dict(form)}, "templates": {}, "templateLinks": []}
    return policies_from_json_str(json.dumps(document)).strip().removesuffix(";")


def _policy_set(forms: Mapping[str, Mapping[str, Any]]) -> PolicySet:
    static = {name: dict(form) for name, form in forms.items()}
    return PolicySet.from_json_str(json.dumps({"staticPolicies": static, "templates": {}, "templateLinks": []}))
