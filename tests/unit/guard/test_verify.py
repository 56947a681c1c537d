"""The guard's obligations, one by one; each refusal beside the same request without the defect."""

import dataclasses
import hashlib
from datetime import timedelta
from typing import Any

import pytest
from support.issuer import (
    AUDIENCE,
    CALLER,
    ISSUER,
    LEAF,
    NOW,
    REFUND,
    URL,
    Issuer,
    Prover,
    by_certificate,
    by_proof,
    guard_for,
    x5t,
)

from broker.action import Action
from broker.errors import BrokerError, Invalid, Reason, Refused, Unavailable
from broker.guard import Allowed, Guard, KeyCache, Memory, Presented

LATER = timedelta(seconds=1)


class Broker:
    """The broker's end of the two questions about REFUND, with whatever answer a test wants."""

    def __init__(self, answer: BaseException | None = None) -> None:
        self.answer, self.asked = answer, []

    def _ask(self, question: str, action: Action) -> None:
        assert action == REFUND
        self.asked.append(question)
        if self.answer:
            raise self.answer

    async def check(self, token: str, action: Action) -> None:
        assert token
        self._ask("check", action)

    async def redeem(self, token: str, action: Action, idempotency_id: str) -> object:
        assert token
        assert 16 <= len(idempotency_id) <= 64
        self._ask("redeem", action)
        return object()


@pytest.fixture
def issuer() -> Issuer:
    return Issuer()


@pytest.fixture
async def guard(issuer: Issuer) -> Guard:
    return await guard_for(issuer)


def refused(reason: Reason, guard: Guard, presented: Presented, action: Action = REFUND, now: Any = NOW) -> None:
    with pytest.raises(BrokerError) as caught:
        guard.verify(presented, action, now)
    assert caught.value.reason is reason


def test_a_token_bound_to_this_certificate_is_good_for_its_act(guard: Guard, issuer: Issuer) -> None:
    allowed = guard.verify(by_certificate(issuer.token()), REFUND, NOW)
    assert isinstance(allowed, Allowed)
    assert (allowed.principal, allowed.action) == (CALLER, REFUND)


def test_a_token_bound_to_a_key_is_good_with_a_proof_of_it(guard: Guard, issuer: Issuer) -> None:
    caller = Prover()
    token = issuer.token(cnf=caller.cnf)
    assert guard.verify(by_proof(token, caller.proof(token)), REFUND, NOW).claims.cnf.jkt == caller.jkt


def test_invariant_2_nobody_uses_a_token_without_the_key_that_it_names(guard: Guard, issuer: Issuer) -> None:
    """Invariant 2: no bearer credential. Each way to present a token without its key is refused."""
    caller, thief = Prover(), Prover("thief")
    bound_to_certificate, bound_to_key = issuer.token(use="ttl"), issuer.token(cnf=caller.cnf, use="ttl")
    mismatch = Reason.KEY_MISMATCH
    refused(mismatch, guard, Presented(token=bound_to_certificate))
    refused(mismatch, guard, by_certificate(bound_to_certificate, b"the thief's certificate"))
    refused(mismatch, guard, by_proof(bound_to_certificate, thief.proof(bound_to_certificate)))
    refused(mismatch, guard, Presented(token=bound_to_key))
    refused(mismatch, guard, by_certificate(bound_to_key))
    refused(mismatch, guard, by_proof(bound_to_key, thief.proof(bound_to_key)))
    assert guard.verify(by_certificate(bound_to_certificate), REFUND, NOW)
    assert guard.verify(by_proof(bound_to_key, caller.proof(bound_to_key)), REFUND, NOW)


@pytest.mark.parametrize("cnf", [None, {}, x5t() | Prover().cnf])
def test_invariant_2_a_token_names_exactly_one_key(guard: Guard, issuer: Issuer, cnf: Any) -> None:
    """Invariant 2: without `cnf`, or with two, a token counts nowhere."""
    refused(Reason.MALFORMED, guard, by_certificate(issuer.token(cnf=cnf)))
    assert guard.verify(by_certificate(issuer.token()), REFUND, NOW)


