"""How late a change is noticed, end to end: a whole broker, and a guard that hears its feed (docs/staleness.md).

These are bounds of correctness: each has its number, and some slack for a machine that has other things to do. How fast
it is on an idle one is the bench's to say.
"""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import datetime, timedelta

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from support.processes import Child, script, until
from support.receiving import claims_of
from support.relay import relay
from support.scoped import Receiver, holding, receiver, write_policy
from support.whole_broker import AGENT, OPERATOR, ORDERS, POLICY, RESOURCE, Whole, utc_now, whole_broker

from broker.action import Action
from broker.client import ActionToken
from broker.ledger.records import PolicyChanged, ScopeRefused, Suspended, SuspensionEnded

SLACK_S = 1.0
EXEC_S = 1.3
MAX_SILENCE_S = 5.0
BLIND_S = 5.0
POLL_S = 1.0
LIMITS = {"requests_per_second": 10_000, "burst": 10_000}
WITHOUT_LONG = POLICY.replace('action == Action::"orders.long"', 'action == Action::"orders.closed"')


async def took(orders: Receiver, token: str, reason: str) -> float:
    """Seconds until the guard says this of the token."""
    start = time.monotonic()
    await orders.hears(token, reason)
    return time.monotonic() - start


# -- processes ---------------------------------------------------------------------------------------------------------


async def test_another_program_in_a_process_is_noticed_within_the_poll_whenever_it_takes_its_place() -> None:
    with whole_broker() as whole:
        async with receiver(whole) as orders, AsyncExitStack() as stack:
            held = [await stack.enter_async_context(holding(whole)) for _ in range(4)]
            _, spared = held.pop()
            late = []
            for child, token in held:  # each at another moment between two polls
                assert orders.reason(token) == ""
                child.tell("replace")
                assert await child.line() == "replaced"
                late.append(await took(orders, token, "not_attested"))
            assert max(late) < EXEC_S + SLACK_S
            assert orders.reason(spared) == ""


async def test_an_exit_is_noticed_without_a_poll() -> None:
    with whole_broker() as whole:
        async with receiver(whole) as orders, AsyncExitStack() as stack:
            held = [await stack.enter_async_context(holding(whole)) for _ in range(4)]
            _, spared = held.pop()
            late = []
            for child, token in held:
                assert orders.reason(token) == ""
                child.end()
                late.append(await took(orders, token, "not_attested"))
            assert min(late) < 0.3
            assert max(late) < SLACK_S
            assert orders.reason(spared) == ""


# -- the feed ----------------------------------------------------------------------------------------------------------


async def test_a_feed_that_is_cut_ends_all_belief_comes_back_by_itself_and_misses_nothing() -> None:
    """Invariant 8."""
    with whole_broker() as whole:
        async with (
            relay(whole.broker.socket) as way,
            receiver(whole, socket=way.path) as orders,
            whole.client(AGENT) as agent,
        ):
            hit = await agent.request("orders.long", RESOURCE, ORDERS)
            spared = await agent.request("orders.longest", RESOURCE, ORDERS)
            assert await orders.refused(hit) == await orders.refused(spared) == ""
            way.cut()
            late = await took(orders, spared.access_token, "scope_stale")
            assert MAX_SILENCE_S - 2 < late < MAX_SILENCE_S + SLACK_S, "believed while it can be, and no longer"
            assert await orders.refused(spared) == "scope_stale"

            write_policy(whole, WITHOUT_LONG)  # while nobody can be told
            await until(lambda: refusals(whole), "the broker refuses it")
            way.mend()
            await orders.hears(spared.access_token, "")
            assert orders.reason(hit.access_token) == "denied"
            assert await orders.refused(spared) == ""


async def test_a_feed_that_falls_silent_ends_all_belief_and_is_dialled_anew() -> None:
    """As when the broker's machine is gone: no connection ends, and nothing comes any more."""
    with whole_broker() as whole:
        async with (
            relay(whole.broker.socket) as way,
            receiver(whole, socket=way.path) as orders,
            whole.client(AGENT) as agent,
        ):
            token = await agent.request("orders.longest", RESOURCE, ORDERS)
            assert await orders.refused(token) == ""
            way.silence()
            late = await took(orders, token.access_token, "scope_stale")
            assert MAX_SILENCE_S - 2 < late < MAX_SILENCE_S + SLACK_S
            await orders.hears(token.access_token, "")


async def test_a_stream_on_which_nothing_comes_may_be_asked_whether_it_lives() -> None:
    """As our client asks of a feed that is silent; a gRPC server that was not told so ends it at the third time."""
    pings = [("grpc.keepalive_time_ms", 2_100), ("grpc.http2.max_pings_without_data", 0)]
    with whole_broker() as whole:
        async with grpc.aio.insecure_channel(whole.target, pings) as channel:
            stream = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            assert await stream.read() == health_pb2.HealthCheckResponse(status="SERVING")
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(9):
                    await stream.read()


