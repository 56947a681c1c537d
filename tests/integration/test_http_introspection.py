"""RFC 7662 over real TLS: each credential that counts beside one that does not, each who may ask beside who may not."""

import json
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from pathlib import Path

import jwt
import pytest
import structlog
from cryptography.hazmat.primitives.asymmetric import ec
from support.asking import (
    INTROSPECT,
    check,
    claims_of,
    introspect,
    is_active,
    ledger_bytes,
    refusals,
    suspend,
    token,
    with_charges,
)
from support.http_broker import AUDIENCE, CALLER, ISSUER, ORDERS, POLICY, HttpBroker, http_broker

from broker.credentials.dpop import ProofKey
from broker.errors import Reason
from broker.ledger.records import ScopeRefused

OTHER = "spiffe://acme.test/service/billing"


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[HttpBroker]:
    async with http_broker(tmp_path) as running:
        yield running


# -- use -------------------------------------------------------------------------------------------------------------


async def test_its_own_audience_and_its_holder_hear_all_that_an_active_token_says(broker: HttpBroker) -> None:
    shown = await token(broker)
    said = jwt.decode(shown, options={"verify_signature": False})
    for asker in (ORDERS, CALLER):
        answer = await introspect(broker, shown, asker)
        assert answer.body == {"active": True, "token_type": "Bearer"} | said
        assert answer.headers["Cache-Control"] == "no-store"
    names = {"iss", "sub", "aud", "client_id", "scope", "exp", "iat", "jti", "cnf", "authorization_details"}
    assert names <= answer.body.keys()
    assert (answer.body["sub"], answer.body["aud"], answer.body["scope"]) == (CALLER, AUDIENCE, "orders.refund")


async def test_a_token_bound_to_a_key_is_of_type_dpop(broker: HttpBroker) -> None:
    key = ProofKey()
    proof = broker.prove(key, await broker.nonce())
    minted = await broker.send(broker.credentials(), svid=broker.svid(), dpop=proof)
    answer = await introspect(broker, minted.body["access_token"])
    assert (answer.body["token_type"], answer.body["cnf"]) == ("DPoP", {"jkt": key.jkt})


async def test_a_hint_of_whatever_type_changes_nothing(broker: HttpBroker) -> None:
    shown = await token(broker)
    for hint in ("access_token", "refresh_token", "x"):
        assert (await introspect(broker, shown, token_type_hint=hint)).body["active"]


async def test_a_service_without_certificate_asks_by_jwt_svid_and_proof(broker: HttpBroker) -> None:
    shown, key = await token(broker), ProofKey()
    url = f"{ISSUER}{INTROSPECT}"
    form = {
        "token": shown,
        "client_assertion_type": "urn:ietf:params:oauth:client-assertion-type:jwt-spiffe",
        "client_assertion": broker.assertion(sub=ORDERS),
    }
    first = await broker.send(form, dpop=broker.prove(key, url=url), path=INTROSPECT)
    assert first.said == (400, "use_dpop_nonce", "use_dpop_nonce")
    for_the_token_endpoint = broker.prove(key, first.nonce)
    other = await broker.send(form, dpop=for_the_token_endpoint, path=INTROSPECT)
    assert other.said == (400, "invalid_dpop_proof", "invalid_dpop_proof")
    proof = broker.prove(key, other.nonce, url=url)
    answer = await broker.send(form, dpop=proof, path=INTROSPECT)
    assert answer.body["active"]
    assert answer.nonce
    replayed = await broker.send(form, dpop=proof, path=INTROSPECT)
    assert replayed.said == (400, "invalid_dpop_proof", "proof_replayed")


# -- who asks --------------------------------------------------------------------------------------------------------


async def test_a_service_learns_nothing_of_tokens_for_others_and_its_asking_is_recorded(broker: HttpBroker) -> None:
    shown = await token(broker)
    assert not await is_active(broker, shown, OTHER)
    assert not await is_active(broker, shown, "spiffe://acme.test/build/sibling")
    assert await is_active(broker, shown, ORDERS)
    found = refusals(await broker.records(), "introspect")
    assert [(one.principal, one.reason) for one in found] == [
        (OTHER, Reason.WRONG_AUDIENCE),
        ("spiffe://acme.test/build/sibling", Reason.WRONG_AUDIENCE),
    ]


