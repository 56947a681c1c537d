"""Check and Redeem of a running broker: for whom, of what, and how long the answer is yes."""

import signal
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import grpc
import pytest
from support.processes import until
from support.whole_broker import AGENT, OPERATOR, ORDERS, POLICY, Whole, Wire, act, eventually, refused, whole_broker

from broker._proto.actionbroker.v1 import broker_pb2
from broker.errors import Reason

SHARED = "https://orders.acme.test"
"""An audience for which two identities speak."""


@pytest.fixture(scope="module")
def whole() -> Iterator[Whole]:
    """Left as it was found."""
    limits = {"requests_per_second": 10_000, "burst": 10_000}
    with whole_broker(limits=limits, audiences={SHARED: [ORDERS, AGENT]}) as found:
        yield found


@pytest.fixture
async def wire(whole: Whole) -> AsyncIterator[Wire]:
    """A connection that gets a token before the test and, the positive control, after it."""
    async with whole.wire() as found:
        assert await found.token()
        yield found
        assert await found.token(), "the broker answers as before"


async def test_only_a_tokens_own_audience_may_ask_about_it(whole: Whole, wire: Wire) -> None:
    token = await wire.token("orders.charge")
    for other in (AGENT, OPERATOR):
        asked = broker_pb2.CheckRequest(token=token, action=act("orders.charge"), spiffe_id=other)
        said = await wire.ask("Check", asked)
        record = await refused(whole, said, Reason.WRONG_AUDIENCE, grpc.StatusCode.PERMISSION_DENIED)
        assert (record.principal, record.stage) == (other, "check")
        said = await wire.redeem(token, "idempotency-id-1", spiffe_id=other)
        record = await refused(whole, said, Reason.WRONG_AUDIENCE, grpc.StatusCode.PERMISSION_DENIED)
        assert (record.principal, record.stage) == (other, "redeem")
    assert await wire.check(token, "orders.charge") == ""
    assert (await wire.redeem(token, "idempotency-id-1")).code is grpc.StatusCode.OK


async def test_a_lost_answer_burns_nothing_and_a_second_use_gets_nothing(whole: Whole, wire: Wire) -> None:
    token, other = await wire.token("orders.charge"), await wire.token("orders.charge")
    first = await wire.redeem(token, "idempotency-id-1")
    again = await wire.redeem(token, "idempotency-id-1")
    assert first.message.redeemed_at == again.message.redeemed_at
    assert first.message.correlation_id != again.message.correlation_id
    said = await wire.redeem(token, "idempotency-id-2")
    record = await refused(whole, said, Reason.ALREADY_USED, grpc.StatusCode.PERMISSION_DENIED)
    assert record.stage == "redeem"
    assert await wire.check(token, "orders.charge") == Reason.ALREADY_USED
    theirs = await wire.redeem(other, "idempotency-id-1")
    assert theirs.code is grpc.StatusCode.OK, "the same id for another token is another redemption"
    assert theirs.message.redeemed_at != first.message.redeemed_at

    shared = await wire.token("orders.charge", audience=SHARED)
    assert (await wire.redeem(shared, "idempotency-id-3", audience=SHARED)).code is grpc.StatusCode.OK
    said = await wire.redeem(shared, "idempotency-id-3", audience=SHARED, spiffe_id=AGENT)
    assert said.reason == Reason.ALREADY_USED, "the same id of another caller"


@pytest.mark.parametrize("idempotency_id", ["", "short", "x" * 65, "sixteen letters!", "idempotency\n-id-1"])
async def test_an_idempotency_id_that_could_be_guessed_or_misread_is_malformed(
    whole: Whole, wire: Wire, idempotency_id: str
) -> None:
    token = await wire.token("orders.charge")
    said = await wire.redeem(token, idempotency_id)
    await refused(whole, said, Reason.MALFORMED, grpc.StatusCode.INVALID_ARGUMENT)
    assert (await wire.redeem(token, "idempotency-id-1")).code is grpc.StatusCode.OK


async def test_what_is_not_single_use_is_not_redeemed(whole: Whole, wire: Wire) -> None:
    asked = broker_pb2.RedeemRequest(
        token=await wire.token(), action=act(), idempotency_id="idempotency-id-1", spiffe_id=ORDERS
    )
    await refused(whole, await wire.ask("Redeem", asked), Reason.MALFORMED, grpc.StatusCode.INVALID_ARGUMENT)


