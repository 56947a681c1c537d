"""What happens to the wire between broker and guard: cut, silent, slow. Nothing is missed, and nothing old believed."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import apsw
import grpc
import pytest
from support.broker import ISSUER
from support.processes import until
from support.receiving import claims_of
from support.scoped import Receiver
from support.signing_calls import UNLIMITED
from support.whole_broker import AGENT, OPERATOR, ORDERS, POLICY, RESOURCE, Whole, serving, utc_now, whole_broker
from support.wires import Cut, Wired, ended, narrow, told, watcher

from broker.action import Action
from broker.client import ActionToken
from broker.errors import Reason, Unavailable
from broker.guard import Guard, Memory, ScopeFeed
from broker.ledger.records import ScopeRefused, SuspensionEnded

BRIEF = timedelta(seconds=1)


def write_policy(whole: Whole, text: str) -> None:
    """Replaces the policy in one step."""
    new = whole.broker.folder / "policy" / "new"
    new.write_text(text)
    new.replace(whole.broker.folder / "policy" / "orders.cedar")


def without(*actions: str) -> str:
    """The policy, but for these."""
    text = POLICY
    for action in actions:
        text = text.replace(f'action == Action::"{action}"', 'action == Action::"orders.closed"')
    return text


@asynccontextmanager
async def wired(whole: Whole, cut: Cut, **options: timedelta) -> AsyncIterator[tuple[Receiver, Wired]]:
    """A guard of ORDERS whose feed comes through a wire that a test may cut."""
    source = Wired(cut.port, whole.domain.svid("service/orders"))
    async with whole.client(ORDERS) as client, ScopeFeed(source, audiences=[ORDERS], **options) as feed:
        async with asyncio.timeout(20):
            await feed.ready()
        guard = Guard(issuer=ISSUER, audience=ORDERS, scope=feed, broker=client, memory=Memory(), clock=utc_now)
        yield Receiver(guard, feed, client), source


async def read(whole: Whole, *actions: str) -> list[ActionToken]:
    async with whole.client(AGENT) as agent:
        return [await agent.request(action, RESOURCE, ORDERS) for action in actions]


async def test_a_guard_that_was_cut_off_goes_on_where_it_was_and_has_missed_nothing() -> None:
    """Resumed by sequence number: what changed meanwhile is told, and nothing else."""
    with whole_broker() as whole:
        async with Cut(whole.broker.grpc_port) as cut, wired(whole, cut) as (orders, source):
            first, second, kept = await read(whole, "orders.long", "orders.longest", "orders.read")
            write_policy(whole, without("orders.long"))
            await orders.hears(first.access_token, "denied")
            assert source.asked == [("", 0)]
            cut.cut()
            write_policy(whole, without("orders.long", "orders.longest"))
            await until(lambda: _refused(whole, second), "it is refused while nobody hears")
            assert orders.reason(second.access_token) == "", "and believed for as long as silence may last"
            cut.mend()
            await orders.hears(second.access_token, "denied")
            assert [orders.reason(one.access_token) for one in (first, kept)] == ["denied", ""]
            name, after = source.asked[-1]
            assert name
            assert after > 0
            assert len({feed for feed, _ in source.asked if feed}) == 1, "the numbering is the same"


def _refused(whole: Whole, token: ActionToken) -> bool:
    jti = claims_of(token.access_token).jti
    return any(jti in one.jtis for one in whole.records() if isinstance(one, ScopeRefused))


@pytest.mark.parametrize("how", ["cut", "hold"])
async def test_a_guard_that_hears_nothing_refuses_everything_and_recovers_by_itself(how: str) -> None:
    """Invariant 8: whether the connection is gone, or lives and carries nothing."""
    with whole_broker() as whole:
        async with Cut(whole.broker.grpc_port) as cut, wired(whole, cut, max_silence=BRIEF) as (orders, _):
            (token,) = await read(whole, "orders.longest")
            assert await orders.refused(token) == ""
            getattr(cut, how)()
            await orders.hears(token.access_token, "scope_stale")
            assert await orders.refused(token) == "scope_stale"
            cut.mend()
            await orders.hears(token.access_token, "")
            assert await orders.refused(token) == ""


async def test_a_broker_that_was_killed_suspends_what_lived_and_lifts_it_and_nothing_refused_comes_back() -> None:
    with whole_broker() as whole:
        async with Cut(whole.broker.grpc_port) as cut, wired(whole, cut) as (orders, source):
            dead, alive = await read(whole, "orders.long", "orders.longest")
            write_policy(whole, without("orders.long"))
            await orders.hears(dead.access_token, "denied")
            names = {feed for feed, _ in source.asked}
            cut.cut()
            whole.broker.kill()
            write_policy(whole, POLICY)
            with serving(whole.broker.folder / "broker.toml", whole.domain) as whole.broker:
                cut.mend(whole.broker.grpc_port)
                (new,) = await read(whole, "orders.long")
                await orders.hears(new.access_token, "")  # its key has come with the feed
                await orders.hears(alive.access_token, "")
                assert orders.reason(dead.access_token) == "denied"
                assert await orders.refused(new) == ""
                cut.cut()
                cut.mend()
                await until(lambda: source.asked[-1][0] not in {*names, ""}, "the numbering is another process's")
                ended = [one for one in whole.records() if isinstance(one, SuspensionEnded)]
                assert [one.refused for one in ended][-1] == 0


# -- the store ---------------------------------------------------------------------------------------------------------


@contextmanager
def nobody_writes(whole: Whole) -> Iterator[None]:
    """Somebody else holds the store's only place to write."""
    connection = apsw.Connection(str(whole.broker.ledger))
    try:
        connection.execute("BEGIN IMMEDIATE")
        yield
        connection.execute("ROLLBACK")
    finally:
        connection.close()


