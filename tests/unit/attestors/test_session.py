"""The facts on sessions: whose, whose key's, how risky others say, and what is no session."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta

import pytest

from attestors.contract import AttestationFailed, AttestationRequest, AttestationUnavailable
from attestors.session import SessionAttestor, SessionSeen, is_session_id

NOW = datetime(2026, 11, 22, 23, 7, tzinfo=UTC)
AGENT, OTHER = "spiffe://acme.test/build/agent", "spiffe://acme.test/build/other"
KEY, OTHER_KEY = "key-of-the-agent", "key-of-somebody"
REQUEST = AttestationRequest(principal=AGENT, session="s-1", confirmation=KEY)


def seen(level: str = "LOW", key: str = KEY, principal: str = AGENT) -> SessionSeen:
    return SessionSeen(principal=principal, level=level, key=key, scored_at=NOW, ends_at=NOW + timedelta(hours=24))


@dataclass
class Written:
    """Sessions in memory. first: a key that binds the session just before another one does. bound: what was."""

    sessions: dict[str, SessionSeen] = field(default_factory=dict)
    first: str = ""
    away: bool = False
    bound: list[str] = field(default_factory=list)
    hearing: list[Callable[[str], None]] = field(default_factory=list)
    heard: asyncio.Event = field(default_factory=asyncio.Event)

    async def current(self, session: str, now: datetime) -> SessionSeen | None:  # noqa: ARG002 -- of SessionSource
        if self.away:
            raise AttestationUnavailable("away")
        return self.sessions.get(session)

    async def bind(self, session: str, principal: str, key: str, now: datetime) -> SessionSeen | None:  # noqa: ARG002
        found = self.sessions.get(session)
        if found is not None and not found.key:
            self.bound.append(self.first or key)
            self.sessions[session] = replace(found, key=self.first or key)
        return self.sessions.get(session)

    def subscribe(self, changed: Callable[[str], None]) -> Callable[[], None]:
        self.hearing.append(changed)
        self.heard.set()
        return lambda: self.hearing.remove(changed)


def source(**sessions: SessionSeen) -> Written:
    return Written({name.replace("_", "-"): one for name, one in sessions.items()})


async def why_not(written: Written, request: AttestationRequest = REQUEST) -> str:
    with pytest.raises(AttestationFailed) as failed:
        await SessionAttestor(written).attest(request, NOW)
    return str(failed.value)


async def test_the_facts_say_which_session_and_how_risky_it_is_until_it_is_forgotten() -> None:
    for level in ("LOW", "MEDIUM"):
        facts = await SessionAttestor(source(s_1=seen(level))).attest(REQUEST, NOW)
        assert facts is not None
        assert facts.values == {"id": "s-1", "level": level, "scored_at": int(NOW.timestamp())}
        assert (facts.attestor, facts.key, facts.attested_at) == ("session", "session:s-1", NOW)
        assert facts.expires_at == NOW + timedelta(hours=24)


async def test_who_names_no_session_has_none() -> None:
    written = Written(away=True)
    assert await SessionAttestor(written).attest(replace(REQUEST, session=""), NOW) is None


async def test_a_session_that_nobody_scored_is_none() -> None:
    """An agent that was led astray gets no better one by naming another."""
    written = source(s_1=seen())
    assert "nobody scored" in await why_not(written, replace(REQUEST, session="s-2"))
    assert not written.bound


async def test_high_refuses_whose_ever_it_is_and_binds_nothing() -> None:
    for key in ("", KEY):
        written = source(s_1=seen("HIGH", key))
        assert "HIGH" in await why_not(written)
        assert not written.bound
    assert await SessionAttestor(source(s_1=seen("MEDIUM"))).attest(REQUEST, NOW)


async def test_anothers_session_and_another_keys_are_refused() -> None:
    assert "another principal" in await why_not(source(s_1=seen(principal=OTHER)))
    assert "another principal" in await why_not(source(s_1=seen(principal="", key="")))
    assert "another principal" in await why_not(source(s_1=seen()), replace(REQUEST, principal=OTHER))
    assert "another key" in await why_not(source(s_1=seen(key=OTHER_KEY)))
    assert "another key" in await why_not(source(s_1=seen()), replace(REQUEST, confirmation=OTHER_KEY))


async def test_who_proved_no_key_has_no_session() -> None:
    for key in ("", KEY):
        written = source(s_1=seen(key=key))
        assert "proved none" in await why_not(written, replace(REQUEST, confirmation=""))
        assert not written.bound


async def test_the_first_key_that_names_a_session_is_bound_and_no_other() -> None:
    written = source(s_1=seen(key=""))
    assert await SessionAttestor(written).attest(REQUEST, NOW)
    assert written.bound == [KEY]
    assert "another key" in await why_not(written, replace(REQUEST, confirmation=OTHER_KEY))
    assert await SessionAttestor(written).attest(REQUEST, NOW), "the first one still has it"
    assert written.bound == [KEY]


async def test_of_two_keys_that_come_at_once_the_second_is_refused() -> None:
    written = source(s_1=seen(key=""))
    written.first = OTHER_KEY
    assert "another key" in await why_not(written)


async def test_what_is_decided_again_binds_nothing() -> None:
    again = replace(REQUEST, credential="a-token")
    written = source(s_1=seen(key=""))
    assert "another key" in await why_not(written, again)
    assert not written.bound
    assert await SessionAttestor(source(s_1=seen())).attest(again, NOW), "it is its own"


@pytest.mark.parametrize("name", ["s 1", "s/1", "s:1", "..%2f", "s\n", "s\x00", "é", "s" * 129, "s|1"])
async def test_a_name_that_none_can_have_is_refused_unread(name: str) -> None:
    assert not is_session_id(name)
    assert "no session can have this name" in await why_not(Written(away=True), replace(REQUEST, session=name))


@pytest.mark.parametrize("name", ["s", "A-z_0.9~", "s" * 128])
def test_names_are_what_a_uri_takes_as_it_is(name: str) -> None:
    assert is_session_id(name)


async def test_a_session_that_cannot_be_read_is_not_none() -> None:
    with pytest.raises(AttestationUnavailable):
        await SessionAttestor(Written(away=True)).attest(REQUEST, NOW)


async def test_each_score_is_told_and_nothing_is_ever_missed() -> None:
    written = Written()
    attestor = SessionAttestor(written)
    assert attestor.blind() == {}
    watching = attestor.watch()
    first = asyncio.create_task(anext(watching))
    await written.heard.wait()
    for session in ("a", "b", "a"):
        written.hearing[0](session)
    assert [await first, await anext(watching)] == ["session:a", "session:b"]
    later = asyncio.create_task(anext(watching))
    await asyncio.sleep(0)
    written.hearing[0]("c")
    assert await later == "session:c"
    await watching.aclose()
    assert not written.hearing
