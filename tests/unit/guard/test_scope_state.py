"""What a guard knows of scope: all of it, in order, and fresh, or nothing at all. Invariant 8."""

from collections.abc import Iterable
from datetime import datetime, timedelta

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from support.issuer import Issuer
from support.lives import NOW, claims_of, live

from broker._proto.actionbroker.v1 import scope_pb2
from broker.errors import BrokerError, Invalid
from broker.guard.keys import StaleKeys, UnknownKey
from broker.guard.scope_state import FeedBroken, ScopeState

ISSUER = Issuer()
LATER = timedelta(seconds=1)
ALIVE, DEAD = live("alive"), live("dead")


def stamp(moment: datetime) -> Timestamp:
    found = Timestamp()
    found.FromDatetime(moment)
    return found


class Guarding:
    """A state, and a broker that tells it what a test says. now: by the broker's clock, `here` by the guard's."""

    def __init__(self, **options: timedelta) -> None:
        self.ticks = 1000.0
        self.now = self.here = NOW
        self.state = ScopeState(lambda: self.ticks, **options)

    def passes(self, seconds: float) -> None:
        """For both."""
        self.ticks += seconds
        self.now += timedelta(seconds=seconds)
        self.here += timedelta(seconds=seconds)

    def message(self, start: int, to: int, *, feed: str = "one", age_s: float = 0, **fields: object) -> object:
        as_of, sent_at = stamp(self.now - timedelta(seconds=age_s)), stamp(self.now)
        return scope_pb2.WatchResponse(feed=feed, to=to, as_of=as_of, sent_at=sent_at, **{"from": start}, **fields)

    def snapshot(self, to: int = 0, *, first: bool = True, last: bool = True, **fields: object) -> object:
        return self.message(0, to, snapshot=scope_pb2.Snapshot(first=first, last=last), **fields)

    def takes(self, *messages: object) -> "Guarding":
        for one in messages:
            self.state.take(one)
        return self

    def whole(self) -> "Guarding":
        return self.takes(self.snapshot(key_set=ISSUER.jwks()))

    def says(self, one: object = ALIVE) -> str:
        try:
            self.state.require(claims_of(one), self.here)
        except BrokerError as error:
            return error.reason
        return ""


def refused(*jtis: str, reason: str = "denied", until: datetime = NOW + timedelta(minutes=5)) -> Iterable[object]:
    return [scope_pb2.RefusedCredential(jti=one, reason=reason, until=int(until.timestamp())) for one in jtis]


def test_without_a_whole_snapshot_everything_is_refused() -> None:
    found = Guarding()
    assert found.says() == "scope_stale"
    found.takes(found.snapshot(last=False))
    assert (found.state.is_whole, found.says()) == (False, "scope_stale")
    found.takes(found.snapshot(first=False))
    assert (found.state.is_whole, found.says()) == (True, "")


def test_what_is_refused_is_refused_with_its_reason_and_nothing_else_is() -> None:
    found = Guarding().whole()
    assert found.says(DEAD) == ""
    assert found.state.take(found.message(0, 1, refused=refused("dead", reason="session_risk")))
    assert (found.says(DEAD), found.says()) == ("session_risk", "")
    assert not found.state.take(found.message(1, 1)), "a heartbeat changes nothing"


def test_a_reason_that_a_newer_broker_knows_refuses_as_well() -> None:
    found = Guarding().whole()
    found.takes(found.message(0, 1, refused=refused("dead", reason="of_the_future")))
    assert (found.says(DEAD), found.says()) == ("revoked", "")


