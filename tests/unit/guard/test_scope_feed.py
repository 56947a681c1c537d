"""A guard follows the feed by itself: it comes back, misses nothing, and believes nothing that it did not hear."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from support.exchanging import steps
from support.issuer import AUDIENCE, ISSUER, Issuer, guard_for
from support.lives import claims_of, live
from support.processes import PATIENCE_S, until

from broker._proto.actionbroker.v1 import scope_pb2
from broker.errors import BrokerError, Invalid, Reason, Refused, Unavailable
from broker.guard import Guard, ScopeFeed
from broker.guard.verify import Allowed

KEYS = Issuer()
Said = scope_pb2.WatchResponse | Exception | None


def utc_now() -> datetime:
    return datetime.now(UTC)


class Broker:
    """What a broker's feed says: a message at a time, an error that ends the stream, None for its end."""

    def __init__(self) -> None:
        self.asked: list[tuple[tuple[str, ...], str, int]] = []
        self._said: asyncio.Queue[Said] = asyncio.Queue()

    async def watch_scope(
        self, audiences: Sequence[str], *, feed: str = "", after: int = 0
    ) -> AsyncIterator[scope_pb2.WatchResponse]:
        self.asked.append((tuple(audiences), feed, after))
        while (said := await self._said.get()) is not None:
            if isinstance(said, Exception):
                raise said
            yield said

    def says(self, *said: Said) -> None:
        for one in said:
            self._said.put_nowait(one)

    def whole(self, to: int = 0, **fields: object) -> None:
        snapshot = scope_pb2.Snapshot(first=True, last=True)
        self.says(self.message(0, to, snapshot=snapshot, key_set=KEYS.jwks(), **fields))

    def message(self, start: int, to: int, *, feed: str = "one", **fields: object) -> scope_pb2.WatchResponse:
        now = Timestamp()
        now.FromDatetime(utc_now())
        return scope_pb2.WatchResponse(feed=feed, to=to, as_of=now, sent_at=now, **{"from": start}, **fields)

    def refuses(self, jti: str) -> dict[str, object]:
        ends = int(utc_now().timestamp()) + 300
        return {"refused": [scope_pb2.RefusedCredential(jti=jti, reason="denied", until=ends)]}


def feed_of(broker: Broker, **options: object) -> ScopeFeed:
    return ScopeFeed(broker, audiences=[AUDIENCE], **options)


def fresh(jti: str = "one") -> Allowed:
    """A credential that is good for a minute by the real clock."""
    one = live(jti)
    one.expires_at = utc_now().timestamp() + 60
    return Allowed(principal=one.principal, action=one.to_action(), claims=claims_of(one))


def says(feed: ScopeFeed, allowed: Allowed) -> str:
    try:
        feed.require(allowed.claims, utc_now())
    except BrokerError as error:
        return error.reason
    return ""


async def ready(feed: ScopeFeed) -> None:
    async with asyncio.timeout(PATIENCE_S):
        await feed.ready()


async def test_it_comes_back_by_itself_and_goes_on_where_it_was() -> None:
    broker = Broker()
    async with feed_of(broker) as feed:
        broker.whole(5)
        await ready(feed)
        for number, end in enumerate((None, Unavailable(Reason.BROKER_UNREACHABLE, "cut"), RuntimeError("whatever"))):
            broker.says(end)
            await until(lambda asked=number + 2: len(broker.asked) == asked, "it comes back")
            assert broker.asked[-1] == ((AUDIENCE,), "one", 5 + number)
            broker.says(broker.message(5 + number, 6 + number, **broker.refuses(f"{number}")))
            await until(lambda jti=f"{number}": says(feed, fresh(jti)) == "denied", "what it missed is told")
        assert [says(feed, fresh(f"{number}")) for number in range(4)] == ["denied", "denied", "denied", ""]


@pytest.mark.parametrize("broken", ["a gap", "keys"])
async def test_what_cannot_be_true_has_it_all_told_anew(broken: str) -> None:
    broker = Broker()
    async with feed_of(broker) as feed:
        broker.whole(5)
        await ready(feed)
        broker.says(broker.message(7, 8) if broken == "a gap" else broker.message(5, 6, key_set=b"{"))
        await until(lambda: len(broker.asked) == 2, "it comes back")
        assert broker.asked[-1] == ((AUDIENCE,), "", 0)
        assert says(feed, fresh()) == "scope_stale"
        assert feed.last_error
        broker.whole(8)
        await ready(feed)
        assert says(feed, fresh()) == ""


