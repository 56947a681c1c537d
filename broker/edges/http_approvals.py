"""POST /approvals/v1/{show,approve,withdraw}: for people, who have no SVID and come with an ID token instead.

The token stands in the body, so it is in no log of paths or headers, and its nonce is the digest of the request that it
is shown for. A client certificate means nothing here: services approve over gRPC. Answers are JSON; refusals are RFC
9457 problems with our `reason` and `correlation_id`, and their status is that of the one table (status.py).
"""

import math
from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime
from http import HTTPStatus
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

import msgspec
import structlog
from aiohttp import web

from broker.action import parse_json
from broker.approval_records import Shown
from broker.approvals import Approvals
from broker.edges.http_answers import CORRELATION, json_answer
from broker.edges.http_body import Unreadable, read_body
from broker.edges.metrics import Metrics
from broker.errors import BrokerError, Invalid
from broker.exchange import Exchange
from broker.ledger.approvals import ApprovalSeen
from broker.status import STATUS, www_authenticate

PATH: Final = "/approvals/v1"
MAX_BODY: Final = 24 * 1024  # bytes: an ID token of 16 KiB, a reason of 500 characters in escapes
BODY_TIMEOUT_S: Final = 5.0
JSON: Final = "application/json"
PROBLEM: Final = "application/problem+json"

_log = structlog.get_logger(__name__)


class _Show(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    request_digest: str
    id_token: str

    def __repr__(self) -> str:  # the token is secret
        return f"{type(self).__name__}({self.request_digest!r})"


class _Withdraw(_Show, frozen=True, kw_only=True, forbid_unknown_fields=True):
    reason: str = ""


class _Approve(_Withdraw, frozen=True, kw_only=True, forbid_unknown_fields=True):
    valid_for_s: int = 0


_Asked = TypeVar("_Asked", bound=_Show)


class ApprovalEndpoints:
    """The three endpoints. Holds no state of its own."""

    def __init__(
        self, approvals: Approvals, exchange: Exchange, metrics: Metrics, clock: Callable[[], datetime]
    ) -> None:
        self._approvals, self._exchange, self._metrics, self._clock = approvals, exchange, metrics, clock

    def add_to(self, app: web.Application) -> None:
        """Serves them under the issuer's path, as all else. Before the application is started."""
        under = urlsplit(self._exchange.issuer).path + PATH
        app.router.add_post(f"{under}/show", self.show)
        app.router.add_post(f"{under}/approve", self.approve)
        app.router.add_post(f"{under}/withdraw", self.withdraw)

    async def show(self, request: web.Request) -> web.Response:
        """One request, to somebody who may approve it."""

        async def work(asked: _Show, correlation: str) -> Mapping[str, Any]:
            now = self._clock()
            asker = await self._approvals.person(asked.id_token, asked.request_digest, now)
            return _shown(await self._approvals.show(asker, asked.request_digest, now, correlation))

        return await self._answer(request, "PersonShow", "shown", _Show, work)

    async def approve(self, request: web.Request) -> web.Response:
        """Says yes to it."""

        async def work(asked: _Approve, correlation: str) -> Mapping[str, Any]:
            now = self._clock()
            approver = await self._approvals.person(asked.id_token, asked.request_digest, now)
            given = await self._approvals.approve(
                approver, asked.request_digest, asked.reason, asked.valid_for_s, now, correlation
            )
            return {"approval": _approval(given), "correlation_id": correlation}

        return await self._answer(request, "PersonApprove", "approved", _Approve, work)

    async def withdraw(self, request: web.Request) -> web.Response:
        """Takes one's own yes back."""

        async def work(asked: _Withdraw, correlation: str) -> Mapping[str, Any]:
            now = self._clock()
            approver = await self._approvals.person(asked.id_token, asked.request_digest, now)
            await self._approvals.withdraw(approver, asked.request_digest, asked.reason, now, correlation)
            return {"correlation_id": correlation}

        return await self._answer(request, "PersonWithdraw", "withdrawn", _Withdraw, work)

    async def _answer(
        self,
        request: web.Request,
        method: str,
        success: str,
        kind: type[_Asked],
        work: Callable[[_Asked, str], Awaitable[Mapping[str, Any]]],
    ) -> web.Response:
        correlation = request[CORRELATION]
        try:
            with self._metrics.observe(method, success):
                with self._exchange.counted():  # of a stranger, whatever it says
                    asked = await _read(request, kind)
                return json_answer(await work(asked, correlation))
        except BrokerError as error:
            _log.debug("refused", reason=error.reason, detail=error.detail, correlation_id=correlation)
            return _problem(error, correlation)


async def _read(request: web.Request, kind: type[_Asked]) -> _Asked:
    """What was sent. Raises: Invalid."""
    if urlsplit(request.raw_path).query:  # it would end up in logs
        raise Invalid("everything belongs into the body, nothing into the URL")
    if len(request.headers.getall("Content-Type", [])) != 1 or request.content_type != JSON:
        raise Unreadable(415, f"the body has to be {JSON}")
    if (request.charset or "utf-8").lower() != "utf-8" or "Content-Encoding" in request.headers:
        raise Unreadable(415, "the body has to be UTF-8, and not compressed")
    found = parse_json(await read_body(request, MAX_BODY, BODY_TIMEOUT_S), "the body")
    try:
        return msgspec.convert(found, kind)
    except msgspec.ValidationError as error:
        names = ", ".join(field.name for field in msgspec.structs.fields(kind))
        raise Invalid(f"the body is not a JSON object of {names}") from error


def _shown(found: Shown) -> dict[str, Any]:
    """With every field that the two digests are over, so that the reader can compute them again."""
    asked = found.request
    return {
        "request_digest": asked.digest,
        "action": {
            "name": asked.action.name,
            "resource": asked.action.resource,
            "audience": asked.action.audience,
            "parameters": asked.action.parameters,
        },
        "action_digest": asked.action.digest.hex(),
        "principal": asked.principal,
        "request_id": asked.request_id,
        "text": found.text,
        "asked_at": found.asked_at,
        "expires_at": found.expires_at,
        "approvals": [_approval(one) for one in found.approvals],
        "state": found.state,
    }


def _approval(given: ApprovalSeen) -> dict[str, Any]:
    return {
        "by": given.approver,
        "reason": given.reason,
        "approved_at": given.approved_at,
        "expires_at": given.expires_at,
    }


def _problem(error: BrokerError, correlation: str) -> web.Response:
    status = error.http if isinstance(error, Unreadable) else STATUS[error.reason].http
    body = {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "reason": str(error.reason),
        "correlation_id": correlation,
    }
    response = json_answer(body, status=status, kind=PROBLEM)
    if status == 401:  # RFC 9110 section 15.5.2 demands a challenge, and a bearer token is what an ID token is
        response.headers["WWW-Authenticate"] = www_authenticate(error.reason, "Bearer") or "Bearer"
    if error.retry_after_ms is not None:
        response.headers["Retry-After"] = str(math.ceil(error.retry_after_ms / 1000))
    if isinstance(error, Unreadable) and error.leaves_a_rest:
        response.force_close()
    return response
