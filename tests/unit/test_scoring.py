"""Who may say how risky a session is, and what a session that others scored is good for."""

import asyncio
from pathlib import Path

import pytest
from support.exchanging import CORRELATION
from support.sessions import GUARDRAIL, KEY, OTHER_AGENT, OTHER_KEY, STRANGER, scored
from support.whole_broker import AGENT, OPERATOR

from broker.errors import BrokerError, Reason, Unavailable
from broker.ledger.records import Refusal
from broker.ledger.scope_records import SessionBound, SessionScored


async def reason(call: object) -> Reason:
    with pytest.raises(BrokerError) as refused:
        await call  # type: ignore[misc] - a coroutine
    return refused.value.reason


# -- what a session is good for --------------------------------------------------------------------------------------


async def test_an_agent_acts_in_a_session_that_somebody_else_scored(tmp_path: Path) -> None:
    async with scored(tmp_path) as found:
        assert await found.why_not() == Reason.SESSION_RISK, "nobody scored it yet"
        await found.score("LOW")
        assert (await found.ask()).token
        assert await found.why_not("wide") == ""
        bound = await found.records(SessionBound)
        assert [(one.session, one.principal, one.key) for one in bound] == [("s-1", AGENT, KEY)]


async def test_leaving_a_session_out_where_policy_wants_one_refuses(tmp_path: Path) -> None:
    async with scored(tmp_path) as found:
        await found.score("LOW")
        assert await found.why_not(session="") == Reason.DENIED
        assert await found.why_not("maybe", session="") == "", "where it may be left out"


async def test_high_refuses_at_once_and_a_new_name_is_no_way_out(tmp_path: Path) -> None:
    """An agent that was led astray: its session, a made-up one, and that of its neighbour."""
    async with scored(tmp_path) as found:
        await found.score("LOW")
        await found.score("LOW", "s-2", principal=OTHER_AGENT)
        assert await found.why_not("maybe") == ""
        await found.score("HIGH", by=GUARDRAIL)
        for name in ("narrow", "wide", "maybe"):
            for session in ("s-1", "s-2", "s-3", "s-1.", "S-1"):
                assert await found.why_not(name, session) == Reason.SESSION_RISK
        await found.score("MEDIUM")
        assert await found.why_not("narrow") == "", "scored anew, and constrained"
        assert await found.why_not("wide") == Reason.DENIED


async def test_a_session_belongs_to_the_first_key_that_names_it(tmp_path: Path) -> None:
    async with scored(tmp_path) as found:
        await found.score("LOW")
        assert await found.why_not(key=KEY) == ""
        assert await found.why_not(key=OTHER_KEY) == Reason.SESSION_RISK
        await found.score("HIGH")
        await found.score("LOW")
        assert await found.why_not(key=OTHER_KEY) == Reason.SESSION_RISK
        assert await found.why_not(key=KEY) == ""


async def test_what_is_decided_again_binds_no_key(tmp_path: Path) -> None:
    async with scored(tmp_path) as found:
        await found.score("LOW")
        assert await found.why_not(credential="a-token") == Reason.SESSION_RISK
        assert await found.why_not(key=OTHER_KEY) == "", "it is still there for the first"


async def test_a_ledger_that_cannot_be_read_is_no_low_session(tmp_path: Path) -> None:
    async with scored(tmp_path) as found:
        await found.score("LOW")
        await found.parts.exchange.ledger.close()
        assert await found.why_not() == Reason.ATTESTATION_UNAVAILABLE
        with pytest.raises(Unavailable):
            await found.score("HIGH")


# -- who scores ------------------------------------------------------------------------------------------------------


async def test_who_scored_what_under_which_policy_is_in_the_ledger(tmp_path: Path) -> None:
    async with scored(tmp_path) as found:
        row = await found.score("MEDIUM", by=GUARDRAIL, reason="read an untrusted page")
        assert (row.level, row.principal) == ("MEDIUM", AGENT)
        (record,) = await found.records(SessionScored)
        assert (record.by, record.correlation_id) == (GUARDRAIL, CORRELATION)
        assert record.policies == ("tools.cedar#guardrails-score-up",)
        assert (record.session, record.principal, record.level) == ("s-1", AGENT, "MEDIUM")
        assert (record.detail, record.event, record.said_at) == ("read an untrusted page", "", None)


