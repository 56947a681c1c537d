"""POST /ssf/events: security events, pushed as RFC 8935 says; SSF 1.0 section 6.1.1 names this `urn:ietf:rfc:8935`.

What is taken is answered 202 and nothing else, and so is what was taken before: transmitters send again what they had
no answer to. What is not taken is answered 400 with a code of RFC 8935 section 2.4, whose description is the same for
everybody; the correlation id leads to more.
"""

import math
from collections.abc import Callable, Mapping
from datetime import datetime
from types import MappingProxyType
from typing import Final
from urllib.parse import urlsplit

import structlog
from aiohttp import web

from broker.edges.http_answers import CORRELATION, json_answer, problem
from broker.edges.http_body import Unreadable, read_body
from broker.edges.metrics import Metrics
from broker.errors import BrokerError, Reason, Unavailable
from broker.exchange import Exchange
from broker.identity.event_refused import Err, EventRefused
from broker.identity.others_jws import MAX_TOKEN
from broker.session_events import EventReceiver
from broker.status import STATUS

PATH: Final = "/ssf/events"
CONTENT_TYPE: Final = "application/secevent+jwt"
BODY_TIMEOUT_S: Final = 5.0

_DESCRIPTIONS: Final[Mapping[Err, str]] = MappingProxyType(
    {
        Err.INVALID_REQUEST: "not a security event token that is read here, too old, or of the future",
        Err.INVALID_KEY: "no key of the issuer fits the kid and alg of the token",
        Err.INVALID_ISSUER: "the issuer is not a configured transmitter",
        Err.INVALID_AUDIENCE: "the token is for somebody else",
        Err.AUTHENTICATION_FAILED: "the transmitter did not prove who it is",
        Err.ACCESS_DENIED: "the transmitter may not speak of this subject",
        Err.INVALID_STATE: "the verification has a state that was not asked for",
    }
)
_log = structlog.get_logger(__name__)


class EventEndpoint:
    """The one endpoint. Holds no state of its own."""

    def __init__(
        self, receiver: EventReceiver, exchange: Exchange, metrics: Metrics, clock: Callable[[], datetime]
    ) -> None:
        self._receiver, self._exchange, self._metrics, self._clock = receiver, exchange, metrics, clock

    def add_to(self, app: web.Application) -> None:
        """Serves it under the issuer's path, as all else. Before the application is started."""
        app.router.add_post(urlsplit(self._exchange.issuer).path + PATH, self.post)

    async def post(self, request: web.Request) -> web.Response:
        """Takes one event."""
        correlation = request[CORRELATION]
        try:
            with self._metrics.observe("TakeEvent", "taken"):
                with self._exchange.counted():  # of a stranger, whatever it says
                    token, authorization = await _read(request)
                await self._receiver.take(token, authorization, self._clock(), correlation)
        except BrokerError as error:
            _log.debug("event_refused", reason=error.reason, detail=error.detail, correlation_id=correlation)
            return _refusal(error, correlation)
        return web.Response(status=202)


async def _read(request: web.Request) -> tuple[str, str | None]:
    """The token, and the value of `Authorization`. Raises: BrokerError."""
    if len(request.headers.getall("Content-Type", [])) != 1 or request.content_type != CONTENT_TYPE:
        raise Unreadable(415, f"the body has to be {CONTENT_TYPE}")
    if "Content-Encoding" in request.headers:
        raise Unreadable(415, "the body must not be compressed")
    shown = request.headers.getall("Authorization", [])
    if len(shown) > 1:
        raise EventRefused(Err.AUTHENTICATION_FAILED, "Authorization was sent more than once")
    body = await read_body(request, MAX_TOKEN, BODY_TIMEOUT_S)
    try:
        return body.decode("ascii"), shown[0] if shown else None
    except UnicodeDecodeError as error:
        raise EventRefused(Err.INVALID_REQUEST, "the body is not a token") from error


def _refusal(error: BrokerError, correlation: str) -> web.Response:
    if isinstance(error, Unreadable):
        response = problem(error.http, correlation)
        if error.leaves_a_rest:
            response.force_close()
        return response
    if isinstance(error, Unavailable) or error.reason is Reason.QUOTA:
        response = problem(STATUS[error.reason].http, correlation)
        if error.retry_after_ms is not None:
            response.headers["Retry-After"] = str(math.ceil(error.retry_after_ms / 1000))
        return response
    err = error.err if isinstance(error, EventRefused) else Err.INVALID_REQUEST
    response = json_answer({"err": err, "description": _DESCRIPTIONS[err]}, status=400)
    response.headers["Content-Language"] = "en"  # RFC 8935 section 2.3: MUST be said
    return response