def refusals(whole: Whole) -> list[ScopeRefused]:
    return [one for one in whole.records() if isinstance(one, ScopeRefused)]


# -- the store ---------------------------------------------------------------------------------------------------------

# Takes what every reader and writer of SQLite's write-ahead log needs, as a disk that hangs would: the eight locks of
# the -shm file, https://sqlite.org/walformat.html section 2.3.1.
_HOLD = """
import fcntl, sqlite3
reader = sqlite3.connect(sys.argv[1])
reader.execute("SELECT seq FROM ledger").fetchall()  # so that the broker is not the only one, and makes no new files
with open(sys.argv[1] + "-shm", "r+b") as file:
    while hear() == "hold":
        fcntl.lockf(file, fcntl.LOCK_EX, 8, 120)
        tell("held")
        hear()
        fcntl.lockf(file, fcntl.LOCK_UN, 8, 120)
        tell("released")
"""


async def told(child: Child, what: str) -> str:
    child.tell(what)
    return await child.line()


async def test_a_store_that_is_stuck_while_the_broker_speaks_ends_all_belief() -> None:
    """Invariant 8: it is the last proven read of the store that counts, not a live socket."""
    with whole_broker() as whole, script(_HOLD, str(whole.broker.ledger)) as holder:
        async with receiver(whole) as orders, whole.client(AGENT) as agent:
            token = await agent.request("orders.longest", RESOURCE, ORDERS)
            assert await orders.refused(token) == ""
            assert await told(holder, "hold") == "held"
            late = await took(orders, token.access_token, "scope_stale")
            assert MAX_SILENCE_S - 2 < late < MAX_SILENCE_S + SLACK_S
            assert orders.feed.last_error is None, "the feed itself never broke off"
            assert await told(holder, "release") == "released"
            await orders.hears(token.access_token, "")
            assert orders.feed.last_error is None
            assert await orders.refused(token) == ""


async def test_a_refusal_that_cannot_be_made_durable_ends_all_belief_until_it_is() -> None:
    with whole_broker() as whole:
        async with receiver(whole) as orders, whole.client(AGENT) as agent:
            hit = await agent.request("orders.long", RESOURCE, ORDERS)
            spared = await agent.request("orders.longest", RESOURCE, ORDERS)
            assert await orders.refused(hit) == await orders.refused(spared) == ""
            whole.limit_files(1)
            write_policy(whole, WITHOUT_LONG)
            await until(lambda: whole.broker.events("refusals_not_recorded"), "it has a refusal that it cannot keep")
            late = await took(orders, spared.access_token, "scope_stale")
            assert late < MAX_SILENCE_S + SLACK_S
            whole.limit_files(-1)
            await orders.hears(spared.access_token, "")
            assert orders.reason(hit.access_token) == "denied"
            assert [one.jtis for one in refusals(whole)] == [(claims_of(hit.access_token).jti,)]


# -- SPIRE -------------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def over_mtls(whole: Whole) -> AsyncIterator[str]:
    """A token that rests on an SVID, and on no process that SPIRE could be asked about."""
    async with whole.mtls(whole.domain.svid("build/agent")) as wire:
        yield await wire.token("orders.longest")


@pytest.mark.parametrize("how", ["its socket is gone", "it hangs"])
async def test_what_spire_cannot_be_asked_about_is_refused_after_its_bound_and_nothing_else(how: str) -> None:
    with whole_broker() as whole:
        async with (
            receiver(whole) as orders,
            over_mtls(whole) as spared,
            holding(whole, "orders.longest") as (child, token),
        ):
            assert orders.reason(token) == orders.reason(spared) == ""
            if how == "it hangs":
                os.kill(whole.domain.pid, signal.SIGSTOP)
            else:
                whole.domain.down()
            try:
                late = await took(orders, token, "attestation_unavailable")
                assert BLIND_S < late < POLL_S + BLIND_S + SLACK_S
                assert orders.reason(spared) == "", "SPIRE is not asked about who shows an SVID"
                assert await told(child, "token orders.read") == "attestation_unavailable"
            finally:
                if how == "it hangs":
                    os.kill(whole.domain.pid, signal.SIGCONT)
                else:
                    whole.domain.up()
            new = ""
            async with asyncio.timeout(20):
                while new in {"", "attestation_unavailable"}:
                    new = await told(child, "token orders.read")
            await orders.hears(new, "")
            assert orders.reason(token) == "attestation_unavailable", "what was refused stays so"
            assert orders.reason(spared) == ""


