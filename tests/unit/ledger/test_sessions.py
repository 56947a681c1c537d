"""Sessions: scored into being, bound to one key, raised by any word, lowered by a younger one, gone in their time."""

import asyncio
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.ledger_records import NOW, PRINCIPAL, QUICK, Clock, checkpointer
from support.processes import until
from support.session_records import KEY, OTHER, OTHER_KEY, desk, event, scored, sql

from attestors.session import LEVELS
from broker.errors import Reason, Refused, Unavailable
from broker.ledger.reading import last_seq, read
from broker.ledger.scope_records import SecurityEvent, SessionBound, SessionScored
from broker.ledger.sessions import LIVES
from broker.ledger.verify import verify

DAY = LIVES.total_seconds()


def kinds(folder: Path, *wanted: type) -> list[str]:
    found = [row.record() for row in read(folder / "ledger.db")]
    return [type(record).__name__ for record in found if isinstance(record, wanted or (SessionScored, SessionBound))]


# -- scores ----------------------------------------------------------------------------------------------------------


async def test_a_session_that_nobody_scored_is_unknown_and_a_score_makes_it(tmp_path: Path) -> None:
    async with desk(tmp_path) as found:
        assert await found.level() is None
        assert await found.bind() is None, "nothing is bound that does not exist"
        row = await found.sessions.score(scored("MEDIUM"), lowers=False)
        assert (row.session, row.principal, row.level, row.key) == ("s-1", PRINCIPAL, "MEDIUM", "")
        assert (row.scored_at, row.said_at, row.ends_at) == (NOW, NOW, NOW + LIVES)
        assert await found.sessions.find("s-1", NOW) == row
        assert await found.level("s-2") is None
    assert kinds(tmp_path) == ["SessionScored"]


async def test_a_session_never_changes_hands(tmp_path: Path) -> None:
    async with desk(tmp_path) as found:
        await found.score("LOW")
        for level in LEVELS:
            with pytest.raises(Refused) as refused:
                await found.score(level, principal=OTHER)
            assert refused.value.reason is Reason.DENIED
        assert (await found.take("HIGH", principal=OTHER, after_s=1)).effect == "another_principal"
        assert await found.level(after_s=1) == "LOW"
        assert await found.score("HIGH") == "HIGH", "the control: its own"


async def test_who_may_not_lower_does_not_and_may_raise(tmp_path: Path) -> None:
    async with desk(tmp_path) as found:
        await found.score("MEDIUM", lowers=False)
        with pytest.raises(Refused) as refused:
            await found.score("LOW", lowers=False)
        assert refused.value.reason is Reason.DENIED
        assert await found.level() == "MEDIUM"
        assert await found.score("HIGH", lowers=False) == "HIGH"
        assert await found.score("LOW") == "LOW", "who may"


async def test_a_session_is_forgotten_a_day_after_its_last_score(tmp_path: Path) -> None:
    async with desk(tmp_path) as found:
        await found.score("HIGH")
        assert await found.level(after_s=DAY - 1) == "HIGH"
        assert await found.level(after_s=DAY) is None
        await found.score("LOW", now=NOW + timedelta(hours=1))
        assert await found.level(after_s=DAY + 3599) == "LOW"
        await found.bind(now=NOW + timedelta(hours=1))
        later = NOW + timedelta(days=3)
        assert await found.bind(now=later) is None
        assert await found.score("LOW", now=later, principal=OTHER) == "LOW", "the name is free again"
        assert (await found.sessions.find("s-1", later)).key == "", "and so is its key"


async def test_rows_that_ended_are_pruned_and_no_others(tmp_path: Path) -> None:
    clock = Clock()
    async with desk(tmp_path, clock, QUICK) as found:
        await found.score("HIGH", "old")
        await found.take("HIGH", "old", jti="e-old")
        clock.now = NOW + timedelta(hours=2)
        await found.score("LOW", "new", now=clock.now)
        await until(lambda: not sql(tmp_path, "SELECT 1 FROM events"), "the event is forgotten")
        assert sorted(sql(tmp_path, "SELECT id FROM sessions")) == [("new",), ("old",)]
        clock.now = NOW + LIVES + timedelta(seconds=62)
        await until(lambda: sql(tmp_path, "SELECT id FROM sessions") == [("new",)], "the old one is forgotten")


async def test_who_listens_hears_of_each_score_once_it_is_durable(tmp_path: Path) -> None:
    async with desk(tmp_path) as found:
        await found.score("LOW")
        await found.bind()
        await found.take("HIGH", after_s=1)
        await found.take("HIGH", after_s=1)  # shown again, maybe because nobody heard of it
        await found.take("LOW", jti="stale", after_s=2, said_at=NOW)
        await found.take("LOW", "s-unknown", principal="")
        with pytest.raises(Refused):
            await found.score("LOW", principal=OTHER)
        await until(lambda: found.told == ["s-1"] * 3, "each score is told, and nothing else")


