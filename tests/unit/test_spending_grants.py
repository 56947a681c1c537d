"""How a grant is spent: the act is done once or not at all, in its time, and the ledger says what came of it."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from support.exchanging import CORRELATION
from support.signing_exchange import SigningExchange, signing_exchange
from support.whole_broker import OPERATOR

from broker import in_time
from broker.artifacts import SigningRequest
from broker.credentials import mint
from broker.credentials.action_token import Confirmation
from broker.errors import BrokerError, Invalid, Reason, Refused, Unavailable
from broker.ledger.records import Intent, Outcome, Record, Redemption
from broker.redemption import Redemption as Redeeming
from broker.spending import Decided, Prepared, Spending


async def answered() -> tuple[bytes, str]:
    """What comes of an act that is done."""
    return b"the answer", "cd" * 32


@dataclass
class Act:
    """What a test wants done. done: how often it was."""

    perform: Callable[[], Awaitable[tuple[bytes, str]]] = answered
    content: bytes = b"content"
    refusal: BrokerError | None = None
    done: int = 0

    async def check(self, _: SigningRequest) -> None:
        if self.refusal is not None:
            raise self.refusal

    def answer(self, made: bytes, _: SigningRequest) -> bytes:
        return made

    def prepare(self, decided: Decided) -> Prepared:
        async def perform() -> tuple[bytes, str]:
            self.done += 1
            return await self.perform()

        cnf = {"spki_sha256": "ab" * 32}
        return Prepared(
            jti=mint.new_id(decided.now), credential="signature", cnf=cnf, key_id="key:release", perform=perform
        )


class Spender:
    """Spends one grant on acts."""

    def __init__(self, found: SigningExchange, grant: str) -> None:
        self.found, self.grant, self.redeeming = found, grant, Redeeming(found.parts.exchange)

    async def __call__(self, act: Act, idempotency_id: str = "i" * 20, stage: str = "sign", **changes: object) -> bytes:
        spending = Spending(
            grant=self.grant, idempotency_id=idempotency_id, provenance=[self.found.envelopes[self.grant]]
        )
        caller = replace(self.found.caller, **changes)
        return await self.redeeming.redeem(caller, spending, act, self.found.parts.now(), CORRELATION, stage)

    async def refuses(self, act: Act, reason: Reason, **options: object) -> None:
        with pytest.raises(BrokerError) as error:
            await self(act, **options)
        assert error.value.reason is reason


@pytest.fixture
async def found(tmp_path: Path) -> AsyncIterator[SigningExchange]:
    async with signing_exchange(tmp_path) as made:
        yield made


@pytest.fixture
async def spend(found: SigningExchange) -> Spender:
    return Spender(found, await found.grant())


async def came(found: SigningExchange) -> list[Record]:
    """What the ledger, which is closed for it, says of signatures: intents, redemptions and their outcomes."""
    records = await found.parts.records()
    begun = {seq for seq, one in enumerate(records, 1) if isinstance(one, Intent) and one.credential == "signature"}
    return [
        one
        for seq, one in enumerate(records, 1)
        if seq in begun or isinstance(one, Redemption) or (isinstance(one, Outcome) and one.intent in begun)
    ]


async def test_an_act_is_done_once_and_its_answer_kept(found: SigningExchange, spend: Spender) -> None:
    """Invariant 1: intent and redemption together, then the act, then its outcome."""
    act = Act()
    assert [await spend(act) for _ in range(3)] == [b"the answer"] * 3
    assert act.done == 1
    await spend.refuses(act, Reason.ALREADY_USED, idempotency_id="j" * 20)
    await spend.refuses(Act(content=b"other"), Reason.ALREADY_USED)
    await spend.refuses(act, Reason.ALREADY_USED, stage="certify")
    records = await came(found)
    assert [type(one) for one in records] == [Intent, Redemption, Outcome]
    assert [one.result for one in records[1:]] == ["used", "issued"]


async def test_what_is_refused_before_it_is_decided_again_costs_nothing(found: SigningExchange, spend: Spender) -> None:
    for refusal in (Invalid("no"), Refused(Reason.OUT_OF_SCOPE)):
        await spend.refuses(Act(refusal=refusal), refusal.reason)
    await spend.refuses(Act(), Reason.MALFORMED, idempotency_id="short")
    await spend.refuses(Act(), Reason.KEY_MISMATCH, confirmation=Confirmation(jkt="x" * 43))
    await spend.refuses(Act(), Reason.KEY_MISMATCH, identity=found.parts.caller(OPERATOR).identity)
    assert await spend(Act()) == b"the answer"
    assert [type(one) for one in await came(found)] == [Intent, Redemption, Outcome]


@pytest.mark.parametrize(
    "error", [Unavailable(Reason.SIGNER_UNAVAILABLE), Refused(Reason.EXPIRED), RuntimeError("unforeseen")], ids=repr
)
async def test_an_act_that_fails_has_its_outcome_and_is_not_done_again(
    found: SigningExchange, spend: Spender, error: Exception
) -> None:
    async def fail() -> tuple[bytes, str]:
        raise error

    act = Act(fail)
    with pytest.raises(type(error)):
        await spend(act)
    for idempotency_id in ("i" * 20, "j" * 20):
        await spend.refuses(Act(), Reason.ALREADY_USED, idempotency_id=idempotency_id)
    assert act.done == 1
    assert [one.result for one in (await came(found))[1:]] == ["used", "failed"]


async def test_an_act_that_takes_too_long_is_given_up(
    found: SigningExchange, spend: Spender, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Invariant 6: a timeout is a no; what is signed afterwards goes nowhere."""
    monkeypatch.setattr(in_time, "REQUEST_TIMEOUT_S", 0.1)
    given_up = asyncio.Event()

    async def hang() -> tuple[bytes, str]:
        try:
            await asyncio.Event().wait()
        finally:
            given_up.set()
        raise AssertionError

    await spend.refuses(Act(hang), Reason.SIGNER_UNAVAILABLE)
    await asyncio.wait_for(given_up.wait(), 10)
    await spend.redeeming.close()
    await spend.refuses(Act(), Reason.ALREADY_USED)
    assert [one.result for one in (await came(found))[1:]] == ["used", "failed"]


