"""What a record's bytes are. They are hashed into the chain: a changed byte here breaks every ledger out there."""

import hashlib
from datetime import datetime, timedelta, timezone

import msgspec
import pytest
from support.ledger_records import ACTION, NOW, approved, asked, intent, outcome, withdrawn

from broker.errors import Reason
from broker.ledger import records
from broker.ledger.records import Record
from broker.ledger.scope_records import SecurityEvent, SessionBound, SessionScored

PINNED: list[tuple[Record, bytes]] = [
    (
        intent("0123456789abcdef"),
        (
            b'{"kind":"intent","at":"2026-11-22T23:07:00Z","correlation_id":"0f6a3c6e5d9b4a1f","jti":"0123456789abcdef",'
            b'"credential":"action_token","principal":"spiffe://acme.test/build/agent","action":{"action":"orders.refund",'
            b'"audience":"https://orders.acme.test","parameters":{"amount":12},'
            b'"resource":"https://orders.acme.test/orders/17"},'
            b'"action_digest":"' + ACTION.digest.hex().encode() + b'",'
            b'"cnf":{"jkt":"0ZcOCORZNYy-DWpqq30jZyJGHTN0d2HglBV3uiguA4I"},"use":"single",'
            b'"expires_at":"2026-11-22T23:08:00Z","epoch":1,"policies":["refunds-by-build-agents"],'
            b'"policy_revision":"sha256:5df6e0e2761359d3","facts":{"spire":"sha256:' + b"11" * 32 + b'",'
            b'"process":"sha256:' + b"22" * 32 + b'"},"process":{"pid":4711,"start_time":99120,"uid":1600,"gid":1600,'
            b'"exe_device":2049,"exe_inode":131074},"method":"unix","key_id":"NzbLsXh8uDCcd-6MNwXF4W_7noWXFZAfHkxZsRGC9Xs",'
            b'"authority_sha256":"","approval":"","approvers":[],"request_id":"","parent":"","artifacts":[],'
            b'"ticket":"","session":""}'
        ),
    ),
    (
        outcome(7, NOW.replace(microsecond=42)),
        (
            b'{"kind":"outcome","at":"2026-11-22T23:07:00.000042Z","correlation_id":"0f6a3c6e5d9b4a1f","intent":7,'
            b'"result":"issued","credential_sha256":"'
            + hashlib.sha256((7).to_bytes(8)).hexdigest().encode()
            + b'","answer_sha256":""}'
        ),
    ),
    (
        records.Refusal(at=NOW, correlation_id="c", reason=Reason.DENIED, principal="p", edge="unix", stage="request"),
        (
            b'{"kind":"refusal","at":"2026-11-22T23:07:00Z","correlation_id":"c","detail":"","reason":"denied",'
            b'"principal":"p","action":"","resource":"","audience":"","action_digest":"","edge":"unix","stage":"request"}'
        ),
    ),
    (
        records.CountedRefusals(at=NOW, since=NOW, counts={Reason.MALFORMED: 3}),
        (
            b'{"kind":"counted_refusals","at":"2026-11-22T23:07:00Z","correlation_id":"","since":"2026-11-22T23:07:00Z",'
            b'"counts":{"malformed":3}}'
        ),
    ),
    (
        records.Redemption(at=NOW, jti="j", by="b", idempotency_sha256="00", content_sha256="01"),
        (
            b'{"kind":"redemption","at":"2026-11-22T23:07:00Z","correlation_id":"","jti":"j","by":"b",'
            b'"idempotency_sha256":"00","content_sha256":"01","result":"used"}'
        ),
    ),
    (
        asked("r"),
        (
            b'{"kind":"approval_asked","at":"2026-11-22T23:07:00Z","correlation_id":"0f6a3c6e5d9b4a1f",'
            b'"request_digest":"454349e422f05297191ead13e21d3db520e5abef52055e4964b82fb213f593a1",'
            b'"principal":"spiffe://acme.test/build/agent","action":{"action":"orders.refund",'
            b'"audience":"https://orders.acme.test","parameters":{"amount":12},'
            b'"resource":"https://orders.acme.test/orders/17"},"action_digest":"' + ACTION.digest.hex().encode() + b'",'
            b'"request_id":"r","text":"Refund 12 for order 17","expires_at":"2026-11-23T00:07:00Z"}'
        ),
    ),
    (
        approved("r"),
        (
            b'{"kind":"approved","at":"2026-11-22T23:07:00Z","correlation_id":"",'
            b'"request_digest":"454349e422f05297191ead13e21d3db520e5abef52055e4964b82fb213f593a1",'
            b'"by":"spiffe://acme.test/people/ann","reason":"looked at it","method":"mtls","evidence_sha256":"",'
            b'"policies":["release-managers"],"policy_revision":"sha256:5df6e0e2761359d3",'
            b'"rules_sha256":"' + b"55" * 32 + b'","expires_at":"2026-11-22T23:17:00Z"}'
        ),
    ),
    (
        withdrawn("r"),
        (
            b'{"kind":"approval_withdrawn","at":"2026-11-22T23:07:00Z","correlation_id":"",'
            b'"request_digest":"454349e422f05297191ead13e21d3db520e5abef52055e4964b82fb213f593a1",'
            b'"by":"spiffe://acme.test/people/ann","reason":"a mistake","method":"mtls","evidence_sha256":""}'
        ),
    ),
    (
        records.KeyBound(at=NOW, assertion_sha256="00", jkt="t", expires_at=NOW),
        (
            b'{"kind":"key_bound","at":"2026-11-22T23:07:00Z","correlation_id":"","assertion_sha256":"00","jkt":"t",'
            b'"expires_at":"2026-11-22T23:07:00Z"}'
        ),
    ),
    (
        records.KeyPublished(at=NOW, kid="k", record_sha256="00", serve_until=NOW),
        (
            b'{"kind":"key_published","at":"2026-11-22T23:07:00Z","correlation_id":"","kid":"k","record_sha256":"00",'
            b'"serve_until":"2026-11-22T23:07:00Z"}'
        ),
    ),
    (
        records.PolicyChanged(at=NOW, revision="r"),
        b'{"kind":"policy_changed","at":"2026-11-22T23:07:00Z","correlation_id":"","revision":"r"}',
    ),
    (
        records.Operated(at=NOW, principal="p", action="a", resource="r", policies=("q",), policy_revision="v"),
        (
            b'{"kind":"operated","at":"2026-11-22T23:07:00Z","correlation_id":"","principal":"p","action":"a",'
            b'"resource":"r","policies":["q"],"policy_revision":"v"}'
        ),
    ),
    (
        SessionScored(at=NOW, session="s", principal="p", level="LOW", by="b", key="k", said_at=NOW, detail="why"),
        (
            b'{"kind":"session_scored","at":"2026-11-22T23:07:00Z","correlation_id":"","detail":"why","session":"s",'
            b'"principal":"p","level":"LOW","by":"b","event":"","policies":[],"key":"k",'
            b'"said_at":"2026-11-22T23:07:00Z"}'
        ),
    ),
    (
        SessionBound(at=NOW, session="s", principal="p", key="k"),
        (
            b'{"kind":"session_bound","at":"2026-11-22T23:07:00Z","correlation_id":"","session":"s","principal":"p",'
            b'"key":"k"}'
        ),
    ),
    (
        SecurityEvent(at=NOW, issuer="i", event="00", type="t", effect="scored", token_sha256="01"),
        (
            b'{"kind":"security_event","at":"2026-11-22T23:07:00Z","correlation_id":"","detail":"","issuer":"i",'
            b'"event":"00","type":"t","effect":"scored","token_sha256":"01"}'
        ),
    ),
    (
        records.ScopeRefused(at=NOW, jtis=("j",), reason=Reason.REVOKED, cause="operator", by="b", detail="why"),
        (
            b'{"kind":"scope_refused","at":"2026-11-22T23:07:00Z","correlation_id":"","detail":"why","jtis":["j"],'
            b'"reason":"revoked","cause":"operator","by":"b"}'
        ),
    ),
    (
        records.Suspended(at=NOW, suspension=1, cause="c", count=3),
        b'{"kind":"suspended","at":"2026-11-22T23:07:00Z","correlation_id":"","suspension":1,"cause":"c","count":3}',
    ),
    (
        records.SuspensionEnded(at=NOW, suspension=1, refused=2),
        (b'{"kind":"suspension_ended","at":"2026-11-22T23:07:00Z","correlation_id":"","suspension":1,"refused":2}'),
    ),
    (
        records.StandingDenial(at=NOW, id="i", principal="p", until=NOW, by="b", policies=("q",), policy_revision="v"),
        (
            b'{"kind":"standing_denial","at":"2026-11-22T23:07:00Z","correlation_id":"","detail":"","id":"i",'
            b'"principal":"p","action":"","trust_domain":"","until":"2026-11-22T23:07:00Z","by":"b","policies":["q"],'
            b'"policy_revision":"v","before":0}'
        ),
    ),
    (
        records.StandingLifted(at=NOW, id="i", by="b", before=7),
        (
            b'{"kind":"standing_lifted","at":"2026-11-22T23:07:00Z","correlation_id":"","detail":"","id":"i","by":"b",'
            b'"policies":[],"policy_revision":"","before":7}'
        ),
    ),
    (
        records.BreakGlass(
            at=NOW,
            id="i",
            principal="p",
            action="a",
            resource="r",
            until=NOW,
            by="b",
            approval="00",
            approvers=("x", "y"),
            policies=("q",),
            policy_revision="v",
            detail="why",
        ),
        (
            b'{"kind":"break_glass","at":"2026-11-22T23:07:00Z","correlation_id":"","detail":"why","id":"i",'
            b'"principal":"p","action":"a","resource":"r","until":"2026-11-22T23:07:00Z","by":"b","approval":"00",'
            b'"approvers":["x","y"],"policies":["q"],"policy_revision":"v","epoch":0,"before":0}'
        ),
    ),
    (
        records.EpochStarted(at=NOW, epoch=2, detail="why", checkpoint="note"),
        (
            b'{"kind":"epoch_started","at":"2026-11-22T23:07:00Z","correlation_id":"","detail":"why","epoch":2,'
            b'"checkpoint":"note"}'
        ),
    ),
    (
        records.Checkpointed(at=NOW, size=9),
        b'{"kind":"checkpointed","at":"2026-11-22T23:07:00Z","correlation_id":"","size":9,"standing":0}',
    ),
    (
        records.Started(at=NOW, ledger="00", epoch=1),
        b'{"kind":"started","at":"2026-11-22T23:07:00Z","correlation_id":"","ledger":"00","epoch":1,"standing":0}',
    ),
    (records.Stopped(at=NOW), b'{"kind":"stopped","at":"2026-11-22T23:07:00Z","correlation_id":""}'),
]


