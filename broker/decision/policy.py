"""Policy documents, validated, compiled and cut into one slice for each action.

A slice holds what a decision about its action needs and nothing else, so that a decision takes the same time whether
the folder holds ten policies or ten thousand.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from cedarpy import Entities, PolicySet, Schema

from broker.decision.declarations import ActionDeclaration, Declarations, read_declarations
from broker.decision.documents import Documents, read
from broker.decision.findings import Finding, PolicyError
from broker.decision.obligations import Obligations
from broker.decision.rules import ASKED, AUDIENCE, IDENTIFIED, PARAMETERS, Rule, read_rules
from broker.decision.validate import validate


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """All that could matter to one action.

    required, optional: the evidence in its context. attestors: whose facts are to be gathered: what is required, and
    of the optional what a policy names; what only identification can tell is among them.
    parameters: whether the action takes them, None where it does not; True where it must have them.
    audience: whether policies see it. signs: whether a signature may be asked for. digest: names all of this, so that
    two slices of one digest decide alike.
    schema: the whole one, shared by all slices. entities: this action and its groups alone, since a decision copies
    them; parsed with their schema, for without it Cedar knows no groups, and a `forbid … action in Group` would
    silently not apply.
    """

    action: str
    rules: tuple[Rule, ...]
    policies: PolicySet
    schema: Schema
    entities: Entities
    required: frozenset[str]
    optional: frozenset[str]
    attestors: frozenset[str]
    parameters: bool | None
    audience: bool
    signs: bool
    digest: bytes
    obligations: Mapping[str, Obligations]


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """Everything that is in force, unchangeable. revision: names its texts, "sha256:" and 32 hex digits."""

    revision: str
    rules: tuple[Rule, ...]
    slices: Mapping[str, Slice]

    def slice(self, action: str) -> Slice | None:
        """What matters to this action; None where no schema declares that it can be asked for."""
        return self.slices.get(action)

    @property
    def attestors(self) -> frozenset[str]:
        """All whose facts some action needs: what `serve` must have configured."""
        return frozenset[str]().union(*(part.attestors for part in self.slices.values())) - IDENTIFIED


class PolicyDocuments:
    """The documents of a folder."""

    @staticmethod
    def load(folder: Path) -> Policy:
        """Reads, validates and compiles a policy folder. Blocks: keep it off the event loop.

        Raises: PolicyError with every mistake that was found.
        """
        return compile_documents(read(folder))


def compile_policy(texts: Mapping[str, str], schemas: Mapping[str, str]) -> Policy:
    """The same from texts: file name (`*.cedar`, `*.cedarschema`) → text. Raises: PolicyError."""
    return compile_documents(Documents(policies=dict(texts), schemas=dict(schemas)))


def compile_documents(documents: Documents) -> Policy:
    """The same from documents that were read. Raises: PolicyError."""
    findings: list[Finding] = []
    rules, wrong = read_rules(documents.policies)
    findings += wrong
    declarations = read_declarations(documents.schemas)
    if not isinstance(declarations, Declarations):
        raise PolicyError([*findings, *declarations])
    requestable = {name: action for name, action in declarations.actions.items() if action.requestable}
    schemas = {name: declarations.schema_of(action) for name, action in requestable.items()}
    findings += validate(rules, declarations, schemas)
    if findings:
        raise PolicyError(findings)
    index = _index(rules)
    seed = _schemas_digest(documents.schemas)
    slices = {
        name: _slice(action, [rules[n] for n in _applicable(action, index)], declarations.schema, schemas[name], seed)
        for name, action in requestable.items()
    }
    return Policy(revision=documents.revision, rules=tuple(rules), slices=MappingProxyType(slices))


def _index(rules: list[Rule]) -> dict[str | None, list[int]]:
    """Positions of the rules by what their action scope names; None holds those for every action."""
    index: dict[str | None, list[int]] = {}
    for position, rule in enumerate(rules):
        for name in rule.scope_actions or [None]:
            index.setdefault(name, []).append(position)
    return index


def _applicable(action: ActionDeclaration, index: Mapping[str | None, list[int]]) -> list[int]:
    """Positions, in order, of the rules whose action scope leaves this action in."""
    return sorted({n for name in (None, action.name, *action.groups) for n in index.get(name, [])})


def _schemas_digest(schemas: Mapping[str, str]) -> bytes:
    """Names these schemas: any change to one may change what every action means."""
    return hashlib.sha256(json.dumps(sorted(schemas.items())).encode()).digest()


def _digest(seed: bytes, action: ActionDeclaration, rules: list[Rule]) -> bytes:
    texts = [[rule.id, rule.text] for rule in rules]
    return hashlib.sha256(seed + json.dumps([action.name, texts]).encode()).digest()


def _slice(action: ActionDeclaration, rules: list[Rule], schema: Schema, own_schema: Schema, seed: bytes) -> Slice:
    forms = {rule.id: {**rule.form, "annotations": {}} for rule in rules}  # they were read; Cedar has no use for them
    policy_set = {"staticPolicies": forms, "templates": {}, "templateLinks": []}
    evidence = {name: must for name, must in action.context.items() if name not in ASKED}
    required = frozenset(name for name, must in evidence.items() if must)
    optional = frozenset(evidence) - required
    named = frozenset[str]().union(*(rule.evidence for rule in rules))
    return Slice(
        action=action.name,
        rules=tuple(rules),
        policies=PolicySet.from_json_str(json.dumps(policy_set), release_gil=True),
        schema=schema,
        entities=Entities.from_json_str("[]", own_schema),
        required=required,
        optional=optional,
        attestors=required | (optional & named),
        parameters=action.context.get(PARAMETERS),
        audience=AUDIENCE in action.context,
        signs=bool(action.signing),
        digest=_digest(seed, action, rules),
        obligations={rule.id: rule.obligations for rule in rules},
    )
