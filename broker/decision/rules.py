"""One permit or forbid: read from Cedar's JSON form, and everything about it that its own text can tell.

What needs the schema (types, forbids that absence switches off) is in `validate`.
"""

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import msgspec
from cedarpy import PolicySet, policies_to_json_str

from broker.action import check_uri
from broker.decision.declarations import ActionDeclaration
from broker.decision.expressions import (
    MAX_DEPTH,
    Node,
    depth,
    entities_named,
    evidence_named,
    hides_evidence,
    reads,
)
from broker.decision.findings import Defect, Finding
from broker.decision.obligations import Obligations, read_obligations, unknown_annotations
from broker.decision.source import Statement, check_text, statements
from broker.errors import Invalid
from broker.identity.person import PersonId, check_issuer
from broker.identity.spiffe_id import SpiffeId, TrustDomain

PARAMETERS = "parameters"
AUDIENCE = "audience"
ASKED = frozenset({PARAMETERS, AUDIENCE})  # what of context is the action's own, not evidence: no attestor's name
IDENTIFIED = frozenset({"person"})  # evidence that comes with the identity itself or not at all: nobody looks for it
_ID = re.compile(r"[A-Za-z][A-Za-z0-9._/-]{0,127}")
_AT_ONCE = 20  # statements given to Cedar in one call: about 2 ms, in which nothing else runs


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One policy.

    id: "<file>#<@id>", or "<file>#<index from 0>" without one. form: Cedar's JSON form.
    evidence: each X of `context.X` and `context has X`, without what is the action's own.
    """

    id: str
    file: str
    line: int
    text: str
    effect: Literal["permit", "forbid"]
    form: Mapping[str, Any]
    obligations: Obligations
    evidence: frozenset[str]

    @property
    def scope_actions(self) -> frozenset[str] | None:
        """Actions and groups that its scope names; None where it is for every action."""
        scope = self.form["action"]
        if scope["op"] == "All":
            return None
        return frozenset(entity["id"] for entity in scope.get("entities", [scope.get("entity")]))

    def could_apply_to(self, action: ActionDeclaration) -> bool:
        """Whether its action scope leaves this action in."""
        named = self.scope_actions
        return named is None or action.name in named or not named.isdisjoint(action.groups)


def read_rules(texts: Mapping[str, str]) -> tuple[list[Rule], list[Finding]]:
    """All policies of a folder, and every mistake that shows without the schema."""
    rules: list[Rule] = []
    findings: list[Finding] = []
    for file, text in texts.items():
        found, wrong = _read_file(file, text)
        rules += found
        findings += wrong
    return rules, findings + list(_duplicates(rules))


def _read_file(file: str, text: str) -> tuple[list[Rule], list[Finding]]:
    findings = check_text(file, text)
    if findings:
        return [], findings
    parts = list(statements(text))
    try:
        whole = PolicySet.from_str(text, release_gil=True)
    except ValueError as error:
        return [], list(_syntax(file, parts, str(error)))
    rules: list[Rule] = []
    for index, (statement, form) in enumerate(_forms(parts)):
        if form is None:
            problem = f"a condition nests deeper than {MAX_DEPTH}; a chain of && or || nests once for each part"
            fix = "Write several `when` clauses instead of &&, and [..].contains(..) instead of ||."
            findings.append(_about(file, statement, "", Defect.TOO_DEEP, problem, fix))
            continue
        if _is_template(form):
            fix = "Write a policy for each principal or resource, or a group of them with `in`."
            problem = "a template (?principal, ?resource) permits and forbids nothing"
            findings.append(_about(file, statement, "", Defect.TEMPLATE, problem, fix))
            continue
        rule, wrong = _read_rule(file, index, statement, form)
        rules.append(rule)
        findings += wrong
    count = len(whole) + len(whole.templates())
    if count != len(parts):  # we and Cedar must see the same policies
        problem = f"Cedar reads {count} policies where {len(parts)} end with a semicolon"
        findings.append(Finding(defect=Defect.SYNTAX, file=file, problem=problem, fix="Simplify the file."))
    return rules, findings


def _forms(parts: Iterable[Statement]) -> Iterator[tuple[Statement, dict[str, Any] | None]]:
    """Each statement with its JSON form; None for one that nests too deep to look at."""
    waiting = iter(parts)
    while batch := list(itertools.islice(waiting, _AT_ONCE)):
        text = policies_to_json_str("\n".join(statement.text for statement in batch))
        try:
            found = msgspec.json.decode(text)
        except RecursionError:
            found = None
        if found is None and len(batch) > 1:
            for statement in batch:
                yield from _forms([statement])
            continue
        for index, statement in enumerate(batch):
            form = _form_of(found, f"policy{index}") if found else None
            yield statement, form if form and all(depth(c["body"]) <= MAX_DEPTH for c in form["conditions"]) else None


def _form_of(found: Mapping[str, Any], name: str) -> dict[str, Any]:
    return cast("dict[str, Any]", found["staticPolicies"].get(name) or found["templates"][name])


def _is_template(form: Mapping[str, Any]) -> bool:
    return any("slot" in form[part] or "slot" in form[part].get("in", {}) for part in ("principal", "resource"))


def _syntax(file: str, parts: list[Statement], whole: str) -> Iterator[Finding]:
    """Every statement that is wrong by itself, with its line; else what Cedar says of the whole."""
    fix = "Correct the Cedar syntax: https://docs.cedarpolicy.com/policies/syntax-policy.html"
    found = False
    for statement in parts:
        try:
            PolicySet.from_str(statement.text)
        except ValueError as error:
            found = True
            yield _about(file, statement, "", Defect.SYNTAX, str(error), fix)
    if not found:
        yield Finding(defect=Defect.SYNTAX, file=file, problem=whole, fix=f"End each policy with a semicolon. {fix}")


def _read_rule(file: str, index: int, statement: Statement, form: dict[str, Any]) -> tuple[Rule, list[Finding]]:
    annotations: dict[str, str | None] = form.get("annotations", {})
    given = annotations.get("id")
    name = f"{file}#{given if given and _ID.fullmatch(given) else index}"
    obligations, wrong = read_obligations(form["effect"], annotations)
    bodies: list[Node] = [condition["body"] for condition in form["conditions"]]
    findings = [_about(file, statement, name, Defect.BAD_OBLIGATION, *pair) for pair in wrong]
    findings += [_about(file, statement, name, Defect.UNKNOWN_ANNOTATION, *p) for p in unknown_annotations(annotations)]
    findings += [_about(file, statement, name, *problem) for problem in _problems(annotations, form, bodies)]
    rule = Rule(
        id=name,
        file=file,
        line=statement.line,
        text=statement.text,
        effect=form["effect"],
        form=form,
        obligations=obligations,
        evidence=frozenset().union(*map(evidence_named, bodies)) - ASKED,
    )
    return rule, findings


def _problems(
    annotations: Mapping[str, str | None], form: Mapping[str, Any], bodies: list[Node]
) -> Iterator[tuple[Defect, str, str]]:
    if "id" in annotations and not _ID.fullmatch(annotations["id"] or ""):
        fix = "Begin with a letter, then letters, digits and . _ / - up to 128 characters."
        yield Defect.BAD_ID, "@id cannot name a policy in the ledger", fix
    if any(map(hides_evidence, bodies)):
        fix = "Name what is meant: context.spire, context.parameters.amount, context has process."
        yield Defect.HIDDEN_EVIDENCE, "context is used whole, which hides the evidence that is needed", fix
    if form["effect"] == "permit":
        yield from _too_generous(form, bodies)
    for operator, entity in itertools.chain(_scope_entities(form), *map(entities_named, bodies)):
        problem = _unreachable(operator, entity["type"], entity["id"])
        if problem:
            yield (
                Defect.IMPOSSIBLE_ENTITY,
                f'{entity["type"]}::"{entity["id"]}" can never match: {problem}',
                ("Write it as requests do; else this policy silently applies to nothing."),
            )


def _too_generous(form: Mapping[str, Any], bodies: list[Node]) -> Iterator[tuple[Defect, str, str]]:
    if form["action"]["op"] == "All":
        problem = "it permits every action: broker.operate and broker.approve as well, and each that is declared later"
        fix = 'Name the actions: action == Action::"..", or action in [..] or in a group of your own.'
        yield Defect.EVERY_ACTION, problem, fix
    if any(reads(body, "process", "exe") for body in bodies):
        problem = "context.process.exe can be forged: who has a mount namespace has any file under any path"
        yield Defect.FORGEABLE, problem, "Compare context.process.exe_sha256."


def _scope_entities(form: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, str]]]:
    for scope in (form["principal"], form["resource"]):
        if "entity" in scope:
            yield scope["op"], scope["entity"]
        elif "entity" in scope.get("in", {}):
            yield "in", scope["in"]["entity"]


def _unreachable(operator: str, kind: str, name: str) -> str:
    """Why no request has this entity, or ""."""
    try:
        if kind == "TrustDomain":
            return "" if TrustDomain.parse(name).name == name else "a trust domain is named without spiffe://"
        if kind in {"Workload", "Path"}:
            path = SpiffeId.parse(name).path
            return "" if path else "it has no path"
        if kind == "Person":
            PersonId.parse(name)
        if kind == "Issuer":
            check_issuer(name)
        if kind == "Resource":
            check_uri(name, "it")
            if operator in {"in", "is"} and (name.endswith("/") or "?" in name):
                return "nothing lies under a URI that ends with a slash or has a query"
    except Invalid as error:
        return error.detail
    return ""


def _duplicates(rules: Iterable[Rule]) -> Iterator[Finding]:
    seen: dict[str, Rule] = {}
    for rule in rules:
        name = rule.form.get("annotations", {}).get("id")
        if not name:
            continue
        first = seen.setdefault(name, rule)
        if first is not rule:
            yield Finding(
                defect=Defect.DUPLICATE_ID,
                file=rule.file,
                line=rule.line,
                policy=rule.id,
                problem=f'@id("{name}") is also at {first.file}:{first.line}',
                fix="Give each policy an id of its own: the ledger names policies by it.",
            )


def _about(file: str, statement: Statement, policy: str, defect: Defect, problem: str, fix: str) -> Finding:
    return Finding(defect=defect, file=file, line=statement.line, policy=policy, problem=problem, fix=fix)
