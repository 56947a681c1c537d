"""What the broker answered instead of yes, as an exception that says what to do next.

    broker.errors.Refused      RefusedByBroker     the broker looked, and the answer is no; asking again changes nothing
    broker.errors.Invalid      InvalidForBroker    what was sent is malformed
    broker.errors.Unavailable  UnavailableBroker   the broker could not look: later may help
                               Unreachable         no answer from the broker at all

Catch the three of broker.errors. Each of these also has `code` (the reason as it was sent, even one that this version
does not know) and `correlation_id` (finds the answer in the broker's ledger).
"""

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Final, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

from broker.errors import ApprovalRequired, BrokerError, Invalid, Reason, Refused, Unavailable
from broker.status import CORRELATION_ID, DETAILS, DOMAIN, STATUS

UNREACHABLE: Final = Reason.BROKER_UNREACHABLE  # no broker whose identity could be established was reached
RETRY_AFTER: Final = "retry-after-ms"
_FAILED_WRITE: Final = "Internal error from Core"  # grpc.aio's own status when a call ends while a message is written
_DIGITS: Final = re.compile(r"[0-9]{1,9}")

Trailers = Mapping[str, str | bytes]
_M = TypeVar("_M", bound=Message)

_ADVICE: Final[Mapping[Reason, str]] = {
    Reason.MALFORMED: "the broker cannot read the request: docs/api.md says how each field is written",
    Reason.UNAUTHENTICATED: "the broker does not accept who we are: look at our SVID with `action-broker doctor`",
    Reason.KEY_MISMATCH: "the credential is bound to another key: request one with this client",
    Reason.INVALID_PROOF: "the key proof does not fit: is `issuer` the broker's own, and is the clock right?",
    Reason.NONCE_REQUIRED: "the broker takes no nonce of this connection: does something between us share connections?",
    Reason.PROOF_REPLAYED: "the broker saw this key proof before: does something between us repeat requests?",
    Reason.NOT_ATTESTED: "SPIRE does not vouch for this process: does a registration entry match it?",
    Reason.EVIDENCE_MISMATCH: "the evidence is about somebody else than the caller",
    Reason.DENIED: "no policy allows it now: an operator can see which condition fails with `action-broker explain`",
    Reason.OUT_OF_SCOPE: "the token is for another action: request one for exactly this act",
    Reason.WRONG_AUDIENCE: "the token is for another audience: only its own may ask about it",
    Reason.EXPIRED: "its time is over: request another right before the act",
    Reason.ALREADY_USED: "it was used before: request one for each act, with a request id of its own",
    Reason.REVOKED: "it was ended; where a new one is refused as well, a denial stands: ask an operator",
    Reason.SUPERSEDED: "what it rests on changed while it was made: request another",
    Reason.PARENT_REFUSED: "the credential that it comes from no longer counts",
    Reason.SESSION_RISK: "the session is at high risk, unknown, or another's: have it scored, then request another",
    Reason.TICKET_CLOSED: "no open ticket authorises it: look at the ticket's state, and name it with the request",
    Reason.PROVENANCE_MISSING: "policy wants provenance of the artifact: send its envelope (--provenance)",
    Reason.PROVENANCE_REJECTED: "the provenance is not about this artifact, too old, or not of a builder trusted here",
    Reason.APPROVAL_REQUIRED: "policy wants approvals: ask with a request id, have it approved, ask with it again",
    Reason.SIGNER_UNAVAILABLE: "the broker's signing key or CA is out of reach, nothing was signed: try again later",
    Reason.TIMESTAMP_UNAVAILABLE: "no timestamp could be had, and no signature left the broker: ask for a new grant",
    Reason.UNKNOWN_ACTION: "no policy declares this action: compare its name with `action-broker policy show`",
    Reason.QUOTA: "too many requests of this caller: wait `retry_after_ms`",
    Reason.ATTESTATION_UNAVAILABLE: "the broker cannot look at the caller now: try again later",
    Reason.LEDGER_UNAVAILABLE: "the broker cannot record now, so it mints nothing: try again later",
    Reason.SCOPE_STALE: "the broker does not know whether this still holds: try again later",
    Reason.SUSPENDED: "something that it rests on changed, and it is being decided again: ask again in a moment",
    Reason.BROKER_UNREACHABLE: "no broker was reached: is it running? `action-broker doctor` looks at each part",
    Reason.IDENTITY_UNAVAILABLE: "the broker has no valid identity of its own now: try again later",
}

# What a status says when the reason is one that this version does not know.
_NEAREST: Final[Mapping[grpc.StatusCode, Reason]] = {
    grpc.StatusCode.INVALID_ARGUMENT: Reason.MALFORMED,
    grpc.StatusCode.UNAUTHENTICATED: Reason.UNAUTHENTICATED,
    grpc.StatusCode.NOT_FOUND: Reason.UNKNOWN_ACTION,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Reason.QUOTA,
    grpc.StatusCode.UNAVAILABLE: Reason.ATTESTATION_UNAVAILABLE,
}


class _Answered(BrokerError):
    """code: the reason as sent; "" where nobody answered. correlation_id: None where nobody answered."""

    code: str = ""
    correlation_id: str | None = None


class RefusedByBroker(_Answered, Refused):
    """The broker looked, and the answer is no."""


class NeedsApproval(RefusedByBroker, ApprovalRequired):
    """The broker looked, and only approvals are lacking: `request_digest` names what to approve, `text` tells it."""


class InvalidForBroker(_Answered, Invalid):
    """The broker could not read what was sent."""


