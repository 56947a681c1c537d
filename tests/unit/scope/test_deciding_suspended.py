"""What cannot be decided in a moment is suspended first, and only what was decided is believed again. Invariant 8."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import apsw
import pytest
from support.exchanging import steps
from support.lives import Reader
from support.processes import until
from support.redeciding import ASKS_FOR_PODS, POLICY, SHORT, Redeciding, Source, redeciding

from attestors.contract import AttestationUnavailable, FactKey
from broker.errors import Reason, Refused, Unavailable
from broker.ledger.records import Suspended, SuspensionEnded
from broker.scope.case import AT_ONCE, RELEASE_EACH, Bounds
from broker.scope.live import Live
from broker.scope.scope import Scope
from broker.scope.suspension import BY_NAME

CLOSED = POLICY.replace('action in [Action::"orders.read", Action::"orders.once"]', 'action == Action::"orders.once"')


def seen_of(found: Redeciding, one: Live, decided: list[int] | None = None) -> list[str]:
    """What a guard says of it after each single change of the feed, in order and without repetition.

    decided: takes how many had been decided by then.
    """
    seen: list[str] = [found.says(one)]
    feed, reader = found.scope.feed, Reader(found.scope.feed, one.audience, now=found.parts.now())
    reader.catch_up()
    before = feed.wake

    def wake(_: object) -> None:
        reader.now = found.parts.now()
        says = reader.catch_up().says(one)
        if says != seen[-1]:
            seen.append(says)
            if decided is not None:
                decided.append(found.scope.deciding.decided)
        before(None)

    feed.wake = wake
    return seen


async def test_more_than_are_decided_in_a_moment_are_suspended_before_the_first_of_them_is_decided(
    tmp_path: Path,
) -> None:
    async with redeciding(tmp_path) as found:
        lives = [await found.token() for _ in range(AT_ONCE + 1)]
        bystander = await found.token("orders.once")
        decided: list[int] = []
        seen, spared = seen_of(found, lives[-1], decided), seen_of(found, bystander)
        await found.policy(CLOSED.replace('"300s"', '"200s"'))
        await found.settled()
        assert seen == ["", "suspended", "denied"]
        assert decided[0] == 0
        assert spared == ["", "suspended", ""]
        assert {found.says(one) for one in lives} == {"denied"}
        records = await found.records()
    (suspended,) = [one for one in records if isinstance(one, Suspended)]
    (ended,) = [one for one in records if isinstance(one, SuspensionEnded)]
    assert (suspended.count, ended.refused) == (AT_ONCE + 2, AT_ONCE + 1)
    assert suspended.cause.startswith("policy:")


async def test_those_that_pass_are_lifted_and_those_that_do_not_are_never_believed_in_between(tmp_path: Path) -> None:
    async with redeciding(tmp_path) as found:
        kept = [await found.token("orders.once") for _ in range(AT_ONCE)]
        lost = [await found.token() for _ in range(AT_ONCE)]
        seen = {one.jti: seen_of(found, one) for one in (kept[0], kept[-1], lost[0], lost[-1])}
        await found.policy(CLOSED.replace('"300s"', '"200s"'))
        await found.settled()
        for one in (kept[0], kept[-1]):
            assert seen[one.jti] == ["", "suspended", ""]
        for one in (lost[0], lost[-1]):
            assert seen[one.jti] == ["", "suspended", "denied"]


async def test_many_are_lifted_part_by_part_as_they_are_decided_and_named_by_what_they_have_in_common(
    tmp_path: Path,
) -> None:
    """What they have in common is more than they are: what is minted meanwhile is told as lifted at once."""
    async with redeciding(tmp_path) as found:
        lives = [await found.token() for _ in range(BY_NAME + RELEASE_EACH)]
        feed, messages = found.scope.feed, []
        reader = Reader(feed, lives[0].audience, now=found.parts.now()).catch_up()
        feed.wake = lambda _: messages.append(reader.read())
        await found.policy(POLICY.replace('"300s"', '"200s"'))
        await until(lambda: any(one.suspended for one in messages), "they are suspended")
        fresh = await found.token()
        await found.settled()
        (suspended,) = [one for message in messages for one in message.suspended]
        changed = ["orders.also", "orders.once", "orders.read", "orders.ticketed"]
        assert (list(suspended.jtis), list(suspended.actions)) == ([], changed)
        released = [one for message in messages for one in message.released]
        parts = [len(one.jtis) for one in released if len(one.jtis) > 1]
        assert len(parts) >= 2
        assert max(parts) <= max(RELEASE_EACH, len(lives) // 8)
        assert released[-1].all
        assert {found.says(one) for one in (*lives, fresh)} == {""}


async def test_few_that_are_decided_at_once_are_not_suspended(tmp_path: Path) -> None:
    desk = Source()
    async with redeciding(tmp_path, desk, bounds=Bounds(patience_s=20)) as found:
        one = await found.token("orders.ticketed", ticket="T-1")
        seen = seen_of(found, one)
        desk.tell("T-1")
        await until(lambda: desk.looks["T-1"] == 2, "it is looked at")
        await found.settled()
        assert seen == [""]


async def test_a_slow_look_suspends_what_waits_for_it(tmp_path: Path) -> None:
    desk = Source()
    async with redeciding(tmp_path, desk, bounds=Bounds(blind_s=20)) as found:
        one, bystander = await found.token("orders.ticketed", ticket="T-1"), await found.token()
        seen, spared = seen_of(found, one), seen_of(found, bystander)
        held = desk.holds["T-1"] = asyncio.Event()
        desk.tell("T-1")
        await found.becomes(one, "suspended")
        held.set()
        await found.settled()
        assert (seen, spared) == (["", "suspended", ""], [""])


async def test_what_is_suspended_is_used_up_by_nobody(tmp_path: Path) -> None:
    """Check, Redeem and Sign ask scope first: suspended is neither yes nor final."""
    desk = Source()
    async with redeciding(tmp_path, desk, bounds=Bounds(blind_s=20)) as found:
        scope, one = found.parts.exchange.scope, await found.token("orders.ticketed", ticket="T-1")
        scope.require(one.jti)
        held = desk.holds["T-1"] = asyncio.Event()
        desk.tell("T-1")
        await found.becomes(one, "suspended")
        with pytest.raises(Unavailable) as suspended:
            scope.require(one.jti)
        assert suspended.value.reason is Reason.SUSPENDED
        desk.closes("T-1")
        held.set()
        await found.becomes(one, "ticket_closed")
        with pytest.raises(Refused) as refused:
            scope.require(one.jti)
        assert refused.value.reason is Reason.TICKET_CLOSED


async def test_whatever_deciding_meets_what_it_could_not_decide_is_refused_and_never_lifted(tmp_path: Path) -> None:
    """Invariant 6: an error is a no. Here a record of who vouched for its caller that cannot be read any more."""
    async with redeciding(tmp_path) as found:
        lives = [await found.token() for _ in range(AT_ONCE + 1)]
        other = await found.token("orders.once")
        lives[10].authority_sha256 = "no hexadecimal digits"
        seen = [seen_of(found, one) for one in (lives[10], lives[-1])]
        await found.policy(POLICY.replace('"300s"', '"200s"'))
        await found.settled()
        assert seen == [["", "suspended", "attestation_unavailable"]] * 2
        assert found.says(other) == "", "it had been decided before"
        fresh = await found.token()
        await found.policy(POLICY)
        await found.settled()
        assert found.says(fresh) == "", "deciding goes on"


# -- blind -------------------------------------------------------------------------------------------------------------


async def test_what_cannot_be_looked_at_is_suspended_and_refused_after_the_bound(tmp_path: Path) -> None:
    desk = Source()
    async with redeciding(tmp_path, desk, bounds=SHORT) as found:
        one, other = [await found.token("orders.ticketed", ticket=ticket) for ticket in ("T-1", "T-2")]
        seen = seen_of(found, one)
        started = asyncio.get_running_loop().time()
        desk.fails["T-1"] = AttestationUnavailable("away")
        desk.tell("T-1")
        await found.becomes(one, "attestation_unavailable")
        took = asyncio.get_running_loop().time() - started
        await found.settled()
        assert seen == ["", "suspended", "attestation_unavailable"]
        assert took >= found.scope.deciding.bounds.blind_s
        assert desk.looks["T-1"] > 3, "it was tried again and again"
        assert found.says(other) == ""


async def test_what_is_seen_again_within_the_bound_is_lifted(tmp_path: Path) -> None:
    desk = Source()
    async with redeciding(tmp_path, desk, bounds=Bounds(blind_s=20, again_s=0.01)) as found:
        one = await found.token("orders.ticketed", ticket="T-1")
        seen = seen_of(found, one)
        desk.fails["T-1"] = AttestationUnavailable("away")
        desk.tell("T-1")
        await found.becomes(one, "suspended")
        desk.fails.clear()
        await found.settled()
        assert seen == ["", "suspended", ""]


async def test_a_source_that_hangs_holds_up_no_other_and_no_other_fact_of_its_own(tmp_path: Path) -> None:
    desk, scores = Source(), Source("session")
    async with redeciding(tmp_path, desk, scores, bounds=Bounds(blind_s=20)) as found:
        stuck = await found.token("orders.ticketed", ticket="T-1")
        same, other = await found.token("orders.ticketed", ticket="T-2"), await found.token("orders.also", session="s")
        desk.holds["T-1"] = asyncio.Event()
        desk.tell("T-1")
        await found.becomes(stuck, "suspended")
        desk.closes("T-2")
        scores.closes("s")
        await found.becomes(same, "ticket_closed")
        await found.becomes(other, "session_risk")
        assert found.says(stuck) == "suspended"
        desk.holds.pop("T-1").set()
        await found.becomes(stuck, "")


async def test_one_that_waits_holds_up_none_of_the_many_of_its_case(tmp_path: Path) -> None:
    """A policy wants a fact of all of them, and of one of them it cannot be seen: the others are lifted meanwhile."""
    scores = Source("session")
    asks = ASKS_FOR_PODS.replace("kubernetes", "session").replace('.state == "open"', '.level == "LOW"')
    async with redeciding(tmp_path, scores, bounds=Bounds(blind_s=20, again_s=0.02)) as found:
        lives = [await found.token("orders.also", session="") for _ in range(200)]
        for number, one in enumerate(lives):
            one.session, one.confirmation = f"s-{number}", f"key-{number}"  # as if each had been minted in its own
        scores.fails["s-3"] = AttestationUnavailable("away")
        held = scores.holds["s-7"] = asyncio.Event()
        await found.policy(POLICY + asks)
        blind = {3, 7}
        await until(lambda: len(scores.looks) == len(lives), "each was looked at")
        await until(
            lambda: {found.says(one) for number, one in enumerate(lives) if number not in blind} == {""},
            "the others are lifted",
        )
        assert {found.says(lives[number]) for number in blind} == {"suspended"}
        held.set()
        scores.fails.clear()
        await found.settled()
        assert {found.says(one) for one in lives} == {""}


async def test_being_one_of_many_is_no_reason_to_be_refused(tmp_path: Path) -> None:
    """The bound is of looking, not of waiting for one's turn: 300 credentials take longer than it here."""
    async with redeciding(tmp_path, bounds=Bounds(blind_s=0.01, again_s=0.005)) as found:
        lives = [await found.token() for _ in range(300)]
        await found.policy(POLICY.replace('"300s"', '"200s"'))
        await found.settled()
        assert {found.says(one) for one in lives} == {""}


