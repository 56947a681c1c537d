"""What guards are told: in order, without a gap, each of its own audiences alone. Invariant 8."""

from collections.abc import Iterable
from datetime import timedelta

import pytest
from support.lives import NOW, OTHERS, Reader, live
from support.whole_broker import ORDERS

from broker._proto.actionbroker.v1 import scope_pb2
from broker.errors import Reason
from broker.scope.feed import IN_ONE, KEPT, Feed
from broker.scope.live import Live
from broker.scope.suspension import Common, Suspension

NOBODY = "spiffe://acme.test/service/nobody"


@pytest.fixture
def feed() -> Feed:
    found = Feed()
    found.proven(NOW)
    return found


def suspension(number: int, *lives: Live, common: Common | None = None) -> Suspension:
    waiting = {one.jti: one for one in lives}
    return Suspension(id=number, cause="cause", common=common, waiting=waiting)


def snapshot(feed: Feed, *audiences: str) -> list[scope_pb2.WatchResponse]:
    return [scope_pb2.WatchResponse.FromString(one) for one in feed.snapshot(tuple(sorted(audiences)), NOW)]


def since(feed: Feed, after: int, *audiences: str) -> tuple[int, scope_pb2.WatchResponse]:
    reached, message = feed.since(tuple(sorted(audiences or (ORDERS,))), after, NOW)
    return reached, scope_pb2.WatchResponse.FromString(message)


def refused(messages: Iterable[scope_pb2.WatchResponse]) -> list[str]:
    return [one.jti for message in messages for one in message.refused]


def test_each_message_begins_where_the_last_one_ended(feed: Feed) -> None:
    reader = Reader(feed).catch_up()
    at = [reader.state.position]
    for number in range(5):
        feed.refuse([live(f"{number}")], Reason.DENIED)
        message = reader.read()
        assert (getattr(message, "from"), message.to) == (at[-1], feed.position)
        at.append(message.to)
    assert at == sorted(set(at))
    heartbeat = reader.read()
    assert (getattr(heartbeat, "from"), heartbeat.to, heartbeat.as_of.ToDatetime()) == (
        *(at[-1], at[-1]),
        NOW.replace(tzinfo=None),
    )


def test_who_comes_late_is_told_all_that_still_counts_and_who_heard_it_the_changes(feed: Feed) -> None:
    early = Reader(feed).catch_up()
    dead, alive, held = live("dead"), live("alive"), live("held")
    feed.refuse([dead], Reason.SESSION_RISK)
    feed.suspend(suspension(1, held))
    late = Reader(feed).catch_up()
    for reader in (early.catch_up(), late):
        assert reader.say([dead, alive, held]) == {"dead": "session_risk", "alive": "", "held": "suspended"}
    feed.release(1, [held])
    feed.release(1, (), all_left=True)
    for reader in (early.catch_up(), late.catch_up(), Reader(feed).catch_up()):
        assert reader.say([dead, alive, held]) == {"dead": "session_risk", "alive": "", "held": ""}


def test_a_refusal_is_told_for_as_long_as_anybody_may_believe_the_credential(feed: Feed) -> None:
    """Invariant 8: to expiry, leeway (5 s) and clock skew (5 s)."""
    one = live("one", ends_s=60)
    feed.refuse([one], Reason.DENIED)
    (message,) = snapshot(feed, ORDERS)
    assert one.expires_at + 10 <= message.refused[0].until <= one.expires_at + 12


def test_what_the_broker_forgot_is_told_no_more_and_what_it_knows_is(feed: Feed) -> None:
    feed.refuse([live("old")], Reason.DENIED)
    feed.refuse([live("others", audience=OTHERS)], Reason.DENIED)
    feed.refuse([live("new")], Reason.DENIED)
    feed.forget({"new"}.__contains__)
    assert refused(snapshot(feed, ORDERS, OTHERS)) == ["new"]
    feed.forget(lambda _: False)
    assert refused(snapshot(feed, ORDERS)) == []


def test_no_audience_hears_of_another(feed: Feed) -> None:
    ours, theirs = live("ours"), live("theirs", audience=OTHERS)
    feed.refuse([ours, theirs], Reason.DENIED)
    feed.suspend(suspension(1, live("ours-held"), live("theirs-held", audience=OTHERS)))
    feed.suspend(suspension(2, live("theirs-too", audience=OTHERS), common=Common(actions=frozenset({"orders.read"}))))
    feed.release(1, [live("ours-held"), live("theirs-held", audience=OTHERS)])
    feed.release(2, (), all_left=True)
    feed.suspend(suspension(3, live("theirs-again", audience=OTHERS)))
    _, changes = since(feed, 0)
    for message in (changes, *snapshot(feed, ORDERS)):
        text = str(message)
        assert "ours" in text
        assert "theirs" not in text
        assert {one.id for one in message.suspended} == {1}
        assert {one.suspension for one in message.released} <= {1}
    _, changes = since(feed, 0, NOBODY)
    for message in (changes, *snapshot(feed, NOBODY)):
        assert (len(message.refused), len(message.suspended), len(message.released)) == (0, 0, 0)
    both = refused(snapshot(feed, ORDERS, OTHERS))
    assert sorted(both) == ["ours", "theirs"]


