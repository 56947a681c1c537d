"""POST /oauth2/token: reads the request off the wire, finds out who sent it, and answers as OAuth says."""

from collections.abc import Callable
from datetime import datetime

from aiohttp import web

from broker.edges import oauth
from broker.edges.http_answers import CORRELATION, json_answer
from broker.edges.http_clients import Clients
from broker.edges.metrics import Metrics
from broker.errors import BrokerError
from broker.exchange import Exchange, Issued
from broker.presented import Presented


class TokenEndpoint:
    """The endpoint. Holds no state of its own. url: its own, as Clients wants it."""

    def __init__(self, exchange: Exchange, metrics: Metrics, clock: Callable[[], datetime], url: str) -> None:
        self._exchange, self._metrics, self._clock = exchange, metrics, clock
        self._clients = Clients(exchange, clock, url)

    async def post(self, request: web.Request) -> web.Response:
        """Answers one request."""
        correlation = request[CORRELATION]
        try:
            with self._metrics.observe("TokenEndpoint", "issued"):
                issued = await self._answer(request, correlation)
        except BrokerError as error:
            return self._clients.refuse(request, error, correlation)
        return self._clients.finish(request, json_answer(oauth.token_answer(issued)))

    async def _answer(self, request: web.Request, correlation: str) -> Issued:
        with self._exchange.counted():
            sent = await self._clients.read(request)
            asked = oauth.parse_token_request(sent.body)
        now = self._clock()  # after the body has come: who sends slowly gains no time
        caller = await self._clients.identify(sent, asked.assertion, now, correlation, asked.grant_type)
        principal = str(caller.identity.spiffe_id)
        presented = Presented(ticket=asked.fields.get("ticket", ""), session=asked.fields.get("session", ""))
        return await self._exchange.request(caller, lambda: asked.action(principal), now, correlation, presented)