async def test_a_storm_of_changes_of_one_fact_is_decided_a_bounded_number_of_times(tmp_path: Path) -> None:
    """10,000 notes while one look is under way: one more look tells all there is to tell."""
    desk = Source()
    async with redeciding(tmp_path, desk, bounds=Bounds(blind_s=20)) as found:
        one = await found.token("orders.ticketed", ticket="T-1")
        held = desk.holds["T-1"] = asyncio.Event()
        desk.tell("T-1")
        await until(lambda: desk.looks["T-1"] == 2, "it is looked at")
        for _ in range(10_000):
            found.parts.exchange.scope.tell(FactKey("ticket:T-1"))
        held.set()
        await found.settled()
        assert desk.looks["T-1"] == 3
        for _ in range(10_000):
            found.parts.exchange.scope.tell(FactKey("ticket:T-1"))
            await steps(1)
        await found.settled()
        assert found.says(one) == ""
        assert desk.looks["T-1"] < 5_000


async def test_what_changes_faster_than_it_is_decided_is_not_believed(tmp_path: Path) -> None:
    cluster, ci = Source("kubernetes"), Source("ci")
    async with redeciding(tmp_path, cluster, ci, bounds=SHORT) as found:
        one, bystander = await found.token("orders.also"), await found.token()
        scope: Scope = found.parts.exchange.scope
        ci.meanwhile.append(lambda: scope.tell(FactKey("kubernetes:job")))
        asks = ASKS_FOR_PODS + ASKS_FOR_PODS.replace("pods", "jobs").replace("kubernetes", "ci")
        await found.policy(POLICY + asks)
        await found.becomes(one, "attestation_unavailable")
        await found.settled()
        assert found.says(bystander) == ""


