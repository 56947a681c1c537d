"""POST /hooks/tickets/<system>: a ticket system says that one of its tickets may have changed.

Nothing in a webhook is believed but that: the body only says which ticket to look at again. So a replayed one causes
no more than a look, and a flood of them a few looks a second. One that nobody known signed is refused and counted, and
one about a ticket on which nothing rests is taken and forgotten.
"""

import hashlib
import hmac
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from http import HTTPStatus
from typing import Final, Literal
from urllib.parse import urlsplit

import structlog
from aiohttp import web
from multidict import CIMultiDictProxy

from attestors.json_pointer import Pointer
from attestors.strict_json import parse_object
from broker.edges.http_answers import CORRELATION, json_answer
from broker.edges.http_body import Unreadable, read_body
from broker.edges.metrics import Metrics
from broker.errors import BrokerError, Invalid, Reason, Refused
from broker.exchange import Exchange
from broker.status import STATUS

PATH: Final = "/hooks/tickets"
MAX_BODY: Final = 64 * 1024  # bytes
BODY_TIMEOUT_S: Final = 5.0
PROBLEM: Final = "application/problem+json"
MAX_AGE: Final = timedelta(minutes=5)
"""How far a signed timestamp may be from our clock, either way."""
DELIVERIES: Final = 4096
"""Signed delivery ids that are remembered; a delivery that comes again after that causes a look again."""

_HEX: Final = re.compile(r"(?:sha256=)?([0-9a-fA-F]{64})")
_TIMESTAMP: Final = re.compile(r"[0-9]{1,12}")
_DELIVERY: Final = re.compile(r"[\x21-\x7e]{1,128}")

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """How a webhook shows that it comes from the ticket system.

    secrets: those of now; never empty. scheme: hmac is HMAC-SHA256, in hexadecimal digits; bearer the secret itself.
    header: where that stands. delivery_header, timestamp_header: "" for none. What they say counts because it is
    signed: the HMAC is over the delivery's id, the seconds since 1970 and the body, those that there are, with a `.`
    between them. An id or a time that is not signed would prove nothing, and is not asked for.
    """

    secrets: Callable[[], Sequence[bytes]] = field(repr=False)
    scheme: Literal["hmac", "bearer"] = "hmac"
    header: str = "X-Hub-Signature-256"
    delivery_header: str = ""
    timestamp_header: str = ""

    def check(self, headers: CIMultiDictProxy[str], body: bytes, now: datetime) -> str:
        """The delivery's id, "" where none is signed. Raises: Refused(UNAUTHENTICATED)."""
        shown = _only(headers, self.header)
        if self.scheme == "bearer":
            kind, _, token = shown.partition(" ")  # RFC 6750 section 2.1, where it is Authorization
            sent = _sha256((token if kind.lower() == "bearer" else shown).encode(errors="surrogateescape"))
            self._require(hmac.compare_digest(sent, _sha256(one)) for one in self.secrets())
            return ""
        found = _HEX.fullmatch(shown)
        delivery = _only(headers, self.delivery_header, _DELIVERY) if self.delivery_header else ""
        timestamp = _only(headers, self.timestamp_header, _TIMESTAMP) if self.timestamp_header else ""
        signed = b".".join([*(part.encode() for part in (delivery, timestamp) if part), body])
        code = bytes.fromhex(found[1]) if found else b""
        self._require(hmac.compare_digest(code, hmac.digest(one, signed, "sha256")) for one in self.secrets())
        if timestamp and abs(now.timestamp() - int(timestamp)) > MAX_AGE.total_seconds():
            raise Refused(Reason.UNAUTHENTICATED, "a webhook from another time: it is replayed, or a clock is wrong")
        return delivery

    def _require(self, matches: Iterable[bool]) -> None:
        """One of them has to; all are looked at."""
        if not any([*matches]):
            raise Refused(Reason.UNAUTHENTICATED, "a webhook that nobody known has signed")


