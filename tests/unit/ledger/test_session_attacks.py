"""Who can write the store writes the rows of sessions and events: no earlier score or other key may come of it."""

from collections.abc import Awaitable
from datetime import timedelta
from pathlib import Path

import pytest
from support.ledger_records import NOW, PRINCIPAL, Clock
from support.session_records import KEY, OTHER, OTHER_KEY, Desk, desk, sql

from broker.errors import Reason, Refused
from broker.ledger import records, recovery
from broker.ledger.records import PolicyChanged
from broker.ledger.scope_records import SessionBound, SessionScored


async def low_then_high(folder: Path, clock: Clock) -> None:
    """A session that was LOW, got its key, and is HIGH; one that is LOW and has no key; one that got its key last."""
    async with desk(folder, clock) as found:
        await found.score("LOW", now=clock.now)
        await found.bind(now=clock.now)
        await found.score("HIGH", now=clock.now)
        await found.score("LOW", "s-2", now=clock.now)
        await found.score("MEDIUM", "bound-last", now=clock.now)
        await found.bind(session="bound-last", now=clock.now)
        await found.take("LOW", jti="e-1", said_at=NOW - timedelta(seconds=1))


def numbers(folder: Path, kind: type[records.Record]) -> list[int]:
    rows = sql(folder, "SELECT seq, body FROM records ORDER BY seq")
    return [int(str(seq)) for seq, body in rows if isinstance(records.decode(bytes(body)), kind)]  # type: ignore[arg-type] - a blob


ATTACKS = {
    "an-earlier-score": "UPDATE sessions SET scored = {first}, bound = 0",
    "an-earlier-score-with-its-key": "UPDATE sessions SET scored = {first}, bound = {bound}",
    "a-later-record": "UPDATE sessions SET scored = scored + 1000 WHERE id = 's-1'",
    "no-record": "UPDATE sessions SET scored = 0, bound = 0",
    "before-the-first": "UPDATE sessions SET scored = -5",
    "no-longer-bound": "UPDATE sessions SET bound = 0",
    "longer-lived": "UPDATE sessions SET expires_at = 9999999999",
    "anothers": "UPDATE sessions SET principal = 'spiffe://acme.test/build/other'",
    "renamed": "UPDATE sessions SET id = 's-3' WHERE id = 's-1'",
    "deleted": "DELETE FROM sessions",
    "swapped": "UPDATE sessions SET scored = (SELECT min(scored) FROM sessions), bound = 0",
    "forgotten-events": "DELETE FROM events",
}


@pytest.mark.parametrize("hours", [0, 23], ids=["at-once", "a-day-later"])
@pytest.mark.parametrize("attack", ATTACKS)
async def test_sessions_whose_rows_somebody_changed_are_as_their_records_say_or_unknown(
    tmp_path: Path, attack: str, hours: int
) -> None:
    """After the next start. What is unknown is refused, so both are safe; LOW or unbound would not be."""
    clock = Clock()
    await low_then_high(tmp_path, clock)
    clock.now = NOW + timedelta(hours=hours)
    async with desk(tmp_path, clock) as found:  # so that the last record is of this hour
        await found.ledger.append(PolicyChanged(at=clock.now, revision="r"))
    first, *_ = numbers(tmp_path, SessionScored)
    bound, _ = numbers(tmp_path, SessionBound)
    sql(tmp_path, ATTACKS[attack].format(first=first, bound=bound))
    async with desk(tmp_path, clock) as found:
        after = hours * 3600.0
        level, key = await found.level(after_s=after), await found.key(after_s=after)
        assert (level, key) in {("HIGH", KEY), (None, None)}
        for session in ("s-1", "bound-last"):
            assert await found.bind(OTHER_KEY, session, now=clock.now) in {KEY, None}
        if not hours or attack == "longer-lived":
            assert (level, key) == ("HIGH", KEY), "the records of the last hour are always read"
        if not hours:
            assert (await found.take("LOW", jti="e-1")).repeated
        assert await found.level("s-3", after) is None


async def refusal(call: Awaitable[object]) -> Reason | None:
    try:
        await call
    except Refused as refused:
        return refused.reason
    return None