@pytest.mark.parametrize(("record", "expected"), PINNED, ids=[type(r).__name__ for r, _ in PINNED])
def test_record_bytes_are_pinned_and_read_back_as_the_same_record(record: Record, expected: bytes) -> None:
    assert records.encode(record) == expected
    assert records.decode(expected) == record


# What an intent of an earlier release lacks, the latest last.
_FIRST = b',"authority_sha256":""'
_SECOND = b',"approval":"","approvers":[],"request_id":"","parent":"","artifacts":[]'
_THIRD = b',"ticket":"","session":""'


@pytest.mark.parametrize(
    ("later", "record"),
    [
        (_FIRST + _SECOND + _THIRD, PINNED[0]),
        (_SECOND + _THIRD, PINNED[0]),
        (_THIRD, PINNED[0]),
        (b',"answer_sha256":""', PINNED[1]),
        (b',"content_sha256":"01","result":"used"', PINNED[4]),
        (b',"result":"used"', PINNED[4]),
        (b',"expires_at":"2026-11-22T23:07:00Z"', PINNED[8]),
        (b',"standing":0', PINNED[-3]),
        (b',"standing":0', PINNED[-2]),
    ],
    ids=[
        "intent",
        "intent-2",
        "intent-3",
        "outcome",
        "redemption",
        "redemption-2",
        "key_bound",
        "checkpointed",
        "started",
    ],
)
def test_a_record_from_before_a_field_was_added_is_still_read(later: bytes, record: tuple[Record, bytes]) -> None:
    before = record[1].removesuffix(later + b"}") + b"}"
    assert len(before) == len(record[1]) - len(later)
    assert records.decode(before).at == record[0].at


