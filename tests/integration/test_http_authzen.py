"""AuthZEN 1.0 over real TLS: what policy enforcement points ask, and what they never learn."""

from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import jwt
import pytest
import structlog
from support.asking import (
    MANY,
    ONE,
    RESOURCE,
    ask,
    check,
    claims_of,
    decided,
    ledger_bytes,
    refund,
    refusals,
    revoke,
    shown,
    subject,
    suspend,
    token,
    verdicts,
    with_charges,
)
from support.http_broker import AUDIENCE, CALLER, ISSUER, ORDERS, POLICY, HttpBroker, http_broker

from broker.credentials.dpop import ProofKey
from broker.errors import Reason
from broker.ledger.records import CountedRefusals, Intent, Outcome, Redemption, StandingDenial

URL = f"{ISSUER}{ONE}"
SIBLING = "spiffe://acme.test/build/sibling"


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[HttpBroker]:
    async with http_broker(tmp_path) as running:
        yield running


# -- without a token -------------------------------------------------------------------------------------------------


async def test_without_a_token_it_is_told_what_policy_says_of_the_subject_and_no_more(broker: HttpBroker) -> None:
    answer = await ask(broker, refund())
    assert answer.body == {"decision": True}
    for asked, reason in (
        (refund(51), "denied"),
        (refund(subject=subject("spiffe://acme.test/web/shop")), "denied"),
        (refund(resource={"type": "order", "id": "https://billing.acme.test/1"}), "denied"),
        (refund(action={"name": "orders.delete"}), "denied"),
        (refund(action={"name": "orders.burn"}), "unknown_action"),
        (refund(action={"name": "orders.refund"}), "denied"),  # parameters that are left out are none
        (refund(subject=subject("spiffe://other.test/build/agent")), "unauthenticated"),
    ):
        assert decided(await ask(broker, asked)) == reason, asked
    assert decided(await ask(broker, refund(action={"name": "orders.read"}))) is True


async def test_an_audience_that_is_left_out_is_who_asks(broker: HttpBroker) -> None:
    asked = refund()
    del asked["context"]
    assert decided(await ask(broker, asked)) is True
    answer = await ask(broker, asked | {"context": {"access_token": await token(broker)}})
    assert decided(answer) == "out_of_scope", "the token is for AUDIENCE, and this is about ORDERS"
    own = await token(broker, locations=[ORDERS])
    assert decided(await ask(broker, asked | {"context": {"access_token": own}})) is True


async def test_what_needs_the_subject_itself_is_a_no_without_it(broker: HttpBroker) -> None:
    """No process is looked at, and there is no evidence: an action that needs either is not decided yes."""
    assert decided(await ask(broker, refund(action={"name": "orders.export"}))) == "attestation_unavailable"
    assert decided(await ask(broker, refund(action={"name": "orders.read"}))) is True


async def test_a_person_is_named_by_issuer_and_subject(broker: HttpBroker, tmp_path: Path) -> None:
    alice = "https://login.acme.test/subject/YWxpY2U"
    (tmp_path / "policies" / "people.cedarschema").write_text(
        'action "orders.look" appliesTo { principal: [Person], resource: [Resource], context: {} };'
    )
    permit = f'@id("people") permit (principal == Person::"{alice}", action == Action::"orders.look", resource);'
    (tmp_path / "policies" / "people.cedar").write_text(permit)
    await broker.exchange.policies.reload()
    assert broker.exchange.policies.last_error is None
    looks = refund(action={"name": "orders.look"})
    assert decided(await ask(broker, looks | {"subject": {"type": "person", "id": alice}})) is True
    bob = "https://login.acme.test/subject/Ym9i"
    assert decided(await ask(broker, looks | {"subject": {"type": "person", "id": bob}})) == "denied"
    for kind, name in (("workload", alice), ("person", CALLER), ("user", alice), ("person", "alice@acme.test")):
        answer = await ask(broker, looks | {"subject": {"type": kind, "id": name}})
        assert decided(answer) == "malformed", (kind, name)


async def test_nothing_is_minted_and_nobody_is_asked_to_approve(broker: HttpBroker) -> None:
    assert decided(await ask(broker, refund())) is True
    assert decided(await ask(broker, refund(51))) == "denied"
    assert len(broker.exchange.scope.live) == 0
    found = await broker.records()
    assert not [one for one in found if isinstance(one, Intent | Outcome)]


async def test_a_standing_denial_and_a_policy_change_count_at_the_next_question(
    broker: HttpBroker, tmp_path: Path
) -> None:
    assert decided(await ask(broker, refund())) is True
    (tmp_path / "policies" / "orders.cedar").write_text(POLICY.replace("<= 50", "<= 4"))
    await broker.exchange.policies.reload()
    assert decided(await ask(broker, refund())) == "denied"
    assert decided(await ask(broker, refund(4))) is True
    denial = StandingDenial(at=broker.now(), id="d" * 16, principal=CALLER, by=SIBLING, policies=(), policy_revision="")
    broker.exchange.scope.standing.add(denial)
    assert decided(await ask(broker, refund(4))) == "revoked"
    assert decided(await ask(broker, refund(4, subject=subject(SIBLING)))) is True


