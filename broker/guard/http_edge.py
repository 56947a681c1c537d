"""What the HTTP edges share: how one request is decided on, and how a refusal is answered."""

import json
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from broker.action import Action, check_uri
from broker.errors import BrokerError
from broker.guard.credential import log_refusal, read_credential
from broker.guard.http_request import Request, clean_path
from broker.guard.mapping import Rule, Table
from broker.guard.verify import Allowed, Guard
from broker.status import CORRELATION_ID, STATUS, www_authenticate

Headers = Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Incoming:
    """One request, as a server hands it on.

    path: decoded. raw_path: as it was sent, where the server tells. headers: names in lower case, values in Latin-1.
    leaf_pem: the peer's certificate on this very TLS connection. read: the whole body; asked only where a rule reads
    it, and then the application must be given it again.
    """

    method: str
    path: str
    raw_path: bytes | None
    query_string: str
    headers: Headers
    leaf_pem: Callable[[], str | None]
    read: Callable[[], Awaitable[bytes]]


class HttpEdge:
    """Decides on HTTP requests. base_url: scheme, host and any prefix under which clients call us."""

    def __init__(self, guard: Guard, table: Table, base_url: str) -> None:
        self.guard: Final = guard
        self._table = table
        self._base: Final = check_uri(base_url, "the guard's base_url").removesuffix("/")

    async def admit(self, incoming: Incoming) -> tuple[Allowed, Rule] | None:
        """Who may do what by this request; None for a public one. Raises: Refused, Unavailable."""
        url = self._base + clean_path(incoming.path, incoming.raw_path)
        rule, params = self._table.http(incoming.method, incoming.path)
        if rule is None:
            return None
        presented = read_credential(
            values(incoming.headers, "authorization"),
            values(incoming.headers, "dpop"),
            leaf_pem=incoming.leaf_pem,
            method=incoming.method,
            urls=(url,),
        )

        async def rebuild() -> Action:
            request = Request(
                method=incoming.method,
                path=incoming.path,
                params=params,
                query_string=incoming.query_string,
                headers=incoming.headers,
                body=await incoming.read() if rule.body else None,
            )
            return rule.rebuild(request, self.guard.audience)

        return await self.guard.admit(presented, rebuild, check=rule.check), rule


def decoded(raw: Iterable[tuple[bytes, bytes]]) -> Headers:
    """Headers as servers hand them on, with names in lower case."""
    return [(name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in raw]


def values(headers: Headers, name: str) -> list[str]:
    """All values of one header. name: in lower case."""
    return [value for key, value in headers if key == name]


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """The answer no: RFC 9457 JSON with the reason and a correlation id, and nothing else (invariant 9)."""

    status: int
    headers: Mapping[str, str]
    body: bytes


def refuse(error: BrokerError, method: str, path: str, headers: Headers) -> Refusal:
    """Writes a refusal to the log. Returns its answer."""
    correlation_id = log_refusal(error, f"{method} {path}")
    status = STATUS[error.reason].http
    body = json.dumps(
        {"type": "about:blank", "status": status, "reason": str(error.reason), "correlation_id": correlation_id}
    ).encode()
    answer = {"content-type": "application/problem+json", "content-length": str(len(body))}
    return Refusal(status=status, headers=answer | refusal_headers(error, correlation_id, headers), body=body)


def refusal_headers(error: BrokerError, correlation_id: str, headers: Headers) -> dict[str, str]:
    """What a refusal says in headers, whatever its body: a challenge where another credential would help."""
    answer = {"cache-control": "no-store", CORRELATION_ID: correlation_id}
    schemes = [value.partition(" ")[0].lower() for value in values(headers, "authorization")]
    scheme = "Bearer" if schemes == ["bearer"] else "DPoP"
    if challenge := www_authenticate(error.reason, scheme, presented=bool(schemes)):
        answer["www-authenticate"] = challenge
    if error.retry_after_ms is not None:
        answer["retry-after"] = str(-(-error.retry_after_ms // 1000))
    return answer


def leaf_of(scope: Mapping[str, Any]) -> str | None:
    """The peer's certificate, PEM, by the ASGI TLS extension; None without one, or where its handshake had an error."""
    tls = (scope.get("extensions") or {}).get("tls") or {}
    if tls.get("client_cert_error"):
        return None
    return next(iter(tls.get("client_cert_chain") or ()), None)
