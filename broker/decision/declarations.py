"""What the schema declares of each action, and a schema of its own for each of them.

Cedar tells which groups an action belongs to, and which attributes its context has, only in the text it writes for a
schema: always `action "id" in [Action::"group"] appliesTo {..}`, one declaration at a time. That text is read here.

Each action also gets a schema that holds only itself, its groups and the types. Cedar's time for a decision grows with
the actions among its entities (1,000 cost four times as much as one), and its time for validating a policy with the
actions of its schema.
"""

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from cedarpy import Schema

from broker.action import Action
from broker.artifacts import PARAMETER
from broker.decision.findings import Defect, Finding
from broker.decision.source import check_text, statements
from broker.errors import Invalid

BASE_FILE = "base.cedarschema"
BASE_SCHEMA = (Path(__file__).parent / BASE_FILE).read_text(encoding="utf-8")
# Cedar's schema compiler ends the process (stack overflow) on a chain of some thousand groups of groups.
MAX_DECLARATIONS = 4000
SIGNING_TYPE = "Signing"  # of the base schema: a parameter "signing" is this, and asks for a signature
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|\w+|::|\S', re.DOTALL)
_NAMESPACE = re.compile(r"^namespace ", re.MULTILINE)  # in Cedar's own writing, where strings hold no line ends


@dataclass(frozen=True, slots=True, kw_only=True)
class ActionDeclaration:
    """One action. groups: all above it, however far. context: attribute name → whether it is required.

    signing: the type of `parameters.signing`, as Cedar writes it, or "" where its parameters have no such member.
    requestable: it applies to something; an action without `appliesTo` is only a group of others.
    """

    name: str
    groups: frozenset[str]
    context: Mapping[str, bool]
    signing: str
    requestable: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Declarations:
    """A whole schema, and its actions by name."""

    schema: Schema
    actions: Mapping[str, ActionDeclaration]
    types: str
    texts: Mapping[str, str]

    def schema_of(self, action: ActionDeclaration) -> Schema:
        """The schema with this action, its groups and all types alone."""
        wanted = [self.texts[name] for name in sorted({action.name, *action.groups})]
        return Schema.from_str("\n".join([self.types, *wanted]), release_gil=True)


def read_declarations(schemas: Mapping[str, str]) -> Declarations | list[Finding]:
    """Parses the operators' schemas together with the base schema: declarations, or what is wrong with them."""
    if sum(text.count(";") for text in schemas.values()) > MAX_DECLARATIONS:
        problem = f"the schemas have more than {MAX_DECLARATIONS} declarations"
        return [Finding(defect=Defect.TOO_LARGE, file="", problem=problem, fix="Put similar actions under one name.")]
    findings = [finding for file, text in schemas.items() for finding in _check_file(file, text)]
    if findings:
        return findings
    try:
        schema = Schema.from_str("\n".join([BASE_SCHEMA, *schemas.values()]), release_gil=True)
    except ValueError as error:
        file = next(iter(schemas)) if len(schemas) == 1 else ""
        fix = f"Declare each type, entity and action once, over the types of {BASE_FILE}, in this folder's schemas."
        return [Finding(defect=Defect.SCHEMA, file=file, problem=str(error), fix=fix)]
    if _NAMESPACE.search(str(schema)):
        fix = 'Declare without a namespace: the wire asks for the action id alone, such as "orders.refund".'
        return [Finding(defect=Defect.SCHEMA, file="", problem="a schema declares a namespace", fix=fix)]
    declarations = _understand(schema)
    findings = [_unaskable(name, schemas) for name in declarations.actions if not _is_action_name(name)]
    signing = (name for name, action in declarations.actions.items() if action.signing not in {"", SIGNING_TYPE})
    findings += [_signs_otherwise(name, schemas) for name in signing]
    return findings or declarations


def _check_file(file: str, text: str) -> Iterator[Finding]:
    """What is wrong with one file by itself."""
    found = check_text(file, text)
    yield from found
    if found:
        return
    try:
        Schema.from_str(text, release_gil=True)
    except ValueError as error:
        # Alone, a file rightly lacks the base types and its neighbours; only its syntax is its own.
        if "error parsing schema" in str(error):
            fix = "Correct the Cedar schema syntax: https://docs.cedarpolicy.com/schema/human-readable-schema.html"
            yield Finding(defect=Defect.SCHEMA, file=file, line=_bad_line(text), problem=str(error), fix=fix)


def _bad_line(text: str) -> int:
    """The line of the first statement whose own syntax is wrong, or 0."""
    for statement in statements(text):
        try:
            Schema.from_str(statement.text)
        except ValueError as error:
            if "error parsing schema" in str(error):
                return statement.line
    return 0


def _is_action_name(name: str) -> bool:
    try:
        Action(name, "urn:any:resource", "urn:any:audience")
    except Invalid:
        return False
    return True


def _unaskable(name: str, schemas: Mapping[str, str]) -> Finding:
    file, line = _place_of(name, schemas)
    return Finding(
        defect=Defect.ACTION_NAME,
        file=file,
        line=line,
        problem=f'no request can ask for action "{name}"',
        fix="Name it with dotted letters, digits, _ and -, at most 128 characters, such as orders.refund.",
    )


