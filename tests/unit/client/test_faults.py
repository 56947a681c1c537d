"""An answer that is not yes becomes one of the three errors of the broker, with its reason and what to do next."""

import grpc
import pytest
from google.protobuf.any_pb2 import Any
from google.rpc import error_details_pb2, status_pb2

from broker.client.faults import InvalidForBroker, Unreachable, from_rpc, late, refusal
from broker.errors import ApprovalRequired, Invalid, Reason, Refused, Unavailable
from broker.status import DETAILS, STATUS, error_info_trailers

Code = grpc.StatusCode


def failed(code, *trailers, details="details", last_error=None):
    error = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailers), details)
    return from_rpc(error, where="/run/broker.sock", seconds=5, last_error=last_error)


def kind_of(code):
    return {Code.INVALID_ARGUMENT: Invalid, Code.UNAVAILABLE: Unavailable}.get(code, Refused)


@pytest.mark.parametrize("reason", Reason)
def test_each_reason_comes_back_as_its_own_kind_with_id_and_advice(reason):
    error = failed(STATUS[reason].grpc, *error_info_trailers(reason, "c0ffee"))
    assert isinstance(error, kind_of(STATUS[reason].grpc))
    assert not isinstance(error, Unreachable)
    assert (error.reason, error.code, error.correlation_id) == (reason, reason, "c0ffee")
    assert "c0ffee" in str(error)
    assert len(error.detail) > len("(correlation id c0ffee)") + 20


def test_what_is_to_be_approved_comes_with_the_refusal():
    metadata = {"request_digest": "ab" * 32, "text": "asks to do release.sign"}
    error = failed(Code.FAILED_PRECONDITION, *details_of("approval_required", **metadata), ("x-correlation-id", "c0"))
    assert isinstance(error, Refused)
    assert isinstance(error, ApprovalRequired)
    assert (error.reason, error.code, error.correlation_id) == (Reason.APPROVAL_REQUIRED, "approval_required", "c0")
    assert (error.request_digest, error.text) == ("ab" * 32, "asks to do release.sign")
    assert "action-broker approve" in error.detail
    without = failed(Code.FAILED_PRECONDITION, *details_of("approval_required"))  # withdrawn after the grant
    assert (without.reason, isinstance(without, ApprovalRequired)) == (Reason.APPROVAL_REQUIRED, False)
    other = failed(Code.PERMISSION_DENIED, *details_of("denied", **metadata))
    assert not isinstance(other, ApprovalRequired)


@pytest.mark.parametrize("reason", Reason)
def test_a_refusal_inside_an_answer_is_the_same_as_one_of_the_whole_call(reason):
    whole = failed(STATUS[reason].grpc, *error_info_trailers(reason, "1"))
    assert (type(refusal(reason, "1")), str(refusal(reason, "1"))) == (type(whole), str(whole))


@pytest.mark.parametrize(
    ("code", "kind", "nearest"),
    [
        (Code.INVALID_ARGUMENT, Invalid, Reason.MALFORMED),
        (Code.UNAUTHENTICATED, Refused, Reason.UNAUTHENTICATED),
        (Code.PERMISSION_DENIED, Refused, Reason.DENIED),
        (Code.FAILED_PRECONDITION, Refused, Reason.DENIED),
        (Code.NOT_FOUND, Refused, Reason.UNKNOWN_ACTION),
        (Code.RESOURCE_EXHAUSTED, Refused, Reason.QUOTA),
        (Code.UNAVAILABLE, Unavailable, Reason.ATTESTATION_UNAVAILABLE),
    ],
)
def test_a_reason_of_a_later_version_is_read_by_its_status_and_kept_as_it_was_sent(code, kind, nearest):
    error = failed(code, *details_of("of_the_future"))
    assert isinstance(error, kind)
    assert not isinstance(error, Unreachable)
    assert (error.reason, error.code) == (nearest, "of_the_future")
    assert "of_the_future" in str(error)


def details_of(reason, domain="action-broker", **metadata):
    packed = Any()
    packed.Pack(error_details_pb2.ErrorInfo(reason=reason, domain=domain, metadata=metadata))
    return ((DETAILS, status_pb2.Status(details=[packed]).SerializeToString()),)


def test_an_unknown_reason_inside_an_answer_is_a_no_and_not_a_try_again():
    assert isinstance(refusal("of_the_future", "1"), Refused)


@pytest.mark.parametrize(
    "trailers",
    [(), details_of("denied", "spiffe.io"), ((DETAILS, b"\xff\xff\xff"),), ((DETAILS, b""),)],
    ids=["no details", "another domain's", "garbage", "empty"],
)
def test_what_the_broker_did_not_say_is_no_answer(trailers):
    for code in (Code.UNAVAILABLE, Code.PERMISSION_DENIED, Code.INTERNAL, Code.UNKNOWN):
        assert isinstance(failed(code, *trailers), Unreachable)
    assert isinstance(failed(Code.PERMISSION_DENIED, *details_of("denied")), Refused)  # positive control


def test_only_a_broken_transport_may_be_tried_again():
    assert failed(Code.UNAVAILABLE).may_retry
    assert failed(Code.INTERNAL, details="Internal error from Core").may_retry
    for code in (Code.DEADLINE_EXCEEDED, Code.INTERNAL, Code.UNKNOWN, Code.CANCELLED, Code.UNIMPLEMENTED):
        assert not failed(code).may_retry


def test_a_fault_of_the_broker_keeps_the_id_that_finds_it_in_its_log():
    assert failed(Code.INTERNAL, ("x-correlation-id", "c0ffee")).correlation_id == "c0ffee"
    assert failed(Code.INTERNAL).correlation_id is None


def test_what_the_dialer_saw_explains_a_closed_socket():
    error = failed(Code.UNAVAILABLE, details="Socket closed", last_error="the server is spiffe://acme.test/other")
    assert "the server is spiffe://acme.test/other" in str(error)
    assert "/run/broker.sock" in str(error)
    assert "action-broker doctor" in str(error)


def test_a_late_answer_says_how_long_was_waited_and_why_if_known():
    assert "within 2 s" in str(late("there", 2, None))
    assert "no route" in str(late("there", 2, "no route"))
    assert "within 5 s" in str(failed(Code.DEADLINE_EXCEEDED))


@pytest.mark.parametrize(
    ("trailers", "wait"),
    [
        (error_info_trailers(Reason.QUOTA, "1", retry_after_ms=1500), 1500),
        ((*error_info_trailers(Reason.QUOTA, "1"), ("retry-after-ms", "250")), 250),
        ((*error_info_trailers(Reason.QUOTA, "1"), ("retry-after-ms", "-1")), None),
        ((*error_info_trailers(Reason.QUOTA, "1"), ("retry-after-ms", "1\n")), None),
        (error_info_trailers(Reason.QUOTA, "1"), None),
    ],
)
def test_a_quota_says_how_long_to_wait(trailers, wait):
    assert failed(Code.RESOURCE_EXHAUSTED, *trailers).retry_after_ms == wait


def test_a_message_that_is_too_large_is_ours_to_change_and_an_overload_is_not():
    assert isinstance(failed(Code.RESOURCE_EXHAUSTED, details="Received message larger than max (2 vs. 1)"), Invalid)
    assert isinstance(failed(Code.RESOURCE_EXHAUSTED, details="Concurrent RPC limit exceeded!"), Unreachable)
    assert issubclass(InvalidForBroker, Invalid)