async def test_who_goes_away_after_asking_has_it_told_all_the_same(tmp_path: Path) -> None:
    async with desk(tmp_path) as found:
        asking = asyncio.create_task(found.score("HIGH"))
        await asyncio.sleep(0)
        asking.cancel()
        await until(lambda: found.told == ["s-1"], "who listens hears of it")
        assert await found.level() == "HIGH"


# -- keys ------------------------------------------------------------------------------------------------------------


async def test_the_first_key_that_names_a_session_has_it_for_good(tmp_path: Path) -> None:
    async with desk(tmp_path) as found:
        await found.score("LOW")
        assert await found.bind(KEY) == KEY
        assert await found.bind(OTHER_KEY) == KEY
        assert await found.bind(KEY) == KEY
        for level in ("HIGH", "LOW"):
            await found.score(level)
            assert await found.key() == KEY, "a score takes it from nobody"
        assert await found.bind(OTHER_KEY) == KEY
    assert kinds(tmp_path, SessionBound) == ["SessionBound"]


async def test_of_many_keys_that_come_at_once_one_is_first(tmp_path: Path) -> None:
    async with desk(tmp_path) as found:
        await found.score("LOW")
        keys = await asyncio.gather(*(found.bind(f"key-{number}") for number in range(40)))
        assert len(set(keys)) == 1
    assert kinds(tmp_path, SessionBound) == ["SessionBound"]


async def test_nothing_is_bound_to_anothers_session_or_to_one_that_is_high(tmp_path: Path) -> None:
    async with desk(tmp_path) as found:
        await found.score("LOW")
        assert await found.bind(OTHER_KEY, principal=OTHER) == ""
        await found.score("HIGH")
        assert await found.bind() == ""
        await found.score("MEDIUM")
        assert await found.bind() == KEY


# -- events ----------------------------------------------------------------------------------------------------------


async def test_an_event_is_taken_once_and_shown_again_does_nothing(tmp_path: Path) -> None:
    async with desk(tmp_path) as found:
        first = await found.take("LOW", jti="e-1")
        assert (first.effect, first.sessions, first.repeated) == ("scored", ("s-1",), False)
        await found.take("HIGH", jti="e-2", after_s=1)
        again = await found.take("LOW", jti="e-1", after_s=2)
        assert (again.sessions, again.repeated) == ((), True), "what it scored was scored again"
        assert await found.level(after_s=2) == "HIGH"
        assert (await found.take("LOW", jti="e-3", after_s=3)).effect == "scored", "another one is another word"
    assert kinds(tmp_path, SecurityEvent) == ["SecurityEvent"] * 3
    written = [row.record() for row in read(tmp_path / "ledger.db")]
    events = {one.event: one.effect for one in written if isinstance(one, SecurityEvent)}
    by_event = [one.event for one in written if isinstance(one, SessionScored)]
    assert set(events.values()) == {"scored"}
    assert by_event == [*events], "each score names the event that it comes from"


async def test_an_event_that_is_late_lowers_nothing_and_raises_all_the_same(tmp_path: Path) -> None:
    async with desk(tmp_path) as found:
        await found.take("MEDIUM", after_s=10)
        assert (await found.take("LOW", jti="late", after_s=11, said_at=NOW + timedelta(seconds=9))).effect == "stale"
        assert (await found.take("LOW", jti="same", after_s=11, said_at=NOW + timedelta(seconds=10))).effect == "stale"
        assert await found.level(after_s=11) == "MEDIUM"
        assert (await found.take("HIGH", jti="late up", after_s=12, said_at=NOW)).effect == "scored"
        assert await found.level(after_s=12) == "HIGH"
        between = NOW + timedelta(seconds=5)
        assert (await found.take("LOW", jti="between", after_s=13, said_at=between)).effect == "stale"
        assert (await found.take("LOW", jti="younger", after_s=14)).effect == "scored"


async def test_an_event_of_before_an_operators_word_lowers_it_not(tmp_path: Path) -> None:
    async with desk(tmp_path) as found:
        ahead = NOW + timedelta(seconds=4)
        await found.take("LOW", after_s=0, said_at=ahead)  # its clock is ahead of ours
        await found.score("HIGH", now=NOW + timedelta(seconds=1))
        late = NOW + timedelta(seconds=3)
        assert (await found.take("LOW", jti="late", after_s=5, said_at=late)).effect == "stale"
        assert await found.score("LOW", now=NOW + timedelta(seconds=2)) == "LOW", "an operator's word is of now"


