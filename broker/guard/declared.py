"""Rules from a configuration file, for guards in front of services that are not written in Python.

    public = ["GET /healthz"]

    [[rules]]
    method = "POST"
    path = "/orders/{order}/refund"
    action = "orders.refund"
    resource = "https://orders.acme.test/orders/{order}"
    parameters = { amount = "body:/amount", currency = { value = "EUR" } }

    [[rules]]
    method = "/acme.Orders/List"
    action = "orders.list"
    resource = "https://orders.acme.test/orders"

What is not where a rule takes it from is refused, and so is what no rule takes: another query parameter, another member
of the body, or a body where the rule reads none, unless `ignore` names it. So the service cannot act on what nobody
approved. Headers are left to it: those that matter have to be taken.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Final, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from broker.action import Action
from broker.errors import Invalid, Reason, Refused
from broker.guard.http_request import Request
from broker.guard.mapping import HttpMethod, Rule, Table
from broker.guard.sources import KINDS, Kind, Source, covers, parse_pointer, parse_source, template_parts

_ANY: Final = "https://any.test/"


class Strict(BaseModel):
    """A table of the file: unknown keys are mistakes, and it never changes."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _spelled_out(written: Any) -> Any:
    match written:
        case str():
            return {"from": written}
        case bool() | int() | float():
            return {"value": written}
        case _:
            return written


class Parameter(Strict):
    """`from` somewhere in the request, as a `type`, or a constant `value`."""

    source: str | None = Field(default=None, alias="from")
    type: Kind | None = None
    value: Any = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.source is None) == (self.value is None) or (self.source is None and self.type is not None):
            raise ValueError("a parameter has `from`, and where that is not enough a `type`; or a constant `value`")
        if self.source is None:
            try:
                Action("any", _ANY, _ANY, {"value": self.value})
            except Invalid as error:
                raise ValueError(error.detail) from error
            return self
        kinds = KINDS[parse_source(self.source).origin]
        if self.type not in {None, *kinds}:
            raise ValueError(f"what comes from there is one of {', '.join(kinds)}")
        return self

    @property
    def taken(self) -> Source | None:
        """Where it comes from; None for a constant."""
        return None if self.source is None else parse_source(self.source, self.type)


def _action(name: str) -> str:
    try:
        return Action(name, _ANY, _ANY).name
    except Invalid as error:
        raise ValueError(error.detail) from error


def _resource(text: str) -> str:
    template_parts(text)
    return text


def _ignored(text: str) -> str:
    if text != "body" and parse_source(text).origin == "header":
        raise ValueError("headers that no rule takes are ignored anyway")
    return text


class DeclaredRule(Strict):
    """One rule, as a file has it. path: None for a gRPC method."""

    method: str
    path: str | None = None
    action: Annotated[str, AfterValidator(_action)]
    resource: Annotated[str, AfterValidator(_resource)]
    parameters: dict[str, Annotated[Parameter, BeforeValidator(_spelled_out)]] = {}
    ignore: tuple[Annotated[str, AfterValidator(_ignored)], ...] = ()
    check: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if mistakes := list(_Reading(self).mistakes()):
            raise ValueError("; ".join(mistakes))
        self.rule()
        return self

    def rule(self) -> Rule:
        """As guards have it. Raises: ValueError where no request could have its method."""
        reading = _Reading(self)
        return Rule(
            method=self.method if self.path is None else (self.method, self.path),
            action=self.action,
            resource=reading.resource,
            parameters=reading.parameters,
            check=self.check,
            body=self.path is not None,  # also where none is read: that there is none has to be seen
        )


class _Reading:
    """How the requests of one rule are read."""

    def __init__(self, declared: DeclaredRule) -> None:
        self._path, self._parts = declared.path, template_parts(declared.resource)
        self._parameters = {name: (one.taken, one.value) for name, one in declared.parameters.items()}
        taken = [part for part in self._parts if isinstance(part, Source)]
        taken += [source for source, _ in self._parameters.values() if source is not None]
        self._ignored = [parse_source(text) for text in declared.ignore if text != "body"]
        self._named = [*taken, *self._ignored]
        self._ignores_body = "body" in declared.ignore
        self._reads_body = any(one.origin == "body" for one in taken)
        self._pointers = [parse_pointer(one.name) for one in self._named if one.origin == "body"]
        self._query = frozenset(one.name for one in self._named if one.origin == "query")

    def mistakes(self) -> Iterator[str]:
        """What cannot be meant, or would leave something out."""
        if self._path is None:
            if self._ignores_body or any(one.origin != "header" for one in self._named):
                yield "a gRPC method's body cannot be read: take values from headers, or make them constants"
            return
        places = [text[1:-1] for text in self._path.split("/") if text[:1] == "{"]
        named = {one.name for one in self._named if one.origin == "path"}
        if len(set(places)) != len(places):
            yield "the path has one name twice"
        for name in sorted(named.difference(places)):
            yield f"the path has no {{{name}}}"
        for name in sorted(set(places) - named):
            yield f"{{{name}}} is not taken, so nobody would have approved it"
        if self._ignores_body and self._pointers:
            yield "the body is taken, and ignored"
        elif self._pointers and not self._reads_body:
            yield 'nothing is taken from the body: write ignore = ["body"]'

    def resource(self, request: Request) -> str:
        """The URI. Raises: Refused."""
        body = self._body(request)
        return "".join(part if isinstance(part, str) else part.segment(request, body) for part in self._parts)

    def parameters(self, request: Request) -> Mapping[str, Any]:
        """All of them, when the request has nothing else. Raises: Refused."""
        body = self._body(request)
        if not self._query.issuperset(request.query_names()):
            raise Refused(Reason.OUT_OF_SCOPE, "a query parameter that the rule neither takes nor ignores")
        if self._reads_body:
            if not covers(self._pointers, body):
                raise Refused(Reason.OUT_OF_SCOPE, "a member of the body that the rule neither takes nor ignores")
        elif request.body and not self._ignores_body:
            raise Refused(Reason.OUT_OF_SCOPE, "a body, and the rule neither takes nor ignores it")
        return {
            name: value if source is None else source.take(request, body)
            for name, (source, value) in self._parameters.items()
        }

    def _body(self, request: Request) -> Any:
        return request.json() if self._reads_body else None


def _public(text: str) -> str:
    Rule(method=_method(text), action="any", resource=str)  # says so where no request could have it
    return text


def _method(text: str) -> str | HttpMethod:
    verb, space, path = text.partition(" ")
    return (verb, path) if space else verb


class Rules(Strict):
    """All rules of one service. public: methods that anybody may call: `GET /healthz`, `/package.Service/Method`."""

    public: tuple[Annotated[str, AfterValidator(_public)], ...] = ()
    rules: Annotated[tuple[DeclaredRule, ...], Field(validate_default=True)] = ()

    @field_validator("rules")
    @classmethod
    def _one_for_a_request(cls, rules: tuple[DeclaredRule, ...], info: ValidationInfo) -> tuple[DeclaredRule, ...]:
        if not rules:
            raise ValueError("no rule: every request would be refused")
        _table(rules, info.data.get("public", ()))
        return rules

    def table(self) -> Table:
        """For a guard."""
        return _table(self.rules, self.public)


def _table(rules: Iterable[DeclaredRule], public: Iterable[str]) -> Table:
    """Raises: ValueError where two may mean the same request."""
    return Table([one.rule() for one in rules], public=map(_method, public))
