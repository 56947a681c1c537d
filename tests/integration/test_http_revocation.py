"""RFC 7009 over real TLS: a holder gives back what is its own, and nobody else anything."""

from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest
import structlog
from support.asking import (
    INTROSPECT,
    REVOKE,
    check,
    claims_of,
    is_active,
    ledger_bytes,
    refusals,
    revoke,
    suspend,
    token,
)
from support.http_broker import CALLER, ISSUER, ORDERS, Answer, HttpBroker, http_broker

from broker.credentials.dpop import ProofKey
from broker.errors import Reason
from broker.ledger.records import Record, ScopeRefused

SIBLING = "spiffe://acme.test/build/sibling"


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[HttpBroker]:
    async with http_broker(tmp_path) as running:
        yield running


def said_yes(answer: Answer) -> bool:
    """RFC 7009 section 2.2: 200, and the body is not looked at."""
    return (answer.status, answer.text, answer.headers["Cache-Control"]) == (200, "", "no-store")


def revoked(found: list[Record]) -> list[ScopeRefused]:
    return [one for one in found if isinstance(one, ScopeRefused)]


async def test_a_token_that_its_holder_gives_back_counts_no_more(broker: HttpBroker) -> None:
    shown, spared = await token(broker), await token(broker)
    assert [await check(broker, shown), await check(broker, spared)] == ["", ""]
    jti, before = claims_of(broker, shown).jti, broker.scope.feed.position
    answer = await revoke(broker, shown, CALLER)
    assert said_yes(answer)
    assert await check(broker, shown) == Reason.REVOKED
    assert not await is_active(broker, shown)
    assert not await is_active(broker, shown, CALLER)
    assert broker.scope.feed.position == before + 1, "guards were told before the answer left"
    assert await check(broker, spared) == ""
    [record] = revoked(await broker.records())
    assert (record.jtis, record.reason, record.cause, record.by) == ((jti,), Reason.REVOKED, "holder", CALLER)
    assert record.correlation_id == answer.headers["X-Correlation-ID"]


async def test_giving_it_back_twice_is_the_same_as_once(broker: HttpBroker) -> None:
    shown = await token(broker)
    assert said_yes(await revoke(broker, shown, CALLER))
    assert said_yes(await revoke(broker, shown, CALLER, token_type_hint="access_token"))
    assert len(revoked(await broker.records())) == 1


async def test_nobody_else_gives_it_back_and_who_tries_hears_nothing_and_is_recorded(broker: HttpBroker) -> None:
    shown = await token(broker)
    for stranger in (SIBLING, ORDERS, "spiffe://acme.test/build"):
        assert said_yes(await revoke(broker, shown, stranger))
        assert await is_active(broker, shown)
    assert said_yes(await revoke(broker, shown, CALLER))
    assert not await is_active(broker, shown)
    found = await broker.records()
    tried = refusals(found, "revoke")
    assert [(one.principal, one.reason) for one in tried] == [
        (SIBLING, Reason.DENIED),
        (ORDERS, Reason.DENIED),
        ("spiffe://acme.test/build", Reason.DENIED),
    ]
    assert {one.action for one in tried} == {"orders.refund"}
    assert [one.by for one in revoked(found)] == [CALLER]


async def test_nobody_known_gives_nothing_back(broker: HttpBroker) -> None:
    shown = await token(broker)
    nobody = await broker.send({"token": shown}, path=REVOKE)
    assert nobody.said == (401, "invalid_client", "unauthenticated")
    named = await broker.send({"token": shown, "client_id": CALLER}, path=REVOKE)
    assert named.said == (401, "invalid_client", "unauthenticated")
    impostor = await revoke(broker, shown, SIBLING, client_id=CALLER)
    assert impostor.said == (401, "invalid_client", "unauthenticated")
    assert await is_active(broker, shown)