async def test_an_act_goes_on_to_its_end_when_its_caller_goes_away(found: SigningExchange, spend: Spender) -> None:
    began, goes_on = asyncio.Event(), asyncio.Event()

    async def wait() -> tuple[bytes, str]:
        began.set()
        await goes_on.wait()
        return await answered()

    act = Act(wait)
    asking = asyncio.ensure_future(spend(act))
    await began.wait()
    asking.cancel()
    await asyncio.wait((asking,))
    again = asyncio.ensure_future(spend(act))
    closing = asyncio.ensure_future(spend.redeeming.close())
    goes_on.set()
    await closing
    assert await again == b"the answer"
    assert act.done == 1
    assert [one.result for one in (await came(found))[1:]] == ["used", "issued"]


async def test_a_failure_after_its_caller_went_away_bothers_nobody(found: SigningExchange, spend: Spender) -> None:
    """No exception is left for nobody to find: pytest would."""
    began, goes_on = asyncio.Event(), asyncio.Event()

    async def fail() -> tuple[bytes, str]:
        began.set()
        await goes_on.wait()
        raise Unavailable(Reason.SIGNER_UNAVAILABLE, "gone")

    asking = asyncio.ensure_future(spend(Act(fail)))
    await began.wait()
    asking.cancel()
    await asyncio.wait((asking,))
    goes_on.set()
    await spend.redeeming.close()
    assert not spend.redeeming._running
    await spend.refuses(Act(), Reason.ALREADY_USED)
    assert [one.result for one in (await came(found))[1:]] == ["used", "failed"]


async def test_many_at_once_are_one_act(found: SigningExchange, spend: Spender) -> None:
    """Invariant 7: each with its own id, all on one grant. Some find too many before them, and may ask again."""
    act = Act()
    done = await asyncio.gather(*[spend(act, f"{number:020}") for number in range(200)], return_exceptions=True)
    assert act.done == 1
    assert done.count(b"the answer") == 1
    reasons = Counter(one.reason for one in done if isinstance(one, BrokerError))
    assert reasons.keys() <= {Reason.ALREADY_USED, Reason.ATTESTATION_UNAVAILABLE}
    assert reasons.total() == 199
    assert [type(one) for one in await came(found)] == [Intent, Redemption, Outcome]
