"""The HTTP edge: where what is served, and the documents that need no caller."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Protocol, Self
from urllib.parse import urlsplit

from aiohttp import web
from aiohttp.typedefs import Handler

from broker.action import check_uri
from broker.edges.http_answers import OAUTH_PATHS, answer_everything, finish_prepared, json_answer
from broker.edges.http_clients import chain_of
from broker.edges.http_token import TokenEndpoint
from broker.edges.metrics import CONTENT_TYPE, Metrics
from broker.edges.oauth import MAX_BODY, GrantType
from broker.errors import BrokerError, Invalid
from broker.exchange import Exchange
from broker.identity.jwt_svid import ALGORITHMS

# A guard keeps keys for 300 s (guard/keys.py). `private`, so that no cache on the way adds its own 300 s to that.
KEYS_CACHE: Final = "private, max-age=300"
METADATA_CACHE: Final = "public, max-age=3600"
METADATA: Final = web.AppKey("metadata", dict[str, object])
"""RFC 8414: what is served, to which other endpoints add themselves before the application is started."""

Clock = Callable[[], datetime]


class Readiness(Protocol):
    """Whether the broker can mint."""

    def problems(self, now: datetime) -> Sequence[str]:
        """What keeps it from minting, in sentences for operators; nothing when it is ready. Quick, and no secrets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoints:
    """What is served where, all derived from the issuer. Made by `of`."""

    issuer: str
    token: str
    introspection: str
    revocation: str
    keys: str
    metadata: str

    @classmethod
    def of(cls, issuer: str) -> Self:
        """RFC 8414 section 3.1: the well-known string goes between the host and the path of an issuer that has one.

        Raises: Invalid when it is no issuer (section 2: https, no query; and no fragment or slash at its end).
        """
        check_uri(issuer, "issuer")
        parts = urlsplit(issuer)
        if parts.scheme != "https" or parts.query or issuer.endswith("/"):
            raise Invalid("issuer is not an https URL without query and without a slash at its end")
        origin = f"https://{parts.netloc}"
        return cls(
            issuer=issuer,
            token=f"{issuer}/oauth2/token",
            introspection=f"{issuer}/oauth2/introspect",
            revocation=f"{issuer}/oauth2/revoke",
            keys=f"{issuer}/.well-known/jwks.json",
            metadata=f"{origin}/.well-known/oauth-authorization-server{parts.path}",
        )


def path_of(url: str) -> str:
    """Its path, as a route."""
    return urlsplit(url).path


def client_authentication(endpoint: str) -> dict[str, list[str]]:
    """RFC 8414 section 2: how clients authenticate at the endpoint of this name ("token", …)."""
    return {
        # draft-ietf-oauth-spiffe-client-auth -02 registers no names for its two methods; these are what others use for
        # them. The first is RFC 8705's, for clients that know no more: to them an X.509-SVID is a client certificate.
        f"{endpoint}_endpoint_auth_methods_supported": ["tls_client_auth", "spiffe_x509", "spiffe_jwt"],
        f"{endpoint}_endpoint_auth_signing_alg_values_supported": sorted(ALGORITHMS),
    }


def server_metadata(endpoints: Endpoints) -> dict[str, object]:
    """RFC 8414 section 2, with RFC 8705 section 3.3, RFC 9396 section 10 and RFC 9449 section 5.1."""
    return {
        "issuer": endpoints.issuer,
        "token_endpoint": endpoints.token,
        "jwks_uri": endpoints.keys,
        "grant_types_supported": [str(kind) for kind in GrantType],
        # Required, and never an empty list (RFC 8414 section 3.2). There is no authorization endpoint to use it at.
        "response_types_supported": ["none"],
        **client_authentication("token"),
        "tls_client_certificate_bound_access_tokens": True,
        "dpop_signing_alg_values_supported": ["ES256"],
        "authorization_details_types_supported": ["action"],
    }