async def test_what_does_not_count_looks_the_same_whatever_it_is(broker: HttpBroker) -> None:
    shown = await token(broker)
    claims, header = jwt.decode(shown, options={"verify_signature": False}), jwt.get_unverified_header(shown)
    made_up = jwt.encode(claims, ec.generate_private_key(ec.SECP256R1()), "ES256", headers=header)
    last = "A" if shown[-1] != "A" else "Q"
    texts = [
        made_up,
        shown[:-1] + last,
        "x",
        "a.b.c",
        broker.assertion(),
        broker.prove(ProofKey()),
        "é",
        "." * 17_000,
    ]
    answers = [await introspect(broker, text) for text in texts]
    answers.append(await introspect(broker, shown, OTHER))
    assert {(one.status, one.text) for one in answers} == {(200, '{"active":false}')}
    ours = {"content-type", "content-length", "cache-control", "x-content-type-options", "server"}
    shapes = {json.dumps({k: v for k, v in one.headers.items() if k.lower() in ours}) for one in answers}
    assert len(shapes) == 1
    assert await is_active(broker, shown)


async def test_nobody_hears_nothing(broker: HttpBroker) -> None:
    shown = await token(broker)
    nobody = await broker.send({"token": shown}, path=INTROSPECT)
    assert nobody.said == (401, "invalid_client", "unauthenticated")
    assert nobody.headers["WWW-Authenticate"] == 'DPoP algs="ES256"'
    bearer = await broker.send(
        {"token": shown}, svid=broker.svid(ORDERS), headers={"Authorization": "Bearer x"}, path=INTROSPECT
    )
    assert bearer.said == (401, "invalid_client", "unauthenticated")
    assert (await introspect(broker, shown, client_id=OTHER)).said == (401, "invalid_client", "unauthenticated")
    assert (await introspect(broker, shown, client_secret="x")).said == (401, "invalid_client", "unauthenticated")
    assert (await introspect(broker, shown, client_id=ORDERS)).body["active"]


async def test_what_is_no_form_with_one_token_is_refused(broker: HttpBroker) -> None:
    shown, svid = await token(broker), broker.svid(ORDERS)
    for form in ({}, {"token": ""}, b"token=x&token=y", b"token=%", b"\xff"):
        answer = await broker.send(form, svid=svid, path=INTROSPECT)
        assert answer.said == (400, "invalid_request", "malformed"), form
        assert answer.headers["Cache-Control"] == "no-store"
    assert (await broker.send({"token": shown}, svid=svid, path=f"{INTROSPECT}?token=x")).status == 400
    json_body = await broker.send(b"{}", svid=svid, headers={"Content-Type": "application/json"}, path=INTROSPECT)
    assert json_body.status == 415
    assert (await broker.get(INTROSPECT)).body["error"] == "invalid_request"
    assert await is_active(broker, shown)


async def test_a_service_that_asks_too_much_is_told_when_to_come_back(tmp_path: Path) -> None:
    async with http_broker(tmp_path, burst=2) as broker:
        shown = await token(broker)
        assert await is_active(broker, shown)
        assert await is_active(broker, shown)
        answer = await introspect(broker, shown)
        assert answer.said == (429, "temporarily_unavailable", "quota")
        assert int(answer.headers["Retry-After"]) >= 1
        assert await is_active(broker, shown, CALLER)


# -- what is asked about ---------------------------------------------------------------------------------------------


async def test_an_expired_token_is_not_active(broker: HttpBroker) -> None:
    shown = await token(broker)
    assert await is_active(broker, shown)
    broker.ahead = timedelta(seconds=66)
    assert not await is_active(broker, shown)
    assert await is_active(broker, await token(broker))


