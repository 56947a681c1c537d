"""AuthZEN 1.0 over HTTP: POST /access/v1/evaluation and /evaluations, GET /.well-known/authzen-configuration.

Who asks is a receiving service, by the X.509-SVID of its connection, or by a JWT-SVID as `Authorization: DPoP …` with
its proof; and it asks about actions at its own audience alone. That it may not ask, or asks in another form, is an HTTP
status with a sentence for a body (section "Error Responses"). Whatever is decided is 200, also where we could not look:
then it is no.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

import structlog
from aiohttp import web

from broker.edges.authzen import (
    MAX_BODY,
    MAX_BODY_OF_MANY,
    MAX_EVALUATIONS,
    BadRequest,
    Item,
    Many,
    Semantic,
    deny,
    parse_many,
    parse_one,
    permit,
)
from broker.edges.grpc_peer import correlation_id
from broker.edges.http_answers import CORRELATION, json_answer
from broker.edges.http_app import document_answer, path_of
from broker.edges.http_body import Unreadable, read_body
from broker.edges.http_clients import BODY_TIMEOUT_S, NONCES, chain_of, single_proof
from broker.edges.metrics import Metrics
from broker.edges.oauth import MAX_ASSERTION
from broker.errors import BrokerError, Reason, Refused, Unavailable
from broker.evaluation import Evaluation
from broker.exchange import Caller, Exchange, KeyProof
from broker.in_time import REQUEST_TIMEOUT_S
from broker.status import STATUS, www_authenticate

REQUEST_ID: Final = "X-Request-ID"
_T = TypeVar("_T")

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoints:
    """What is served where, derived from the issuer, which names the policy decision point as well."""

    evaluation: str
    evaluations: str
    metadata: str

    @classmethod
    def of(cls, issuer: str) -> "Endpoints":
        """Section "Obtaining Policy Decision Point Metadata": the well-known string goes before an issuer's path."""
        parts = urlsplit(issuer)
        return cls(
            evaluation=f"{issuer}/access/v1/evaluation",
            evaluations=f"{issuer}/access/v1/evaluations",
            metadata=f"https://{parts.netloc}/.well-known/authzen-configuration{parts.path}",
        )


class AuthZenEndpoints:
    """The three of them. Hold no state of their own."""

    def __init__(
        self, evaluation: Evaluation, exchange: Exchange, metrics: Metrics, clock: Callable[[], datetime]
    ) -> None:
        self._evaluation, self._exchange, self._metrics, self._clock = evaluation, exchange, metrics, clock
        self._endpoints = Endpoints.of(exchange.issuer)

    def add_to(self, app: web.Application) -> None:
        """Serves them. Before the application is started."""
        ours = self._endpoints
        app.router.add_post(path_of(ours.evaluation), partial(self._post, ours.evaluation, self._one))
        app.router.add_post(path_of(ours.evaluations), partial(self._post, ours.evaluations, self._many))
        app.router.add_get(path_of(ours.metadata), self.metadata)
        paths = {path_of(ours.evaluation), path_of(ours.evaluations)}

        async def echo(request: web.Request, response: web.StreamResponse) -> None:
            found = request.headers.get(REQUEST_ID)
            if request.path in paths and found is not None and _is_plain(found):
                response.headers[REQUEST_ID] = found

        app.on_response_prepare.append(echo)

    async def metadata(self, _: web.Request) -> web.Response:
        """Where what is asked; searches are not offered."""
        ours = self._endpoints
        return document_answer(
            {
                "policy_decision_point": self._exchange.issuer,
                "access_evaluation_endpoint": ours.evaluation,
                "access_evaluations_endpoint": ours.evaluations,
            }
        )

    async def _post(self, url: str, work: "_Work", request: web.Request) -> web.Response:
        correlation, reason = request[CORRELATION], None
        try:
            with self._metrics.observe("Evaluate", "answered"):
                with self._exchange.counted():  # of a stranger, whatever it says
                    proof, assertion = _check_head(request, url)
                asker = await self._identify(request, proof, assertion, correlation)
                response = json_answer(await work(asker, request, correlation))
        except BrokerError as error:
            _log.debug("refused", reason=error.reason, detail=error.detail, correlation_id=correlation)
            reason = error.reason
            response = _refusal(error)
        if "DPoP" in request.headers or reason is Reason.NONCE_REQUIRED:  # RFC 9449 section 8.2
            response.headers["DPoP-Nonce"] = self._exchange.nonces.issue(NONCES, self._clock())
        return response

    async def _identify(self, request: web.Request, proof: KeyProof, assertion: str | None, correlation: str) -> Caller:
        """Who asks, before its body is read. Raises: BrokerError."""
        chain, now = chain_of(request), self._clock()
        with self._exchange.counted():
            if assertion is None and not chain:
                raise Refused(Reason.UNAUTHENTICATED, "neither an X.509-SVID nor a JWT-SVID")
            if assertion is not None and chain:
                raise BadRequest("a certificate and a JWT-SVID at once: send one of them")
        if assertion is None:
            return self._exchange.identify_certificate(chain, proof, now, correlation)
        return await self._exchange.identify_assertion(assertion, proof, now, correlation)

    async def _read(
        self, asker: Caller, request: web.Request, most: int, parse: Callable[[bytes], _T], correlation: str
    ) -> tuple[_T, datetime]:
        """What it asks, and when. Raises: BrokerError, which is recorded."""
        now = self._clock()
        try:
            found = parse(await read_body(request, most, BODY_TIMEOUT_S))
            now = self._clock()  # after the body has come: who sends slowly gains no time
            if asker.identity.expires_at <= now:
                raise Refused(Reason.EXPIRED, "the SVID ended while the body came")
        except BrokerError as error:
            self._exchange.refused(asker.identity, None, error, now, correlation, "evaluate")
            raise
        return found, now

    async def _one(self, asker: Caller, request: web.Request, correlation: str) -> dict[str, Any]:
        item, now = await self._read(asker, request, MAX_BODY, parse_one, correlation)
        return await self._single(asker, item, now, correlation)

    async def _many(self, asker: Caller, request: web.Request, correlation: str) -> dict[str, Any]:
        most = min(MAX_EVALUATIONS, self._exchange.quota.burst)
        parse = partial(parse_many, most=most)
        many, now = await self._read(asker, request, MAX_BODY_OF_MANY, parse, correlation)
        if many.one is not None:
            return await self._single(asker, many.one, now, correlation)
        for item in many.items:
            self._require_own(asker, item, now, correlation)
        self._exchange.admit_more(asker, len(many.items) - 1)
        if many.semantic is Semantic.EXECUTE_ALL:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._decide(asker, item, now, correlation_id())) for item in many.items]
            return {"evaluations": [task.result() for task in tasks]}
        return {"evaluations": await self._until(asker, many)}

    async def _until(self, asker: Caller, many: Many) -> list[dict[str, Any]]:
        """One after the other, as far as its semantic goes; all together take little longer than one may."""
        loop = asyncio.get_running_loop()
        ends, answers = loop.time() + REQUEST_TIMEOUT_S, list[dict[str, Any]]()
        late = Item(None, Unavailable(Reason.ATTESTATION_UNAVAILABLE, "out of time"))
        for item in many.items:
            asked = item if loop.time() < ends else late
            answers.append(await self._decide(asker, asked, self._clock(), correlation_id()))
            if many.semantic.ends_with(decision=answers[-1]["decision"]):
                break
        return answers

    async def _single(self, asker: Caller, item: Item, now: datetime, correlation: str) -> dict[str, Any]:
        self._require_own(asker, item, now, correlation)
        return await self._decide(asker, item, now, correlation)

    def _require_own(self, asker: Caller, item: Item, now: datetime, correlation: str) -> None:
        if item.audience:
            self._evaluation.require_own(asker, item.audience, now, correlation)

    async def _decide(self, asker: Caller, item: Item, now: datetime, correlation: str) -> dict[str, Any]:
        asked = partial(item.question, str(asker.identity.spiffe_id))
        try:
            with self._metrics.observe("Evaluation", "allowed"):
                return permit(await self._evaluation.evaluate(asker, asked, now, correlation))
        except BrokerError as error:
            return deny(error, correlation)


