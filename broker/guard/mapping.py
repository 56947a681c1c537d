"""What a request means: the declared mapping from requests to actions.

A rule stands in a `Table`, or at the handler as `@action(...)`. A request without a rule is refused, unless its method
is listed as public; a rule that raises refuses. Write rules so that everything which changes what the handler does is
in the resource or the parameters: what the mapping leaves out, nobody approved.
"""

import functools
import inspect
import re
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from broker.action import Action
from broker.errors import BrokerError, Reason, Refused
from broker.guard.verify import Allowed

HttpMethod = tuple[str, str]
"""The verb and the path template, for example ("POST", "/orders/{id}")."""

_F = TypeVar("_F", bound=Callable[..., Any])
_RPC: Final = re.compile(r"/[A-Za-z_][A-Za-z0-9_.]*/[A-Za-z_][A-Za-z0-9_]*")
_TEMPLATE: Final = re.compile(r"(?:/(?:\{[A-Za-z_][A-Za-z0-9_]*\}|[A-Za-z0-9\-._~!$&'()*+,;=:@]*))+")


def _nothing(_: Any) -> Mapping[str, Any]:
    return {}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rule:
    """What requests of one method mean.

    method: "/package.Service/Method", or a verb with a path template. None only at what has a name: a gRPC handler, or
    a tool.
    action: the Cedar action id. resource, parameters: of a request (the gRPC message, an http_request.Request, or a
    tool's arguments).
    check: ask the broker each time whether it would grant this again.
    body: HTTP only: `parameters` and `resource` may read `request.json()`.
    payload: gRPC client streams only. The first message is mapped; each later one must map to the same act, except
    those for which `payload` says that they only carry what the first one announced.
    """

    method: str | HttpMethod | None = None
    action: str
    resource: Callable[[Any], str]
    parameters: Callable[[Any], Mapping[str, Any]] = _nothing
    check: bool = False
    body: bool = False
    payload: Callable[[Any], bool] | None = None

    def __post_init__(self) -> None:
        match self.method:
            case None:
                pass
            case str():
                if not _RPC.fullmatch(self.method):
                    raise ValueError(f"{self.method!r} is not /package.Service/Method")
            case verb, path:
                if not verb.isupper() or not _TEMPLATE.fullmatch(path):
                    raise ValueError(f"{self.method!r} is not a verb in upper case and a path such as /orders/{{id}}")

    def rebuild(self, request: Any, audience: str) -> Action:
        """The act that `request` means. Raises: Refused, whatever the mapping raises."""
        try:
            return Action(self.action, self.resource(request), audience, self.parameters(request))
        except BrokerError:
            raise
        except Exception as error:  # deny by default: a request that the mapping cannot read means nothing
            raise Refused(
                Reason.OUT_OF_SCOPE, f"the mapping of {self.action} failed with {type(error).__name__}"
            ) from error


class Table:
    """The rules of one service, by method.

    rules: also handlers that have one by `@action`. public: methods that anybody may call, named one by one: RPC names,
    or verbs with a path without parameters.

    Raises: ValueError where two of them could mean the same request: the guard and the service's router might take
    different ones.
    """

    def __init__(
        self, rules: Iterable[Rule | Callable[..., Any]] = (), *, public: Iterable[str | HttpMethod] = ()
    ) -> None:
        self.public: Final = frozenset(public)
        self.rpc: Final[dict[str, Rule]] = {}
        self._http: Final[dict[tuple[str, int], list[tuple[tuple[str, ...], Rule | None]]]] = {}
        for name in self.public:
            if not isinstance(name, str):
                if "{" in name[1]:
                    raise ValueError(f"{name!r}: a public path has no parameters")
                self._add_http(name, None)
        for item in rules:
            rule = item if isinstance(item, Rule) else rule_of(item)
            if rule is None or rule.method is None:
                raise ValueError(f"{item!r} has no rule that names its method")
            if isinstance(rule.method, tuple):
                self._add_http(rule.method, rule)
            elif rule.method in self.rpc or rule.method in self.public:
                raise ValueError(f"{rule.method} is declared twice")
            else:
                self.rpc[rule.method] = rule

    def _add_http(self, method: HttpMethod, rule: Rule | None) -> None:
        verb, template = method
        segments = tuple(template.split("/"))
        same = self._http.setdefault((verb, len(segments)), [])
        for other, _ in same:
            if all(a == b or a[:1] == "{" or b[:1] == "{" for a, b in zip(segments, other, strict=True)):
                raise ValueError(f"{verb} {template} and {verb} {'/'.join(other)} may mean the same request")
        same.append((segments, rule))

    def http(self, verb: str, path: str) -> tuple[Rule | None, dict[str, str]]:
        """The rule for a request (None: public) and its path parameters. Raises: Refused where there is none."""
        segments = path.split("/")
        for template, rule in self._http.get((verb, len(segments)), ()):
            pairs = list(zip(template, segments, strict=True))
            if all(a == b or (a[:1] == "{" and b) for a, b in pairs):
                return rule, {a[1:-1]: b for a, b in pairs if a[:1] == "{"}
        raise Refused(Reason.OUT_OF_SCOPE, f"no rule for {verb} and this path")


