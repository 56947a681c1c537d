"""The one table from reason to status: what a refusal looks like over gRPC, over HTTP and in OAuth.

Everything that answers (edges, guard) and everything that reads answers (client) uses this table, so a reason means
the same on every wire. The caller gets the reason and a correlation id and nothing else (invariant 9), but for what it
needs to have its own request approved: `detail` of an error never enters a function of this file.

Sources: WIRE.md "Refusals"; RFC 6749 section 5.2 and RFC 8693 section 2.2.2 (token endpoint), RFC 6750 section 3.1
(protected resource), RFC 9396 section 5, RFC 9449 sections 5, 7.1 and 8.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import grpc
from google.protobuf import any_pb2, duration_pb2, message
from google.rpc import error_details_pb2, status_pb2

from broker.errors import Reason

DOMAIN: Final = "action-broker"  # google.rpc.ErrorInfo.domain
CORRELATION_ID: Final = "x-correlation-id"  # gRPC trailing metadata and HTTP header
DETAILS: Final = "grpc-status-details-bin"  # where gRPC libraries look for a google.rpc.Status


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """How one reason is answered.

    grpc: the status code. http: the status at a protected resource, and everywhere but at the token endpoint.
    oauth: the error code at the token endpoint (RFC 6749 section 5.2 and its extensions).
    token_http: the HTTP status at the token endpoint: RFC 6749 section 5.2 wants 400 except for invalid_client, and
    RFC 9449 section 8 shows use_dpop_nonce as 400 there (401 is for resource servers, section 9).
    resource: the error code in a protected resource's WWW-Authenticate (RFC 6750 section 3.1, RFC 9449 section 7.1),
    None where such a header would not help.
    """

    grpc: grpc.StatusCode
    http: int
    oauth: str
    token_http: int = 400
    resource: str | None = None


_Code = grpc.StatusCode


def _token(code: grpc.StatusCode, oauth: str = "invalid_grant", resource: str = "invalid_token") -> Status:
    """A credential that does not count, or a caller who is not known."""
    return Status(grpc=code, http=401, oauth=oauth, token_http=400, resource=resource)


def _denied(oauth: str = "access_denied") -> Status:
    """Known, and no."""
    return Status(grpc=_Code.PERMISSION_DENIED, http=403, oauth=oauth, token_http=403, resource="insufficient_scope")


_AWAY = Status(grpc=_Code.UNAVAILABLE, http=503, oauth="temporarily_unavailable", token_http=503)

STATUS: Final[Mapping[Reason, Status]] = MappingProxyType(
    {
        Reason.MALFORMED: Status(
            grpc=_Code.INVALID_ARGUMENT, http=400, oauth="invalid_request", resource="invalid_request"
        ),
        Reason.UNAUTHENTICATED: Status(
            grpc=_Code.UNAUTHENTICATED, http=401, oauth="invalid_client", token_http=401, resource="invalid_token"
        ),
        Reason.KEY_MISMATCH: _token(_Code.UNAUTHENTICATED),
        Reason.INVALID_PROOF: _token(_Code.UNAUTHENTICATED, "invalid_dpop_proof", "invalid_dpop_proof"),
        Reason.NONCE_REQUIRED: _token(_Code.UNAUTHENTICATED, "use_dpop_nonce", "use_dpop_nonce"),
        Reason.PROOF_REPLAYED: _token(_Code.UNAUTHENTICATED, "invalid_dpop_proof", "invalid_dpop_proof"),
        Reason.NOT_ATTESTED: _denied(),
        Reason.EVIDENCE_MISMATCH: _denied(),
        Reason.DENIED: _denied(),
        Reason.OUT_OF_SCOPE: _denied("invalid_scope"),
        Reason.WRONG_AUDIENCE: _denied("invalid_target"),
        Reason.EXPIRED: _token(_Code.PERMISSION_DENIED),
        Reason.ALREADY_USED: _token(_Code.PERMISSION_DENIED),
        Reason.REVOKED: _token(_Code.PERMISSION_DENIED),
        Reason.SUPERSEDED: _token(_Code.PERMISSION_DENIED),
        Reason.PARENT_REFUSED: _denied(),
        Reason.SESSION_RISK: _denied(),
        Reason.TICKET_CLOSED: _denied(),
        Reason.UNKNOWN_ACTION: Status(grpc=_Code.NOT_FOUND, http=400, oauth="invalid_authorization_details"),
        Reason.QUOTA: Status(grpc=_Code.RESOURCE_EXHAUSTED, http=429, oauth="temporarily_unavailable", token_http=429),
        Reason.PROVENANCE_MISSING: _denied(),
        Reason.PROVENANCE_REJECTED: _denied(),
        Reason.APPROVAL_REQUIRED: Status(
            grpc=_Code.FAILED_PRECONDITION, http=403, oauth="access_denied", token_http=403
        ),
        Reason.SIGNER_UNAVAILABLE: _AWAY,
        Reason.TIMESTAMP_UNAVAILABLE: _AWAY,
        Reason.ATTESTATION_UNAVAILABLE: _AWAY,
        Reason.LEDGER_UNAVAILABLE: _AWAY,
        Reason.SCOPE_STALE: _AWAY,
        Reason.SUSPENDED: _AWAY,
        Reason.IDENTITY_UNAVAILABLE: _AWAY,
        Reason.BROKER_UNREACHABLE: _AWAY,
    }
)


def known_reason(text: str) -> Reason:
    """The reason of this name; "revoked" for one that a newer broker knows and we do not."""
    try:
        return Reason(text)
    except ValueError:
        return Reason.REVOKED


def rich_status(
    reason: Reason, correlation_id: str, *, retry_after_ms: int | None = None, told: Mapping[str, str] | None = None
) -> status_pb2.Status:
    """A google.rpc.Status: ErrorInfo with the reason, our domain and `told`, RequestInfo with the correlation id."""
    details: list[message.Message] = [
        error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN, metadata=told),
        error_details_pb2.RequestInfo(request_id=correlation_id),
    ]
    if retry_after_ms is not None:
        seconds, milliseconds = divmod(retry_after_ms, 1000)
        delay = duration_pb2.Duration(seconds=seconds, nanos=milliseconds * 1_000_000)
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    answer = status_pb2.Status(code=STATUS[reason].grpc.value[0], message=reason)
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        answer.details.append(packed)
    return answer


def error_info_trailers(
    reason: Reason, correlation_id: str, *, retry_after_ms: int | None = None, told: Mapping[str, str] | None = None
) -> tuple[tuple[str, str | bytes], ...]:
    """The trailing metadata of a gRPC refusal. Abort with `STATUS[reason].grpc`, message `reason` and these."""
    rich = rich_status(reason, correlation_id, retry_after_ms=retry_after_ms, told=told)
    return (DETAILS, rich.SerializeToString()), (CORRELATION_ID, correlation_id)


def reason_of(details: bytes | None) -> Reason | None:
    """The reason in the `grpc-status-details-bin` of an answer; None when it is not ours or a reason we do not know.

    Not checked: that the status code fits the reason. Who sent it is the transport's to know.
    """
    try:
        answer = status_pb2.Status.FromString(details or b"")
        for packed in answer.details:
            info = error_details_pb2.ErrorInfo()
            if packed.Unpack(info) and info.domain == DOMAIN:
                return Reason(info.reason)
    except (message.DecodeError, ValueError):
        return None
    return None


def www_authenticate(reason: Reason, scheme: str = "DPoP", *, presented: bool = True) -> str | None:
    """The WWW-Authenticate value of a protected resource's refusal; None where another credential would not help.

    scheme: "DPoP" (RFC 9449 section 7.1) or "Bearer" for certificate-bound tokens (RFC 8705).
    presented: whether the request had a credential at all; without one the challenge names no error (RFC 6750
    section 3.1). A description is allowed there, and left out: invariant 9.
    """
    error = STATUS[reason].resource
    if error is None:
        return None
    parts = ([f'error="{error}"'] if presented else []) + (['algs="ES256"'] if scheme == "DPoP" else [])
    return f"{scheme} {', '.join(parts)}".rstrip()