async def test_a_holder_without_certificate_gives_back_by_jwt_svid_and_proof(broker: HttpBroker) -> None:
    """Whatever the token is bound to: a holder is known by its SPIFFE ID (RFC 7009 section 2.1)."""
    shown, key, assertion = await token(broker), ProofKey(), broker.assertion()
    form = {
        "token": shown,
        "client_assertion_type": "urn:ietf:params:oauth:client-assertion-type:jwt-spiffe",
        "client_assertion": assertion,
    }
    first = await broker.send(form, path=REVOKE)
    assert first.said == (400, "use_dpop_nonce", "use_dpop_nonce")
    for_introspection = broker.prove(key, first.nonce, url=f"{ISSUER}{INTROSPECT}")
    elsewhere = await broker.send(form, dpop=for_introspection, path=REVOKE)
    assert elsewhere.said == (400, "invalid_dpop_proof", "invalid_dpop_proof")
    assert await is_active(broker, shown)
    answer = await broker.send(form, dpop=broker.prove(key, elsewhere.nonce, url=f"{ISSUER}{REVOKE}"), path=REVOKE)
    assert said_yes(answer)
    assert answer.nonce
    assert not await is_active(broker, shown)
    stolen = await broker.send(
        form | {"token": await token(broker)},
        dpop=broker.prove(ProofKey(), answer.nonce, url=f"{ISSUER}{REVOKE}"),
        path=REVOKE,
    )
    assert stolen.said == (401, "invalid_client", "key_mismatch")


async def test_what_is_no_credential_of_ours_or_has_expired_is_answered_alike(
    broker: HttpBroker, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    async with http_broker(elsewhere, issuer="https://broker.other.test") as other:
        foreign = await token(other)
    expired, broker.ahead = await token(broker), timedelta(seconds=66)
    fresh = await token(broker)
    for shown in ("x", "a.b.c", foreign, expired, f"{fresh[:-3]}AAA"):
        assert said_yes(await revoke(broker, shown, CALLER)), shown
    assert await is_active(broker, fresh)
    found = await broker.records()
    assert revoked(found) == []
    assert [one.reason for one in refusals(found, "revoke")] == [
        Reason.MALFORMED,
        Reason.MALFORMED,
        Reason.UNAUTHENTICATED,
        Reason.UNAUTHENTICATED,
    ], "an expired one is no attack"


async def test_a_token_of_a_type_that_is_not_given_here_is_unsupported(broker: HttpBroker) -> None:
    for shown in (broker.assertion(), broker.prove(ProofKey())):
        answer = await revoke(broker, shown, CALLER)
        assert answer.said == (400, "unsupported_token_type", "malformed")
    assert said_yes(await revoke(broker, await token(broker), CALLER))


async def test_what_is_no_form_with_one_token_is_refused(broker: HttpBroker) -> None:
    shown, svid = await token(broker), broker.svid()
    for form in ({}, {"token": ""}, b"token=x&token=y", f"token={shown}&token={shown}".encode()):
        answer = await broker.send(form, svid=svid, path=REVOKE)
        assert answer.said == (400, "invalid_request", "malformed"), form
    assert (await broker.send({"token": shown}, svid=svid, path=f"{REVOKE}?token={shown}")).status == 400
    assert (await broker.get(f"{REVOKE}?token={shown}", svid=svid)).status == 405
    assert await is_active(broker, shown)


async def test_a_suspended_token_is_given_back_for_good(broker: HttpBroker) -> None:
    shown = await token(broker)
    end = suspend(broker, shown)
    assert said_yes(await revoke(broker, shown, CALLER))
    end()
    assert await check(broker, shown) == Reason.REVOKED


async def test_where_it_cannot_be_recorded_nobody_is_told_that_it_was(broker: HttpBroker) -> None:
    """RFC 7009 section 2.2.1: with 503 the client must assume that the token still exists."""
    shown = await token(broker)
    broker.exchange.scope.live.remove(claims_of(broker, shown).jti)
    await broker.exchange.ledger.close()
    answer = await revoke(broker, shown, CALLER)
    assert answer.said == (503, "temporarily_unavailable", "ledger_unavailable")


async def test_a_token_that_is_revoked_is_in_neither_log_nor_ledger(broker: HttpBroker, tmp_path: Path) -> None:
    """DESIGN invariant 10."""
    shown = await token(broker)
    with structlog.testing.capture_logs() as logs:
        assert said_yes(await revoke(broker, shown, SIBLING))
        assert said_yes(await revoke(broker, shown, CALLER))
    await broker.exchange.ledger.close()
    kept = repr(logs).encode() + ledger_bytes(tmp_path)
    assert shown.encode() not in kept
    assert shown.rpartition(".")[2].encode() not in kept