def test_a_snapshot_of_more_than_fits_comes_in_parts_and_counts_with_the_last(feed: Feed) -> None:
    lives = [live(f"{number}") for number in range(2 * IN_ONE + 1)]
    feed.refuse(lives, Reason.DENIED)
    parts = snapshot(feed, ORDERS)
    assert [(part.snapshot.first, part.snapshot.last) for part in parts] == [
        (True, False),
        (False, False),
        (False, True),
    ]
    assert {part.to for part in parts} == {feed.position}
    reader = Reader(feed)
    for _ in parts[:-1]:
        reader.read()
        assert not reader.state.is_whole
        assert reader.says(live("alive")) == "scope_stale"
    reader.read()
    assert {reader.says(one) for one in lives} == {"denied"}
    assert reader.says(live("alive")) == ""


def test_changes_that_do_not_fit_into_one_message_claim_no_proof_until_all_are_told(feed: Feed) -> None:
    """Else a reader that lags would take old knowledge for fresh: `as_of` is about everything committed before it."""
    reader = Reader(feed).catch_up()
    for start in range(0, 3 * IN_ONE, IN_ONE):
        feed.refuse([live(f"{number}") for number in range(start, start + IN_ONE)], Reason.DENIED)
    proofs = []
    while not reader.knows_all:
        message = reader.read()
        proofs.append(message.HasField("as_of"))
        assert len(message.refused) <= 2 * IN_ONE
    assert proofs == [False, False, True]
    assert reader.says(live(f"{3 * IN_ONE - 1}")) == "denied"


def test_who_fell_behind_is_not_told_half_of_what_it_missed(feed: Feed) -> None:
    reader = Reader(feed).catch_up()
    missed = [live(f"{number}") for number in range(KEPT + 1)]
    for one in missed:
        feed.refuse([one], Reason.DENIED)
    behind = reader.state.position
    assert not feed.can_resume(feed.name, behind)
    assert feed.can_resume(feed.name, behind + 1)
    with pytest.raises(LookupError):
        feed.since((ORDERS,), behind, NOW)
    reader.come_back()
    reader.catch_up()
    assert set(reader.say(missed).values()) == {"denied"}


def test_only_this_process_numbers_can_be_resumed(feed: Feed) -> None:
    feed.refuse([live("one")], Reason.DENIED)
    assert feed.can_resume(feed.name, 0)
    assert feed.can_resume(feed.name, feed.position)
    for name, after in ((feed.name, feed.position + 1), ("", 0), ("another", 0), (feed.name, 2**64 - 1)):
        assert not feed.can_resume(name, after)
    assert Feed().name != Feed().name


def test_keys_ride_along_once_for_each_change_and_with_every_snapshot(feed: Feed) -> None:
    feed.offer_keys(b"first")
    feed.offer_keys(b"first")
    assert feed.position == 1
    assert since(feed, 0, NOBODY)[1].key_set == b"first"
    assert snapshot(feed, NOBODY)[0].key_set == b"first"
    feed.offer_keys(b"second")
    assert since(feed, 1)[1].key_set == b"second"
    assert since(feed, 2)[1].key_set == b""


def test_a_message_is_made_once_for_all_who_watch_the_same_and_says_when_it_was_sent(feed: Feed) -> None:
    feed.refuse([live("one")], Reason.DENIED)
    first = feed.since((ORDERS,), 0, NOW)
    assert feed.since((ORDERS,), 0, NOW + timedelta(milliseconds=20))[1] is first[1]
    assert feed.since((OTHERS,), 0, NOW)[1] != first[1]
    for other in (NOW + timedelta(milliseconds=60), NOW - timedelta(seconds=1)):
        message = scope_pb2.WatchResponse.FromString(feed.since((ORDERS,), 0, other)[1])
        assert message.sent_at.ToDatetime() == other.replace(tzinfo=None)
    feed.refuse([live("two")], Reason.DENIED)
    assert refused([since(feed, 0)[1]]) == ["one", "two"]


def test_before_the_store_was_read_nothing_is_believed() -> None:
    unproven = Feed()
    reader = Reader(unproven).catch_up()
    assert reader.says(live("one")) == "scope_stale"
    unproven.proven(NOW)
    assert reader.catch_up().says(live("one")) == ""


def test_a_suspension_that_has_ended_is_not_ended_twice(feed: Feed) -> None:
    feed.suspend(suspension(1, live("one")))
    feed.release(1, (), all_left=True)
    at = feed.position
    feed.release(1, [live("one")])
    feed.release(1, (), all_left=True)
    feed.release(2, [live("one")])
    assert feed.position == at