@pytest.mark.parametrize("how", ["locked", "full"])
async def test_while_the_store_is_stuck_guards_refuse_although_the_feed_lives(how: str, tmp_path: Path) -> None:
    """Invariant 8: `as_of` ages, since no read is proven; and all goes on by itself when the store does."""
    with whole_broker() as whole:
        async with Cut(whole.broker.grpc_port) as cut, wired(whole, cut) as (orders, source):
            (token,) = await read(whole, "orders.longest")
            assert await orders.refused(token) == ""
            if how == "locked":
                with nobody_writes(whole):
                    await _tries(whole)
                    await orders.hears(token.access_token, "scope_stale")
                    assert source.asked == [("", 0)], "the stream has been there all the time"
            else:
                whole.limit_files(4096)
                await _tries(whole)
                await orders.hears(token.access_token, "scope_stale")
                assert source.asked == [("", 0)]
                whole.limit_files(2**40)
            await orders.hears(token.access_token, "")
            assert await orders.refused(token) == ""
            assert source.asked == [("", 0)]


async def _tries(whole: Whole) -> None:
    """Somebody wants a token meanwhile, and gets none."""
    async with whole.client(AGENT) as agent:
        with pytest.raises(Unavailable) as unavailable:
            await agent.request("orders.read", RESOURCE, ORDERS)
        assert unavailable.value.reason in {Reason.LEDGER_UNAVAILABLE, Reason.BROKER_UNREACHABLE}


# -- who does not listen -----------------------------------------------------------------------------------------------


async def test_a_watcher_that_does_not_read_is_cut_off_and_nothing_is_kept_for_it() -> None:
    """It takes what fits into its own window, and after 5 s of not taking more it has to come again."""
    wanted = [Action("orders.longest", RESOURCE, ORDERS)] * 250
    with whole_broker(limits=UNLIMITED) as whole:
        async with (
            narrow(whole) as slow,
            watcher(whole) as good,
            whole.client(AGENT) as agent,
            whole.client(OPERATOR) as operator,
        ):
            lazy, listening = slow.watch(ORDERS), good.watch(ORDERS)
            assert await told(lazy)
            assert await told(listening)
            before, revoked = _memory(whole), 0
            heard: Counter[str] = Counter()
            reading = asyncio.create_task(_count(listening, heard))
            for _ in range(16):
                await asyncio.gather(*(agent.request_many(wanted, deadline_s=20) for _ in range(2)))
                revoked += (await operator.scope.revoke(action="orders.longest")).hits
            await until(lambda: heard["refused"] == revoked == 16 * 500, "who listens hears all of it")
            await until(lambda: _watchers(whole) == 1, "who does not is cut off")
            assert not reading.done()
            reading.cancel()
            assert _memory(whole) - before < 64 * 2**20
            reason, _ = await ended(lazy)
            assert reason == Reason.QUOTA, "and told so, when it reads"
            assert sum([len(one.refused) for one in await told(slow.watch(ORDERS), 5)]) == revoked, "and may come again"


async def _count(call: Any, heard: Counter[str]) -> None:
    while (message := await call.read()) is not grpc.aio.EOF:
        heard["refused"] += len(message.refused)


def _watchers(whole: Whole) -> int:
    lines = whole.get("/metrics")[1].splitlines()
    (line,) = [line for line in lines if line.startswith("action_broker_scope_watchers ")]
    return int(float(line.split()[1]))


def _memory(whole: Whole) -> int:
    text = Path(f"/proc/{whole.broker.process.pid}/status").read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("VmRSS:")]
    return int(line.split()[1]) * 1024