def _only(headers: CIMultiDictProxy[str], name: str, form: re.Pattern[str] | None = None) -> str:
    """The value of a header that is there once, and looks like that. Raises: Refused."""
    found = headers.getall(name, [])
    if len(found) != 1 or (form is not None and not form.fullmatch(found[0])):
        raise Refused(Reason.UNAUTHENTICATED, f"a webhook without one {name}, or with one that cannot be")
    return found[0]


def _sha256(secret: bytes) -> bytes:
    return hashlib.sha256(secret).digest()


@dataclass(frozen=True, slots=True, kw_only=True)
class TicketHook:
    """The webhooks of one ticket system. id: where the ticket's id stands in their bodies.

    tell: takes an id; whether anybody cares about that ticket.
    """

    system: str
    proof: Proof
    id: Pointer
    tell: Callable[[str], bool]


class TicketHooks:
    """The endpoints, one for each system that has webhooks."""

    def __init__(
        self, hooks: Iterable[TicketHook], exchange: Exchange, metrics: Metrics, clock: Callable[[], datetime]
    ) -> None:
        self._hooks: Mapping[str, TicketHook] = {hook.system: hook for hook in hooks}
        self._exchange, self._metrics, self._clock = exchange, metrics, clock
        self._delivered: OrderedDict[tuple[str, str], None] = OrderedDict()

    def add_to(self, app: web.Application) -> None:
        """Serves them under the issuer's path, as all else. Before the application is started."""
        under = urlsplit(self._exchange.issuer).path + PATH
        for hook in self._hooks.values():
            app.router.add_post(f"{under}/{hook.system}", partial(self.post, hook))

    async def post(self, hook: TicketHook, request: web.Request) -> web.Response:
        """Takes one. 202 says no more than that it was taken: not whether there is such a ticket."""
        correlation = request[CORRELATION]
        try:
            with self._metrics.observe("TellTicket", "told"), self._exchange.counted():
                if "Content-Encoding" in request.headers:
                    raise Unreadable(415, "the body must not be compressed")
                body = await read_body(request, MAX_BODY, BODY_TIMEOUT_S)
                delivery = hook.proof.check(request.headers, body, self._clock())
                ticket_id = _ticket_id(hook.id, body)
                watched = not self._is_repeated(hook.system, delivery) and hook.tell(ticket_id)
        except BrokerError as error:
            _log.debug("refused", reason=error.reason, detail=error.detail, correlation_id=correlation)
            return _problem(error, correlation, hook.proof.scheme)
        _log.debug("ticket_told", system=hook.system, watched=watched, correlation_id=correlation)
        return json_answer({"correlation_id": correlation}, status=202)

    def _is_repeated(self, system: str, delivery: str) -> bool:
        if not delivery:
            return False
        if (system, delivery) in self._delivered:
            return True
        self._delivered[system, delivery] = None
        if len(self._delivered) > DELIVERIES:
            self._delivered.popitem(last=False)
        return False


def _ticket_id(pointer: Pointer, body: bytes) -> str:
    """A string, or a whole number. Raises: Invalid."""
    try:
        found = pointer.find(parse_object(body, "the webhook"))
    except (ValueError, LookupError) as error:
        raise Invalid("the webhook names no ticket where its id should stand") from error
    if not isinstance(found, int | str) or isinstance(found, bool):
        raise Invalid("the webhook names no ticket where its id should stand")
    return str(found)


def _problem(error: BrokerError, correlation: str, scheme: str) -> web.Response:
    """RFC 9457."""
    status = error.http if isinstance(error, Unreadable) else STATUS[error.reason].http
    body = {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "reason": str(error.reason),
        "correlation_id": correlation,
    }
    response = json_answer(body, status=status, kind=PROBLEM)
    if status == 401:  # RFC 9110 section 15.5.2 demands a challenge
        response.headers["WWW-Authenticate"] = "Bearer" if scheme == "bearer" else "HMAC"
    if isinstance(error, Unreadable) and error.leaves_a_rest:
        response.force_close()
    return response