async def test_a_spire_that_comes_and_goes_within_the_bound_refuses_nothing_and_hides_nothing() -> None:
    with whole_broker(limits=LIMITS) as whole:
        async with (
            receiver(whole) as orders,
            holding(whole, "orders.longest") as (child, token),
            holding(whole, "orders.longest") as (other, spared),
        ):
            seen = {orders.reason(token), orders.reason(spared)}
            for _ in range(4):
                whole.domain.down()
                await says(other, refused=True)
                seen |= {orders.reason(token), orders.reason(spared)}
                whole.domain.up()
                await says(other, refused=False)
                seen |= {orders.reason(token), orders.reason(spared)}
            assert seen == {""}
            whole.domain.down()
            whole.domain.delete(whole.entries[f"build/agent of {child.pid}"])  # while nobody can look
            whole.domain.up()
            await orders.hears(token, "not_attested")
            assert orders.reason(spared) == ""


async def says(child: Child, *, refused: bool) -> None:
    """Asks until there is no token, or until there is one again."""
    async with asyncio.timeout(20):
        while (await told(child, "token orders.read") == "attestation_unavailable") is not refused:
            pass


async def test_the_entry_of_who_shows_an_svid_is_asked_about_by_nobody_and_an_operator_can_revoke_it() -> None:
    with whole_broker() as whole:
        async with (
            receiver(whole) as orders,
            over_mtls(whole) as token,
            holding(whole, "orders.longest") as (_, asked_about),
            whole.client(OPERATOR) as operator,
        ):
            for spiffe_id in [one for one in whole.entries if one.startswith((AGENT, "build/agent"))]:
                whole.domain.delete(whole.entries[spiffe_id])
            await orders.hears(asked_about, "not_attested")
            assert orders.reason(token) == "", "good until its SVID ends"
            await operator.scope.revoke(principal=AGENT)
            await orders.hears(token, "revoked")


# -- storms ------------------------------------------------------------------------------------------------------------


async def test_a_storm_of_policies_settles_on_the_last_one_and_the_broker_answers_meanwhile() -> None:
    with whole_broker(limits=LIMITS) as whole:
        async with receiver(whole) as orders, whole.client(AGENT) as agent:
            longs = [Action("orders.long", RESOURCE, ORDERS, {})] * 200
            hit = [one.access_token for one in await agent.request_many(longs) if isinstance(one, ActionToken)]
            assert len(hit) == 200, "more than are decided in a moment"
            spared = (await agent.request("orders.longest", RESOURCE, ORDERS)).access_token
            for turn in range(20):
                write_policy(whole, POLICY.replace('"200s"', f'"{199 - turn}s"'))
                whole.broker.process.send_signal(signal.SIGHUP)
                await agent.request("orders.read", RESOURCE, ORDERS)
            write_policy(whole, WITHOUT_LONG)
            await orders.hears(hit[-1], "denied")
            for token in hit:
                await orders.hears(token, "denied")
            await orders.hears(spared, "")
            await until(lambda: count(whole, Suspended) == count(whole, SuspensionEnded), "nothing is being decided")
            assert count(whole, Suspended) >= 1
            assert count(whole, PolicyChanged) >= 3, "several of them were in force"
            died = [jti for one in refusals(whole) for jti in one.jtis]
            assert sorted(died) == sorted(claims_of(token).jti for token in hit), "each once, and no other"


def count(whole: Whole, kind: type[object]) -> int:
    return sum(isinstance(one, kind) for one in whole.records())


# -- clocks ------------------------------------------------------------------------------------------------------------


async def test_a_guard_whose_clock_is_set_back_believes_nothing_again() -> None:
    ahead = timedelta()

    def clock() -> datetime:
        return utc_now() + ahead

    with whole_broker() as whole:
        async with receiver(whole, clock=clock) as orders, whole.client(AGENT) as agent:
            brief = (await agent.request("orders.brief", RESOURCE, ORDERS)).access_token
            long = (await agent.request("orders.longest", RESOURCE, ORDERS)).access_token
            assert orders.reason(brief) == orders.reason(long) == ""
            ahead = timedelta(seconds=8)  # within what two clocks may be apart
            assert orders.reason(long) == ""
            ahead = timedelta()
            assert orders.reason(brief) == "expired"
            assert orders.reason(long) == ""
            ahead = timedelta(seconds=-8)
            assert orders.reason(long) == "scope_stale", "further apart than two clocks may be"
            ahead = timedelta(hours=1)
            assert orders.reason(long) == "scope_stale"
            ahead = timedelta()
            assert orders.reason(long) == ""