@pytest.mark.parametrize(
    "other",
    [
        {"name": "orders.read"},
        {"resource": "https://orders.acme.test/v1/orders/18"},
        {"parameters": {"amount": 31, "currency": "EUR"}},
        {"parameters": {"amount": 30}},
        {"parameters": {"amount": "30", "currency": "EUR"}},
        {"parameters": {"amount": 30, "currency": "EUR", "to": "me"}},
        {"parameters": {}},
    ],
)
def test_invariant_13_an_act_that_differs_in_anything_was_not_approved(
    guard: Guard, issuer: Issuer, other: dict[str, Any]
) -> None:
    """Invariant 13: what is executed is what was approved, parameters included."""
    presented = by_certificate(issuer.token())
    parts = {"name": REFUND.name, "resource": REFUND.resource, "parameters": REFUND.parameters}
    refused(Reason.OUT_OF_SCOPE, guard, presented, Action(audience=AUDIENCE, **(parts | other)))
    assert guard.verify(presented, REFUND, NOW)


def test_invariant_13_a_token_whose_detail_and_digest_differ_covers_neither(guard: Guard, issuer: Issuer) -> None:
    other = Action(REFUND.name, REFUND.resource, AUDIENCE, {"amount": 31, "currency": "EUR"})
    presented = by_certificate(issuer.token(action_digest=other.digest.hex()))
    refused(Reason.OUT_OF_SCOPE, guard, presented, REFUND)
    refused(Reason.OUT_OF_SCOPE, guard, presented, other)
    assert guard.verify(by_certificate(issuer.token()), REFUND, NOW)


def test_lists_and_tuples_in_parameters_are_the_same_json(guard: Guard, issuer: Issuer) -> None:
    asked = Action("orders.pick", REFUND.resource, AUDIENCE, {"lines": [1, 2]})
    rebuilt = Action("orders.pick", REFUND.resource, AUDIENCE, {"lines": (1, 2)})
    assert guard.verify(by_certificate(issuer.token(asked)), rebuilt, NOW)


def test_a_token_for_another_service_is_refused_here(guard: Guard, issuer: Issuer) -> None:
    elsewhere = dataclasses.replace(REFUND, audience="spiffe://acme.test/service/billing")
    refused(Reason.WRONG_AUDIENCE, guard, by_certificate(issuer.token(elsewhere)), elsewhere)
    assert guard.verify(by_certificate(issuer.token()), REFUND, NOW)


def test_a_token_counts_once_in_this_process(guard: Guard, issuer: Issuer) -> None:
    presented = by_certificate(issuer.token())
    assert guard.verify(presented, REFUND, NOW)
    refused(Reason.ALREADY_USED, guard, presented)
    assert guard.verify(by_certificate(issuer.token(jti="another")), REFUND, NOW)


async def test_two_guards_of_one_process_count_together(issuer: Issuer) -> None:
    memory = Memory()
    over_grpc, over_http = await guard_for(issuer, memory=memory), await guard_for(issuer, memory=memory)
    presented = by_certificate(issuer.token())
    assert over_grpc.verify(presented, REFUND, NOW)
    refused(Reason.ALREADY_USED, over_http, presented)


def test_a_refused_request_leaves_the_token_unused(guard: Guard, issuer: Issuer) -> None:
    presented = by_certificate(issuer.token())
    refused(Reason.OUT_OF_SCOPE, guard, presented, Action("orders.read", REFUND.resource, AUDIENCE))
    assert guard.verify(presented, REFUND, NOW)


def test_a_reusable_token_counts_until_it_expires_and_no_longer(guard: Guard, issuer: Issuer) -> None:
    presented = by_certificate(issuer.token(use="ttl"))
    last = NOW + timedelta(seconds=64)
    assert all(guard.verify(presented, REFUND, now) for now in (NOW, NOW + LATER, last))
    refused(Reason.EXPIRED, guard, presented, now=last + LATER)


