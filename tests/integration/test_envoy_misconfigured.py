"""An Envoy that lacks one of the lines that deploy/envoy/envoy.yaml marks: what the guard can notice, it refuses."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from support.envoy import Edge, serving
from support.envoy_calls import (
    ISSUER,
    MALFORMED,
    REFUND,
    TABLE,
    bearer,
    call,
    dpop,
    now,
    on_the_wire,
    refund,
    token,
)
from support.issuer import CALLER, guard_for, x5t
from support.pki import CA, der

from broker.errors import Reason

BODY = {"amount": 30}
WITH_BODY = "with_request_body: { max_request_bytes: 1048576, allow_partial_message: false, pack_as_bytes: true }"


@asynccontextmanager
async def changed(folder: Path, changes: Mapping[str, str]) -> AsyncIterator[Edge]:
    """The shipped configuration with other texts instead of its own."""
    async with serving(await guard_for(ISSUER, clock=now), TABLE, folder, CA(now=now()), changes) as edge:
        yield edge


@pytest.mark.parametrize(
    ("line", "instead", "reason"),
    [
        ("encode_raw_headers: true", "encode_raw_headers: false", Reason.SCOPE_STALE),
        ("pack_as_bytes: true", "pack_as_bytes: false", Reason.SCOPE_STALE),
        (WITH_BODY, "", Reason.MALFORMED),
    ],
)
async def test_what_is_not_told_rightly_admits_nobody(tmp_path: Path, line: str, instead: str, reason: Reason) -> None:
    async with changed(tmp_path, {line: instead}) as edge:
        answer = await call(edge, dpop(token(refund())), BODY)
        answer.refused(reason, MALFORMED if reason is Reason.MALFORMED else None)
        assert edge.seen == []


async def test_a_part_of_a_body_is_no_body(tmp_path: Path) -> None:
    whole = b'{"amount": 30}'
    part = WITH_BODY.replace("1048576", str(len(whole))).replace("false", "true")
    async with changed(tmp_path, {WITH_BODY: part}) as edge:
        raw = on_the_wire(dpop(token(refund())), body=whole + b" " * 100_000 + b'{"amount": 99}')
        (await edge.send(raw)).refused(Reason.MALFORMED, MALFORMED)
        assert edge.seen == []


async def test_a_certificate_that_envoy_does_not_tell_counts_for_nothing(tmp_path: Path) -> None:
    async with changed(tmp_path, {"include_peer_certificate: true": "include_peer_certificate: false"}) as edge:
        caller = edge.ca.svid(CALLER)
        answer = await call(edge, bearer(token(refund(), cnf=x5t(der(caller.leaf)))), BODY, svid=caller)
        answer.refused(Reason.KEY_MISMATCH, 'Bearer error="invalid_token"')
        assert (await call(edge, dpop(token(refund())), BODY)).status == 200


async def test_a_path_that_envoy_leaves_as_it_is_is_refused_by_the_guard(tmp_path: Path) -> None:
    as_sent = {
        "normalize_path: true": "normalize_path: false",
        "path_with_escaped_slashes_action: REJECT_REQUEST": "path_with_escaped_slashes_action: KEEP_UNCHANGED",
    }
    async with changed(tmp_path, as_sent) as edge:
        for path in ("/v1/orders/18/../17/refund", "/v1/orders/18/%2e%2e/17/refund", "/v1/orders/17%2Frefund"):
            answer = await edge.send(on_the_wire(dpop(token(refund()), path=path), path))
            answer.refused(Reason.MALFORMED, MALFORMED)
        assert edge.seen == []
        assert (await edge.send(on_the_wire(dpop(token(refund())), REFUND))).status == 200


async def test_invariant_6_a_guard_that_fails_says_no_also_where_envoy_admits_on_failure(tmp_path: Path) -> None:
    """Invariant 6: its answer is a denial, never a failed call. An Envoy that gets no answer admits everybody then."""
    admits = {"failure_mode_allow: false": "failure_mode_allow: true"}
    guard = await guard_for(ISSUER, clock=lambda: 1 // 0)
    async with serving(guard, TABLE, tmp_path, CA(now=now()), admits) as edge:
        (await call(edge, dpop(token(refund())), BODY)).refused(Reason.SCOPE_STALE, None)
        assert edge.seen == []