async def test_a_token_that_is_not_ours_is_refused_by_check(whole: Whole, wire: Wire) -> None:
    token = await wire.token()
    header, payload, signature = token.split(".")
    other = (await wire.token()).split(".")[2]
    reasons = {
        Reason.MALFORMED: ["", "a.b.c", f"{header}.{payload}", f"{token}.", f"{token}=", "x" * 20_000],
        Reason.UNAUTHENTICATED: [f"{header}.{payload}.{other}"],
    }
    for reason, tokens in reasons.items():
        for wrong in tokens:
            assert await wire.check(wrong) == reason, wrong
    assert signature != other
    assert await wire.check(token) == ""


async def test_an_expired_token_is_refused_by_check(whole: Whole, wire: Wire) -> None:
    token = await wire.token("orders.brief")
    assert await wire.check(token, "orders.brief") == ""
    await eventually(lambda: wire.check(token, "orders.brief"), Reason.EXPIRED)


async def test_check_decides_by_the_policy_of_now(whole: Whole, wire: Wire) -> None:
    """The policy changes back before the test ends; what was refused does not come back with it."""
    file = whole.broker.folder / "policy" / "orders.cedar"
    token, single = await wire.token("orders.once"), await wire.token("orders.charge")
    assert await wire.check(token, "orders.once") == ""
    try:
        file.write_text(f'{POLICY}\n@id("never") forbid (principal, action, resource) unless {{ false }};\n')
        whole.broker.process.send_signal(signal.SIGHUP)
        await eventually(lambda: wire.check(token, "orders.once"), Reason.DENIED)
        assert (await wire.redeem(single, "idempotency-id-1")).reason == Reason.DENIED

        file.write_text("permit (")
        whole.broker.process.send_signal(signal.SIGHUP)
        await until(
            lambda: "action_broker_policy_reload_failed 1.0" in whole.get("/metrics")[1],
            "a document that is wrong changes nothing, and is told",
        )
        assert await wire.check(token, "orders.once") == Reason.DENIED
    finally:
        file.write_text(POLICY)
        whole.broker.process.send_signal(signal.SIGHUP)
        await eventually(lambda: wire.reason("orders.once"), "")
    assert await wire.check(token, "orders.once") == Reason.DENIED
    assert (await wire.redeem(single, "idempotency-id-1")).reason == Reason.DENIED
    assert await wire.check(await wire.token("orders.once"), "orders.once") == ""
    await until(lambda: "action_broker_policy_reload_failed 0.0" in whole.get("/metrics")[1], "mended")


async def test_check_sees_a_process_that_died(whole: Whole, wire: Wire) -> None:
    with whole.caller() as child:
        token = await tokens_of(child)("orders.attested")
        assert await wire.check(token, "orders.attested") == ""
        child.end()
        assert await wire.check(token, "orders.attested") == Reason.NOT_ATTESTED


async def test_check_sees_a_process_that_was_replaced(whole: Whole, wire: Wire) -> None:
    with whole.caller() as child:
        ask = tokens_of(child)
        token = await ask("orders.read")
        assert await wire.check(token) == ""
        child.tell("replace")
        assert await child.line() == "replaced"
        assert await wire.check(token) == Reason.NOT_ATTESTED


async def test_check_and_the_next_request_see_an_entry_that_was_deleted(whole: Whole, wire: Wire) -> None:
    with whole.caller() as child:
        ask = tokens_of(child)
        token = await ask("orders.read")
        assert await wire.check(token) == ""
        whole.domain.delete(whole.entries[f"build/agent of {child.pid}"])
        assert await wire.check(token) == Reason.NOT_ATTESTED
        assert await ask("orders.read") == Reason.NOT_ATTESTED


def tokens_of(child: Any) -> Callable[[str], Any]:
    """Asks the child for tokens once it is ready."""
    ready: list[str] = []

    async def ask(action: str) -> str:
        if not ready:
            ready.append(await child.line())
        child.tell(f"token {action}")
        return await child.line()

    return ask
