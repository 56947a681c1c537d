"""POST /oauth2/revoke (RFC 7009): a holder gives a credential back.

200 says no more than that the client's own credential counts no more, if this was one: somebody else's, one that has
expired and one that never was are answered alike (section 2.2). What was not the client's is in the ledger.
"""

from collections.abc import Callable
from datetime import datetime

from aiohttp import web

from broker.credentials.credential import OfAnotherType
from broker.edges.http_answers import CORRELATION
from broker.edges.http_app import METADATA, Endpoints, add_oauth, client_authentication
from broker.edges.http_clients import Clients
from broker.edges.metrics import Metrics
from broker.edges.oauth import TokenRequestRefused
from broker.edges.oauth_tokens import parse_about_token
from broker.errors import BrokerError, Refused
from broker.exchange import Exchange
from broker.holder_revocation import GivingBack


class _NotTheirs(BrokerError):
    """A client asked that is known, and nothing was revoked."""


class RevocationEndpoint:
    """The endpoint. Holds no state of its own."""

    def __init__(
        self, giving_back: GivingBack, exchange: Exchange, metrics: Metrics, clock: Callable[[], datetime]
    ) -> None:
        self._giving_back, self._exchange, self._metrics, self._clock = giving_back, exchange, metrics, clock
        self._url = Endpoints.of(exchange.issuer).revocation
        self._clients = Clients(exchange, clock, self._url)

    def add_to(self, app: web.Application) -> None:
        """Serves it. Before the application is started."""
        add_oauth(app, self._url, self.post)
        app[METADATA].update({"revocation_endpoint": self._url, **client_authentication("revocation")})

    async def post(self, request: web.Request) -> web.Response:
        """Answers one request."""
        correlation = request[CORRELATION]
        try:
            with self._metrics.observe("Revoke", "revoked"):
                await self._answer(request, correlation)
        except _NotTheirs:
            pass
        except BrokerError as error:
            return self._clients.refuse(request, error, correlation)
        return self._clients.finish(request, web.Response())

    async def _answer(self, request: web.Request, correlation: str) -> None:
        with self._exchange.counted():
            sent = await self._clients.read(request)
            asked = parse_about_token(sent.body)
        now = self._clock()
        caller = await self._clients.identify(sent, asked.assertion, now, correlation)
        try:
            shown = asked.token(str(caller.identity.spiffe_id))
        except BrokerError as error:
            self._exchange.refused(caller.identity, None, error, now, correlation, "revoke")
            raise
        try:
            await self._giving_back.revoke(caller, shown, now, correlation)
        except OfAnotherType as error:
            said = "a token of a type that is not given here"
            raise TokenRequestRefused("unsupported_token_type", said, detail=error.detail) from error
        except Refused as error:
            raise _NotTheirs(error.reason, error.detail) from error