def test_a_proof_counts_once_even_where_the_token_counts_more_often(guard: Guard, issuer: Issuer) -> None:
    caller = Prover()
    token = issuer.token(cnf=caller.cnf, use="ttl")
    seen = caller.proof(token)
    assert guard.verify(by_proof(token, seen), REFUND, NOW)
    refused(Reason.PROOF_REPLAYED, guard, by_proof(token, seen))
    assert guard.verify(by_proof(token, caller.proof(token)), REFUND, NOW)


def test_a_proof_of_a_refused_request_is_used_up(guard: Guard, issuer: Issuer) -> None:
    caller = Prover()
    token = issuer.token(cnf=caller.cnf, use="ttl")
    seen = by_proof(token, caller.proof(token))
    refused(Reason.OUT_OF_SCOPE, guard, seen, Action("orders.read", REFUND.resource, AUDIENCE))
    refused(Reason.PROOF_REPLAYED, guard, seen)


def test_a_proof_is_good_for_any_name_of_ours_and_no_other(guard: Guard, issuer: Issuer) -> None:
    caller = Prover()
    token = issuer.token(cnf=caller.cnf, use="ttl")
    ours = ("https://orders.internal.test/acme.Orders/Refund", URL)
    presented = Presented(token=token, proof=caller.proof(token), method="POST", urls=ours)
    assert guard.verify(presented, REFUND, NOW)
    elsewhere = caller.proof(token, htu="https://billing.acme.test/acme.Orders/Refund")
    refused(Reason.INVALID_PROOF, guard, Presented(token=token, proof=elsewhere, method="POST", urls=ours), REFUND)


async def test_a_single_use_token_is_redeemed_at_the_broker_before_it_counts(issuer: Issuer) -> None:
    broker = Broker()
    guard = await guard_for(issuer, broker=broker)
    assert await guard.admit(by_certificate(issuer.token(use="single")), REFUND)
    assert broker.asked == ["redeem"]


async def test_a_single_use_token_without_a_broker_to_ask_is_refused(issuer: Issuer) -> None:
    guard = await guard_for(issuer)
    presented = by_certificate(issuer.token(use="single"))
    with pytest.raises(Unavailable):
        await guard.admit(presented, REFUND)
    refused(Reason.SCOPE_STALE, guard, presented)
    assert await guard.admit(by_certificate(issuer.token(use="once")), REFUND)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (Refused(Reason.ALREADY_USED, ""), Reason.ALREADY_USED),
        (Refused(Reason.REVOKED, ""), Reason.REVOKED),
        (Unavailable(Reason.LEDGER_UNAVAILABLE, ""), Reason.LEDGER_UNAVAILABLE),
        (RuntimeError("a client that failed"), Reason.SCOPE_STALE),
        (TimeoutError(), Reason.SCOPE_STALE),
    ],
)
@pytest.mark.parametrize("use", ["single", "once"])
async def test_whatever_the_broker_answers_but_yes_refuses(
    issuer: Issuer, answer: Exception, reason: Reason, use: str
) -> None:
    guard = await guard_for(issuer, broker=Broker(answer))
    presented = by_certificate(issuer.token(use=use))
    with pytest.raises(BrokerError) as caught:
        await guard.admit(presented, REFUND, check=True)
    assert caught.value.reason is reason


async def test_a_rule_with_check_asks_the_broker_each_time(issuer: Issuer) -> None:
    broker = Broker()
    guard = await guard_for(issuer, broker=broker)
    presented = by_certificate(issuer.token(use="ttl"))
    assert await guard.admit(presented, REFUND, check=True)
    assert await guard.admit(presented, REFUND, check=True)
    assert await guard.admit(presented, REFUND)
    assert broker.asked == ["check", "check"]


async def test_the_mapping_runs_only_for_those_who_proved_their_key(guard: Guard, issuer: Issuer) -> None:
    ran = []

    async def rebuild() -> Action:
        ran.append(True)
        return REFUND

    with pytest.raises(Refused):
        await guard.admit(Presented(token=issuer.token()), rebuild)
    assert not ran
    assert await guard.admit(by_certificate(issuer.token()), rebuild)
    assert ran