def test_every_kind_of_record_is_pinned() -> None:
    assert {type(record) for record, _ in PINNED} == set(Record.__args__)


@pytest.mark.parametrize("at", [datetime(2026, 1, 1), NOW.astimezone(timezone(timedelta(hours=2)))])  # noqa: DTZ001 - the defect
def test_a_time_that_is_not_utc_is_not_recorded(at: datetime) -> None:
    with pytest.raises(ValueError, match="aware UTC"):
        records.encode(records.Stopped(at=at))
    assert records.encode(records.Stopped(at=NOW))


def test_the_recorded_action_is_the_preimage_of_its_digest() -> None:
    found = records.decode(records.encode(intent()))
    assert isinstance(found, records.Intent)
    assert hashlib.sha256(bytes(found.action)).hexdigest() == found.action_digest
    assert found.to_action() == ACTION


def test_a_caller_cannot_fill_the_ledger_with_a_long_detail() -> None:
    def refusal(detail: str) -> records.Refusal:
        return records.Refusal(at=NOW, reason=Reason.DENIED, detail=detail, principal="p", edge="mtls", stage="request")

    assert len(approved(reason="x" * 100_000).reason) == records.MAX_DETAIL
    assert len(refusal("x" * 100_000).detail) == records.MAX_DETAIL
    assert refusal("x" * records.MAX_DETAIL).detail == "x" * records.MAX_DETAIL


@pytest.mark.parametrize(
    "body",
    [
        b'{"kind":"stopped","at":"2026-11-22T23:07:00Z","correlation_id":"","extra":1}',
        b'{"kind":"unheard_of","at":"2026-11-22T23:07:00Z"}',
        b'{"kind":"stopped","at":"2026-11-22T23:07:00"}',
        b'{"kind":"stopped"}',
        b"{",
        b"",
    ],
    ids=["unknown-field", "unknown-kind", "naive-time", "no-time", "cut-off", "empty"],
)
def test_bytes_that_are_no_record_are_refused(body: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        records.decode(body)


def test_no_record_has_a_field_for_a_credential_or_a_key() -> None:
    """Invariant 10, the ledger's part: what could hold a secret is a hash, a thumbprint or an id by its very name."""
    names = {name for kind in Record.__args__ for name in kind.__struct_fields__}
    assert not {name for name in names if name in {"token", "proof", "evidence", "secret", "private_key", "jwk"}}
    hashed = {"credential_sha256", "idempotency_sha256", "assertion_sha256", "record_sha256", "action_digest"}
    hashed |= {"answer_sha256", "evidence_sha256", "request_digest"}
    assert hashed <= names