# -- the store ---------------------------------------------------------------------------------------------------------


async def test_while_the_store_cannot_be_written_refusals_count_here_and_no_proof_is_given(tmp_path: Path) -> None:
    """What guards know is then not all there is, so `as_of` grows old, and they soon believe nothing."""
    desk = Source()
    async with redeciding(tmp_path, desk) as found:
        scope, feed = found.parts.exchange.scope, found.scope.feed
        lives = [await found.token("orders.ticketed", ticket=ticket) for ticket in ("T-1", "T-2")]
        with nobody_writes(tmp_path):
            desk.closes("T-1", "T-2")
            await until(lambda: all(scope.is_refused(one.jti) for one in lives), "they are refused here at once")
            with pytest.raises(Refused) as refused:
                scope.require(lives[0].jti)
            assert refused.value.reason is Reason.TICKET_CLOSED
            await until(lambda: found.scope.deciding.refusing.unrecorded == 2, "they wait for the store")
            before = feed.as_of
            for _ in range(3):
                with suppress(Unavailable):
                    await found.scope.store.prove()  # in turn with those that would be told
            assert feed.as_of == before
        await until(lambda: feed.as_of != before, "proofs come again")
        assert found.scope.deciding.refusing.unrecorded == 0
        assert {found.says(one) for one in lives} == {"ticket_closed"}
        assert {jti for record in await found.refusals() for jti in record.jtis} == {one.jti for one in lives}


@contextmanager
def nobody_writes(folder: Path) -> Iterator[None]:
    """Somebody else holds the store's only place to write."""
    connection = apsw.Connection(str(folder / "ledger.db"))
    try:
        connection.execute("BEGIN IMMEDIATE")
        yield
        connection.execute("ROLLBACK")
    finally:
        connection.close()
