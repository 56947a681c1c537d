"""A token for each call of an MCP tool over streamable HTTP (extra `mcp`).

    auth = TokenPerCall()
    async with (
        httpx2.AsyncClient(auth=auth) as http,
        Client(streamable_http_client("https://incidents.acme.test/mcp", http_client=http)) as mcp,
    ):
        token = await broker.request("db.query", "https://db.acme.test/incidents", INCIDENTS)
        with auth.using(token):
            found = await mcp.call_tool("query", {"table": "incidents"})

Over stdio there are no headers: `await mcp.call_tool("query", {...}, meta=token.mcp_meta("query"))`.
"""

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final

import httpx2
import msgspec

from broker.client.token import ActionToken


class _Message(msgspec.Struct):
    method: Any = None


_message: Final = msgspec.json.Decoder(_Message)


class TokenPerCall(httpx2.Auth):
    """Puts the token in use on the HTTP requests that call a tool, with a fresh proof on each, and on no others.

    url: the endpoint as the server knows itself, where that is not the URL that is dialled.

    Which token is in use is a matter of the task: calls that run side by side each have their own.
    """

    requires_request_body = True

    def __init__(self, url: str | None = None) -> None:
        self._url = url
        self._token: Final[ContextVar[ActionToken | None]] = ContextVar("action_broker_token", default=None)

    @contextmanager
    def using(self, token: ActionToken) -> Iterator[None]:
        """While calls are made with `token`; one, where it counts once."""
        before = self._token.set(token)
        try:
            yield
        finally:
            self._token.reset(before)

    def auth_flow(self, request: httpx2.Request) -> Generator[httpx2.Request, httpx2.Response, None]:
        """Called by httpx2 for each request."""
        token = self._token.get()
        if token is not None and _calls_a_tool(request):
            request.headers.update(token.http_headers(request.method, self._url or str(request.url)))
        yield request


def _calls_a_tool(request: httpx2.Request) -> bool:
    try:
        return request.method == "POST" and _message.decode(request.content).method == "tools/call"
    except msgspec.DecodeError:
        return False