_RULE: Final = "__action_broker_rule__"
_current: Final[ContextVar[tuple[Allowed, Rule] | None]] = ContextVar("action_broker_allowed", default=None)


def current() -> Allowed:
    """Who was admitted to the call that is going on, and for what.

    Raises: LookupError outside of a guarded call, and in a public one.
    """
    found = _current.get()
    if found is None:
        raise LookupError("no guard admitted this call: install GuardInterceptor or GuardMiddleware, or it is public")
    return found[0]


@contextmanager
def admitted(allowed: Allowed, rule: Rule) -> Iterator[None]:
    """While the handler runs."""
    _current.set((allowed, rule))
    try:
        yield
    finally:
        _current.set(None)  # not reset(): a stream may be closed in another context than it was opened in


def rule_of(handler: object) -> Rule | None:
    """The rule that `@action` gave a handler, or `@tool_action` a tool."""
    found = getattr(handler, _RULE, None)
    return found if isinstance(found, Rule) else None


def give_rule(handler: object, rule: Rule) -> None:
    """What `rule_of` finds."""
    setattr(handler, _RULE, rule)


def action(
    name: str,
    *,
    resource: Callable[[Any], str],
    parameters: Callable[[Any], Mapping[str, Any]] = _nothing,
    method: str | HttpMethod | None = None,
    **more: Any,
) -> Callable[[_F], _F]:
    """Declares at a handler what its requests mean; arguments as in `Rule`.

    A gRPC servicer method needs no `method`. For HTTP the handler also goes into the table:
    `GuardMiddleware(app, guard, Table([refund]), ...)`. The handler itself refuses whatever did not come through a
    guard by this very rule, so forgetting to install the guard lets nobody in.

    Raises: TypeError for a handler that is not async.
    """
    rule = Rule(method=method, action=name, resource=resource, parameters=parameters, **more)

    def decorate(handler: _F) -> _F:
        guarded = _guarded_stream(handler, rule) if inspect.isasyncgenfunction(handler) else _guarded(handler, rule)
        give_rule(guarded, rule)
        return guarded

    return decorate


def _require(rule: Rule) -> None:
    found = _current.get()
    if found is None or found[1] is not rule:
        raise Refused(Reason.OUT_OF_SCOPE, f"{rule.action}: no guard admitted this call, so the handler does not run")


def _guarded(handler: _F, rule: Rule) -> _F:
    if not inspect.iscoroutinefunction(handler):
        raise TypeError("a guarded handler is async")

    @functools.wraps(handler)
    async def call(*args: Any, **kwargs: Any) -> Any:
        _require(rule)
        return await handler(*args, **kwargs)

    return call  # type: ignore[return-value] # the same signature, as wraps() says


def _guarded_stream(handler: _F, rule: Rule) -> _F:
    @functools.wraps(handler)
    async def stream(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        _require(rule)
        async for item in handler(*args, **kwargs):
            yield item

    return stream  # type: ignore[return-value] # likewise
