"""What a policy enforcement point asks, and what it is told: OpenID AuthZEN Authorization API 1.0, no I/O.

https://openid.net/specs/authorization-api-1_0.html, here by its section names. What we make of its words:

    subject   type "workload" and a SPIFFE ID, or "person" and <issuer>/subject/<base64url of sub>
    action    name, and as properties all the parameters there are: left out is not the same as any
    resource  id: a URI, which says all; its type is not looked at
    context   audience: whom the action is done at, the asker where it is left out. access_token: that the subject
              showed. idempotency_id: to use a single-use one up

Properties of subject and resource are not looked at: facts come from attestors, never from who asks. "Receivers MUST
ignore unknown fields" (JSON Serialization), and they are; what we know has to have its type, and no name stands twice.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, TypeVar

import msgspec

from broker.action import Action, parse_json
from broker.credentials.action_token import VerifiedClaims
from broker.errors import BrokerError, Invalid
from broker.evaluation import Question, subject_of

MAX_EVALUATIONS: Final = 64
MAX_BODY: Final = 64 * 1024  # bytes of one question: a token of 16 KiB, parameters of 4 KiB, what is ignored
MAX_BODY_OF_MANY: Final = 512 * 1024
_KEYS: Final = ("subject", "action", "resource", "context")


class Semantic(StrEnum):
    """When the evaluations of a request stop (section "Evaluations semantics")."""

    EXECUTE_ALL = "execute_all"
    DENY_ON_FIRST_DENY = "deny_on_first_deny"
    PERMIT_ON_FIRST_PERMIT = "permit_on_first_permit"

    def ends_with(self, *, decision: bool) -> bool:
        """Whether nothing more is evaluated after this."""
        return self is (Semantic.PERMIT_ON_FIRST_PERMIT if decision else Semantic.DENY_ON_FIRST_DENY)


class BadRequest(Invalid):
    """The request is not of the form that AuthZEN gives it. `detail` speaks of that form alone, and is told."""


class _Entity(msgspec.Struct, frozen=True, kw_only=True):
    type: str
    id: str
    properties: dict[str, Any] = {}


class _Act(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    properties: dict[str, Any] = {}


class _Context(msgspec.Struct, frozen=True, kw_only=True):
    audience: str = ""
    access_token: str = ""
    idempotency_id: str = ""

    def __repr__(self) -> str:  # the token is secret
        return f"_Context({self.audience!r})"


class _Options(msgspec.Struct, frozen=True, kw_only=True):
    evaluations_semantic: str = Semantic.EXECUTE_ALL


class _Asked(msgspec.Struct, frozen=True, kw_only=True):
    subject: _Entity
    action: _Act
    resource: _Entity
    context: _Context = _Context()


class _Defaults(msgspec.Struct, frozen=True, kw_only=True):
    """What stands beside `evaluations`, for those that leave it out."""

    subject: _Entity | msgspec.UnsetType = msgspec.UNSET
    action: _Act | msgspec.UnsetType = msgspec.UNSET
    resource: _Entity | msgspec.UnsetType = msgspec.UNSET
    context: _Context = _Context()
    options: _Options = _Options()
    evaluations: list[Any] = []


@dataclass(frozen=True, slots=True)
class Item:
    """One question as it came. wrong: why it is not looked at: it is answered no, for itself."""

    asked: _Asked | None
    wrong: BrokerError | None = None

    @property
    def audience(self) -> str:
        """As it came; "" where it was left out."""
        return "" if self.asked is None else self.asked.context.audience

    def question(self, asker: str) -> Question:
        """What it means, where `asker` asks. Raises: Invalid, or what is wrong with it."""
        if self.asked is None:
            raise self.wrong or BadRequest("no question")
        found, context = self.asked, self.asked.context
        audience = context.audience or asker
        return Question(
            subject=subject_of(found.subject.type, found.subject.id),
            action=Action(found.action.name, found.resource.id, audience, found.action.properties),
            token=context.access_token,
            idempotency_id=context.idempotency_id,
        )


@dataclass(frozen=True, slots=True)
class Many:
    """Several questions. items: none where it is asked as for one evaluation, which is then `one`."""

    items: Sequence[Item]
    semantic: Semantic
    one: Item | None = None


def parse_one(body: bytes) -> Item:
    """An Access Evaluation request. Raises: BadRequest."""
    return Item(_convert(_object(body), _Asked))


def parse_many(body: bytes, most: int = MAX_EVALUATIONS) -> Many:
    """An Access Evaluations request of at most so many. Raises: BadRequest where it is wrong as a whole."""
    found = _object(body)
    defaults = _convert(found, _Defaults)
    try:
        semantic = Semantic(defaults.options.evaluations_semantic)
    except ValueError as error:
        raise BadRequest(f"evaluations_semantic: {', '.join(Semantic)} are offered") from error
    if not defaults.evaluations:  # "behaves in a backwards-compatible manner with the (single) Access Evaluation"
        return Many((), semantic, Item(_convert(found, _Asked)))
    if len(defaults.evaluations) > most:
        raise BadRequest(f"evaluations are more than {most}")
    return Many(tuple(_items(found, defaults.evaluations)), semantic)


def _items(found: Mapping[str, Any], evaluations: Iterable[Any]) -> Iterable[Item]:
    """Section "Default values": a key that an evaluation has replaces the whole default."""
    defaults = {key: found[key] for key in _KEYS if key in found}
    for one in evaluations:
        try:
            yield Item(_convert(defaults | _convert(one, dict[str, Any]), _Asked))
        except BadRequest as error:
            yield Item(None, error)


_T = TypeVar("_T")


def _convert(found: Any, kind: type[_T]) -> _T:
    try:
        return msgspec.convert(found, kind)
    except msgspec.ValidationError as error:  # its sentences name members and types, and no values of these kinds
        raise BadRequest(str(error)) from error


def _object(body: bytes) -> dict[str, Any]:
    try:
        found = parse_json(body, "the body")
    except Invalid as error:
        raise BadRequest(error.detail) from error
    return _convert(found, dict[str, Any])


def permit(claims: VerifiedClaims | None) -> dict[str, Any]:
    """The decision yes. claims: of the token that was shown; what is left for the asker to check is told with it."""
    if claims is None:
        return {"decision": True}
    context = {"jti": claims.jti, "exp": claims.exp, "use": claims.use, "cnf": msgspec.to_builtins(claims.cnf)}
    return {"decision": True, "context": context}


def deny(error: BrokerError, correlation_id: str) -> dict[str, Any]:
    """The decision no: its reason, and where to look it up. Policy and facts are nobody else's business."""
    return {"decision": False, "context": {"reason": str(error.reason), "correlation_id": correlation_id}}
