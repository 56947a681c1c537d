"""Giving back: while the store is away, what hangs on it, and grants."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
from support.exchanging import CORRELATION, Exchanging, act, exchanging, steps
from support.scope import ScopeAround
from support.signing_exchange import SigningExchange, signing_exchange
from support.whole_broker import ORDERS

from broker.callers import Caller
from broker.errors import Reason, Refused, Unavailable
from broker.exchange import Exchange
from broker.holder_revocation import GivingBack
from broker.ledger.records import Refusal, ScopeRefused
from broker.ledger.scope_store import ScopeStore
from broker.recheck import Recheck
from broker.scope.deciding import Deciding


@pytest.fixture
async def found(tmp_path: Path) -> AsyncIterator[Exchanging]:
    async with exchanging(tmp_path) as made:
        yield made


@pytest.fixture
async def signing(tmp_path: Path) -> AsyncIterator[SigningExchange]:
    async with signing_exchange(tmp_path) as made:
        yield made


class StoreAway(ScopeStore):
    """The store of a test, which takes nothing until it is told to."""

    def __init__(self, exchange: Exchange) -> None:
        super().__init__(exchange.ledger.submit, exchange.ledger.append_later)
        self.back, self.tried = False, asyncio.Event()

    async def refuse(self, refused: ScopeRefused, ends: Sequence[int]) -> int:
        self.tried.set()
        if not self.back:
            raise Unavailable(Reason.LEDGER_UNAVAILABLE, "away")
        return await super().refuse(refused, ends)


async def introspected(parts: Exchanging, around: ScopeAround, caller: Caller, shown: str) -> str:
    recheck: Recheck = around.recheck({})
    try:
        await recheck.introspect(caller, shown, parts.now(), CORRELATION)
    except Refused as error:
        return error.reason
    return ""


async def test_who_asks_again_while_it_is_being_recorded_hears_yes_no_sooner_than_the_first(
    found: Exchanging,
) -> None:
    """A yes that a crash could take back would be a lie."""
    around = ScopeAround(found.exchange, found.now)
    store = StoreAway(found.exchange)
    deciding = Deciding(found.exchange.scope, store, around.feed, around.again, found.now)
    giving = GivingBack(found.exchange, deciding)
    issued, holder = await found.token(act()), found.caller()
    asking = [asyncio.create_task(giving.revoke(holder, issued.token, found.now(), CORRELATION)) for _ in range(3)]
    await asyncio.wait_for(store.tried.wait(), 20)
    assert found.exchange.scope.is_refused(issued.claims.jti), "here it counts no more at once"
    await steps(10)
    assert not any(task.done() for task in asking)
    asking[0].cancel()  # the client goes away
    late = asyncio.create_task(giving.revoke(holder, issued.token, found.now(), CORRELATION))
    await steps(10)
    assert not late.done()
    assert around.feed.position == 0, "guards hear nothing that is not durable"
    store.back = True
    await asyncio.wait_for(asyncio.gather(*asking[1:], late), 20)
    assert around.feed.position == 1
    assert len([one for one in await found.records() if isinstance(one, ScopeRefused)]) == 1


async def test_a_token_that_the_ledger_does_not_know_is_not_revoked(found: Exchanging, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    async with exchanging(elsewhere) as other:
        other.exchange.keyring, theirs = found.exchange.keyring, other.exchange.keyring
        unknown = await other.token(act())
        other.exchange.keyring = theirs
    around = ScopeAround(found.exchange, found.now)
    giving = GivingBack(found.exchange, around.deciding)
    with pytest.raises(Refused) as caught:
        await giving.revoke(found.caller(), unknown.token, found.now(), CORRELATION)
    assert caught.value.reason is Reason.REVOKED
    await giving.revoke(found.caller(), (await found.token(act())).token, found.now(), CORRELATION)
    records = await found.records()
    assert len([one for one in records if isinstance(one, ScopeRefused)]) == 1
    assert [one.stage for one in records if isinstance(one, Refusal)] == ["revoke"]


async def test_a_token_of_before_the_start_is_found_in_the_ledger(found: Exchanging) -> None:
    around = ScopeAround(found.exchange, found.now)
    issued = await found.token(act())
    found.exchange.scope.live.remove(issued.claims.jti)
    await GivingBack(found.exchange, around.deciding).revoke(found.caller(), issued.token, found.now(), CORRELATION)
    assert found.exchange.scope.is_refused(issued.claims.jti)
    assert await introspected(found, around, found.caller(ORDERS), issued.token) == Reason.REVOKED


# -- signing grants --------------------------------------------------------------------------------------------------


async def test_a_grant_that_was_given_back_signs_nothing(signing: SigningExchange) -> None:
    around = ScopeAround(signing.parts.exchange, signing.parts.now)
    giving = GivingBack(signing.parts.exchange, around.deciding)
    grant, spared = await signing.grant(), await signing.grant()
    with pytest.raises(Refused) as caught:
        await giving.revoke(signing.parts.caller(ORDERS), grant, signing.parts.now(), CORRELATION)
    assert caught.value.reason is Reason.DENIED
    assert await introspected(signing.parts, around, signing.caller, grant) == ""
    await giving.revoke(signing.caller, grant, signing.parts.now(), CORRELATION)
    with pytest.raises(Refused) as caught:
        await signing.sign(grant)
    assert caught.value.reason is Reason.REVOKED
    assert (await signing.sign(spared, "j" * 20)).bundle


async def test_a_holder_asks_about_its_grant_and_nobody_else(signing: SigningExchange) -> None:
    around = ScopeAround(signing.parts.exchange, signing.parts.now)
    grant = await signing.grant()
    assert await introspected(signing.parts, around, signing.caller, grant) == ""
    assert await introspected(signing.parts, around, signing.parts.caller(ORDERS), grant) == Reason.WRONG_AUDIENCE
    await signing.sign(grant)
    assert await introspected(signing.parts, around, signing.caller, grant) == Reason.ALREADY_USED
