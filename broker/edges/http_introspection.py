"""POST /oauth2/introspect (RFC 7662): whether a credential counts now, for its own audience and for its holder.

Whoever else asks, and whatever is wrong with it, hears `{"active": false}` and no more. Suspended is not active *now*.
Where we cannot look, nothing is said of the credential: 503.
"""

from collections.abc import Callable
from datetime import datetime

from aiohttp import web

from broker.credentials.credential import Credential
from broker.edges.http_answers import CORRELATION, json_answer
from broker.edges.http_app import METADATA, Endpoints, add_oauth, client_authentication
from broker.edges.http_clients import Clients
from broker.edges.metrics import Metrics
from broker.edges.oauth_tokens import INACTIVE, introspection_answer, parse_about_token
from broker.errors import BrokerError, Reason, Unavailable
from broker.exchange import Exchange
from broker.recheck import Recheck


class _Inactive(BrokerError):
    """A client asked that is known, and this is the answer."""


class IntrospectionEndpoint:
    """The endpoint. Holds no state of its own."""

    def __init__(self, recheck: Recheck, exchange: Exchange, metrics: Metrics, clock: Callable[[], datetime]) -> None:
        self._recheck, self._exchange, self._metrics, self._clock = recheck, exchange, metrics, clock
        self._url = Endpoints.of(exchange.issuer).introspection
        self._clients = Clients(exchange, clock, self._url)

    def add_to(self, app: web.Application) -> None:
        """Serves it. Before the application is started."""
        add_oauth(app, self._url, self.post)
        app[METADATA].update({"introspection_endpoint": self._url, **client_authentication("introspection")})

    async def post(self, request: web.Request) -> web.Response:
        """Answers one request."""
        correlation = request[CORRELATION]
        try:
            with self._metrics.observe("Introspect", "active"):
                found = await self._answer(request, correlation)
        except _Inactive:
            return self._clients.finish(request, json_answer(INACTIVE))
        except BrokerError as error:
            return self._clients.refuse(request, error, correlation)
        return self._clients.finish(request, json_answer(introspection_answer(found)))

    async def _answer(self, request: web.Request, correlation: str) -> Credential:
        with self._exchange.counted():
            sent = await self._clients.read(request)
            asked = parse_about_token(sent.body)
        now = self._clock()
        caller = await self._clients.identify(sent, asked.assertion, now, correlation)
        try:
            shown = asked.token(str(caller.identity.spiffe_id))
        except BrokerError as error:
            self._exchange.refused(caller.identity, None, error, now, correlation, "introspect")
            raise
        try:
            return await self._recheck.introspect(caller, shown, now, correlation)
        except BrokerError as error:
            if isinstance(error, Unavailable) and error.reason is not Reason.SUSPENDED:
                raise
            raise _Inactive(error.reason, error.detail) from error