async def test_a_token_of_another_issuer_is_not_active(broker: HttpBroker, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    async with http_broker(elsewhere, issuer="https://broker.other.test") as other:
        theirs = await token(other)
        assert await is_active(other, theirs)
        assert not await is_active(broker, theirs)
    namesakes = tmp_path / "namesake"
    namesakes.mkdir()
    async with http_broker(namesakes) as namesake:  # with other keys
        theirs = await token(namesake)
        assert not await is_active(broker, theirs)
    assert await is_active(broker, await token(broker))


async def test_a_token_that_was_redeemed_is_not_active(broker: HttpBroker, tmp_path: Path) -> None:
    with_charges(tmp_path)
    await broker.exchange.policies.reload()
    shown = await token(broker, actions=["orders.charge"], parameters={})
    spared = await token(broker, actions=["orders.charge"], parameters={})
    assert await is_active(broker, shown)
    assert await is_active(broker, shown), "asking uses nothing up"
    claims = claims_of(broker, shown)
    await broker.exchange.ledger.redeem(
        claims.jti, "i" * 20, ORDERS, bytes(32), now=broker.now(), correlation_id="", counted=None
    )
    assert not await is_active(broker, shown)
    assert await is_active(broker, spared)


async def test_a_suspended_token_is_not_active_until_it_was_decided(broker: HttpBroker) -> None:
    shown, spared = await token(broker), await token(broker)
    end = suspend(broker, shown)
    assert not await is_active(broker, shown)
    assert await is_active(broker, spared)
    end()
    assert await is_active(broker, shown)


async def test_a_token_that_was_refused_since_is_not_active(broker: HttpBroker) -> None:
    shown, spared = await token(broker), await token(broker)
    live = broker.exchange.scope.live.get(claims_of(broker, shown).jti)
    await broker.scope.deciding.refuse([live], Reason.SESSION_RISK, "test")
    assert not await is_active(broker, shown)
    assert await is_active(broker, spared)


async def test_asking_decides_again_and_a_no_is_final(broker: HttpBroker, tmp_path: Path) -> None:
    shown, spared = await token(broker), await token(broker, actions=["orders.read"], parameters={})
    policies: Callable[[str], object] = (tmp_path / "policies" / "orders.cedar").write_text
    policies(POLICY.replace("<= 50", "<= 4"))
    await broker.exchange.policies.reload()
    assert not await is_active(broker, shown)
    assert await is_active(broker, spared)
    policies(POLICY)
    await broker.exchange.policies.reload()
    assert not await is_active(broker, shown), "a credential never comes back"
    assert await check(broker, shown) == Reason.DENIED
    found = await broker.records()
    [refused] = [one for one in found if isinstance(one, ScopeRefused)]
    assert (refused.jtis, refused.reason) == (
        (jwt.decode(shown, options={"verify_signature": False})["jti"],),
        "denied",
    )


async def test_where_we_cannot_look_nothing_is_said_of_the_token(broker: HttpBroker) -> None:
    """503 and not `false`: nobody looked. To whoever asks it is a no all the same."""
    shown = await token(broker)
    assert await is_active(broker, shown)
    await broker.exchange.ledger.close()
    answer = await introspect(broker, shown)
    assert answer.said == (503, "temporarily_unavailable", "ledger_unavailable")
    assert "active" not in answer.body
    assert not await is_active(broker, shown, OTHER), "who may not know is not told that we cannot look"


# -- what is left of it ----------------------------------------------------------------------------------------------


async def test_no_credential_that_was_shown_is_in_log_or_ledger(broker: HttpBroker, tmp_path: Path) -> None:
    """DESIGN invariant 10."""
    shown, jwt_svid = await token(broker), broker.assertion()
    with structlog.testing.capture_logs() as logs:
        for text in (shown, jwt_svid, f"{shown}x"):
            for asker in (ORDERS, OTHER):
                await introspect(broker, text, asker)
    await broker.exchange.ledger.close()
    kept = repr(logs).encode() + ledger_bytes(tmp_path)
    for secret in (shown, jwt_svid):
        assert secret.encode() not in kept
        assert secret.rpartition(".")[2].encode() not in kept
    assert len(logs) >= 6


async def test_asking_is_counted_by_how_it_ended(broker: HttpBroker) -> None:
    shown = await token(broker)
    assert await is_active(broker, shown)
    assert not await is_active(broker, shown, OTHER)
    rendered = broker.metrics.render().decode()
    assert 'action_broker_requests_total{method="Introspect",outcome="active"} 1.0' in rendered
    assert 'action_broker_requests_total{method="Introspect",outcome="wrong_audience"} 1.0' in rendered
