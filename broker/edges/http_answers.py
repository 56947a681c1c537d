"""How every HTTP answer looks: JSON, a correlation id, nothing of the inside. RFC 9457 where OAuth has no say."""

import asyncio
import traceback
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Final

import msgspec
import structlog
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from broker.edges.grpc_peer import correlation_id
from broker.status import CORRELATION_ID

CORRELATION: Final = web.RequestKey("correlation", str)
OAUTH_PATHS: Final = web.AppKey("oauth_paths", set[str])
"""Where answers are OAuth's: RFC 6749 section 5.2."""

_log = structlog.get_logger(__name__)


def json_answer(body: Mapping[str, Any], *, status: int = 200, kind: str = "application/json") -> web.Response:
    """A JSON object."""
    return web.Response(body=msgspec.json.encode(body), status=status, content_type=kind)


def problem(status: int, correlation: str) -> web.Response:
    """RFC 9457: the status and where to look it up. What went wrong inside is the log's."""
    body = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "correlation_id": correlation}
    return json_answer(body, status=status, kind="application/problem+json")


def oauth_problem(status: int, correlation: str) -> web.Response:
    """The same at OAuth's endpoints, whose clients read `error` (RFC 6749 section 5.2)."""
    error = "invalid_request" if status < 500 else "server_error"
    return json_answer({"error": error, "correlation_id": correlation}, status=status)


def finish(response: web.StreamResponse, correlation: str) -> None:
    """Headers that every answer has. Which server in which version answers is nobody's business."""
    response.headers[CORRELATION_ID] = correlation
    response.headers["Server"] = "action-broker"
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers.setdefault("Cache-Control", "no-store")


async def finish_prepared(request: web.Request, response: web.StreamResponse) -> None:
    """For `on_response_prepare`: also what aiohttp answers before any middleware runs, such as a strange Expect."""
    finish(response, request.get(CORRELATION) or correlation_id())


def answer_everything() -> Middleware:
    """The middleware that gives each request its correlation id, turns what fails into JSON, and logs.

    The log has the route as declared, never the path or query as sent.
    """

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        started = asyncio.get_running_loop().time()
        correlation = request[CORRELATION] = correlation_id()
        failed = oauth_problem if request.path in request.app.get(OAUTH_PATHS, ()) else problem
        try:
            response = await handler(request)
        except web.HTTPException as error:
            response = failed(error.status, correlation)
            if "Allow" in error.headers:
                response.headers["Allow"] = error.headers["Allow"]
        except ConnectionError:  # the client went away: nobody to answer
            raise
        except Exception:  # noqa: BLE001 -- the one broad except of this edge
            # As text, so that no renderer of whatever logging is set up adds local variables: they hold credentials.
            _log.error("request_failed", correlation_id=correlation, traceback=traceback.format_exc())
            response = failed(500, correlation)
        route = request.match_info.route.resource
        _log.debug(  # strangers must not fill the disk; metrics count
            "http_request",
            method=request.method,
            route=None if route is None else route.canonical,
            status=response.status,
            seconds=round(asyncio.get_running_loop().time() - started, 6),
            remote=request.remote,
            correlation_id=correlation,
        )
        return response

    return middleware
