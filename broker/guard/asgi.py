"""The guard in front of an ASGI application, whatever its framework."""

import json
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from typing import Any, Final

from broker.action import Action, check_uri
from broker.errors import BrokerError, Invalid, Reason, Refused
from broker.guard.credential import log_refusal, read_credential
from broker.guard.http_request import MAX_BODY, Request, clean_path
from broker.guard.mapping import Rule, Table, admitted
from broker.guard.verify import Allowed, Guard, Presented
from broker.status import CORRELATION_ID, STATUS, www_authenticate

_Scope = MutableMapping[str, Any]
_Message = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]
_Headers = Sequence[tuple[str, str]]
_App = Callable[[_Scope, _Receive, _Send], Awaitable[None]]


class GuardMiddleware:
    """Refuses every request that no rule and no credential admits. WebSockets have no rules, so they are refused.

    base_url: scheme, host and any prefix under which clients call us; a DPoP proof's `htu` is that and the path.
    A certificate-bound token needs a server with the ASGI TLS extension: the peer's certificate is never taken from a
    header, which anybody could have written.

    Put it outermost, so that nothing else sees what is refused, and behind nothing that changes the path.
    """

    def __init__(self, app: _App, guard: Guard, table: Table, *, base_url: str) -> None:
        self._app, self._guard, self._table = app, guard, table
        self._base: Final = check_uri(base_url, "the guard's base_url").removesuffix("/")

    async def __call__(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        """Decides on one request."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        else:
            log_refusal(Refused(Reason.OUT_OF_SCOPE, "no rules for WebSockets"), scope["type"])
            await send({"type": "websocket.close", "code": 1008})  # RFC 6455 section 7.4.1: policy violation

    async def _http(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        headers = [(name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in scope["headers"]]
        body = _Body(receive)
        try:
            url = self._base + clean_path(scope["path"], scope.get("raw_path"))
            rule, params = self._table.http(scope["method"], scope["path"])
            allowed = await self._admit(rule, params, scope, headers, url, body) if rule else None
        except BrokerError as error:
            await _refuse(error, scope, headers, send)
            return
        except _Gone:
            return
        if rule is None or allowed is None:  # public
            await self._app(scope, receive, send)
            return
        with admitted(allowed, rule):
            await self._app(scope, body.replay, send)

    async def _admit(
        self, rule: Rule, params: Mapping[str, str], scope: _Scope, headers: _Headers, url: str, body: "_Body"
    ) -> Allowed:
        async def rebuild() -> Action:
            request = Request(
                method=scope["method"],
                path=scope["path"],
                params=params,
                query_string=scope.get("query_string", b"").decode("latin-1"),
                headers=headers,
                body=await body.read() if rule.body else None,
            )
            return rule.rebuild(request, self._guard.audience)

        return await self._guard.admit(self._presented(scope, headers, url), rebuild, check=rule.check)

    def _presented(self, scope: _Scope, headers: _Headers, url: str) -> Presented:
        def leaf_pem() -> str | None:
            tls = (scope.get("extensions") or {}).get("tls") or {}
            if tls.get("client_cert_error"):
                return None
            return next(iter(tls.get("client_cert_chain") or ()), None)

        return read_credential(
            [value for name, value in headers if name == "authorization"],
            [value for name, value in headers if name == "dpop"],
            leaf_pem=leaf_pem,
            method=scope["method"],
            urls=(url,),
        )


class _Gone(Exception):
    """The client went away before it had sent its request."""


class _Body:
    """A request's body, read for the mapping and given to the application again."""

    def __init__(self, receive: _Receive) -> None:
        self._receive = receive
        self._read: bytes | None = None

    async def read(self) -> bytes:
        """All of it. Raises: Invalid where it is too large; _Gone."""
        parts, size, more = [], 0, True
        while more:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise _Gone
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > MAX_BODY:
                raise Invalid(f"a body of more than {MAX_BODY} bytes")
            more = message.get("more_body", False)
        self._read = b"".join(parts)
        return self._read

    async def replay(self) -> _Message:
        """What the application receives: the body first if it was read, then whatever comes."""
        if self._read is None:
            return await self._receive()
        body, self._read = self._read, None
        return {"type": "http.request", "body": body, "more_body": False}


async def _refuse(error: BrokerError, scope: _Scope, headers: _Headers, send: _Send) -> None:
    """RFC 9457 JSON with the reason and a correlation id; a challenge where another credential would help."""
    correlation_id = log_refusal(error, f"{scope['method']} {scope['path']}")
    status = STATUS[error.reason].http
    body = {"type": "about:blank", "status": status, "reason": str(error.reason), "correlation_id": correlation_id}
    answer = {
        "content-type": "application/problem+json",
        "cache-control": "no-store",
        CORRELATION_ID: correlation_id,
    }
    schemes = [value.partition(" ")[0].lower() for name, value in headers if name == "authorization"]
    scheme = "Bearer" if schemes == ["bearer"] else "DPoP"
    if challenge := www_authenticate(error.reason, scheme, presented=bool(schemes)):
        answer["www-authenticate"] = challenge
    if error.retry_after_ms is not None:
        answer["retry-after"] = str(-(-error.retry_after_ms // 1000))
    encoded = json.dumps(body).encode()
    answer["content-length"] = str(len(encoded))
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [(name.encode(), value.encode()) for name, value in answer.items()],
        }
    )
    await send({"type": "http.response.body", "body": encoded})