class UnavailableBroker(_Answered, Unavailable):
    """The broker could not look."""


class Unreachable(UnavailableBroker):
    """No answer from the broker, or none to use. What it may have minted is bound to our key, so it is lost to all.

    may_retry: the call may be made again at once (the transport failed; the deadline has not passed).
    """

    def __init__(self, detail: str, *, may_retry: bool = False) -> None:
        super().__init__(UNREACHABLE, detail)
        self.may_retry = may_retry


def refusal(
    code: str,
    correlation_id: str | None,
    *,
    retry_after_ms: int | None = None,
    status: grpc.StatusCode = grpc.StatusCode.PERMISSION_DENIED,
) -> RefusedByBroker | InvalidForBroker | UnavailableBroker:
    """The exception for the reason `code`.

    status: the call's; it decides only where the reason is one that we do not know.
    """
    known = _known(code)
    reason = known or _NEAREST.get(status, Reason.DENIED)
    detail = (
        _ADVICE[known] if known else f"for a reason that this version does not know ({code!r}): look into docs/api.md"
    )
    if correlation_id:
        detail = f"{detail} (correlation id {correlation_id})"
    kind = STATUS[known].grpc if known else status
    error: RefusedByBroker | InvalidForBroker | UnavailableBroker
    if kind is grpc.StatusCode.INVALID_ARGUMENT:
        error = InvalidForBroker(detail, reason)
    elif kind is grpc.StatusCode.UNAVAILABLE:
        error = UnavailableBroker(reason, detail, retry_after_ms=retry_after_ms)
    else:
        error = RefusedByBroker(reason, detail, retry_after_ms=retry_after_ms)
    error.code, error.correlation_id = code, correlation_id
    return error


def _needs_approval(request_digest: str, text: str, correlation_id: str | None) -> NeedsApproval:
    detail = f"it waits for approval: `action-broker approve {request_digest}` (correlation id {correlation_id})"
    error = NeedsApproval(request_digest, text, detail)
    error.code, error.correlation_id = Reason.APPROVAL_REQUIRED, correlation_id
    return error


def from_rpc(error: grpc.aio.AioRpcError, *, where: str, seconds: float, last_error: str | None) -> BrokerError:
    """The exception for a failed call.

    where: the broker's address. seconds: the call's deadline. last_error: what the dialer says of its last connection,
    since gRPC itself knows only that a socket closed.
    """
    status, trailers = error.code(), dict(error.trailing_metadata() or ())
    details, correlation_id = _details(trailers.get(DETAILS)), _text(trailers.get(CORRELATION_ID))
    for info in _all(details, error_details_pb2.ErrorInfo):
        if info.domain == DOMAIN:
            if info.reason == Reason.APPROVAL_REQUIRED and "request_digest" in info.metadata:
                return _needs_approval(info.metadata["request_digest"], info.metadata["text"], correlation_id)
            return refusal(info.reason, correlation_id, retry_after_ms=_wait_ms(details, trailers), status=status)
    failed = _by_status(error, where=where, seconds=seconds, last_error=last_error)
    failed.correlation_id = correlation_id
    return failed


def _by_status(
    error: grpc.aio.AioRpcError, *, where: str, seconds: float, last_error: str | None
) -> InvalidForBroker | Unreachable:
    """What a failed call means that no broker explained."""
    status = error.code()
    if status is grpc.StatusCode.DEADLINE_EXCEEDED:
        return late(where, seconds, last_error)
    if status is grpc.StatusCode.UNAVAILABLE or error.details() == _FAILED_WRITE:
        why = last_error or error.details()
        hint = "Is it running, and is that its address? `action-broker doctor` looks at each part"
        return Unreachable(f"no broker at {where}: {why}. {hint}", may_retry=True)
    if status is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in (error.details() or ""):
        return InvalidForBroker(f"a message is too large: ask for less at once ({error.details()})")
    if status is grpc.StatusCode.UNIMPLEMENTED:
        return Unreachable(f"what answers at {where} is no Action Broker, or an older one: it does not know this call")
    return Unreachable(f"the broker at {where} failed: {status.name} {error.details()}; its log says why")


def late(where: str, seconds: float, last_error: str | None) -> Unreachable:
    """For an answer that did not come in time."""
    because = f": {last_error}" if last_error else "; it is overloaded or stopped, or the deadline is too short"
    return Unreachable(f"no answer from the broker at {where} within {seconds:g} s{because}")


def unintelligible(what: str) -> Unreachable:
    """For an answer that cannot be what we asked for: do not use it."""
    return Unreachable(f"the broker's answer is not usable: {what}; is the broker newer than this client?")


def _known(code: str) -> Reason | None:
    try:
        return Reason(code)
    except ValueError:
        return None


def _text(value: str | bytes | None) -> str | None:
    return value if isinstance(value, str) else None


def _details(packed: str | bytes | None) -> status_pb2.Status:
    try:
        return status_pb2.Status.FromString(packed if isinstance(packed, bytes) else b"")
    except DecodeError:
        return status_pb2.Status()


def _all(details: status_pb2.Status, kind: type[_M]) -> Iterator[_M]:
    for packed in details.details:
        found = kind()
        with contextlib.suppress(DecodeError):
            if packed.Unpack(found):
                yield found


def _wait_ms(details: status_pb2.Status, trailers: Trailers) -> int | None:
    for retry in _all(details, error_details_pb2.RetryInfo):
        return int(retry.retry_delay.ToMilliseconds())
    text = _text(trailers.get(RETRY_AFTER)) or ""
    return int(text) if _DIGITS.fullmatch(text) else None
