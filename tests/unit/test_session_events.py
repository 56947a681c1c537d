"""What security events do to sessions, for whom, once, and what of it is in the ledger."""

import hashlib
from datetime import timedelta
from pathlib import Path

import pytest
from support.exchanging import CORRELATION
from support.oidc import Signer
from support.security_events import (
    CAEP,
    REVOKED,
    SECRET,
    TRANSMITTER,
    VERIFICATION,
    Transmitting,
    complex_subject,
    opaque,
    uri,
)
from support.sessions import OTHER_AGENT, scored
from support.whole_broker import AGENT

from broker.errors import BrokerError, Reason, Unavailable
from broker.identity.event_refused import Err, EventRefused
from broker.ledger.records import CountedRefusals
from broker.ledger.scope_records import SecurityEvent, SessionScored


async def refusal(call: object) -> BrokerError:
    with pytest.raises(BrokerError) as refused:
        await call  # type: ignore[misc] - a coroutine
    return refused.value


async def test_an_event_scores_the_session_and_stands_in_the_ledger_without_its_token(tmp_path: Path) -> None:
    async with scored(tmp_path) as found:
        token = found.transmitting.token(found.now(), "MEDIUM", jti="e-1")
        await found.take(token)
        assert await found.level() == "MEDIUM"
        assert await found.why_not() == ""
        await found.event("HIGH")
        assert await found.why_not() == Reason.SESSION_RISK
        first, _ = await found.records(SecurityEvent)
        score, _ = await found.records(SessionScored)
        assert (first.issuer, first.effect, first.type) == (TRANSMITTER, "scored", f"{CAEP}risk-level-change")
        assert first.event == hashlib.sha256(f"{TRANSMITTER} e-1".encode()).hexdigest() == score.event
        assert first.token_sha256 == hashlib.sha256(token.rpartition(".")[0].encode()).hexdigest()
        assert first.correlation_id == CORRELATION
        assert (score.by, score.principal, score.policies) == (TRANSMITTER, AGENT, ())
        assert score.detail == "READ_AN_UNTRUSTED_PAGE"
        written = b"".join((tmp_path / name).read_bytes() for name in ("ledger.db", "checkpoint"))
        assert token.rpartition(".")[2].encode() not in written
        assert b"e-1" not in written


async def test_a_replayed_event_is_taken_without_any_effect(tmp_path: Path) -> None:
    async with scored(tmp_path) as found:
        low = found.transmitting.token(found.now(), "LOW")
        await found.take(low)
        await found.event("HIGH", event={"event_timestamp": (found.now() + timedelta(seconds=1)).timestamp()})
        for _ in range(3):
            await found.take(low)
        assert await found.level() == "HIGH"
        assert len(await found.records(SecurityEvent)) == 2


async def test_a_revoked_session_is_refused_whatever_comes_late(tmp_path: Path) -> None:
    async with scored(tmp_path) as found:
        earlier = found.transmitting.token(found.now() - timedelta(seconds=30), "LOW")
        await found.event(kind=REVOKED, subject=opaque())
        assert await found.level() == "HIGH"
        await found.take(earlier)
        assert await found.why_not() == Reason.SESSION_RISK


async def test_a_revoked_workload_loses_all_its_sessions(tmp_path: Path) -> None:
    async with scored(tmp_path) as found:
        for session in ("s-1", "s-2"):
            await found.score("LOW", session)
        await found.score("LOW", "others", principal=OTHER_AGENT)
        await found.event(kind=REVOKED, subject=uri(AGENT))
        assert [await found.level(one) for one in ("s-1", "s-2", "others")] == ["HIGH", "HIGH", "LOW"]


@pytest.mark.parametrize(
    "name",
    [
        "token-claims-change",
        "credential-change",
        "assurance-level-change",
        "device-compliance-change",
        "session-established",
        "session-presented",
    ],
)
async def test_what_tells_nothing_that_a_fact_rests_on_is_recorded_and_has_no_effect(tmp_path: Path, name: str) -> None:
    async with scored(tmp_path) as found:
        await found.score("LOW")
        await found.event(kind=f"{CAEP}{name}")
        assert await found.level() == "LOW"
        assert found.told == ["s-1"]
        (event,) = await found.records(SecurityEvent)
        assert (event.effect, event.type) == ("none", f"{CAEP}{name}")


async def test_a_verification_is_taken(tmp_path: Path) -> None:
    async with scored(tmp_path) as found:
        await found.event(kind=VERIFICATION, subject=opaque("stream-7"))
        (event,) = await found.records(SecurityEvent)
        assert event.effect == "none"


