"""Security event tokens: what they say, and each defect with its code of RFC 8935 beside a sound one."""

import json
import tomllib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from support.oidc import Signer
from support.pki import ISSUER, WORKLOAD
from support.security_events import (
    CAEP,
    REVOKED,
    RISK,
    SECRET,
    SSF,
    TRANSMITTER,
    VERIFICATION,
    Transmitting,
    complex_subject,
    opaque,
    uri,
)

from broker.errors import Invalid
from broker.identity.event_refused import Err, EventRefused
from broker.identity.event_subject import EventSubject
from broker.identity.others_jws import MAX_TOKEN
from broker.identity.security_event import EventType, SecurityEvents, TransmitterSettings, VerifiedEvent

NOW = datetime(2031, 5, 6, 7, 8, 9, tzinfo=UTC)
VECTORS = Path(__file__).parents[2] / "vectors" / "security_event" / "refused"
REFUSED = [pytest.param(tomllib.loads(path.read_text()), id=path.stem) for path in sorted(VECTORS.iterdir())]


@pytest.fixture(scope="module")
def transmitting() -> Transmitting:
    return Transmitting()


@pytest.fixture
def events(transmitting: Transmitting, tmp_path: Path) -> SecurityEvents:
    return transmitting.verifier(tmp_path)


async def verified(events: SecurityEvents, token: str, *, shown: str | None = None) -> VerifiedEvent:
    return await events.verify(token, shown, NOW)


async def refusal(events: SecurityEvents, token: str, *, shown: str | None = None) -> EventRefused:
    with pytest.raises(EventRefused) as refused:
        await events.verify(token, shown, NOW)
    assert not token or token not in str(refused.value)
    return refused.value


# -- defects ---------------------------------------------------------------------------------------------------------


def edited(transmitting: Transmitting, vector: dict[str, Any]) -> str:
    """A sound token with the vector's defect."""
    how = {name: vector[name] for name in ("kind", "without", "event") if name in vector}
    for name in vector.get("without_event", ()):
        how.setdefault("event", {})[name] = None
    claims = transmitting.claims(NOW, **how) | vector.get("claims", {})
    claims["iat"] = claims["iat"] + vector["issued_s"] if "issued_s" in vector else claims.get("iat")
    claims = {name: value for name, value in claims.items() if name not in vector.get("without", ())}
    header = {name: None if value == "-" else value for name, value in vector.get("header", {}).items()}
    payload: Any = claims
    if "twice" in vector:
        payload = f"{json.dumps(claims)[:-1]}, {vector['twice']}}}".encode()
    if "by" in vector:
        return Transmitting(signer=Signer("RS256", kid=transmitting.signer.kid)).sign(payload, **header)
    token = transmitting.sign(payload, **header)
    if "swapped" in vector:
        head, _, signature = token.split(".")
        return f"{head}.{transmitting.token(NOW, 'LOW').split('.')[1]}.{signature}"
    return token.rpartition(".")[0] if "cut" in vector else token


@pytest.mark.parametrize("vector", REFUSED)
async def test_a_defect_is_refused_with_its_code_and_a_sound_token_is_not(
    events: SecurityEvents, transmitting: Transmitting, vector: dict[str, Any]
) -> None:
    refused = await refusal(events, edited(transmitting, vector))
    assert refused.err == vector["err"]
    if "reason" in vector:
        assert refused.reason == vector["reason"]
    assert (await verified(events, edited(transmitting, {}))).level == "HIGH", "the control"


def test_each_code_but_that_of_the_subject_has_a_vector() -> None:
    """Who may speak of whom is not the token's to say: see test_session_events.py."""
    assert {vector.values[0]["err"] for vector in REFUSED} == {*Err} - {Err.ACCESS_DENIED}
    assert len(REFUSED) > 60


async def test_what_is_no_small_plain_jws_is_refused(events: SecurityEvents, transmitting: Transmitting) -> None:
    good = transmitting.token(NOW)
    bad = ["", "..", f"{good}.", f"{good}\n", f" {good}", "a.b.c", "a" * (MAX_TOKEN + 1), f"{good}=="]
    bad += [transmitting.sign(payload) for payload in (b"[]", b"\xff", b"{", b'{"iat": NaN}', b"[" * 5000)]
    for token in bad:
        assert (await refusal(events, token)).err is Err.INVALID_REQUEST
    assert await verified(events, good)


# -- what is taken ---------------------------------------------------------------------------------------------------


