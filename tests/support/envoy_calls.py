"""What clients of a service behind Envoy send, and what they are answered.

TABLE: the rules of the guard.toml that is shipped.
"""

import io
import json
from datetime import UTC, datetime
from typing import Any

import aiohttp
import grpc
from support.envoy import DEPLOY, HOST, Answer, Edge
from support.issuer import AUDIENCE, Issuer, Prover
from support.pki import Svid

from broker.action import Action
from broker.cli.guard_config import load
from broker.status import CORRELATION_ID, DETAILS, reason_of

BASE = f"https://{HOST}"
ISSUER, PROVER = Issuer(), Prover()
TABLE = load(DEPLOY / "guard.toml").table()
REFUND = "/v1/orders/17/refund"
LIST = Action("orders.list", f"{BASE}/v1/orders", AUDIENCE)
SCOPE = 'DPoP error="insufficient_scope", algs="ES256"'
MALFORMED = 'DPoP error="invalid_request", algs="ES256"'

Headers = list[tuple[str, str]]
_COUNT = iter(range(10_000))


def now() -> datetime:
    return datetime.now(UTC)


def refund(order: str = "17", amount: Any = 30) -> Action:
    return Action("orders.refund", f"{BASE}/v1/orders/{order}", AUDIENCE, {"amount": amount})


def read(order: str = "17") -> Action:
    return Action("orders.read", f"{BASE}/v1/orders/{order}", AUDIENCE)


def token(action: Action, **changes: Any) -> str:
    defaults = {"cnf": PROVER.cnf, "jti": f"token-{next(_COUNT)}", "now": now()}
    return ISSUER.token(action, **(defaults | changes))


def dpop(access: str, method: str = "POST", path: str = REFUND, **changes: Any) -> Headers:
    proof = PROVER.proof(access, **({"now": now(), "htm": method, "htu": BASE + path} | changes))
    return [("authorization", f"DPoP {access}"), ("dpop", proof)]


def bearer(access: str) -> Headers:
    return [("authorization", f"Bearer {access}")]


async def call(
    edge: Edge,
    headers: Headers,
    body: Any = None,
    *,
    method: str = "POST",
    path: str = REFUND,
    host: str = HOST,
    kind: str = "application/json",
    svid: Svid | None = None,
) -> Answer:
    """One request by a client that knows the service by its name. body: JSON, or bytes as they are."""
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    sent = [("host", host), *headers, *([("content-type", kind)] if data is not None else [])]
    connector = aiohttp.TCPConnector(ssl=edge.tls(svid))
    async with (
        aiohttp.ClientSession(connector=connector) as session,
        session.request(
            method,
            aiohttp.client.URL(edge.origin + path, encoded=True),
            headers=sent,
            data=None if data is None else io.BytesIO(data),
            allow_redirects=False,
        ) as response,
    ):
        return Answer.of(response.status, response.headers, await response.read())


def on_the_wire(
    headers: Headers, path: str = REFUND, body: bytes = b'{"amount": 30}', method: str = "POST", closes: str = "close"
) -> bytes:
    """A request as it is sent, where a client would mend it."""
    lines = [f"{method} {path} HTTP/1.1", f"host: {HOST}", f"connection: {closes}", f"content-length: {len(body)}"]
    lines += ["content-type: application/json", *(f"{name}: {value}" for name, value in headers)]
    return "\r\n".join([*lines, "", ""]).encode() + body


async def rpc(edge: Edge, method: str, metadata: Headers, svid: Svid | None = None) -> Any:
    """What the call answers, or its status and the reason in its details."""
    async with edge.channel(svid) as channel:
        try:
            return await channel.unary_unary(f"/acme.Orders/{method}")(b"all", metadata=metadata)
        except grpc.aio.AioRpcError as error:
            caught = error
    trailers = dict(caught.trailing_metadata() or ())
    details = trailers.get(DETAILS)
    assert isinstance(details, bytes), caught
    assert trailers[CORRELATION_ID]
    return caught.code(), reason_of(details)
