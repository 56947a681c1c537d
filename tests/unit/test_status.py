"""One table from reason to status, the same on every wire, with nothing in an answer but reason and correlation id."""

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from broker.errors import Reason
from broker.status import (
    CORRELATION_ID,
    DETAILS,
    DOMAIN,
    STATUS,
    error_info_trailers,
    reason_of,
    www_authenticate,
)

# WIRE.md, "Refusals".
WIRE = {
    "INVALID_ARGUMENT 400": {"malformed"},
    "UNAUTHENTICATED 401": {
        "unauthenticated",
        "key_mismatch",
        "proof_replayed",
        "invalid_dpop_proof",
        "use_dpop_nonce",
    },
    "PERMISSION_DENIED 403": {
        "not_attested",
        "evidence_mismatch",
        "denied",
        "out_of_scope",
        "wrong_audience",
        "provenance_missing",
        "provenance_rejected",
        "parent_refused",
        "session_risk",
        "ticket_closed",
    },
    "FAILED_PRECONDITION 403": {"approval_required"},
    "PERMISSION_DENIED 401": {"expired", "already_used", "revoked", "superseded"},
    "NOT_FOUND 400": {"unknown_action"},
    "RESOURCE_EXHAUSTED 429": {"quota"},
    "UNAVAILABLE 503": {
        "attestation_unavailable",
        "ledger_unavailable",
        "scope_stale",
        "suspended",
        "identity_unavailable",
        "signer_unavailable",
        "timestamp_unavailable",
        "broker_unreachable",  # a client's own word, for a broker that did not answer
    },
}
# RFC 6749 section 5.2 (and 4.1.2.1 for what it says of a server), RFC 8693 2.2.2, RFC 9396 5, RFC 9449 5 and 8.
OAUTH = {
    "invalid_request",
    "invalid_client",
    "invalid_grant",
    "invalid_scope",
    "access_denied",
    "temporarily_unavailable",
    "invalid_target",
    "invalid_authorization_details",
    "invalid_dpop_proof",
    "use_dpop_nonce",
}


def test_every_reason_has_the_status_that_the_wire_says() -> None:
    found: dict[str, set[str]] = {}
    for reason, status in STATUS.items():
        found.setdefault(f"{status.grpc.name} {status.http}", set()).add(str(reason))
    assert found == WIRE
    assert set(STATUS) == set(Reason)


@pytest.mark.parametrize("reason", Reason)
def test_oauth_errors_are_registered_ones(reason: Reason) -> None:
    status = STATUS[reason]
    assert status.oauth in OAUTH
    assert status.token_http in {400, 401, 403, 429, 503}
    assert (status.oauth == "invalid_client") == (status.token_http == 401)  # RFC 6749 section 5.2
    assert (status.grpc is grpc.StatusCode.UNAVAILABLE) == (status.http == status.token_http == 503)


def test_who_lacks_approvals_is_told_what_to_have_approved_and_nobody_else_is_told_more() -> None:
    told = {"request_digest": "0" * 64, "text": "what it asks for"}
    assert told_by(error_info_trailers(Reason.APPROVAL_REQUIRED, "the-id", told=told)) == told
    assert told_by(error_info_trailers(Reason.DENIED, "the-id")) == {}


def told_by(trailers: tuple[tuple[str, str | bytes], ...]) -> dict[str, str]:
    info = error_details_pb2.ErrorInfo()
    assert status_pb2.Status.FromString(dict(trailers)[DETAILS]).details[0].Unpack(info)
    return dict(info.metadata)


@pytest.mark.parametrize("reason", Reason)
def test_invariant_9_an_answer_over_grpc_is_a_reason_and_a_correlation_id(reason: Reason) -> None:
    """Invariant 9: never the policy or the facts; there is no field that could carry them."""
    trailers = dict(error_info_trailers(reason, "the-id", retry_after_ms=1500))
    assert set(trailers) == {DETAILS, CORRELATION_ID}
    assert reason_of(trailers[DETAILS]) is reason
    status = status_pb2.Status.FromString(trailers[DETAILS])
    assert (status.code, status.message) == (STATUS[reason].grpc.value[0], reason)
    info, request, retry = (
        error_details_pb2.ErrorInfo(),
        error_details_pb2.RequestInfo(),
        error_details_pb2.RetryInfo(),
    )
    for detail, message in zip(status.details, (info, request, retry), strict=True):
        assert detail.Unpack(message)
    assert (info.reason, info.domain, dict(info.metadata)) == (reason, DOMAIN, {})
    assert request.request_id == trailers[CORRELATION_ID] == "the-id"
    assert retry.retry_delay.ToMilliseconds() == 1500


@pytest.mark.parametrize("details", [None, b"", b"\xff\xff", b"text", b"\x12\x06denied"])
def test_details_that_are_not_ours_have_no_reason(details: bytes | None) -> None:
    assert reason_of(details) is None
    assert reason_of(dict(error_info_trailers(Reason.DENIED, "c"))[DETAILS]) is Reason.DENIED


def test_a_reason_of_another_domain_or_of_the_future_is_not_taken_for_one_of_ours() -> None:
    for reason, domain in (("denied", "spiffe.io"), ("a_reason_of_the_future", DOMAIN)):
        status = status_pb2.Status(code=7)
        status.details.add().Pack(error_details_pb2.ErrorInfo(reason=reason, domain=domain))
        assert reason_of(status.SerializeToString()) is None


def test_a_challenge_names_an_error_only_to_who_presented_something() -> None:
    """RFC 6750 section 3.1, RFC 9449 section 7.1."""
    assert www_authenticate(Reason.EXPIRED) == 'DPoP error="invalid_token", algs="ES256"'
    assert www_authenticate(Reason.EXPIRED, "Bearer") == 'Bearer error="invalid_token"'
    assert www_authenticate(Reason.INVALID_PROOF) == 'DPoP error="invalid_dpop_proof", algs="ES256"'
    assert www_authenticate(Reason.OUT_OF_SCOPE) == 'DPoP error="insufficient_scope", algs="ES256"'
    assert www_authenticate(Reason.UNAUTHENTICATED, presented=False) == 'DPoP algs="ES256"'
    assert www_authenticate(Reason.UNAUTHENTICATED, "Bearer", presented=False) == "Bearer"
    assert www_authenticate(Reason.SCOPE_STALE) is None