async def test_a_risk_level_change_scores_the_session_that_it_names(
    events: SecurityEvents, transmitting: Transmitting
) -> None:
    for level in ("LOW", "MEDIUM", "HIGH"):
        found = await verified(events, transmitting.token(NOW, level, event={"previous_level": "HIGH"}))
        assert (found.type, found.level) == (EventType.RISK_LEVEL_CHANGE, level)
        assert found.subject == EventSubject(session="s-1", principal=WORKLOAD)
        assert (found.by.issuer, found.issued_at, found.said_at) == (TRANSMITTER, NOW, NOW)
        assert found.reason == "READ_AN_UNTRUSTED_PAGE"


async def test_a_revoked_session_is_as_risky_as_can_be(events: SecurityEvents, transmitting: Transmitting) -> None:
    event = {"reason_admin": {"en": "Policy Violation: C076E82F", "de": "…"}, "initiating_entity": "policy"}
    found = await verified(events, transmitting.token(NOW, kind=REVOKED, subject=opaque(), event=event))
    assert (found.level, found.subject) == ("HIGH", EventSubject(session="s-1"))
    assert found.reason == "Policy Violation: C076E82F"
    for reason in ({}, [], "x", {"en": 7}, None):
        assert (await verified(events, transmitting.token(NOW, kind=REVOKED, event={"reason_admin": reason}))).level


@pytest.mark.parametrize("name", [*EventType])
async def test_other_events_say_nothing_of_a_level(
    events: SecurityEvents, transmitting: Transmitting, name: str
) -> None:
    found = await verified(events, transmitting.token(NOW, kind=name))
    assert (found.level is not None) == (name in {RISK, REVOKED})
    assert found.type.startswith((CAEP, SSF))


async def test_a_verification_that_we_did_not_ask_for_is_good_without_a_state(
    events: SecurityEvents, transmitting: Transmitting
) -> None:
    found = await verified(events, transmitting.token(NOW, kind=VERIFICATION, subject=opaque("stream-7")))
    assert found.level is None


async def test_the_same_event_has_the_same_id_and_another_issuers_has_not(tmp_path: Path) -> None:
    one, other = Transmitting(), Transmitting(issuer="https://other.acme.test")
    (tmp_path / "other").mkdir()
    both = SecurityEvents([one.configured(tmp_path), other.configured(tmp_path / "other")], ISSUER)
    first = await verified(both, one.token(NOW, jti="j"))
    assert (await verified(both, one.token(NOW, "LOW", jti="j"))).id == first.id
    assert (await verified(both, other.token(NOW, jti="j"))).id != first.id
    assert (await verified(both, one.token(NOW, jti="k"))).id != first.id
    assert (await refusal(both, other.sign(one.claims(NOW)))).err is Err.AUTHENTICATION_FAILED, "not of its own issuer"


@pytest.mark.parametrize("alg", ["RS256", "PS384", "ES256", "ES512", "EdDSA"])
async def test_a_transmitter_signs_with_whatever_its_key_is_for(tmp_path: Path, alg: str) -> None:
    transmitting = Transmitting(signer=Signer(alg))
    assert await verified(transmitting.verifier(tmp_path), transmitting.token(NOW))


async def test_the_type_may_be_spelled_out_and_in_any_case(events: SecurityEvents, transmitting: Transmitting) -> None:
    for kind in ("secevent+jwt", "SecEvent+JWT", "application/secevent+jwt"):
        assert await verified(events, transmitting.token(NOW, header={"typ": kind}))


async def test_we_may_be_one_of_several_audiences_and_have_another_name(
    transmitting: Transmitting, tmp_path: Path
) -> None:
    events = transmitting.verifier(tmp_path, audience="receiver-7")
    assert await verified(events, transmitting.token(NOW, aud=["shop", "receiver-7"]))
    assert (await refusal(events, transmitting.token(NOW))).err is Err.INVALID_AUDIENCE


@pytest.mark.parametrize(("seconds", "good"), [(5, True), (6, False), (-3600, True), (-3601, False)])
async def test_how_old_an_event_may_be(
    events: SecurityEvents, transmitting: Transmitting, seconds: int, *, good: bool
) -> None:
    token = transmitting.token(NOW, iat=int(NOW.timestamp()) + seconds)
    if good:
        assert await verified(events, token)
    else:
        await refusal(events, token)


