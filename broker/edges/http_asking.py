"""What holders and receiving services ask about credentials over HTTP: introspection, revocation, AuthZEN."""

from collections.abc import Callable
from datetime import datetime

from aiohttp import web

from broker.edges.http_authzen import AuthZenEndpoints
from broker.edges.http_introspection import IntrospectionEndpoint
from broker.edges.http_revocation import RevocationEndpoint
from broker.edges.metrics import Metrics
from broker.evaluation import Evaluation
from broker.exchange import Exchange
from broker.holder_revocation import GivingBack
from broker.recheck import Recheck
from broker.scope.deciding import Deciding


def add_asking(
    app: web.Application,
    exchange: Exchange,
    recheck: Recheck,
    deciding: Deciding,
    metrics: Metrics,
    clock: Callable[[], datetime],
) -> None:
    """Serves all of it. Before the application, which `build_app` made, is started."""
    IntrospectionEndpoint(recheck, exchange, metrics, clock).add_to(app)
    RevocationEndpoint(GivingBack(exchange, deciding), exchange, metrics, clock).add_to(app)
    AuthZenEndpoints(Evaluation(exchange, recheck), exchange, metrics, clock).add_to(app)
