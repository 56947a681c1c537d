"""How a call of ours ends over gRPC: an answer, a refusal with its reason, or a number to look it up by."""

from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Final, NoReturn, TypeVar

import grpc
import structlog

from broker.edges.grpc_peer import Context, Identifier, correlation_id
from broker.edges.metrics import Metrics
from broker.errors import ApprovalRequired, BrokerError
from broker.status import CORRELATION_ID, STATUS, error_info_trailers

MAX_TOLD: Final = 2048  # characters: trailers have to fit into what clients take; `Approvals.Wait` tells the rest

Clock = Callable[[], datetime]
_T = TypeVar("_T")
_log = structlog.get_logger(__name__)


class Answers:
    """What both services end their calls with."""

    def __init__(self, identifier: Identifier, metrics: Metrics, clock: Clock) -> None:
        self._identifier, self._metrics, self._clock = identifier, metrics, clock

    async def answer(
        self, context: Context, method: str, success: str, work: Callable[[datetime, str], Awaitable[_T]]
    ) -> _T:
        """Runs `work` with the one `now` and correlation id of this call, and maps how it ends."""
        now, correlation = self._clock(), correlation_id()
        try:
            with self._metrics.observe(method, success):
                answer = await work(now, correlation)
        except BrokerError as error:
            await self.abort(context, error, correlation)
        except Exception:  # noqa: BLE001 -- the one broad except of this edge
            await self.fail(context, method, correlation)
        nonce = self._identifier.nonce_metadata(context, self._clock())
        context.set_trailing_metadata((*nonce, (CORRELATION_ID, correlation)))
        return answer

    async def abort(self, context: Context, error: BrokerError, correlation: str) -> NoReturn:
        """Ends a call with a refusal that is in the ledger, or counted there."""
        _log.debug("refused", reason=error.reason, detail=error.detail, correlation_id=correlation)
        nonce = self._identifier.nonce_metadata(context, self._clock())
        trailers = error_info_trailers(
            error.reason, correlation, retry_after_ms=error.retry_after_ms, told=_told(error)
        )
        context.set_trailing_metadata((*nonce, *trailers))
        await context.abort(STATUS[error.reason].grpc, error.reason.value)

    async def fail(self, context: Context, method: str, correlation: str) -> NoReturn:
        """Ends a call on what nobody foresaw: the log has it, the caller its number."""
        _log.exception("request_failed", method=method, correlation_id=correlation)
        context.set_trailing_metadata(((CORRELATION_ID, correlation),))
        await context.abort(grpc.StatusCode.INTERNAL, "internal error; the log has it under the correlation id")


def _told(error: BrokerError) -> dict[str, str]:
    """What a caller needs to have its request approved; of every other refusal nothing."""
    if not isinstance(error, ApprovalRequired):
        return {}
    return {"request_digest": error.request_digest, "text": error.text[:MAX_TOLD]}