@pytest.mark.parametrize(
    "attack",
    [
        "UPDATE sessions SET scored = 1",
        "UPDATE sessions SET scored = 1000",
        "UPDATE sessions SET scored = (SELECT scored FROM sessions WHERE id = 's-2') WHERE id = 's-1'",
        "UPDATE sessions SET principal = 'spiffe://acme.test/build/other'",
        "INSERT OR REPLACE INTO sessions VALUES ('s-1', 'spiffe://acme.test/build/agent', 2, 2, 9999999999)",
    ],
    ids=["another-kind", "no-record", "anothers-score", "another-principal", "another-bound"],
)
async def test_a_score_that_nobody_gave_counts_for_nothing_in_a_running_broker(tmp_path: Path, attack: str) -> None:
    async with desk(tmp_path) as found:
        await found.score("LOW", "s-1")
        await found.score("LOW", "s-2")
        assert await found.level() == "LOW"
        sql(tmp_path, attack)
        for call in (found.level(), found.bind(), found.score("LOW"), found.take("LOW", after_s=1)):
            assert await refusal(call) is Reason.REVOKED


async def test_a_session_that_was_made_up_counts_for_nothing(tmp_path: Path) -> None:
    async with desk(tmp_path) as found:
        await found.score("LOW", "s-1")
        sql(tmp_path, "INSERT INTO sessions VALUES ('made-up', ?, 2, 0, 9999999999)", PRINCIPAL)
        assert await refusal(found.level("made-up")) is Reason.REVOKED
    async with desk(tmp_path) as found:
        assert await found.level("made-up") is None
        assert await found.level("s-1") == "LOW"


async def test_a_session_ends_when_its_record_says(tmp_path: Path) -> None:
    async with desk(tmp_path) as found:
        await found.score("LOW")
        sql(tmp_path, "UPDATE sessions SET expires_at = 9999999999")
        assert await found.level(after_s=86_399) == "LOW"
        assert await found.level(after_s=86_400) is None


async def test_a_row_that_somebody_made_up_keeps_no_event_from_being_taken(tmp_path: Path) -> None:
    """Who can write the store and knows what is coming would silence what says HIGH."""
    async with desk(tmp_path) as found:
        await found.score("LOW")
        await found.take("LOW", jti="another", after_s=1)
        coming = await found.take("LOW", jti="known", after_s=2)
        assert not coming.repeated
        (digest,) = [row for (row,) in sql(tmp_path, "SELECT event FROM events ORDER BY seq DESC LIMIT 1")]
        for seq in (1, 2, 999):
            sql(tmp_path, "UPDATE events SET seq = ? WHERE event = ?", seq, str(digest))
            taken = await found.take("HIGH", jti="known", after_s=3)
            assert (taken.repeated, taken.effect) == (False, "scored")
        assert await found.level(after_s=3) == "HIGH"
        assert (await found.take("HIGH", jti="known", after_s=3)).repeated, "the control"


async def test_a_session_out_of_reach_of_the_start_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing would say whether it was scored again."""
    async with desk(tmp_path) as found:
        await found.score("LOW", "s-1")
    async with desk(tmp_path) as found:
        assert await found.level("s-1") == "LOW", "the control: all of it is read"
        for number in range(10):
            await found.ledger.append(PolicyChanged(at=NOW, revision=f"{number}"))
        await found.score("LOW", "s-2")
    monkeypatch.setattr(recovery, "_READ_BACK_RECORDS", 8)
    async with desk(tmp_path) as found:
        assert await found.level("s-1") is None
        assert await found.level("s-2") == "LOW"


async def test_the_first_binding_and_the_second_stand_in_the_records(tmp_path: Path) -> None:
    """What a running broker can be made to do by who writes its store is seen afterwards, and ends with it."""
    async with desk(tmp_path) as found:
        await found.score("LOW")
        await found.bind()
        sql(tmp_path, "UPDATE sessions SET bound = 0")
        assert await found.bind(OTHER_KEY) == OTHER_KEY
    assert len(numbers(tmp_path, SessionBound)) == 2


async def test_who_scored_another_principals_session_is_not_believed_after_a_row_was_changed(tmp_path: Path) -> None:
    async with desk(tmp_path) as found:
        await found.score("LOW")
        sql(tmp_path, "UPDATE sessions SET principal = ?", OTHER)
        assert await refusal(found.score("LOW", principal=OTHER)) is Reason.REVOKED
    async with desk(tmp_path) as found:
        assert await refusal(found.score("LOW", principal=OTHER)) is Reason.DENIED


async def test_a_score_is_never_lost_between_two_starts(tmp_path: Path) -> None:
    """Killed right after the answer: what was answered is there."""
    for number, level in enumerate(("LOW", "HIGH", "MEDIUM", "HIGH")):
        found: Desk
        async with desk(tmp_path) as found:
            assert await found.level() == (None, "LOW", "HIGH", "MEDIUM")[number]
            await found.score(level)