def build_app(
    exchange: Exchange, metrics: Metrics, readiness: Readiness, clock: Clock, *, operations: bool = True
) -> web.Application:
    """What callers and guards see, for the TLS listener.

    operations: whether health, readiness and metrics are here too; not where they have a listener of their own. Here
    strangers learn whether we are alive and ready, and a holder of an X.509-SVID of our own trust domain the rest.

    Raises: Invalid when the exchange's issuer is none.
    """
    endpoints = Endpoints.of(exchange.issuer)
    app = _application()
    app[METADATA] = server_metadata(endpoints)
    app[OAUTH_PATHS] = set()

    async def metadata(_: web.Request) -> web.Response:
        found = app[METADATA]
        return document_answer(found)

    async def keys(request: web.Request) -> web.StreamResponse:
        return _key_set(request, exchange.keyring.key_set())

    add_oauth(app, endpoints.token, TokenEndpoint(exchange, metrics, clock, endpoints.token).post)
    app.router.add_get(path_of(endpoints.metadata), metadata)
    app.router.add_get(path_of(endpoints.keys), keys)
    if operations:

        def is_ours(request: web.Request) -> bool:
            own, chain = exchange.snapshot().own, chain_of(request)
            if own is None or not chain:
                return False
            try:
                return exchange.holder_of(chain, clock()).spiffe_id.trust_domain == own.spiffe_id.trust_domain
            except BrokerError:
                return False

        _add_operations(app, metrics, readiness, clock, is_ours)
    return app


def add_oauth(app: web.Application, url: str, handler: Handler) -> None:
    """Serves one of OAuth's endpoints. Before the application is started."""
    app.router.add_post(path_of(url), handler)
    app[OAUTH_PATHS].add(path_of(url))


def document_answer(document: Mapping[str, object]) -> web.Response:
    """A document of metadata, which changes with the configuration alone."""
    answer = json_answer(document)
    answer.headers["Cache-Control"] = METADATA_CACHE
    return answer


def build_operations_app(metrics: Metrics, readiness: Readiness, clock: Clock) -> web.Application:
    """Health, readiness and metrics alone, for a listener without TLS that only the platform reaches."""
    app = _application()
    _add_operations(app, metrics, readiness, clock)
    return app


def _application() -> web.Application:
    app = web.Application(middlewares=[answer_everything()], client_max_size=MAX_BODY)
    app.on_response_prepare.append(finish_prepared)
    return app


def _key_set(request: web.Request, body: bytes) -> web.StreamResponse:
    if not json.loads(body)["keys"]:  # a guard would keep the emptiness
        raise web.HTTPServiceUnavailable
    tag = hashlib.sha256(body).hexdigest()[:32]
    headers = {"Cache-Control": KEYS_CACHE, "ETag": f'"{tag}"'}
    if any(known.value in {tag, "*"} for known in request.if_none_match or ()):
        return web.Response(status=304, headers=headers)
    return web.Response(body=body, content_type="application/jwk-set+json", headers=headers)


def _add_operations(
    app: web.Application,
    metrics: Metrics,
    readiness: Readiness,
    clock: Clock,
    is_ours: Callable[[web.Request], bool] = lambda _: True,
) -> None:
    def look() -> list[str]:
        problems = list(readiness.problems(clock()))
        metrics.ready.set(0 if problems else 1)
        return problems

    async def healthz(_: web.Request) -> web.Response:
        return json_answer({"alive": True})

    async def readyz(request: web.Request) -> web.Response:
        problems = look()
        told = {"problems": problems} if is_ours(request) else {}
        return json_answer({"ready": not problems, **told}, status=503 if problems else 200)

    async def scrape(request: web.Request) -> web.Response:
        if not is_ours(request):
            raise web.HTTPForbidden
        look()
        return web.Response(body=metrics.render(), headers={"Content-Type": CONTENT_TYPE})

    app.router.add_get("/healthz", healthz)
    app.router.add_get("/readyz", readyz)
    app.router.add_get("/metrics", scrape)
