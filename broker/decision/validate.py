"""Holds policies against the schema.

Finds wrong types, policies that can never apply, forbids that a caller could switch off by leaving evidence out, and
permits that give signers to actions that ask for no signature.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from typing import Any

from cedarpy import Schema, policies_from_json_str, validate_policies

from broker.artifacts import PARAMETER
from broker.decision.declarations import SIGNING_TYPE, ActionDeclaration, Declarations
from broker.decision.expressions import switched_off_by_absence, walk
from broker.decision.findings import Defect, Finding
from broker.decision.obligations import names_signers
from broker.decision.rules import ASKED, Rule

_AT_ONCE = 20  # policies given to Cedar in one call
_ABOUT = re.compile(r"for policy `[^`]*`, ")

# Cedar warns of a policy that can never be true, but cedarpy does not pass warnings on. Its type checker looks at what
# follows `&&` only where the part before can be true, so a last condition that is ill-typed tells: no complaint, never
# true.
_ILL_TYPED = {"kind": "when", "body": {"<": {"left": {"Value": "never"}, "right": {"Value": 1}}}}


def validate(rules: Iterable[Rule], declarations: Declarations, schemas: Mapping[str, Schema]) -> Iterator[Finding]:
    """Every mistake that shows against the schema. schemas: for each action name, the schema of that action alone."""
    groups = frozenset[str]().union(*(action.groups for action in declarations.actions.values()))
    waiting: dict[str | None, list[Rule]] = {}
    for rule in rules:
        waiting.setdefault(_only_action(rule, schemas.keys() - groups), []).append(rule)
    for action, group in waiting.items():
        schema = declarations.schema if action is None else schemas[action]
        for start in range(0, len(group), _AT_ONCE):
            batch = group[start : start + _AT_ONCE]
            badly_typed = list(_type_findings(batch, schema))
            yield from badly_typed
            wrong = {finding.policy for finding in badly_typed}
            yield from _never_true([rule for rule in batch if rule.id not in wrong], schema)
    for rule in rules:
        yield from _switched_off(rule, declarations.actions.values())
        yield from _signs_nothing(rule, declarations.actions.values())


def _only_action(rule: Rule, single: AbstractSet[str]) -> str | None:
    """The one action that the rule is about, if no other action plays a part in it. single: actions that are no group.

    Type checking costs a step for each action of the schema. A policy for one action is the common one, and its own
    action's schema says the same of it in a thousandth of the time.
    """
    named = rule.scope_actions
    if named is None or len(named) != 1:
        return None
    (action,) = named
    mentions_actions = any(
        found.get("Var") == "action" for condition in rule.form["conditions"] for found in walk(condition["body"])
    )
    return action if action in single and not mentions_actions else None


def _type_findings(batch: list[Rule], schema: Schema) -> Iterator[Finding]:
    result = validate_policies("\n".join(rule.text for rule in batch), schema, release_gil=True)
    seen: dict[str, set[str]] = {}
    for error in result.errors:
        rule = batch[int(error.policy_id.removeprefix("policy"))]
        problem = _ABOUT.sub("", error.error)
        before = seen.setdefault(rule.id, set())
        # One mistake comes once for each action, and a misspelt name once more as a scope that fits nothing.
        if problem not in before and not (before and problem.startswith("unable to find an applicable action")):
            before.add(problem)
            fix = "Correct the policy, or what its action declares in a *.cedarschema file."
            yield _finding(rule, Defect.TYPE, problem, fix)


def _never_true(batch: list[Rule], schema: Schema) -> Iterator[Finding]:
    if not batch:
        return
    probes = {str(index): _probe(rule, str(index)) for index, rule in enumerate(batch)}
    text = policies_from_json_str(json.dumps({"staticPolicies": probes, "templates": {}, "templateLinks": []}))
    result = validate_policies(text, schema, release_gil=True)
    can_be_true = set(result.id_annotations_by_policy_id.values())
    for index, rule in enumerate(batch):
        if str(index) not in can_be_true:
            problem = "its conditions can never all be true"
            fix = "Look for a type that its actions do not take, or evidence that they do not declare; or remove it."
            yield _finding(rule, Defect.NEVER_APPLIES, problem, fix)


def _probe(rule: Rule, name: str) -> dict[str, Any]:
    """The rule with an ill-typed condition after its own, and `name` for its `@id`."""
    return {**rule.form, "annotations": {"id": name}, "conditions": [*rule.form["conditions"], _ILL_TYPED]}


def _switched_off(rule: Rule, actions: Iterable[ActionDeclaration]) -> Iterator[Finding]:
    """Evidence that a caller can leave out of the action, and that the forbid needs in order to forbid."""
    if rule.effect == "permit":
        return
    off = frozenset[str]().union(
        *(switched_off_by_absence(c["body"], negated=c["kind"] == "unless") for c in rule.form["conditions"])
    )
    if off <= ASKED:
        return
    optional = {
        name
        for action in actions
        if action.requestable and rule.could_apply_to(action)
        for name, required in action.context.items()
        if not required
    }
    for name in sorted(off & optional - ASKED):
        problem = f"a caller without {name} evidence is not forbidden"
        fix = (
            f"Write `forbid (..) unless {{ context has {name} && .. }}`, with what must hold instead of what must not."
        )
        yield _finding(rule, Defect.FORBID_SWITCHED_OFF, problem, fix)


def _signs_nothing(rule: Rule, actions: Iterable[ActionDeclaration]) -> Iterator[Finding]:
    """A permit that gives signers, where none of its actions can ask for a signature."""
    if rule.effect != "permit" or not names_signers(rule.form.get("annotations", {})):
        return
    if any(action.signing for action in actions if action.requestable and rule.could_apply_to(action)):
        return
    problem = "@key and @agent_key say nothing here: no action of this permit asks for a signature"
    fix = f"Remove it, or declare `{PARAMETER}: {SIGNING_TYPE}` among the parameters of the action."
    yield _finding(rule, Defect.BAD_OBLIGATION, problem, fix)


def _finding(rule: Rule, defect: Defect, problem: str, fix: str) -> Finding:
    return Finding(defect=defect, file=rule.file, line=rule.line, policy=rule.id, problem=problem, fix=fix)
