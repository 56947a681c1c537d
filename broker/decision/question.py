"""The question that Cedar is asked, and its answer: the same for a decision and for its explanation.

The caller's words reach Cedar only as values: ids as JSON strings, never as Cedar text, and no name of a parameter that
Cedar would read as a type.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import msgspec
from cedarpy import Decision, Entities, PolicySet, Schema, is_authorized

from attestors.contract import Facts
from broker.action import Action, ancestors
from broker.artifacts import PARAMETER
from broker.decision.policy import Slice
from broker.decision.rules import AUDIENCE, PARAMETERS
from broker.errors import Invalid, Reason, Refused
from broker.identity.person import PersonId, Principal
from broker.identity.spiffe_id import SCHEME

PROVENANCE: Final = "provenance"
APPROVAL: Final = "approval"
SESSION: Final = "session"
TICKET: Final = "ticket"

# Cedar's JSON escapes: under these names it reads an entity or an extension value, whatever the schema says is there.
# https://docs.cedarpolicy.com/auth/entities-syntax.html
_ESCAPES = frozenset({"__entity", "__extn", "__expr"})
_MAY_ESCAPE = '"__e'
_MAX_DETAIL = 500

_json = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What Cedar said.

    allowed: it decided Allow, and no policy failed to evaluate: Cedar skips a policy that errs, so that a forbid that
    errs would allow. policies: ids that gave the decision. errors: of evaluation or of the question itself.
    undecided: the question did not fit the schema, so no policy was looked at.
    """

    allowed: bool
    policies: tuple[str, ...]
    errors: tuple[str, ...]
    undecided: bool

    @property
    def nobody_spoke(self) -> bool:
        """Whether it was not allowed for one reason alone: no policy permits it, and none forbids it."""
        return not (self.allowed or self.policies or self.errors or self.undecided)


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One request in Cedar's terms."""

    request: Mapping[str, Any]
    entities: Entities

    def ask(self, policies: PolicySet, schema: Schema | None) -> Answer:
        """Asks it of these policies. schema None: without holding the question against it, for explanations only."""
        result = is_authorized(dict(self.request), policies, self.entities, schema)
        diagnostics = result.diagnostics
        errors = tuple(error[:_MAX_DETAIL] for error in diagnostics.errors)
        return Answer(
            allowed=result.decision is Decision.Allow and not errors,
            policies=tuple(sorted(diagnostics.reasons)),
            errors=errors,
            undecided=result.decision is Decision.NoDecision,
        )


def asked_signer(action: Action) -> str | None:
    """By which signer a signature is asked for: "keyless", "agent-key" or "key:<name>"; None where none is asked for.

    Not checked: that there is such a signer. Where it cannot even be a word it is "", which no permit gives.
    """
    if PARAMETER not in action.parameters:
        return None
    asked = action.parameters[PARAMETER]
    signer = asked.get("signer") if isinstance(asked, Mapping) else None
    return signer if isinstance(signer, str) else ""


def put(part: Slice, principal: Principal, action: Action, facts: Mapping[str, Facts]) -> Question:
    """The question whether `principal` may do `action`, given these facts.

    Of the facts, only those of attestors that the slice needs are told. Not checked here: whether required facts are
    there, or have expired.
    Raises: Refused(DENIED) for parameters of an action that takes none; Invalid for a reserved name in them.
    """
    context: dict[str, Any] = {name: facts[name].values for name in part.attestors if name in facts}
    if part.parameters is None:
        if action.parameters:
            raise Refused(Reason.DENIED, f"the schema declares no parameters for {action.name}")
    elif part.parameters or action.parameters:
        context[PARAMETERS] = action.parameters
    if part.audience:
        context[AUDIENCE] = action.audience
    text = _json(context).decode()
    if _MAY_ESCAPE in text and _has_escape(context):
        raise Invalid("a parameter or fact is named __entity, __extn or __expr, which Cedar reserves")
    request = {
        "principal": {"type": "Person" if isinstance(principal, PersonId) else "Workload", "id": str(principal)},
        "action": {"type": "Action", "id": action.name},
        "resource": {"type": "Resource", "id": action.resource},
        "context": text,
    }
    delta = f"[{_who(principal)},{_resource(action.resource)}]"
    return Question(request=request, entities=part.entities.with_added_json_str(delta))


def _who(principal: Principal) -> str:
    if isinstance(principal, PersonId):
        return _person(str(principal), principal.issuer)
    return _workload(str(principal))


@functools.lru_cache(maxsize=4096)  # pure: what a name lies under never changes
def _person(name: str, issuer: str) -> str:
    """The entity of a person, under the issuer that vouches for it."""
    parents = [{"type": "Issuer", "id": issuer}]
    return _json({"uid": {"type": "Person", "id": name}, "attrs": {}, "parents": parents}).decode()


@functools.lru_cache(maxsize=4096)  # pure: likewise
def _workload(name: str) -> str:
    """The entity of a SPIFFE ID, under each path above it and its trust domain."""
    domain, *segments = name.removeprefix(SCHEME).split("/")
    paths = [f"{SCHEME}{'/'.join([domain, *segments[:n]])}" for n in range(len(segments) - 1, 0, -1)]
    parents = [*({"type": "Path", "id": path} for path in paths), {"type": "TrustDomain", "id": domain}]
    return _json({"uid": {"type": "Workload", "id": name}, "attrs": {}, "parents": parents}).decode()


@functools.lru_cache(maxsize=4096)  # pure: likewise
def _resource(uri: str) -> str:
    """The entity of a resource, under each URI above it."""
    parents = [{"type": "Resource", "id": above} for above in ancestors(uri)]
    return _json({"uid": {"type": "Resource", "id": uri}, "attrs": {}, "parents": parents}).decode()


def _has_escape(value: object) -> bool:
    if isinstance(value, Mapping):
        return not _ESCAPES.isdisjoint(value) or any(_has_escape(item) for item in value.values())
    return isinstance(value, list | tuple) and any(_has_escape(item) for item in value)