async def test_what_a_transmitter_may_not_lower_stays(tmp_path: Path) -> None:
    async with desk(tmp_path) as found:
        await found.score("HIGH")
        assert (await found.take("LOW", after_s=1, lowers=False)).effect == "not_lowered"
        assert await found.level(after_s=1) == "HIGH"
        assert (await found.take("LOW", after_s=2, jti="who may")).effect == "scored"


async def test_an_event_makes_a_session_where_it_says_whose_it_is(tmp_path: Path) -> None:
    async with desk(tmp_path) as found:
        assert (await found.take("LOW", "s-1", principal="")).effect == "unknown"
        assert await found.level("s-1") is None
        assert (await found.take("LOW", "s-2")).effect == "scored"
        assert await found.level("s-2") == "LOW"


async def test_a_session_that_was_revoked_before_it_was_known_is_revoked(tmp_path: Path) -> None:
    """Events overtake one another: what makes it LOW comes after what ends it."""
    async with desk(tmp_path) as found:
        assert (await found.take("HIGH", after_s=10, principal="")).effect == "scored"
        assert await found.bind(now=NOW + timedelta(seconds=10)) == ""
        made = await found.take("LOW", after_s=11, said_at=NOW + timedelta(seconds=5))
        assert made.effect == "stale"
        assert await found.level(after_s=11) == "HIGH"
        assert (await found.take("LOW", jti="younger", after_s=12)).effect == "scored"
        assert await found.bind(now=NOW + timedelta(seconds=12)) == KEY


async def test_an_event_about_a_principal_raises_all_its_sessions_and_lowers_none(tmp_path: Path) -> None:
    async with desk(tmp_path) as found:
        for session, level in (("a", "LOW"), ("b", "MEDIUM"), ("c", "HIGH")):
            await found.score(level, session)
        await found.score("LOW", "others", principal=OTHER)
        await found.take("HIGH", "nobodys", principal="")
        medium = await found.take("MEDIUM", "", jti="m", after_s=1)
        assert (medium.effect, medium.sessions) == ("scored", ("a",))
        assert (await found.take("LOW", "", jti="l", after_s=2)).effect == "none"
        high = await found.take("HIGH", "", jti="h", after_s=3)
        assert (high.effect, high.sessions) == ("scored", ("a", "b"))
        assert [await found.level(one) for one in ("a", "b", "c", "others")] == ["HIGH"] * 3 + ["LOW"]
        assert (await found.take("HIGH", "", jti="x", principal="")).effect == "unknown"
        assert (await found.take("HIGH", "", jti="y", principal="spiffe://acme.test/nobody")).effect == "unknown"
        await until(lambda: found.told[-3:] == ["a", "a", "b"], "each of them is told")


async def test_an_event_that_says_nothing_of_a_session_is_recorded_without_effect(tmp_path: Path) -> None:
    async with desk(tmp_path) as found:
        taken = await found.sessions.take(event("other"), NOW, None, lowers=True)
        assert (taken.effect, taken.sessions) == ("none", ())
        assert (await found.sessions.take(event("other"), NOW, None, lowers=True)).repeated
    assert kinds(tmp_path, SecurityEvent) == ["SecurityEvent"]


async def test_an_event_that_may_have_been_forgotten_is_not_taken_again(tmp_path: Path) -> None:
    """The clock goes ahead and back: what was pruned in between could be shown again."""
    clock = Clock()
    async with desk(tmp_path, clock, QUICK) as found:
        await found.take("LOW", jti="e-1")
        await found.take("HIGH", jti="e-2", after_s=1)
        clock.now = NOW + timedelta(days=2)
        await until(lambda: not sql(tmp_path, "SELECT 1 FROM events UNION ALL SELECT 1 FROM sessions"), "all forgotten")
        clock.now = NOW + timedelta(seconds=10)
        with pytest.raises(Refused) as refused:
            await found.take("LOW", jti="e-1", after_s=10, issued_after_s=0)
        assert refused.value.reason is Reason.EXPIRED
        assert await found.level(after_s=10) is None
        clock.now = NOW + timedelta(days=2, hours=2)
        late = clock.now - NOW
        assert (await found.take("LOW", jti="e-9", after_s=late.total_seconds())).effect == "scored"


# -- durable ---------------------------------------------------------------------------------------------------------


async def test_what_was_answered_is_covered_by_a_checkpoint_outside(tmp_path: Path) -> None:
    async with desk(tmp_path) as found:
        for change in (found.score("HIGH"), found.take("LOW", after_s=1), found.bind(now=NOW + timedelta(seconds=2))):
            await change
            checkpoint = checkpointer(tmp_path).read()
            assert checkpoint is not None
            assert checkpoint[0].size == last_seq(tmp_path / "ledger.db")


