"""One grant, one signature: whatever is lost, asked again, asked at once or killed in between."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

import grpc
import pytest
from support.processes import until
from support.signing import SigningBroker, example_policies, signing_broker
from support.signing_calls import (
    NIGHTLY,
    UNLIMITED,
    acts,
    ask_sign,
    claims_of,
    get_grant,
    nothing_signed,
    results,
    spent,
)
from support.signing_parts import timestamps
from support.stamping import Stamping, stamping
from support.whole_broker import Said, Wire

from broker.errors import BrokerError, Reason


@dataclass
class Setting:
    """A broker whose signatures wait for an authority's timestamp as long as a test likes."""

    broker: SigningBroker
    authority: Stamping

    def signatures_of(self, grant: str) -> list[str]:
        """What became of each signature that was ever begun with it."""
        jti = claims_of(grant).jti
        found = {one.correlation_id for one in acts(self.broker.whole) if one.parent == jti}
        return [result for one in found for result in results(self.broker.whole, one)]


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    """Left as it was found."""
    with stamping() as authority:
        tables = timestamps(tmp_path_factory.mktemp("tsa"), authority.url, authority.tsa.pem)
        with signing_broker(example_policies() | NIGHTLY, limits=UNLIMITED, **tables) as broker:
            yield Setting(broker, authority)


class Holder:
    """A caller with a grant, and as many connections as it likes, all with the one key that the grant names."""

    def __init__(self, broker: SigningBroker, wire: Wire, grant: str, envelope: bytes) -> None:
        self.broker, self.wire, self.grant, self.envelope = broker, wire, grant, [envelope]

    async def sign(self, idempotency_id: str, wire: Wire | None = None) -> Said:
        return await ask_sign(wire or self.wire, self.grant, self.envelope, idempotency_id=idempotency_id)

    async def elsewhere(self, idempotency_id: str) -> Said:
        """On a new connection."""
        async with self.broker.whole.wire() as wire:
            wire.key = self.wire.key
            return await self.sign(idempotency_id, wire)


@pytest.fixture
async def holder(setting: Setting) -> AsyncIterator[Holder]:
    async with setting.broker.whole.wire() as wire:
        envelope = setting.broker.builder.envelope()
        grant = await get_grant(wire, setting.broker.nightly(), [envelope])
        yield Holder(setting.broker, wire, grant.grant, envelope)


async def test_two_that_ask_at_the_same_instant_get_one_signature(setting: Setting) -> None:
    """Invariant 7: from two connections, many times over: one wins, the other finds it used."""
    whole = setting.broker.whole
    async with whole.wire() as first, whole.wire() as second:
        second.key = first.key
        for number in range(20):
            envelope = setting.broker.builder.envelope()
            grant = (await get_grant(first, setting.broker.nightly(), [envelope])).grant
            said = await asyncio.gather(
                *[
                    ask_sign(wire, grant, [envelope], idempotency_id=f"{number:020}-{name}")
                    for name, wire in (("a", first), ("b", second))
                ]
            )
            assert sorted(one.reason for one in said) == ["", Reason.ALREADY_USED]
            assert setting.signatures_of(grant) == ["issued"]


async def test_two_hundred_that_ask_at_once_get_one_signature(setting: Setting, holder: Holder) -> None:
    """Invariant 7: each with an id of its own, over twenty connections."""
    start = asyncio.Event()

    async def ask(first: int) -> list[Said]:
        async with setting.broker.whole.wire() as wire:
            wire.key = holder.wire.key
            await start.wait()
            return [await holder.sign(f"{number:020}", wire) for number in range(first, first + 10)]

    asking = [asyncio.ensure_future(ask(first)) for first in range(0, 200, 10)]
    start.set()
    said = [one for some in await asyncio.gather(*asking) for one in some]
    assert Counter(one.reason for one in said) == {"": 1, Reason.ALREADY_USED: 199}
    assert setting.signatures_of(holder.grant) == ["issued"]
    assert spent(setting.broker.whole, holder.grant) == "used"