@pytest.mark.parametrize(
    "message",
    [
        lambda found: found.message(6, 7),
        lambda found: found.message(4, 6),
        lambda found: found.message(5, 4),
        lambda found: found.message(5, 6, feed="another"),
        lambda found: found.snapshot(5, first=False),
    ],
    ids=["a gap", "what was told before", "backwards", "another numbering", "a part of no snapshot"],
)
def test_what_does_not_follow_ends_all_belief(message: object) -> None:
    """Told anew from the start, never mended by guessing: `feed` and `position` are gone as well."""
    found = Guarding().takes((made := Guarding()).snapshot(5))
    assert found.takes(made.message(5, 6)).takes(made.message(6, 6)).says() == ""
    found = Guarding().takes(made.snapshot(5))
    with pytest.raises(FeedBroken):
        found.takes(message(made))
    assert (found.says(), found.state.is_whole) == ("scope_stale", False)
    assert (found.state.feed, found.state.position) == ("", 0)
    with pytest.raises(FeedBroken):
        found.takes(made.message(5, 6))
    assert found.takes(made.snapshot(6)).says() == ""


def test_a_snapshot_that_broke_off_is_not_completed_by_what_was_known_before() -> None:
    """Resumed where it broke off, the changes are of what the guard never got."""
    found = Guarding().whole()
    found.takes(found.snapshot(9, last=False, feed="two", refused=refused("dead")))
    assert found.says() == "scope_stale", "what it knew is forgotten with the first part"
    assert (found.state.feed, found.state.position) == ("two", 9)
    with pytest.raises(FeedBroken):
        found.takes(found.message(9, 10, feed="two"))
    assert found.says() == "scope_stale"


def test_a_snapshot_of_another_moment_does_not_complete_one() -> None:
    found = Guarding()
    for other in ({"to": 2}, {"to": 1, "feed": "two"}):
        found.takes(found.snapshot(1, last=False))
        with pytest.raises(FeedBroken):
            found.takes(found.snapshot(first=False, **other))
        assert found.says() == "scope_stale"
    found.takes(found.snapshot(1, last=False), found.snapshot(2, last=False), found.snapshot(2, first=False))
    assert found.says() == "", "one that begins anew is a new one"


def test_a_new_snapshot_is_all_that_counts() -> None:
    found = Guarding().takes(Guarding().snapshot(refused=refused("dead"), suspended=[scope_pb2.Suspension(id=1)]))
    assert (found.says(DEAD), found.says()) == ("denied", "suspended")
    found.takes(found.snapshot(7, feed="two", refused=refused("alive")))
    assert (found.says(DEAD), found.says()) == ("", "denied")


# -- age ---------------------------------------------------------------------------------------------------------------


def test_silence_ends_belief_after_max_silence_and_a_word_restores_it() -> None:
    found = Guarding().whole()
    found.passes(4.9)
    assert found.says() == ""
    found.passes(0.2)
    assert found.says() == "scope_stale"
    found.takes(found.message(0, 0))
    assert found.says() == ""


def test_a_store_that_is_stuck_ages_what_is_told_although_the_socket_lives() -> None:
    """`as_of` counts, not that something came: heartbeats of a broker whose store does not answer prove nothing."""
    found = Guarding().whole()
    for age in range(1, 5):
        found.passes(1)
        found.takes(found.message(0, 0, age_s=age))
        assert found.says() == "", age
    found.passes(1)
    found.takes(found.message(0, 0, age_s=5))
    assert found.says() == "scope_stale"
    found.takes(found.message(0, 0))
    assert found.says() == ""


def test_a_message_without_a_proof_makes_nothing_younger() -> None:
    found = Guarding().whole()
    found.passes(4)
    for fields in (("as_of",), ("sent_at",)):
        message = found.message(0, 0)
        for field in fields:
            message.ClearField(field)
        found.takes(message)
    found.passes(1.5)
    assert found.says() == "scope_stale"


def test_a_broker_whose_clock_was_set_back_between_proof_and_word_proves_nothing_with_it() -> None:
    found = Guarding().whole()
    found.passes(4)
    found.takes(found.message(0, 0, age_s=-3600))
    found.passes(1.5)
    assert found.says() == "scope_stale"
    found.takes(found.message(0, 0))
    assert found.says() == ""