async def test_a_guard_without_a_whole_snapshot_refuses() -> None:
    broker = Broker()
    async with feed_of(broker) as feed:
        guard = Guard(issuer=ISSUER, audience=AUDIENCE, scope=feed, clock=utc_now)
        with pytest.raises(Unavailable) as stale:
            guard.still_good(fresh())
        assert stale.value.reason is Reason.SCOPE_STALE
        broker.says(broker.message(0, 0, snapshot=scope_pb2.Snapshot(first=True), key_set=KEYS.jwks()))
        broker.says(broker.message(0, 0, snapshot=scope_pb2.Snapshot(last=True)))
        await ready(feed)
        guard.still_good(fresh())


async def test_who_waits_is_woken_by_a_refusal_and_by_silence_alike() -> None:
    broker, ticks = Broker(), [0.0]
    async with feed_of(broker, seconds=lambda: ticks[0]) as feed:
        guard = Guard(issuer=ISSUER, audience=AUDIENCE, scope=feed, clock=utc_now)
        broker.whole()
        await ready(feed)
        dies = asyncio.create_task(guard.until_dead(fresh("dies")))
        silenced = asyncio.create_task(guard.until_dead(fresh("silenced")))
        broker.says(broker.message(0, 1, **broker.refuses("dies")))
        async with asyncio.timeout(PATIENCE_S):
            assert (await dies).reason is Reason.DENIED
        assert not silenced.done()
        ticks[0] += 5  # nothing is heard any more
        async with asyncio.timeout(PATIENCE_S):
            assert (await silenced).reason is Reason.SCOPE_STALE


async def test_who_waits_is_woken_when_its_own_time_is_over() -> None:
    guard = await guard_for(KEYS, clock=utc_now)
    one = live("brief")
    one.expires_at = utc_now().timestamp() - 4  # and 5 s of leeway
    brief = Allowed(principal=one.principal, action=one.to_action(), claims=claims_of(one))
    guard.still_good(brief)
    async with asyncio.timeout(PATIENCE_S):
        assert (await guard.until_dead(brief)).reason is Reason.EXPIRED


async def test_when_the_feed_is_left_nothing_is_believed_and_nobody_waits_on() -> None:
    broker = Broker()
    async with feed_of(broker) as feed:
        guard = Guard(issuer=ISSUER, audience=AUDIENCE, scope=feed, clock=utc_now)
        broker.whole()
        await ready(feed)
        waiting = asyncio.create_task(guard.until_dead(fresh()))
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="followed already"):
            await feed.__aenter__()
        assert says(feed, fresh()) == ""
    async with asyncio.timeout(PATIENCE_S):
        assert (await waiting).reason is Reason.SCOPE_STALE


async def test_an_unknown_key_waits_for_a_feed_that_is_being_opened_again_and_for_no_other() -> None:
    """A broker that was started anew signs with keys that only its feed has told."""
    broker = Broker()
    async with feed_of(broker) as feed:
        broker.whole()
        await ready(feed)
        assert await feed.refetch() is False, "it is connected: there is nothing to wait for"
        broker.says(None)
        await until(lambda: len(broker.asked) == 2, "it comes back")
        waiting = asyncio.create_task(feed.refetch())
        await steps(20)
        assert feed.is_fresh, "what was heard before still counts"
        assert not waiting.done(), "but says nothing of keys that came since"
        broker.says(broker.message(0, 0))
        async with asyncio.timeout(PATIENCE_S):
            assert await waiting is True


async def test_a_broker_that_says_no_is_asked_again_and_not_believed_meanwhile() -> None:
    broker = Broker()
    async with feed_of(broker) as feed:
        broker.says(Refused(Reason.WRONG_AUDIENCE, "not yours"))
        await until(lambda: len(broker.asked) == 2, "it comes back")
        assert "wrong_audience" in str(feed.last_error)
        assert says(feed, fresh()) == "scope_stale"
        broker.whole()
        await ready(feed)
        assert says(feed, fresh()) == ""


@pytest.mark.parametrize("audience", ["orders", "https://a/../b", ""])
async def test_an_audience_that_is_none_is_said_at_once(audience: str) -> None:
    with pytest.raises(Invalid):
        ScopeFeed(Broker(), audiences=[audience])
    with pytest.raises(ValueError, match="not about this guard's audience"):
        Guard(issuer=ISSUER, audience=AUDIENCE, scope=ScopeFeed(Broker(), audiences=["spiffe://acme.test/other"]))


async def test_silence_is_bounded_by_configuration_and_never_switched_off() -> None:
    """Invariant 12."""
    for wrong in (timedelta(0), timedelta(hours=1), timedelta.max):
        with pytest.raises((ValueError, OverflowError)):
            feed_of(Broker(), max_silence=wrong)