_Work = Callable[[Caller, web.Request, str], Awaitable[dict[str, Any]]]


def _is_plain(text: str) -> bool:
    return text.isascii() and text.isprintable()


def _check_head(request: web.Request, url: str) -> tuple[KeyProof, str | None]:
    """What can be refused before anybody is identified; the proof and the JWT-SVID, if any. Raises: Refused."""
    if urlsplit(request.raw_path).query:  # it would end up in logs
        raise BadRequest("everything belongs into the body, nothing into the URL")
    if not all(_is_plain(text) for text in request.headers.getall(REQUEST_ID, [])):
        raise BadRequest(f"{REQUEST_ID} is not printable ASCII")
    for name in (REQUEST_ID, "Content-Type", "Authorization"):
        if len(request.headers.getall(name, [])) > 1:
            raise BadRequest(f"{name} was sent more than once")
    if request.content_type != "application/json" or (request.charset or "utf-8").lower() != "utf-8":
        raise BadRequest("the body has to be application/json, in UTF-8")
    if "Content-Encoding" in request.headers:
        raise BadRequest("the body must not be compressed")
    assertion = _assertion(request.headers.get("Authorization"))
    proof = KeyProof(proof=single_proof(request), method="POST", url=url, binding=NONCES, token=assertion)
    return proof, assertion


def _assertion(authorization: str | None) -> str | None:
    """A JWT-SVID is a bearer token: it comes beside a proof. Raises: Refused."""
    if authorization is None:
        return None
    scheme, _, assertion = authorization.partition(" ")
    if scheme.lower() != "dpop" or not assertion:  # RFC 9110 section 11.1: schemes are case-insensitive
        raise Refused(Reason.UNAUTHENTICATED, "Authorization is not DPoP with a JWT-SVID")
    if len(assertion) > MAX_ASSERTION:
        raise BadRequest(f"the JWT-SVID is larger than {MAX_ASSERTION} bytes")
    return assertion


def _refusal(error: BrokerError) -> web.Response:
    """Section "Error Responses": a status, and "an error message string"."""
    status = error.http if isinstance(error, Unreadable) else STATUS[error.reason].http
    said = f"{error.reason}: {error.detail}" if isinstance(error, BadRequest | Unreadable) else str(error.reason)
    response = web.Response(text=said, status=status)  # text/plain
    if status == 401:
        response.headers["WWW-Authenticate"] = www_authenticate(error.reason) or 'DPoP algs="ES256"'
    if error.retry_after_ms is not None:
        response.headers["Retry-After"] = str(math.ceil(error.retry_after_ms / 1000))
    if isinstance(error, Unreadable) and error.leaves_a_rest:
        response.force_close()
    return response