def test_what_lay_in_a_socket_for_long_is_not_fresh_when_it_is_read() -> None:
    """By the wall clocks: such a message says of itself that it was young when it was sent."""
    found = Guarding().whole()
    late = [found.message(0, 0) for _ in range(3)]
    found.passes(30)
    found.takes(*late)
    assert found.says() == "scope_stale"
    found.takes(found.message(0, 0))
    assert found.says() == ""


@pytest.mark.parametrize(("apart_s", "believed"), [(0, True), (4.9, True), (-4.9, True), (30, False), (-5.1, False)])
def test_clocks_that_are_too_far_apart_are_believed_neither(apart_s: float, believed: bool) -> None:  # noqa: FBT001
    found = Guarding().whole()
    found.here += timedelta(seconds=apart_s)
    assert found.says() == ("" if believed else "scope_stale")
    found.here = found.now
    assert found.says() == ""


@pytest.mark.parametrize("seconds", [0.9, 61])
def test_no_configuration_makes_silence_endless_or_shorter_than_a_heartbeat(seconds: float) -> None:
    """Invariant 12."""
    with pytest.raises(ValueError, match="max_silence"):
        Guarding(max_silence=timedelta(seconds=seconds))
    assert Guarding(max_silence=timedelta(seconds=60)).whole().says() == ""


def test_a_shorter_silence_is_kept() -> None:
    found = Guarding(max_silence=timedelta(seconds=1)).whole()
    found.passes(0.9)
    assert found.says() == ""
    found.passes(0.2)
    assert found.says() == "scope_stale"


# -- forgetting --------------------------------------------------------------------------------------------------------


def test_refusals_are_kept_until_nobody_can_believe_their_credential() -> None:
    found = Guarding()
    ends = NOW + timedelta(seconds=70)
    found.takes(found.snapshot(refused=refused("dead", until=ends)))
    dead = live("dead", ends_s=60)
    for _ in range(17):
        found.passes(4)
        found.takes(found.message(0, 0))
        found.state.forget(found.here)
        assert found.says(dead) == "denied"
    found.passes(4)
    found.takes(found.message(0, 0))
    found.state.forget(found.here)
    assert len(found.state._known.refused) == 0


def test_what_was_forgotten_does_not_count_again_when_the_clock_goes_back() -> None:
    found = Guarding()
    found.takes(found.snapshot(refused=refused("dead", until=NOW + timedelta(seconds=4))))
    dead = live("dead", ends_s=-6)
    assert found.says(dead) == "denied"
    found.passes(4.9)
    found.takes(found.message(0, 0))
    found.state.forget(found.here)
    found.here -= timedelta(seconds=4.9)
    assert found.says(dead) == "expired", "our clock was set back"
    assert found.says() == ""


def test_a_clock_that_runs_ahead_for_a_while_forgets_nothing_and_does_no_lasting_harm() -> None:
    found = Guarding().takes(Guarding().snapshot(refused=refused("dead")))
    found.here += timedelta(hours=1)
    found.state.forget(found.here)
    assert (found.says(), found.says(DEAD)) == ("scope_stale", "scope_stale")
    found.here -= timedelta(hours=1)
    found.state.forget(found.here)
    assert (found.says(), found.says(DEAD)) == ("", "denied")


# -- suspending --------------------------------------------------------------------------------------------------------


def test_those_that_are_named_are_suspended_until_they_are_released() -> None:
    found = Guarding().whole()
    one, two, other = live("one"), live("two"), live("other")
    assert found.state.take(found.message(0, 1, suspended=[scope_pb2.Suspension(id=1, jtis=["one", "two"])]))
    assert [found.says(each) for each in (one, two, other)] == ["suspended", "suspended", ""]
    assert not found.state.take(found.message(1, 2, released=[scope_pb2.Release(suspension=1, jtis=["one"])]))
    assert [found.says(each) for each in (one, two, other)] == ["", "suspended", ""]
    found.takes(found.message(2, 3, released=[scope_pb2.Release(suspension=1, all=True)]))
    assert [found.says(each) for each in (one, two, other)] == ["", "", ""]


