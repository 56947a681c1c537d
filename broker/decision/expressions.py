"""Walks Cedar's JSON form of a condition: what evidence it names, and what it does when evidence is left out.

Source: https://docs.cedarpolicy.com/policies/json-format.html. A node is an object with one name: its operator.
"""

from collections.abc import Iterator, Mapping
from typing import Any

Node = Mapping[str, Any]

# Cedar reads its JSON form back to 128 levels, of which a node takes two and the document around it up to 9.
# A chain of && nests once for each part.
MAX_DEPTH = 50

_LEAVES = frozenset({"Value", "Var", "Slot", "Unknown"})
_OPERANDS = ("left", "right", "arg", "if", "then", "else", "in")


def children(node: Node) -> tuple[Node, ...]:
    """The expressions directly under `node`."""
    ((operator, body),) = node.items()
    if operator in _LEAVES:
        return ()
    if operator == "Record":
        return tuple(body.values())
    if isinstance(body, list):  # a set, or the arguments of an extension function
        return tuple(body)
    return tuple(body[name] for name in _OPERANDS if name in body)


def walk(node: Node) -> Iterator[Node]:
    """`node` and all below it."""
    waiting = [node]
    while waiting:
        found = waiting.pop()
        yield found
        waiting.extend(children(found))


def depth(node: Node) -> int:
    """How deep it nests, 1 for a leaf."""
    level, row = 0, [node]
    while row:
        level, row = level + 1, [child for parent in row for child in children(parent)]
    return level


def is_context(node: Node) -> bool:
    """Whether it is `context` itself."""
    return node.get("Var") == "context"


def evidence_named(node: Node) -> frozenset[str]:
    """Each X of `context.X` and `context has X`."""
    return frozenset(
        body["attr"]
        for found in walk(node)
        for op, body in found.items()
        if op in {".", "has"} and is_context(body["left"])
    )


def reads(node: Node, name: str, attribute: str) -> bool:
    """Whether it reads `attribute` of `context.name`, also by way of a record or a branch that it passes through."""
    return any(
        operator == "." and body["attr"] == attribute and name in evidence_named(body["left"])
        for found in walk(node)
        for operator, body in found.items()
    )


def hides_evidence(node: Node) -> bool:
    """Whether `context` stands anywhere but directly under `.` or `has`: then no reader can tell what of it counts."""
    for found in walk(node):
        ((operator, _),) = found.items()
        if operator not in {".", "has"} and any(is_context(child) for child in children(found)):
            return True
    return is_context(node)


def switched_off_by_absence(node: Node, *, negated: bool = False) -> frozenset[str]:
    """Each X whose absence can turn `node` from true to false (with `negated`: from false to true).

    `context has X` counts where it stands under an even number of negations: there the expression is the weaker without
    X. Under an operator that is neither `&&`, `||`, `!` nor `if`, it counts both ways.
    """
    ((operator, body),) = node.items()
    match operator:
        case "has" if is_context(body["left"]):
            return frozenset() if negated else frozenset({body["attr"]})
        case "!":
            return switched_off_by_absence(body["arg"], negated=not negated)
        case "&&" | "||":
            left = switched_off_by_absence(body["left"], negated=negated)
            return left | switched_off_by_absence(body["right"], negated=negated)
        case "if-then-else":
            return _switched_off_branch(body, negated=negated)
        case _:
            both = [switched_off_by_absence(c, negated=n) for c in children(node) for n in (False, True)]
            return frozenset[str]().union(*both)


def _switched_off_branch(body: Mapping[str, Node], *, negated: bool) -> frozenset[str]:
    """`if a then b else c` is `(a && b) || (!a && c)`: a condition counts both ways, unless a branch settles it."""
    condition, then, other = body["if"], body["then"], body["else"]
    found = switched_off_by_absence(then, negated=negated) | switched_off_by_absence(other, negated=negated)
    if other != {"Value": True} and then != {"Value": False}:  # else it is the same as !a || b, or !a && c
        found |= switched_off_by_absence(condition, negated=negated)
    if other != {"Value": False} and then != {"Value": True}:  # else it is the same as a && b, or a || c
        found |= switched_off_by_absence(condition, negated=not negated)
    return found


def conjuncts(node: Node, operator: str = "&&") -> tuple[Node, ...]:
    """The parts of a chain of `&&` (or of `||`), from left to right."""
    found: list[Node] = []
    waiting = [node]
    while waiting:
        part = waiting.pop()
        if operator in part:
            waiting += [part[operator]["right"], part[operator]["left"]]
        else:
            found.append(part)
    return tuple(found)


def entities_named(node: Node) -> Iterator[tuple[str, Mapping[str, str]]]:
    """Each entity literal with the operator above it, such as ("in", {"type": "Resource", "id": "https://…"})."""
    for found in walk(node):
        ((operator, _),) = found.items()
        for child in children(found):
            literal = child.get("Value")
            if isinstance(literal, dict) and "__entity" in literal:
                yield operator, literal["__entity"]
