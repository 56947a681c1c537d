"""What clients are told of a guarded HTTP service before they have a credential: RFC 9728."""

import json
from collections.abc import Iterable, Mapping
from typing import Any, Final
from urllib.parse import urlsplit, urlunsplit

from broker.action import check_uri
from broker.errors import BrokerError
from broker.guard.asgi import App, Message, Receive, Scope, Send
from broker.guard.http_edge import decoded, refusal_headers
from broker.guard.verify import Guard
from broker.status import STATUS

WELL_KNOWN: Final = "/.well-known/oauth-protected-resource"
CACHE: Final = "public, max-age=3600"  # it changes with the service's own code only
_REFUSED: Final = "action_broker.refused"


def metadata_url(resource: str) -> str:
    """Where the metadata of `resource` is: RFC 9728 section 3.1, between its host and its path."""
    parts = urlsplit(resource)
    return urlunsplit((parts.scheme, parts.netloc, WELL_KNOWN + parts.path.removesuffix("/"), "", ""))


def metadata(
    guard: Guard, resource: str, *, actions: Iterable[str] = (), certificates: bool = False
) -> dict[str, object]:
    """RFC 9728 section 2. Arguments as for ProtectedResource."""
    found: dict[str, object] = {
        "resource": resource,
        "authorization_servers": [guard.issuer],
        "bearer_methods_supported": ["header"],
        "dpop_signing_alg_values_supported": ["ES256"],
        "dpop_bound_access_tokens_required": not certificates,
        "tls_client_certificate_bound_access_tokens": certificates,
        "authorization_details_types_supported": ["action"],
        "action_broker_audience": guard.audience,  # ours: `locations` of what is asked for
    }
    if scopes := sorted(actions):
        found["scopes_supported"] = scopes
    return found


class ProtectedResource:
    """An ASGI application around a guarded one: publishes its metadata, and names it in each challenge.

    resource: the service's URL as clients call it; of an MCP server that of its endpoint.
    actions: whose tokens it takes, if anybody may know. certificates: whether clients come over mutual TLS, so that
    tokens may be bound to certificates and not only to DPoP keys.

    It also gives the refusals of `guard_tools` their HTTP status and challenge, where the answer has not begun.

    Raises: ValueError for a resource that is no https URL without a query (RFC 9728 section 1.2).
    """

    def __init__(
        self,
        app: App,
        guard: Guard,
        *,
        resource: str,
        actions: Iterable[str] = (),
        certificates: bool = False,
    ) -> None:
        parts = urlsplit(check_uri(resource, "the resource"))
        if parts.scheme != "https" or parts.query:
            raise ValueError("a resource is named by an https URL without a query")
        self._app = app
        self._url: Final = metadata_url(resource)
        self._path: Final = urlsplit(self._url).path
        self._document: Final = json.dumps(
            metadata(guard, resource, actions=actions, certificates=certificates)
        ).encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers for the metadata, and hands everything else on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif scope["path"] == self._path and scope["method"] in {"GET", "HEAD"}:
            await self._tell(scope["method"], send)
        else:
            refused: list[tuple[BrokerError, str]] = []

            async def challenging(message: Message) -> None:
                if message["type"] == "http.response.start":
                    message = self._with_challenge(scope, message, refused)
                await send(message)

            await self._app({**scope, _REFUSED: refused}, receive, challenging)

    async def _tell(self, method: str, send: Send) -> None:
        headers = {
            "content-type": "application/json",
            "content-length": str(len(self._document)),
            "cache-control": CACHE,
        }
        encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": encoded})
        await send({"type": "http.response.body", "body": b"" if method == "HEAD" else self._document})

    def _with_challenge(self, scope: Scope, message: Message, refused: list[tuple[BrokerError, str]]) -> Message:
        status, headers = message["status"], list(message.get("headers", ()))
        if refused and _is_json(headers):  # to a stream of events an MCP client listens with status 200 only
            error, correlation_id = refused[0]
            status = STATUS[error.reason].http
            more = refusal_headers(error, correlation_id, decoded(scope["headers"]))
            headers = [(name, value) for name, value in headers if name.decode("latin-1").lower() not in more]
            headers += [(name.encode(), value.encode()) for name, value in more.items()]
        return {**message, "status": status, "headers": [self._named(name, value) for name, value in headers]}

    def _named(self, name: bytes, value: bytes) -> tuple[bytes, bytes]:
        """RFC 9728 section 5.1."""
        if name.lower() != b"www-authenticate" or b"resource_metadata=" in value:
            return name, value
        return name, value + (b", " if b" " in value else b" ") + f'resource_metadata="{self._url}"'.encode()


def _is_json(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    return any(name.lower() == b"content-type" and value.startswith(b"application/json") for name, value in headers)


def report(scope: Mapping[str, Any], error: BrokerError, correlation_id: str) -> None:
    """Tells the ProtectedResource around a request, if there is one, that the request was refused inside."""
    refused = scope.get(_REFUSED)
    if isinstance(refused, list):
        refused.append((error, correlation_id))
