"""The guard in front of an MCP server's tools (extra `mcp`): each call has a credential of its own, or is refused.

    server = MCPServer("incidents")
    guard_tools(server, guard, url="https://incidents.acme.test/mcp")

    @server.tool()
    @tool_action("db.query", resource=lambda a: f"https://db.acme.test/{a['table']}")
    async def query(table: str) -> list[str]: ...

Over HTTP the credential is in `Authorization` and `DPoP` of the very request that carries the call; elsewhere (stdio)
it is in the call's `_meta` (credentials/mcp_call.py). What is refused is answered by a JSON-RPC error that has the
reason and a correlation id. A call that still runs when its credential dies is cancelled, progress or not.

What a guarded server tells about itself (its tools' names and schemas, too) it tells anybody. Not checked: who may
cancel a call, or read again what an `event_store` keeps; in sessions of 2025 that is whoever knows the session's id.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar

from mcp.server.context import CallNext, HandlerResult, ServerRequestContext
from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.tools import Tool
from mcp.shared.exceptions import MCPError

from broker.action import Action, check_uri
from broker.credentials import mcp_call
from broker.errors import BrokerError, Invalid, Reason, Refused
from broker.guard.credential import log_refusal, read_credential
from broker.guard.going_on import CutOff, while_good
from broker.guard.http_edge import leaf_of
from broker.guard.mapping import Rule, admitted, give_rule, rule_of
from broker.guard.protected_resource import report
from broker.guard.verify import Allowed, Guard, Presented

CODE: Final = -32010  # of our refusals; MCP leaves -32000 to -32019 to implementations
# What tells about the server, and does nothing.
_OPEN: Final = frozenset(
    {
        "initialize",
        "logging/setLevel",
        "ping",
        "prompts/list",
        "resources/list",
        "resources/templates/list",
        "server/discover",
        "tools/list",
    }
)
_F = TypeVar("_F", bound=Callable[..., Any])
_Context = ServerRequestContext[Any, Any]


@dataclass(slots=True)
class _Admitted:
    """One call on its way to its handler. arguments: names of what was mapped."""

    allowed: Allowed
    rule: Rule
    arguments: frozenset[str]
    taken: bool = False


_admitted: Final[ContextVar[_Admitted | None]] = ContextVar("action_broker_mcp_call", default=None)


def tool_action(
    name: str,
    *,
    resource: Callable[[Mapping[str, Any]], str],
    parameters: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda _: {},
    check: bool = False,
) -> Callable[[_F], _F]:
    """Declares at a tool's handler what its calls mean. To be put under `@server.tool()`.

    name: the action. resource, parameters: of the tool's arguments, as the handler gets them: by name, validated, with
    the defaults. check: ask the broker each time whether it would grant this again.

    The handler itself refuses a call that did not come through a guard by this rule, and one whose arguments are not
    those that were approved, whatever changed them on the way: so a default that is another each time cannot be mapped.

    Raises: TypeError for a handler that is not async: another one could not be ended.
    """
    rule = Rule(action=name, resource=resource, parameters=parameters, check=check)

    def decorate(handler: _F) -> _F:
        if not inspect.iscoroutinefunction(handler):
            raise TypeError("a guarded tool is async")

        @functools.wraps(handler)
        async def call(**arguments: Any) -> Any:
            try:
                _take(rule, arguments)
            except BrokerError as error:
                raise _refusal(error, handler.__name__) from error
            return await handler(**arguments)

        give_rule(call, rule)
        return call  # type: ignore[return-value] # the same signature, as wraps() says

    return decorate


def _take(rule: Rule, arguments: Mapping[str, Any]) -> None:
    """Raises: Refused unless this very call was admitted, and not run yet."""
    admission = _admitted.get()
    if admission is None or admission.rule is not rule or admission.taken:
        raise Refused(Reason.OUT_OF_SCOPE, f"{rule.action}: no guard admitted this call, so the tool does not run")
    admission.taken = True
    approved = admission.allowed.action
    mapped = {name: value for name, value in arguments.items() if name in admission.arguments}
    if not approved.covers(rule.rebuild(mapped, approved.audience)):
        raise Refused(Reason.OUT_OF_SCOPE, f"{rule.action}: the arguments changed on their way to the tool")


def guard_tools(server: MCPServer[Any], guard: Guard, *, url: str | None = None, public: Iterable[str] = ()) -> None:
    """Puts the guard in front of `server`: a tool without `@tool_action` is refused, and so is whatever else it does.

    url: the endpoint as clients call it, for streamable HTTP; a DPoP proof's `htu` is that. Without it calls over HTTP
    are refused. A certificate-bound token needs an ASGI server with the TLS extension.
    public: further methods of MCP that anybody may use, such as "resources/read" and "prompts/get". What describes the
    server, such as "tools/list", always is.

    The guard becomes the outermost middleware, so that nothing else sees what is refused, nor a credential in `_meta`.

    Raises: TypeError for a server whose tools the guard cannot look at.
    """
    if not callable(getattr(getattr(server, "_tool_manager", None), "get_tool", None)):
        raise TypeError("this version of the MCP SDK keeps its tools elsewhere")
    if "tools/call" in (methods := frozenset(public)):
        raise ValueError("calls of tools are not public: declare a rule for each tool")
    server.middleware.insert(0, _ToolGuard(server, guard, url, _OPEN | methods))


class _ToolGuard:
    def __init__(self, server: MCPServer[Any], guard: Guard, url: str | None, public: frozenset[str]) -> None:
        self._server, self._guard, self._public = server, guard, public
        self._url: Final = None if url is None else check_uri(url, "the guard's url")

    async def __call__(self, ctx: _Context, call_next: CallNext) -> HandlerResult:
        """Decides on one message. Raises: MCPError for one that is refused, or whose credential dies meanwhile."""
        if ctx.request_id is None or ctx.method in self._public:  # a notification starts nothing
            return await call_next(ctx)
        params = ctx.params or {}
        name = params.get("name")
        what = f"{ctx.method} {name[:128]}" if isinstance(name, str) else ctx.method  # a client's word, for the log
        try:
            if ctx.method != "tools/call":
                raise Refused(Reason.OUT_OF_SCOPE, f"{ctx.method} is not public")
            admission = await self._admit(ctx, name, params)
        except BrokerError as error:
            raise _refusal(error, what, ctx) from error
        with admitted(admission.allowed, admission.rule):
            token = _admitted.set(admission)
            try:
                async with while_good(self._guard, admission.allowed) as going:
                    going.begin()
                    return await call_next(_without_credential(ctx))
            except CutOff as cut:
                raise _refusal(cut.error, f"{what}, cut off", ctx) from cut
            finally:
                _admitted.reset(token)

    async def _admit(self, ctx: _Context, name: object, params: Mapping[str, Any]) -> _Admitted:
        if not isinstance(name, str):
            raise Invalid("a call that names no tool")
        # There is no public way to a tool's function. Looked up at each call, as the server does: none is remembered.
        tool = self._server._tool_manager.get_tool(name)  # noqa: SLF001
        rule = None if tool is None else rule_of(tool.fn)
        if tool is None or rule is None:
            raise Refused(Reason.OUT_OF_SCOPE, "no such tool, or it has no rule: declare what it means")
        mapped: dict[str, Any] = {}

        async def rebuild() -> Action:
            mapped.update(_validated(tool, params.get("arguments")))
            return rule.rebuild(mapped, self._guard.audience)

        allowed = await self._guard.admit(self._presented(ctx, name), rebuild, check=rule.check)
        return _Admitted(allowed, rule, frozenset(mapped))

    def _presented(self, ctx: _Context, tool: str) -> Presented:
        meta = _meta(ctx)
        if ctx.request is None:
            return read_credential(
                _texts(meta, mcp_call.AUTHORIZATION),
                _texts(meta, mcp_call.DPOP),
                leaf_pem=lambda: None,
                method="POST",
                urls=(mcp_call.proof_url(self._guard.audience, tool),),
            )
        if mcp_call.AUTHORIZATION in meta or mcp_call.DPOP in meta:
            raise Invalid("over HTTP a credential is in the headers")
        if self._url is None:
            raise Refused(Reason.OUT_OF_SCOPE, "give guard_tools the url of the endpoint: a call came over HTTP")
        headers = ctx.request.headers
        return read_credential(
            headers.getlist("authorization"),
            headers.getlist("dpop"),
            leaf_pem=functools.partial(leaf_of, ctx.request.scope),
            method="POST",
            urls=(self._url,),
        )


def _validated(tool: Tool, arguments: object) -> dict[str, Any]:
    """The arguments as the handler will get them. Raises: Invalid where they do not fit the tool's schema."""
    if not isinstance(arguments, dict | None):
        raise Invalid("arguments that are no object")
    try:
        return tool.fn_metadata.validate_arguments(arguments or {})
    except Exception as error:  # a ValidationError, or whatever else a validator of the tool's own raises
        raise Invalid("the arguments do not fit the tool's schema") from error


