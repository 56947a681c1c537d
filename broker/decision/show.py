"""What a policy says, action by action, for `policy show`."""

from dataclasses import dataclass
from typing import Literal

from broker.decision.obligations import Use
from broker.decision.policy import Policy


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownPolicy:
    """One policy that could apply to an action. max_ttl_s, use: its obligations; of a forbid, None.

    signers: by which it lets a signature happen; none for a forbid, or where the action asks for no signature.
    """

    id: str
    effect: Literal["permit", "forbid"]
    line: int
    max_ttl_s: int | None
    use: Use | None
    signers: tuple[str, ...]
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownAction:
    """One action that can be asked for.

    attestors: whose facts are gathered for it. required: those of them without which it is refused.
    parameters: whether it takes parameters. audience: whether its policies see for whom a credential is meant.
    """

    action: str
    attestors: tuple[str, ...]
    required: tuple[str, ...]
    parameters: Literal["none", "optional", "required"]
    audience: bool
    policies: tuple[ShownPolicy, ...]


def show(policy: Policy) -> tuple[ShownAction, ...]:
    """All actions by name, with their policies in the order of the documents."""
    names: dict[bool | None, Literal["none", "optional", "required"]] = {
        None: "none",
        False: "optional",
        True: "required",
    }
    return tuple(
        ShownAction(
            action=name,
            attestors=tuple(sorted(part.attestors)),
            required=tuple(sorted(part.required)),
            parameters=names[part.parameters],
            audience=part.audience,
            policies=tuple(
                ShownPolicy(
                    id=rule.id,
                    effect=rule.effect,
                    line=rule.line,
                    max_ttl_s=int(rule.obligations.max_ttl.total_seconds()) if rule.effect == "permit" else None,
                    use=rule.obligations.use if rule.effect == "permit" else None,
                    signers=tuple(sorted(rule.obligations.signers)) if part.signs and rule.effect == "permit" else (),
                    text=rule.text,
                )
                for rule in part.rules
            ),
        )
        for name, part in sorted(policy.slices.items())
    )