async def test_a_new_key_of_the_issuer_is_fetched_when_it_is_met(issuer: Issuer) -> None:
    new, sets, clock = Issuer("a newer key"), [issuer.jwks()], [0.0]

    async def fetch() -> bytes:
        return sets[-1]

    keys = KeyCache(fetch, seconds=lambda: clock[0])
    guard = await guard_for(issuer, keys=keys)
    assert await guard.admit(by_certificate(issuer.token()), REFUND)
    sets.append(new.jwks())
    clock[0] += 6.0
    assert await guard.admit(by_certificate(new.token(jti="by the new key")), REFUND)
    with pytest.raises(Refused) as caught:
        await guard.admit(by_certificate(Issuer("a stranger's").token(jti="by a stranger")), REFUND)
    assert caught.value.reason is Reason.UNAUTHENTICATED


async def test_invariant_12_no_argument_of_the_guard_switches_a_check_off(issuer: Issuer) -> None:
    """Invariant 12: every wrong, empty or generous configuration refuses; none lets more through."""
    good, late = by_certificate(issuer.token()), NOW + timedelta(seconds=66)
    assert (await guard_for(issuer)).verify(good, REFUND, NOW)
    for wrong in ("", "*", "https://Broker.acme.test"):
        with pytest.raises(Invalid):
            await guard_for(issuer, issuer=wrong)
        with pytest.raises(Invalid):
            await guard_for(issuer, audience=wrong)
    refused(Reason.UNAUTHENTICATED, await guard_for(issuer, issuer=f"{ISSUER}/v2"), good)
    refused(Reason.WRONG_AUDIENCE, await guard_for(issuer, audience="spiffe://acme.test/service"), good)
    refused(Reason.WRONG_AUDIENCE, await guard_for(issuer, audience="spiffe://*"), good)
    refused(Reason.QUOTA, await guard_for(issuer, memory=Memory(capacity=0)), good)
    # The clock that counts is the one argument read for this decision, and none stops it.
    refused(Reason.EXPIRED, await guard_for(issuer, clock=lambda: NOW), good, now=late)
    with pytest.raises(Refused) as caught:
        await (await guard_for(issuer, clock=lambda: late)).admit(good, REFUND)
    assert caught.value.reason is Reason.EXPIRED


def test_a_proof_is_never_presented_beside_a_certificate_or_for_no_url() -> None:
    leaf = hashlib.sha256(LEAF).digest()
    assert Presented(token="t", proof="p", method="POST", urls=(URL,))
    with pytest.raises(ValueError, match="stands alone"):
        Presented(token="t", proof="p", certificate_sha256=leaf, method="POST", urls=(URL,))
    with pytest.raises(ValueError, match="stands alone"):
        Presented(token="t", proof="p", method="POST")


def test_neither_token_nor_proof_shows_in_what_is_printed(issuer: Issuer) -> None:
    caller = Prover()
    token = issuer.token(cnf=caller.cnf)
    proof = caller.proof(token)
    text = repr(by_proof(token, proof))
    assert token not in text
    assert proof not in text
    assert URL in text


async def test_a_request_that_takes_long_to_come_is_looked_at_again_when_it_has(issuer: Issuer) -> None:
    """Its header was verified, then its body dripped in; what ended meanwhile opens nothing, and is not used up."""
    for patience, dead in ((timedelta(seconds=59), False), (timedelta(seconds=66), True)):
        clock = [NOW]
        guard = await guard_for(issuer, clock=lambda clock=clock: clock[0])

        async def body(clock: list[Any] = clock, patience: timedelta = patience) -> Action:
            clock[0] += patience
            return REFUND

        if not dead:
            assert await guard.admit(by_certificate(issuer.token()), body)
            continue
        with pytest.raises(Refused) as caught:
            await guard.admit(by_certificate(issuer.token()), body)
        assert caught.value.reason is Reason.EXPIRED
        clock[0] = NOW
        assert await guard.admit(by_certificate(issuer.token()), REFUND), "it was not used up"