def _meta(ctx: _Context) -> Mapping[str, Any]:
    meta = (ctx.params or {}).get("_meta")
    return meta if isinstance(meta, dict) else {}


def _texts(meta: Mapping[str, Any], key: str) -> list[str]:
    value = meta.get(key)
    if not isinstance(value, str | None):
        raise Invalid(f"{key} is no string")
    return [] if value is None else [value]


def _without_credential(ctx: _Context) -> _Context:
    """The context that the server sees, and may log."""
    secret = {mcp_call.AUTHORIZATION, mcp_call.DPOP}
    meta = {key: value for key, value in _meta(ctx).items() if key not in secret}
    if len(meta) == len(_meta(ctx)):
        return ctx
    left: Any = None if ctx.meta is None else {key: value for key, value in ctx.meta.items() if key not in secret}
    return replace(ctx, params={**(ctx.params or {}), "_meta": meta}, meta=left)


def _refusal(error: BrokerError, what: str, ctx: _Context | None = None) -> MCPError:
    """The answer no (invariant 9): the reason, a correlation id, and when to ask again where that is known."""
    correlation_id = log_refusal(error, what)
    if ctx is not None and ctx.request is not None:
        report(ctx.request.scope, error, correlation_id)
    data: dict[str, Any] = {"reason": str(error.reason), "correlation_id": correlation_id}
    if error.retry_after_ms is not None:
        data["retry_after_ms"] = error.retry_after_ms
    return MCPError(CODE, str(error.reason), data)