async def test_an_event_about_somebody_who_is_not_ours_is_taken_and_does_nothing(tmp_path: Path) -> None:
    """SSF 1.0 section 9.3: it is no error of the transmitter's."""
    async with scored(tmp_path) as found:
        await found.score("LOW")
        for subject in (
            {"format": "email", "email": "jane@acme.test"},
            complex_subject("", "", tenant=opaque("t")),
            complex_subject("not|ours", AGENT),
            complex_subject("s-1", OTHER_AGENT),
        ):
            await found.event(kind=REVOKED, subject=subject)
        assert await found.level() == "LOW"
        assert [one.effect for one in await found.records(SecurityEvent)] == ["unknown"] * 3 + ["another_principal"]


async def test_a_transmitter_that_may_only_raise_lowers_nothing(tmp_path: Path) -> None:
    async with scored(tmp_path, lowers=False) as found:
        await found.event("HIGH")
        found.parts.ahead = timedelta(seconds=5)
        await found.event("LOW")
        assert await found.level() == "HIGH"
        assert [one.effect for one in await found.records(SecurityEvent)] == ["scored", "not_lowered"]


async def test_a_transmitter_speaks_of_its_own_principals_alone(tmp_path: Path) -> None:
    async with scored(tmp_path, principals=("spiffe://acme.test/build/other",)) as found:
        await found.score("LOW", "s-1")
        await found.score("LOW", "s-2", principal=OTHER_AGENT)
        for subject in (opaque("s-1"), complex_subject("s-1", AGENT), uri(AGENT), complex_subject("new", AGENT)):
            refused = await refusal(found.event(kind=REVOKED, subject=subject))
            assert isinstance(refused, EventRefused)
            assert refused.err is Err.ACCESS_DENIED
        await found.event(kind=REVOKED, subject=opaque("unknown"))
        assert await found.level("unknown") is None, "whose it is nobody said"
        assert await found.level("s-1") == "LOW"
        for subject in (opaque("s-2"), complex_subject("new", OTHER_AGENT)):
            await found.event(kind=REVOKED, subject=subject)
        assert [await found.level(one) for one in ("s-2", "new")] == ["HIGH", "HIGH"]


async def test_what_nobody_configured_signed_is_counted_and_not_written(tmp_path: Path) -> None:
    async with scored(tmp_path, secret=SECRET) as found:
        stranger = Transmitting(audience=found.transmitting.audience, signer=Signer("RS256", kid="k-1"))
        good = found.transmitting.token(found.now())
        for token, shown in ((stranger.token(found.now()), f"Bearer {SECRET}"), (good, None), (good, "Bearer x")):
            assert (await refusal(found.take(token, shown))).reason is Reason.UNAUTHENTICATED
        assert await found.level() is None
        await found.take(good, f"Bearer {SECRET}")
        assert await found.level() == "HIGH"
        records = await found.records()
        assert len([one for one in records if isinstance(one, SecurityEvent)]) == 1
        (counted,) = [one for one in records if isinstance(one, CountedRefusals)]
        assert counted.counts == {Reason.UNAUTHENTICATED: 3}


async def test_a_transmitter_has_a_quota_as_everybody(tmp_path: Path) -> None:
    async with scored(tmp_path, burst=3) as found:
        for _ in range(3):
            await found.event()
        assert (await refusal(found.event())).reason is Reason.QUOTA
        assert len(await found.records(SecurityEvent)) == 3


async def test_without_the_ledger_nothing_is_taken_so_that_it_is_sent_again(tmp_path: Path) -> None:
    async with scored(tmp_path) as found:
        await found.parts.exchange.ledger.close()
        refused = await refusal(found.event())
        assert isinstance(refused, Unavailable)
        assert refused.reason is Reason.LEDGER_UNAVAILABLE


async def test_sessions_and_events_outlive_the_broker(tmp_path: Path) -> None:
    async with scored(tmp_path) as found:
        low = found.transmitting.token(found.now(), "LOW")
        await found.take(low)
        assert await found.why_not() == ""
        await found.event("HIGH")
        transmitting = found.transmitting
    async with scored(tmp_path, transmitting=transmitting) as found:
        assert await found.why_not() == Reason.SESSION_RISK
        await found.take(low)
        assert await found.level() == "HIGH"
        await found.score("LOW")
        assert await found.why_not(key="another") == Reason.SESSION_RISK
        assert await found.why_not() == ""