@pytest.mark.parametrize(
    "common",
    [
        {"policy_other_than": "sha256:later"},
        {"actions": ["orders.read", "orders.once"]},
        {"principal": "spiffe://acme.test/build/agent"},
        {"principal": "spiffe://acme.test/build/"},
        {"trust_domain": "acme.test"},
        {"trust_domain": "acme.test", "actions": ["orders.read"], "policy_other_than": "sha256:later"},
        {},
    ],
)
def test_those_that_have_something_in_common_are_suspended_but_for_who_was_released(common: dict[str, object]) -> None:
    found = Guarding().whole()
    stranger = live(
        "stranger", principal="spiffe://other.test/x", action="orders.closed", policy_revision="sha256:later"
    )
    found.takes(found.message(0, 1, suspended=[scope_pb2.Suspension(id=1, **common)]))
    assert (found.says(), found.says(stranger)) == ("suspended", "" if common else "suspended")
    found.takes(found.message(1, 2, released=[scope_pb2.Release(suspension=1, jtis=["alive"])]))
    assert (found.says(), found.says(DEAD)) == ("", "suspended")


def test_two_suspensions_end_one_after_the_other_and_refused_outweighs_both() -> None:
    found = Guarding().whole()
    both = [scope_pb2.Suspension(id=number, jtis=["alive", "dead"]) for number in (1, 2)]
    found.takes(found.message(0, 1, suspended=both))
    found.takes(found.message(1, 2, refused=refused("dead"), released=[scope_pb2.Release(suspension=1, all=True)]))
    assert (found.says(), found.says(DEAD)) == ("suspended", "denied")
    found.takes(found.message(2, 3, released=[scope_pb2.Release(suspension=2, all=True)]))
    assert (found.says(), found.says(DEAD)) == ("", "denied")
    found.takes(found.message(3, 4, released=[scope_pb2.Release(suspension=99, jtis=["dead"], all=True)]))
    assert (found.says(), found.says(DEAD)) == ("", "denied")


# -- keys --------------------------------------------------------------------------------------------------------------


def test_keys_come_with_the_feed_and_are_as_old_as_it() -> None:
    found = Guarding()
    with pytest.raises(StaleKeys):
        found.state.key(ISSUER.kid)
    found.whole()
    assert found.state.key(ISSUER.kid).public_numbers() == ISSUER.key.public_key().public_numbers()
    with pytest.raises(UnknownKey):
        found.state.key("another")
    found.passes(6)
    with pytest.raises(StaleKeys):
        found.state.key(ISSUER.kid)


def test_keys_rotate_and_messages_without_keys_leave_them() -> None:
    found, successor = Guarding().whole(), Issuer("the next one")
    found.takes(found.message(0, 1))
    assert found.state.key(ISSUER.kid)
    found.takes(found.message(1, 2, key_set=successor.jwks()))
    assert found.state.key(successor.kid)
    with pytest.raises(UnknownKey):
        found.state.key(ISSUER.kid)


@pytest.mark.parametrize(
    "key_set",
    [
        ISSUER.jwks(d="c2VjcmV0"),
        ISSUER.jwks(k="c2VjcmV0"),
        b"{",
        b'{"keys":[]}',
        ISSUER.jwks(x="AAAA"),
        ISSUER.jwks() * 1000,
    ],
    ids=["a private key", "a secret key", "no JSON", "no key", "no point", "too much"],
)
def test_a_key_set_that_cannot_be_believed_ends_all_belief(key_set: bytes) -> None:
    found = Guarding().whole()
    with pytest.raises(Invalid):
        found.takes(found.message(0, 1, key_set=key_set))
    assert (found.says(), found.state.is_whole) == ("scope_stale", False)
    with pytest.raises(StaleKeys):
        found.state.key(ISSUER.kid)
    found.whole()
    assert found.says() == ""