async def test_many_clients_calls_at_once_get_one_signature(setting: Setting) -> None:
    """Invariant 7: by our own client. Some find too many before them, and may ask again."""
    async with setting.broker.client() as client:
        grant = await client.signing.grant(setting.broker.nightly(), (setting.broker.builder.envelope(),))

        async def ask() -> str:
            try:
                return (await client.signing.sign(grant)).bundle
            except BrokerError as error:
                return str(error.reason)

        answers = Counter(await asyncio.gather(*[ask() for _ in range(200)]))
    refused = answers.pop(Reason.ALREADY_USED) + answers.pop(Reason.ATTESTATION_UNAVAILABLE, 0)
    assert (refused, list(answers.values())) == (199, [1])
    assert setting.signatures_of(grant.grant) == ["issued"]


async def test_a_lost_answer_is_the_same_when_it_is_asked_for_again(setting: Setting, holder: Holder) -> None:
    """Byte for byte, on this connection and on a new one; and nothing is signed for it."""
    first = await holder.sign("i" * 20)
    assert first.code is grpc.StatusCode.OK
    with nothing_signed(setting.broker.whole):
        again = [await holder.sign("i" * 20), await holder.elsewhere("i" * 20), await holder.elsewhere("i" * 20)]
        for one in again:
            assert one.code is grpc.StatusCode.OK
            one.message.correlation_id = first.message.correlation_id
            assert one.message.SerializeToString(deterministic=True) == first.message.SerializeToString(
                deterministic=True
            )
        assert (await holder.elsewhere("j" * 20)).reason == Reason.ALREADY_USED


async def test_the_same_question_at_once_has_one_answer(setting: Setting, holder: Holder) -> None:
    asked = setting.authority.asked
    with setting.authority.holding():
        asking = [asyncio.ensure_future(holder.elsewhere("i" * 20)) for _ in range(12)]
        await setting.authority.waits(asked + 1)
    said = await asyncio.gather(*asking)
    assert {one.reason for one in said} == {""}
    assert len({one.message.bundle for one in said}) == 1
    assert setting.authority.asked == asked + 1
    assert setting.signatures_of(holder.grant) == ["issued"]


async def test_another_question_meanwhile_finds_it_used(setting: Setting, holder: Holder) -> None:
    """Invariant 7: the grant is spent before the key is used, not when the answer is there."""
    asked = setting.authority.asked
    with setting.authority.holding():
        first = asyncio.ensure_future(holder.elsewhere("i" * 20))
        await setting.authority.waits(asked + 1)
        assert spent(setting.broker.whole, holder.grant) == "used"
        other = asyncio.ensure_future(holder.elsewhere("j" * 20))
    assert (await other).reason == Reason.ALREADY_USED
    assert (await first).code is grpc.StatusCode.OK


async def test_who_goes_away_in_mid_call_finds_the_signature_when_it_comes_back(setting: Setting) -> None:
    asked, broker = setting.authority.asked, setting.broker
    async with broker.client() as client:
        grant = await client.signing.grant(broker.nightly(), (broker.builder.envelope(),))
        with setting.authority.holding():
            asking = asyncio.ensure_future(client.signing.sign(grant, idempotency_id="i" * 20))
            await setting.authority.waits(asked + 1)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
        await until(lambda: setting.signatures_of(grant.grant) == ["issued"], "it is finished, though nobody waits")
        with nothing_signed(broker.whole):
            found = await client.signing.sign(grant, idempotency_id="i" * 20)
            assert found.bundle
            assert setting.authority.asked == asked + 1
            with pytest.raises(BrokerError) as error:
                await client.signing.sign(grant)
            assert error.value.reason is Reason.ALREADY_USED


async def test_who_goes_away_and_asks_again_while_it_is_made_waits_for_that_very_one(
    setting: Setting, holder: Holder
) -> None:
    asked = setting.authority.asked
    with setting.authority.holding():
        first = asyncio.ensure_future(holder.elsewhere("i" * 20))
        await setting.authority.waits(asked + 1)
        first.cancel()
        await asyncio.wait((first,))
        again = asyncio.ensure_future(holder.sign("i" * 20))
    assert (await again).code is grpc.StatusCode.OK
    assert setting.signatures_of(holder.grant) == ["issued"]
    assert setting.authority.asked == asked + 1