def _signs_otherwise(name: str, schemas: Mapping[str, str]) -> Finding:
    file, line = _place_of(name, schemas)
    return Finding(
        defect=Defect.SCHEMA,
        file=file,
        line=line,
        problem=f'the parameter "{PARAMETER}" of action "{name}" is not what a signature is asked for with',
        fix=f"Declare it as `{PARAMETER}: {SIGNING_TYPE}`, or give it another name.",
    )


def _place_of(name: str, schemas: Mapping[str, str]) -> tuple[str, int]:
    """File and line of an action's declaration; line 0 of the last file when none shows the name plainly."""
    file, line = "", 0
    for file, text in schemas.items():  # noqa: B007 -- the last one is blamed
        line = next((s.line for s in statements(text) if f'"{name}"' in s.text), 0)
        if line:
            break
    return file, line


def _understand(schema: Schema) -> Declarations:
    """Reads the text that Cedar writes for a schema."""
    texts: dict[str, str] = {}
    direct: dict[str, tuple[str, ...]] = {}
    contexts: dict[str, list[str] | None] = {}
    types: list[str] = []
    aliases: dict[str, list[str]] = {}
    for statement in statements(str(schema)):
        tokens = list(_without_annotations(_TOKEN.findall(statement.text)))
        if tokens[0] != "action":
            types.append(statement.text)
            if tokens[0] == "type":
                aliases[tokens[1]] = tokens[3:-1]
            continue
        name = tokens[1][1:-1]
        texts[name] = statement.text
        body = tokens.index("appliesTo") if "appliesTo" in tokens else len(tokens)
        direct[name] = tuple(token[1:-1] for token in tokens[2:body] if token.startswith('"'))
        contexts[name] = _context_of(tokens[body:]) if body < len(tokens) else None
    actions = {}
    for name, context in contexts.items():
        attributes = _attributes(context or [], aliases)
        actions[name] = ActionDeclaration(
            name=name,
            groups=_closure(name, direct),
            context={attribute: found.required for attribute, found in attributes.items()},
            signing=_signing_of(attributes, aliases),
            requestable=context is not None,
        )
    return Declarations(schema=schema, actions=actions, types="\n".join(types), texts=texts)


def _without_annotations(tokens: list[str]) -> Iterator[str]:
    """Drops `@doc("..")`, which may stand before a declaration or an attribute."""
    index = 0
    while index < len(tokens):
        if tokens[index] == "@":
            index += 2  # "@" and its name
            if index < len(tokens) and tokens[index] == "(":
                index += 3  # "(", a string and ")"
        else:
            yield tokens[index]
            index += 1


def _context_of(tokens: list[str]) -> list[str]:
    """The tokens after `context:` in `appliesTo { principal: [..], resource: [..], context: .. }`."""
    depth = 0
    for index, token in enumerate(tokens):
        if token in {"{", "[", "<"}:
            depth += 1
        elif token in {"}", "]", ">"}:
            depth -= 1
        elif depth == 1 and tokens[index : index + 2] == ["context", ":"]:
            return tokens[index + 2 : -2]  # without the closing "}" and ";"
    return []


@dataclass(frozen=True, slots=True, kw_only=True)
class _Attribute:
    """One attribute of a record type. type: its tokens."""

    required: bool
    type: list[str]


def _attributes(tokens: list[str], aliases: Mapping[str, list[str]]) -> dict[str, _Attribute]:
    """The attributes of a record type, or of a named one, by name."""
    for _ in range(len(aliases) + 1):  # `type A = B;` leads on, and Cedar has refused circles
        if tokens and tokens[0] != "{":
            tokens = aliases.get(tokens[0], [])
    found: dict[str, _Attribute] = {}
    depth = 0
    current: list[str] = []
    for token, following in itertools.pairwise(tokens):
        if token in {"{", "[", "<"}:
            depth += 1
        elif token in {"}", "]", ">"}:
            depth -= 1
        elif depth == 1 and following in {"?", ":"} and token not in {"?", ":"}:
            current = []
            found[token.strip('"')] = _Attribute(required=following == ":", type=current)
            continue
        if depth > 1 or token not in {"?", ":", ",", "{"}:
            current.append(token)
    return found


def _signing_of(attributes: Mapping[str, _Attribute], aliases: Mapping[str, list[str]]) -> str:
    """The type of `parameters.signing`, followed through its aliases down to the base schema's name for it."""
    parameters = attributes.get("parameters")
    signing = _attributes(parameters.type, aliases).get(PARAMETER) if parameters else None
    if signing is None:
        return ""
    words = signing.type
    for _ in range(len(aliases) + 1):
        if len(words) == 1 and words[0] != SIGNING_TYPE:
            words = aliases.get(words[0], words)
    return " ".join(words)


def _closure(name: str, direct: Mapping[str, tuple[str, ...]]) -> frozenset[str]:
    found: set[str] = set()
    waiting = list(direct[name])
    while waiting:
        group = waiting.pop()
        if group not in found:
            found.add(group)
            waiting += direct[group]
    return frozenset(found)