async def test_an_event_is_as_of_when_it_happened_and_never_later_than_now(
    events: SecurityEvents, transmitting: Transmitting
) -> None:
    at = int(NOW.timestamp())

    async def said_s(**how: Any) -> float:
        return (await verified(events, transmitting.token(NOW, **how))).said_at.timestamp() - at

    assert await said_s(event={"event_timestamp": None}) == 0
    assert await said_s(event={"event_timestamp": at - 90.5}) == -90.5
    assert await said_s(event={"event_timestamp": at + 90}) == 0
    assert await said_s(toe=at - 100) == -100
    assert await said_s(iat=at + 5, event={"event_timestamp": None}) == 0
    assert await said_s(iat=at - 7) == -7


# -- whom it is about ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("subject", "session", "principal"),
    [
        (opaque("s-2"), "s-2", ""),
        (uri(), "", WORKLOAD),
        ({"format": "iss_sub", "iss": ISSUER, "sub": WORKLOAD}, "", WORKLOAD),
        ({"format": "iss_sub", "iss": "https://idp.test", "sub": WORKLOAD}, "", ""),
        ({"format": "iss_sub", "iss": ISSUER, "sub": "jane"}, "", ""),
        ({"format": "email", "email": "jane@acme.test"}, "", ""),
        (uri("https://acme.test/jane"), "", ""),
        (opaque("dMTlD|1600802906337.16|16008.16"), "", ""),
        (complex_subject("s-2", ""), "s-2", ""),
        (complex_subject("", WORKLOAD), "", WORKLOAD),
        (complex_subject("s-2", "", application=uri()), "s-2", WORKLOAD),
        (complex_subject("s-2", WORKLOAD, application=uri()), "s-2", WORKLOAD),
        (complex_subject("s-2", "", user={"format": "email", "email": "jane@acme.test"}), "s-2", ""),
        (complex_subject("s-2", WORKLOAD, tenant=opaque("t"), device="?"), "s-2", WORKLOAD),
        (complex_subject("not|ours", WORKLOAD), "", ""),
        ({**complex_subject("", WORKLOAD), "session": uri("https://idp.test/s")}, "", ""),
        (complex_subject("", "", tenant=opaque("t")), "", ""),
        ({"format": "complex", "session": complex_subject("s-2")}, "", ""),
    ],
)
async def test_whom_an_event_is_about(
    events: SecurityEvents, transmitting: Transmitting, subject: dict[str, Any], session: str, principal: str
) -> None:
    """One session of somebody else's is never all of a workload's."""
    found = await verified(events, transmitting.token(NOW, subject=subject))
    assert found.subject == EventSubject(session=session, principal=principal)


# -- who sends it ----------------------------------------------------------------------------------------------------


async def test_a_transmitter_with_a_secret_has_to_show_it(transmitting: Transmitting, tmp_path: Path) -> None:
    events, token = transmitting.verifier(tmp_path, secret=SECRET), transmitting.token(NOW)
    for shown in (None, "", SECRET, f"Basic {SECRET}", "Bearer", "Bearer ", f"Bearer {SECRET}x", f"Bearer  {SECRET}"):
        assert (await refusal(events, token, shown=shown)).err is Err.AUTHENTICATION_FAILED
    for shown in (f"Bearer {SECRET}", f"bearer {SECRET}"):
        assert await verified(events, token, shown=shown)
    assert await verified(transmitting.verifier(tmp_path), token, shown="Bearer whatever"), "where none is asked for"


@pytest.mark.parametrize(
    "changes",
    [{"issuer": "http://caep.test"}, {"issuer": "caep"}, {"audience": ""}, {"principals": ("agent",)}],
)
def test_a_transmitter_that_cannot_be_is_refused(changes: dict[str, Any]) -> None:
    TransmitterSettings(issuer=TRANSMITTER, audience=ISSUER)
    with pytest.raises(Invalid):
        TransmitterSettings(**({"issuer": TRANSMITTER, "audience": ISSUER} | changes))


@pytest.mark.parametrize(
    ("principals", "may"),
    [
        ((), True),
        ((WORKLOAD,), True),
        (("spiffe://acme.test/build/",), True),
        (("spiffe://acme.test/",), True),
        (("spiffe://acme.test/other", "spiffe://acme.test/build/"), True),
        (("spiffe://acme.test/build",), False),
        (("spiffe://acme.test/build/agen",), False),
        (("spiffe://acme.test/build/agent/",), False),
        (("spiffe://other.test/",), False),
    ],
)
def test_whose_sessions_a_transmitter_may_score(principals: tuple[str, ...], *, may: bool) -> None:
    settings = TransmitterSettings(issuer=TRANSMITTER, audience=ISSUER, principals=principals)
    assert settings.may_score(WORKLOAD) is may
    assert settings.may_score("spiffe://acme.test.evil.test/build/agent") is (not principals)
