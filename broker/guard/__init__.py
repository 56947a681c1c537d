"""What a receiving service puts in front of its handlers: a credential is good for exactly the act at hand, or refused.

    keys = KeyCache(spiffe_fetch("https://broker.acme.test/.well-known/jwks.json", broker_id, workload_api.snapshot))
    guard = Guard(issuer="https://broker.acme.test", audience="spiffe://acme.test/service/orders", keys=keys)

    grpc.aio.server(interceptors=[GuardInterceptor(guard, Table([...]), authorities=["orders.acme.test"])])
    app = GuardMiddleware(app, guard, Table([...]), base_url="https://orders.acme.test")
    guard_application(aiohttp_app, guard, Table([...]), base_url="https://orders.acme.test")

What a request means is declared, by a `Rule` in a table or by `@action(...)` at the handler; a request without a rule
is refused. MCP tools are guarded by broker.guard.mcp, with the extra `mcp`. verify.py lists what is checked and in
which order. Reading order: verify, mapping, keys, http_edge and going_on, the edges.
"""

from broker.guard.aiohttp_middleware import guard_application
from broker.guard.asgi import GuardMiddleware
from broker.guard.feed import ScopeFeed
from broker.guard.fetch import https_fetch, spiffe_fetch
from broker.guard.grpc_interceptor import GuardInterceptor
from broker.guard.http_request import Request
from broker.guard.keys import KeyCache
from broker.guard.mapping import Rule, Table, action, current
from broker.guard.metrics import GuardMetrics
from broker.guard.once import Memory
from broker.guard.protected_resource import ProtectedResource
from broker.guard.verify import Allowed, BrokerCalls, Guard, Presented

__all__ = [
    "Allowed",
    "BrokerCalls",
    "Guard",
    "GuardInterceptor",
    "GuardMetrics",
    "GuardMiddleware",
    "KeyCache",
    "Memory",
    "Presented",
    "ProtectedResource",
    "Request",
    "Rule",
    "ScopeFeed",
    "Table",
    "action",
    "current",
    "guard_application",
    "https_fetch",
    "spiffe_fetch",
]