async def test_a_guardrail_scores_up_and_not_down(tmp_path: Path) -> None:
    async with scored(tmp_path) as found:
        for level in ("LOW", "MEDIUM", "HIGH"):
            assert (await found.score(level, by=GUARDRAIL)).level == level
        for level in ("LOW", "MEDIUM"):
            assert await reason(found.score(level, by=GUARDRAIL)) is Reason.DENIED
            assert await found.level() == "HIGH"
        assert (await found.score("HIGH", by=GUARDRAIL)).level == "HIGH"
        assert (await found.score("LOW", by=OPERATOR)).level == "LOW"


async def test_two_guardrails_at_once_leave_the_higher_score(tmp_path: Path) -> None:
    """Both decided while it was LOW; what then would lower the other's word is refused, and looks again."""
    async with scored(tmp_path) as found:
        await found.score("LOW")
        both = [found.score(level, by=GUARDRAIL) for level in ("HIGH", "MEDIUM")]
        first, second = await asyncio.gather(*both, return_exceptions=True)
        assert not isinstance(first, BaseException)
        assert isinstance(second, BrokerError)
        assert second.reason is Reason.DENIED
        assert await found.level() == "HIGH"


async def test_nobody_scores_a_session_of_their_own_whatever_policy_says(tmp_path: Path) -> None:
    async with scored(tmp_path) as found:
        assert (await found.score("LOW", by=OTHER_AGENT)).level == "LOW", "policy permits builders"
        for level in ("LOW", "HIGH"):
            assert await reason(found.score(level, by=AGENT)) is Reason.DENIED
            both = found.who(OTHER_AGENT, ids=[AGENT, OTHER_AGENT])
            assert await reason(found.score(level, by=both)) is Reason.DENIED
        alone = found.who(OTHER_AGENT, ids=[OTHER_AGENT])
        assert (await found.score("LOW", by=alone)).level == "LOW"
        assert {one.stage for one in await found.records(Refusal)} == {"score"}


async def test_whom_no_policy_permits_scores_nothing_and_that_is_written_down(tmp_path: Path) -> None:
    async with scored(tmp_path) as found:
        assert await reason(found.score("LOW", by=STRANGER)) is Reason.DENIED
        assert await found.level() is None
        (refusal,) = await found.records(Refusal)
        assert (refusal.principal, refusal.action, refusal.stage) == (STRANGER, "broker.score", "score")
        assert refusal.resource.endswith("/sessions/s-1")


async def test_a_session_cannot_be_given_to_another_principal(tmp_path: Path) -> None:
    async with scored(tmp_path) as found:
        await found.score("HIGH")
        assert await reason(found.score("LOW", principal=OTHER_AGENT)) is Reason.DENIED
        assert await found.level() == "HIGH"


@pytest.mark.parametrize(
    "changes",
    [
        {"session": ""},
        {"session": "a b"},
        {"session": "s/1"},
        {"session": ".."},
        {"session": "s" * 129},
        {"principal": ""},
        {"principal": "agent"},
        {"principal": "https://login.acme.test/subject/dQ"},
        {"level": "low"},
        {"level": "NONE"},
        {"level": ""},
        {"reason": "two\nlines"},
        {"reason": "x" * 501},
    ],
)
async def test_what_cannot_be_is_malformed_and_changes_nothing(tmp_path: Path, changes: dict[str, str]) -> None:
    async with scored(tmp_path) as found:
        usual = {"level": "LOW", "session": "s-1", "principal": AGENT, "reason": "x" * 500}
        assert await reason(found.score(**(usual | changes))) is Reason.MALFORMED
        assert await found.level() is None
        assert (await found.score(**usual)).level == "LOW"


async def test_each_score_is_told_to_who_listens(tmp_path: Path) -> None:
    async with scored(tmp_path) as found:
        await found.score("LOW")
        await found.score("HIGH")
        await found.event("HIGH", subject={"format": "opaque", "id": "s-1"})
        assert found.told == ["s-1"] * 3
