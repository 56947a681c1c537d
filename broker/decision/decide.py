"""The decision: pure, deny by default, and the only place where a Grant is made.

Nothing is read, awaited or remembered here, so deciding again tells whether a credential would be minted again.
"""

import hashlib
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import InitVar, dataclass, field
from datetime import datetime
from types import MappingProxyType
from typing import Final, NoReturn

from attestors.contract import Facts
from broker.action import MAX_INTEGER, Action, canonical_json
from broker.decision.obligations import Obligations, Use, combine
from broker.decision.policy import Policy, Slice
from broker.decision.question import PROVENANCE, Answer, asked_signer, put
from broker.errors import Reason, Refused
from broker.identity.person import Principal

# What tells where the caller runs; the rest of the facts are about the act or about who asked for it.
_ENVIRONMENT = ("kubernetes", "process", "spire")

BREAK_GLASS: Final = "break-glass:"  # begins the names of policies that are permits for an emergency

_seal = object()  # never leaves this module: what is not sealed with it is no Grant


@dataclass(frozen=True, slots=True, kw_only=True)
class Permit:
    """Leave, beside policy, to do what it was looked up for, until then (broker/scope/standing.py)."""

    id: str
    until: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """Leave to mint exactly one credential. Only `decide` makes one; `mint` takes nothing else, and spends it.

    expires_at: the earliest of what bounds it (invariant 3). use: how often the credential counts.
    policies: ids of the permits that gave it; where a signature is asked for, those that give its signer.
    provenance_digest: SHA-256 over RFC 8785 JSON of what the provenance attestor saw, None where it saw nothing.
    heard: how many changes the broker had heard of before it looked. permit: the id of the break-glass permit that
    gave it, "" where policy did.
    """

    principal: Principal
    action: Action
    expires_at: datetime
    use: Use
    policies: tuple[str, ...]
    policy_revision: str
    facts: Mapping[str, Facts]
    provenance_digest: bytes | None
    heard: int
    permit: str
    seal: InitVar[object]
    _unspent: list[bool] = field(default_factory=lambda: [True], init=False, repr=False, compare=False)

    def __post_init__(self, seal: object) -> None:
        if seal is not _seal:
            raise TypeError("only decide() makes a Grant")

    @property
    def environment_digest(self) -> bytes:
        """SHA-256 over RFC 8785 JSON of what the kubernetes, process and spire attestors saw."""
        seen = {name: self.facts[name].values for name in _ENVIRONMENT if name in self.facts}
        return hashlib.sha256(canonical_json(seen, plain=_is_plain(seen))).digest()

    def spend(self) -> None:
        """Uses it up. Raises: Refused(ALREADY_USED) when it was spent before."""
        try:
            self._unspent.pop()  # atomic: of two threads, one gets the only element
        except IndexError:
            raise Refused(Reason.ALREADY_USED, "this grant was spent on a credential before") from None

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Grant cannot be copied or stored: decide again")


def decide(  # noqa: PLR0913 -- all that a decision may rest on; it reads nothing else
    policy: Policy,
    principal: Principal,
    action: Action,
    facts: Mapping[str, Facts],
    now: datetime,
    *,
    not_after: datetime,
    permit: Permit | None = None,
    heard: int = 0,
) -> Grant:
    """May `principal` do `action`, given `facts`?

    facts: by attestor name; all of them bound the grant, those that the action needs are shown to its policies.
    not_after: when the caller's SVID, a parent credential or the person's ID token ends. permit: stands in for a policy
    that permits, where none does and none forbids. heard: see Grant.

    A signature is granted only by permits that give the signer that is asked for; these alone bound it.

    Raises: Refused with UNKNOWN_ACTION, EXPIRED, PROVENANCE_MISSING or DENIED; Invalid for parameters that would
    forge a Cedar value.
    Not checked: that principal and facts were verified, and that the facts are of this very caller.
    """
    part = policy.slice(action.name)
    if part is None:
        raise Refused(Reason.UNKNOWN_ACTION, f"no schema declares {action.name}")
    ends = [not_after, *(fact.expires_at for fact in facts.values() if fact.expires_at is not None)]
    if min(ends) <= now:
        raise Refused(Reason.EXPIRED, "the caller's identity or the facts about it have expired")
    missing = part.required - facts.keys()
    if missing:
        reason = reason_of_missing(missing)
        raise Refused(reason, f"{action.name} requires evidence that is missing: {', '.join(sorted(missing))}")
    answer = put(part, principal, action, facts).ask(part.policies, part.schema)
    if permit is not None and now < permit.until and answer.nobody_spoke and asked_signer(action) is None:
        ends.append(permit.until)
        granting: tuple[str, ...] = (f"{BREAK_GLASS}{permit.id}",)
        return _grant(policy, Obligations(), granting, principal, action, facts, now, min(ends), heard, permit.id)
    if not answer.allowed:
        raise Refused(Reason.DENIED, _why_not(answer))
    granting = granted_by(part, answer, action)
    if not granting:
        raise Refused(Reason.DENIED, f"no policy that permits it gives the signer {asked_signer(action)!r:.80}")
    obligations = (
        part.obligations[granting[0]] if len(granting) == 1 else combine(part.obligations[name] for name in granting)
    )
    return _grant(policy, obligations, granting, principal, action, facts, now, min(ends), heard, "")


def granted_by(part: Slice, answer: Answer, action: Action) -> tuple[str, ...]:
    """Which of the policies that allowed it give what is asked for: all, or those that give the signer."""
    signer = asked_signer(action)
    if signer is None:
        return answer.policies
    return tuple(name for name in answer.policies if part.obligations[name].gives(signer))


def reason_of_missing(missing: AbstractSet[str]) -> Reason:
    """What a caller hears when evidence that the schema requires is missing."""
    return Reason.PROVENANCE_MISSING if PROVENANCE in missing else Reason.DENIED


def _grant(  # noqa: PLR0913, PLR0917 -- the parts of one value
    policy: Policy,
    obligations: Obligations,
    granting: tuple[str, ...],
    principal: Principal,
    action: Action,
    facts: Mapping[str, Facts],
    now: datetime,
    bound: datetime,
    heard: int,
    permit: str,
) -> Grant:
    return Grant(
        principal=principal,
        action=action,
        expires_at=min(now + obligations.max_ttl, bound),  # obligations are never over 300 s
        use=obligations.use,
        policies=granting,
        policy_revision=policy.revision,
        facts=MappingProxyType(dict(facts)),
        provenance_digest=facts_digest(facts[PROVENANCE]) if PROVENANCE in facts else None,
        heard=heard,
        permit=permit,
        seal=_seal,
    )


def _why_not(answer: Answer) -> str:
    if answer.errors:
        return f"not decided without error: {'; '.join(answer.errors)}"
    if answer.policies:
        return f"forbidden by {', '.join(answer.policies)}"
    return "no policy permits it"


def facts_digest(facts: Facts) -> bytes:
    """SHA-256 over RFC 8785 JSON of what one attestor saw: what the ledger keeps of it."""
    return hashlib.sha256(canonical_json(facts.values, plain=_is_plain(facts.values))).digest()


def _is_plain(value: object) -> bool:
    """Whether the fast encoder writes RFC 8785 for it: ASCII strings, booleans, integers that all JSON reads alike."""
    if isinstance(value, str):
        return value.isascii()
    if isinstance(value, Mapping):
        return all([name.isascii() and _is_plain(item) for name, item in value.items()])
    if isinstance(value, list):
        return all([_is_plain(item) for item in value])
    return isinstance(value, int) and abs(value) <= MAX_INTEGER