@pytest.mark.parametrize("hours", [0, 2, 23])
async def test_after_a_restart_all_is_as_it_was(tmp_path: Path, hours: int) -> None:
    clock = Clock()
    async with desk(tmp_path, clock) as found:
        await found.score("LOW", "low")
        await found.bind(session="low")
        await found.score("MEDIUM", "again")
        await found.bind(session="again")
        await found.take("LOW", "high", jti="e-1")
        await found.score("HIGH", "high")
        clock.now = NOW + timedelta(hours=hours)
        await found.score("LOW", "again", now=clock.now)
    for _ in range(2):
        async with desk(tmp_path, clock) as found:
            after = clock.now.timestamp() - NOW.timestamp()
            assert [await found.level(one, after) for one in ("low", "again", "high")] == ["LOW", "LOW", "HIGH"]
            assert [await found.key(one, after) for one in ("low", "again", "high")] == [KEY, KEY, ""]
            assert await found.bind(OTHER_KEY, "low", now=clock.now) == KEY
            if not hours:
                assert (await found.take("LOW", "high", jti="e-1", after_s=1)).repeated
    assert verify(tmp_path / "ledger.db").finding is None


async def test_in_a_new_epoch_every_session_is_unknown_and_no_earlier_event_makes_one(tmp_path: Path) -> None:
    """A store that was put back does not know what was scored since: invariant 7."""
    clock = Clock()
    async with desk(tmp_path, clock) as found:
        await found.take("LOW", jti="e-1")
        await found.take("HIGH", jti="e-2", after_s=1)
    (tmp_path / "checkpoint").unlink()
    clock.now = NOW + timedelta(seconds=60)
    for _ in range(2):
        async with desk(tmp_path, clock) as found:
            assert found.ledger.epoch == 2
            assert await found.level(after_s=60) is None
            assert (await found.take("LOW", jti="lost", after_s=60, issued_after_s=2)).effect in {"unknown", "none"}
            assert await found.level(after_s=60) is None
    async with desk(tmp_path, clock) as found:
        assert (await found.take("HIGH", jti="late", after_s=61, issued_after_s=3)).effect == "scored", "up, always"
        assert (await found.take("LOW", jti="late2", after_s=62, issued_after_s=4)).effect == "stale"
        assert (await found.take("LOW", jti="new", after_s=90)).effect == "scored"


async def test_what_could_not_be_answered_is_told_all_the_same(tmp_path: Path) -> None:
    """It may be durable: while the outside checkpoint cannot be written, what is scored counts, and nobody hears of it.

    Who listens looks at the session again; a transmitter sends again what it had no answer to.
    """
    async with desk(tmp_path) as found:
        for session in ("s-1", "s-2"):
            await found.score("LOW", session)
        await until(lambda: found.told == ["s-1", "s-2"], "the control")
        (tmp_path / "checkpoint").unlink()
        (tmp_path / "checkpoint").mkdir()  # nobody can write a file over it
        with pytest.raises(Unavailable):
            await found.score("MEDIUM")
        with pytest.raises(Unavailable):
            await found.take("HIGH", "", jti="all", after_s=1)
        with pytest.raises(Unavailable):
            await found.take("HIGH", "s-3", jti="one", after_s=1)
        assert [await found.level(one, 1) for one in ("s-1", "s-2", "s-3")] == ["HIGH"] * 3
        await until(lambda: found.told[2:] == ["s-1", "s-3"], "each that is known to be meant")
        (tmp_path / "checkpoint").rmdir()
        again = await found.take("HIGH", "", jti="all", after_s=2)
        assert (again.repeated, again.sessions) == (True, ("s-1", "s-2"))
        await until(lambda: found.told[4:] == ["s-1", "s-2"], "the others when it is sent again")


# -- whatever comes in whatever order ----------------------------------------------------------------------------------

word = st.tuples(st.sampled_from(LEVELS), st.integers(0, 20), st.booleans())


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(word, min_size=1, max_size=12))
async def test_the_level_is_never_below_the_youngest_word(
    tmp_path_factory: pytest.TempPathFactory, words: list[tuple[str, int, bool]]
) -> None:
    """Said after so many seconds, by an event or an operator; they arrive in the order of the list."""
    folder = tmp_path_factory.mktemp("ledger")
    async with desk(folder) as found:
        youngest, expected = -1, ""
        for number, (level, said_s, by_event) in enumerate(words):
            at = 100 + number
            if by_event:
                await found.take(level, jti=f"{number}", after_s=at, said_at=NOW + timedelta(seconds=said_s))
            else:
                said_s = at  # noqa: PLW2901 -- an operator speaks of now
                await found.score(level, now=NOW + timedelta(seconds=at))
            if said_s > youngest:
                youngest, expected = said_s, level
            elif LEVELS.index(level) > LEVELS.index(expected):
                expected = level
            assert await found.level(after_s=at) == expected
        before = await found.level(after_s=200)
    async with desk(folder) as found:
        assert await found.level(after_s=200) == before
