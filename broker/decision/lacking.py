"""Would an approval help? Of a refusal, whether approvals are all that it is for want of.

An approver is asked only then: not for a request that stays refused whatever anybody approves. The answer is read from
the conditions, so it does not tell how many approvals are wanted, nor whose.
"""

from collections.abc import Iterator, Mapping, Sequence

from attestors.contract import Facts
from broker.action import Action
from broker.decision.decide import granted_by
from broker.decision.expressions import Node, evidence_named
from broker.decision.pieces import EMPTY, ask_pieces
from broker.decision.policy import Policy, Slice
from broker.decision.question import APPROVAL, Answer, Question, asked_signer, put
from broker.decision.rules import Rule
from broker.errors import Refused
from broker.identity.person import Principal


def lacks_approval(policy: Policy, principal: Principal, action: Action, facts: Mapping[str, Facts]) -> bool:
    """Whether this request, which `decide` has just refused, could be allowed by other approvals than there are.

    True when some permit that gives the signer that is asked for fails in nothing but what it says of
    `context.approval`, and every forbid that applies would not, if `context.approval` were otherwise. Where evidence is
    missing, or a policy cannot be evaluated, it is false: approvals do not mend that.

    Not checked: when the facts expire; that a number or an approver could ever satisfy what is said of approvals.
    """
    part = policy.slice(action.name)
    if part is None or APPROVAL not in part.attestors:
        return False
    try:
        question = put(part, principal, action, facts)
    except Refused:
        return False
    answer = question.ask(part.policies, part.schema)
    if answer.errors or answer.undecided or (answer.allowed and granted_by(part, answer, action)):
        return False
    return _waits(part, answer, question, asked_signer(action))


def _waits(part: Slice, answer: Answer, question: Question, signer: str | None) -> bool:
    forbids = [rule for rule in part.rules if rule.effect == "forbid" and rule.id in answer.policies]
    if not all(APPROVAL in rule.evidence for rule in forbids):
        return False  # the common refusal, told without looking into any condition
    permits = [rule for rule in part.rules if rule.effect == "permit" and rule.obligations.gives(signer)]
    seen = _Seen(question, part, [*forbids, *permits])
    return any(seen.may_hold(rule) for rule in permits) and all(seen.may_lapse(rule) for rule in forbids)


class _Seen:
    """What holds now of everything that approvals do not decide, in some rules."""

    def __init__(self, question: Question, part: Slice, rules: Sequence[Rule]) -> None:
        leaves = {id(leaf): leaf for rule in rules for c in rule.form["conditions"] for leaf in _leaves(c["body"])}
        scopes = [{**rule.form, "effect": "permit", "annotations": {}, "conditions": []} for rule in rules]
        forms = [{**EMPTY, "conditions": [{"kind": "when", "body": leaf}]} for leaf in leaves.values()]
        holds = ask_pieces(question, part.schema, [*scopes, *forms])
        self._scopes = {rule.id: bool(one) for rule, one in zip(rules, holds[: len(scopes)], strict=True)}
        self._leaves = dict(zip(leaves, holds[len(scopes) :], strict=True))

    def may_hold(self, permit: Rule) -> bool:
        """Whether it would permit, with other approvals."""
        return self._scopes[permit.id] and all(
            self._may_be(condition["body"], wanted=condition["kind"] == "when")
            for condition in permit.form["conditions"]
        )

    def may_lapse(self, forbid: Rule) -> bool:
        """Whether this forbid, which applies, would not, with other approvals."""
        return any(
            self._may_be(condition["body"], wanted=condition["kind"] == "unless")
            for condition in forbid.form["conditions"]
        )

    def _may_be(self, node: Node, *, wanted: bool) -> bool:
        """Whether the expression can be `wanted`, with other approvals."""
        if id(node) in self._leaves:
            return self._leaves[id(node)] is wanted
        ((operator, body),) = node.items()
        match operator:
            case "!":
                return self._may_be(body["arg"], wanted=not wanted)
            case "&&" | "||":
                every = (operator == "&&") is wanted  # a && b is true by both, false by one; a || b the other way round
                return (all if every else any)(self._may_be(body[side], wanted=wanted) for side in ("left", "right"))
            case "if-then-else":
                return any(
                    self._may_be(body["if"], wanted=taken) and self._may_be(body[branch], wanted=wanted)
                    for taken, branch in ((True, "then"), (False, "else"))
                )
            case _:
                return True  # a comparison with what is said of approvals: they may come out either way


def _leaves(node: Node) -> Iterator[Node]:
    """The largest parts that approvals play no part in."""
    if APPROVAL not in evidence_named(node):
        yield node
        return
    ((operator, body),) = node.items()
    if operator in {"!", "&&", "||", "if-then-else"}:
        for side in ("arg", "left", "right", "if", "then", "else"):
            if side in body:
                yield from _leaves(body[side])