# -- with a token ----------------------------------------------------------------------------------------------------


async def test_a_token_counts_for_exactly_its_action_and_what_is_left_to_check_is_told(broker: HttpBroker) -> None:
    text = await token(broker)
    claims = claims_of(broker, text)
    answer = await ask(broker, refund(context=shown(text)))
    assert decided(answer) is True
    said = jwt.decode(text, options={"verify_signature": False})
    assert answer.body["context"] == {"jti": claims.jti, "exp": claims.exp, "use": "once", "cnf": said["cnf"]}
    for asked in (
        refund(6, context=shown(text)),  # which policy would permit
        refund(action={"name": "orders.read"}, context=shown(text)),
        refund(resource={"type": "order", "id": f"{RESOURCE}8"}, context=shown(text)),
        refund(subject=subject(SIBLING), context=shown(text)),
    ):
        assert decided(await ask(broker, asked)) == "out_of_scope", asked


async def test_a_token_that_does_not_count_outweighs_what_policy_would_say(broker: HttpBroker, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    async with http_broker(elsewhere) as namesake:
        foreign = await token(namesake)
    good, given_back, suspended = [await token(broker) for _ in range(3)]
    await revoke(broker, given_back, CALLER)
    suspend(broker, suspended)
    for text, reason in (
        (given_back, "revoked"),
        (suspended, "suspended"),
        (foreign, "unauthenticated"),
        (f"{good[:-3]}AAA", "unauthenticated"),
        ("x", "malformed"),
        (broker.assertion(), "malformed"),
    ):
        assert decided(await ask(broker, refund(context=shown(text)))) == reason, reason
    assert decided(await ask(broker, refund(context=shown(good)))) is True
    broker.ahead = timedelta(seconds=66)
    assert decided(await ask(broker, refund(context=shown(good)))) == "expired"
    assert decided(await ask(broker, refund())) is True


async def test_asking_with_a_token_decides_again_and_a_no_is_final(broker: HttpBroker, tmp_path: Path) -> None:
    text = await token(broker)
    assert decided(await ask(broker, refund(context=shown(text)))) is True
    (tmp_path / "policies" / "orders.cedar").write_text(POLICY.replace("<= 50", "<= 4"))
    await broker.exchange.policies.reload()
    assert decided(await ask(broker, refund(context=shown(text)))) == "denied"
    (tmp_path / "policies" / "orders.cedar").write_text(POLICY)
    await broker.exchange.policies.reload()
    assert decided(await ask(broker, refund(context=shown(text)))) == "denied"
    assert await check(broker, text) == Reason.DENIED
    assert decided(await ask(broker, refund())) is True


async def test_a_single_use_token_is_used_up_or_not_answered_yes(broker: HttpBroker, tmp_path: Path) -> None:
    """A yes that can be had twice is not single use: without an idempotency_id there is none."""
    with_charges(tmp_path)
    await broker.exchange.policies.reload()
    text = await token(broker, actions=["orders.charge"], parameters={})
    charge = refund(action={"name": "orders.charge"})
    assert decided(await ask(broker, charge | {"context": shown(text)})) == "malformed"
    first = charge | {"context": shown(text, idempotency_id="i" * 20)}
    assert decided(await ask(broker, first)) is True
    assert decided(await ask(broker, first)) is True, "the same answer for a request whose answer was lost"
    assert decided(await ask(broker, charge | {"context": shown(text, idempotency_id="j" * 20)})) == "already_used"
    once = refund(context=shown(await token(broker), idempotency_id="k" * 20))
    assert decided(await ask(broker, once)) == "malformed", "it would not be used up"
    redeemed = [one for one in await broker.records() if isinstance(one, Redemption)]
    assert [one.by for one in redeemed] == [ORDERS]


# -- who asks --------------------------------------------------------------------------------------------------------


async def test_who_asks_about_others_actions_is_forbidden_and_recorded(broker: HttpBroker) -> None:
    """Else whoever has an SVID could try policies out."""
    text = await token(broker)
    for context in ({"audience": AUDIENCE}, shown(text), {"audience": ISSUER}, {"audience": "no URI"}):
        answer = await ask(broker, refund(context=context), spiffe_id=SIBLING)
        assert (answer.status, answer.text) == (403, "wrong_audience"), context
    mixed = {"evaluations": [refund(context={}), refund()]}
    answer = await ask(broker, mixed, spiffe_id=SIBLING, path=MANY)
    assert (answer.status, answer.text) == (403, "wrong_audience"), "nothing of it was evaluated"
    assert decided(await ask(broker, refund())) is True
    assert decided(await ask(broker, refund(context={}), spiffe_id=SIBLING)) is True, "at itself"
    found = refusals(await broker.records(), "evaluate")
    assert [(one.principal, one.reason) for one in found] == [(SIBLING, Reason.WRONG_AUDIENCE)] * 5


async def test_a_caller_may_not_ask_for_itself(broker: HttpBroker) -> None:
    """A token is shown to its audience; its holder has introspection."""
    answer = await ask(broker, refund(context=shown(await token(broker))), spiffe_id=CALLER)
    assert (answer.status, answer.text) == (403, "wrong_audience")


async def test_nobody_hears_nothing(broker: HttpBroker) -> None:
    nobody = await ask(broker, refund(), nobody=True)
    assert (nobody.status, nobody.text) == (401, "unauthenticated")
    assert nobody.headers["WWW-Authenticate"] == 'DPoP error="invalid_token", algs="ES256"'
    for header in ("Bearer x", "DPoP", "DPoP ", "Basic eDp5"):
        answer = await ask(broker, refund(), nobody=True, headers={"Authorization": header})
        assert answer.status == 401, header
    found = await broker.records()
    [counted] = [one for one in found if isinstance(one, CountedRefusals)]
    assert counted.counts == {Reason.UNAUTHENTICATED: 5}


async def test_a_service_without_certificate_asks_by_jwt_svid_and_proof(broker: HttpBroker) -> None:
    key, assertion = ProofKey(), broker.assertion(sub=ORDERS)
    header = {"Authorization": f"DPoP {assertion}"}
    first = await ask(broker, refund(), nobody=True, headers=header)
    assert (first.status, first.text) == (401, "use_dpop_nonce")
    assert first.headers["WWW-Authenticate"] == 'DPoP error="use_dpop_nonce", algs="ES256"'

    def prove(nonce: str, url: str = URL, token: str | None = assertion, key: ProofKey = key) -> str:
        return key.prove("POST", url, broker.now(), nonce=nonce, token=token)

    good = prove(first.nonce)
    answer = await ask(broker, refund(), nobody=True, headers=header, dpop=good)
    assert decided(answer) is True
    nonce = answer.nonce
    for proof, reason in (
        (good, "proof_replayed"),
        (prove(nonce, token=None), "invalid_dpop_proof"),  # it does not say for which JWT-SVID
        (prove(nonce, token="x"), "invalid_dpop_proof"),
        (prove(nonce, url=f"{ISSUER}{MANY}"), "invalid_dpop_proof"),
        (prove(nonce, key=ProofKey()), "key_mismatch"),
    ):
        refused = await ask(broker, refund(), nobody=True, headers=header, dpop=proof)
        assert (refused.status, refused.text) == (401, reason)
    both = await ask(broker, refund(), headers=header, dpop=prove(nonce))
    assert both.status == 400
    again = await ask(broker, refund(), nobody=True, headers=header, dpop=prove(refused.nonce))
    assert decided(again) is True


async def test_each_evaluation_costs_what_a_request_costs(tmp_path: Path) -> None:
    async with http_broker(tmp_path, burst=6) as broker:
        assert await verdicts(broker, {"evaluations": [refund()] * 4}) == [True] * 4
        answer = await ask(broker, {"evaluations": [refund()] * 3}, path=MANY)
        assert (answer.status, answer.text) == (429, "quota")
        assert int(answer.headers["Retry-After"]) >= 1
        too_many = await ask(broker, {"evaluations": [refund(context={})] * 7}, spiffe_id=SIBLING, path=MANY)
        assert too_many.status == 400, "it could never be answered"


# -- what is left of it ----------------------------------------------------------------------------------------------


async def test_no_token_that_was_shown_is_in_answer_log_or_ledger(broker: HttpBroker, tmp_path: Path) -> None:
    """DESIGN invariant 10."""
    text, key, assertion = await token(broker), ProofKey(), broker.assertion(sub=ORDERS)
    with structlog.testing.capture_logs() as logs:
        contexts = (shown(text), {"access_token": text}, {"audience": AUDIENCE, "access_token": f"{text}x"})
        answers = [await ask(broker, refund(context=context)) for context in contexts]
        proof = key.prove("POST", URL, broker.now(), nonce=await broker.nonce(), token=assertion)
        answers.append(await ask(broker, "x", nobody=True, headers={"Authorization": f"DPoP {assertion}"}, dpop=proof))
    await broker.exchange.ledger.close()
    kept = repr(logs).encode() + ledger_bytes(tmp_path) + "".join(one.text for one in answers).encode()
    for secret in (text, assertion, proof):
        assert secret.encode() not in kept
        assert secret.rpartition(".")[2].encode() not in kept


async def test_a_no_is_found_in_the_ledger_by_what_its_answer_says(broker: HttpBroker) -> None:
    answer = await ask(broker, refund(51))
    several = await ask(broker, {"evaluations": [refund(52), refund(), refund(53)]}, path=MANY)
    ids = [answer.body["context"]["correlation_id"]]
    ids += [one["context"]["correlation_id"] for one in several.body["evaluations"] if not one["decision"]]
    assert answer.headers["X-Correlation-ID"] == ids[0]
    found = refusals(await broker.records(), "evaluate")
    assert [one.correlation_id for one in found] == ids
    assert {(one.principal, one.action, one.audience, one.reason) for one in found} == {
        (ORDERS, "orders.refund", AUDIENCE, Reason.DENIED)
    }
