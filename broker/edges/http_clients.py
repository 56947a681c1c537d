"""Who sends a form to one of our OAuth endpoints, and how those answer: RFC 6749 sections 2.3, 3.2 and 5.2.

A client authenticates by the X.509-SVID of its connection, or by a JWT-SVID in the form beside a DPoP proof; never by
both, or else which of the two identities is the client's?
"""

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final
from urllib.parse import urlsplit

import structlog
from aiohttp import web

from broker.edges import oauth
from broker.edges.http_answers import json_answer
from broker.edges.oauth import FORM, MAX_BODY, GrantType, TokenRequestRefused
from broker.errors import BrokerError, Reason, Refused
from broker.exchange import Caller, Exchange, KeyProof
from broker.identity.tls_context import peer_chain

BODY_TIMEOUT_S: Final = 5.0  # for 64 KiB at most; who is slower is not slow but holding on
NONCES: Final = "http"  # what our nonces are bound to: requests of one client may come over several connections

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """A request as it came, from whomever. chain: the certificates of its connection, in DER, leaf first."""

    body: bytes = field(repr=False)
    proof: KeyProof
    chain: tuple[bytes, ...] = field(repr=False)


class Clients:
    """What the endpoints have in common. One for each of them. Holds no state of its own.

    url: what a DPoP proof has to name in `htu`. It is made of the configured issuer, never of the Host header, so that
    who can choose a host name cannot choose what a proof is for.
    """

    def __init__(self, exchange: Exchange, clock: Callable[[], datetime], url: str) -> None:
        self._exchange, self._clock, self._url = exchange, clock, url

    async def read(self, request: web.Request) -> Sent:
        """What was sent. Raises: Refused, of a stranger: count it."""
        _check_head(request)
        proof = KeyProof(proof=single_proof(request), method="POST", url=self._url, binding=NONCES)
        return Sent(body=await _read_body(request), proof=proof, chain=chain_of(request))

    async def identify(
        self,
        sent: Sent,
        assertion: str | None,
        now: datetime,
        correlation: str,
        grant_type: GrantType = GrantType.CLIENT_CREDENTIALS,
    ) -> Caller:
        """The client, by the JWT-SVID that the form holds, or else by its certificate. Raises: BrokerError."""
        with self._exchange.counted():
            _require_one_way(sent, assertion)
        try:
            if assertion is None:
                return self._exchange.identify_certificate(sent.chain, sent.proof, now, correlation)
            return await self._exchange.identify_assertion(assertion, sent.proof, now, correlation)
        except BrokerError as error:
            raise oauth.while_authenticating(error, grant_type) from error

    def refuse(self, request: web.Request, error: BrokerError, correlation: str) -> web.Response:
        """The answer to a request that was refused."""
        _log.debug("refused", reason=error.reason, detail=error.detail, correlation_id=correlation)
        http, body = oauth.error_answer(error, correlation)
        response = json_answer(body, status=http)
        if http == 401:
            response.headers["WWW-Authenticate"] = _challenge(request, self._exchange.issuer)
        if error.retry_after_ms is not None:
            response.headers["Retry-After"] = str(math.ceil(error.retry_after_ms / 1000))
        if http in {408, 413}:  # the rest of the body is still to come, and nobody will read it
            response.force_close()
        return self.finish(request, response, nonce=error.reason is Reason.NONCE_REQUIRED)

    def finish(self, request: web.Request, response: web.Response, *, nonce: bool = False) -> web.Response:
        """Headers that every answer has. nonce: whether the client wants one although it sent no proof."""
        response.headers["Cache-Control"] = "no-store"
        if "DPoP" in request.headers or nonce:  # RFC 9449 section 8.2
            response.headers["DPoP-Nonce"] = self._exchange.nonces.issue(NONCES, self._clock())
        return response


def chain_of(request: web.Request) -> tuple[bytes, ...]:
    """The client's certificates in DER, leaf first, as the handshake gave them; empty where it showed none."""
    connection = None if request.transport is None else request.transport.get_extra_info("ssl_object")
    return () if connection is None else peer_chain(connection)


def single_proof(request: web.Request) -> str | None:
    """RFC 9449 section 4.3, point 1: not more than one DPoP header. Raises: Refused."""
    proofs = request.headers.getall("DPoP", [])
    if len(proofs) > 1:
        raise Refused(Reason.INVALID_PROOF, "the header DPoP was sent more than once")
    return proofs[0] if proofs else None


def _require_one_way(sent: Sent, assertion: str | None) -> None:
    """Raises: TokenRequestRefused unless there is exactly one way in which the client authenticates."""
    if assertion is None and not sent.chain:
        raise oauth.not_a_client("no client authentication: connect with an X.509-SVID, or send a JWT-SVID")
    if assertion is not None and sent.chain:
        # RFC 6749 section 2.3: one method in each request. Else which of the two identities is the caller's?
        raise TokenRequestRefused("invalid_request", "a certificate and a JWT-SVID at once: send one of them")


def _check_head(request: web.Request) -> None:
    """What can be refused before the body is read. Raises: TokenRequestRefused."""
    if "Authorization" in request.headers:
        raise oauth.not_a_client("no HTTP authentication here: connect with an X.509-SVID, or send a JWT-SVID")
    if urlsplit(request.raw_path).query:  # RFC 6749 section 3.2: a query ends up in logs
        raise TokenRequestRefused("invalid_request", "parameters belong into the body, not into the URL")
    if len(request.headers.getall("Content-Type", [])) != 1 or request.content_type != FORM:
        raise TokenRequestRefused("invalid_request", f"the body has to be {FORM}", http=415)
    if (request.charset or "utf-8").lower() != "utf-8" or "Content-Encoding" in request.headers:
        raise TokenRequestRefused("invalid_request", "the body has to be UTF-8, and not compressed", http=415)


async def _read_body(request: web.Request) -> bytes:
    """The body, if it is small enough and comes in time. Raises: TokenRequestRefused."""
    too_large = TokenRequestRefused("invalid_request", f"the body is larger than {MAX_BODY} bytes", http=413)
    if (request.content_length or 0) > MAX_BODY:
        raise too_large
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            return await request.read()  # the application's client_max_size bounds what has no Content-Length
    except web.HTTPRequestEntityTooLarge as error:
        raise too_large from error
    except TimeoutError as error:
        raise TokenRequestRefused("invalid_request", "the body did not come in time", http=408) from error
    except web.RequestPayloadError as error:
        raise TokenRequestRefused("invalid_request", "the body is not what its headers say") from error


def _challenge(request: web.Request, issuer: str) -> str:
    """WWW-Authenticate of a 401, which RFC 9110 section 15.5.2 demands.

    RFC 6749 section 5.2 wants the scheme that the client tried; else we name the one thing that helps, a key proof.
    """
    tried = request.headers.get("Authorization", "").partition(" ")[0].lower()
    known = {"basic": "Basic", "bearer": "Bearer"}
    return f'{known[tried]} realm="{issuer}"' if tried in known else 'DPoP algs="ES256"'
