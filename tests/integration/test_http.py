"""The token endpoint over real TLS, with real SVIDs, policy and ledger: each use beside its abuses."""

import hashlib
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import aiohttp
import jwt
import pytest
import structlog
from support.http_broker import CALLER, ISSUER, HttpBroker, details, http_broker, read_details
from support.pki import CA, JwtAuthority, base64url, snapshot
from support.processes import on_both_loops

from broker.credentials.dpop import ProofKey
from broker.errors import Reason

ACCESS_TOKEN = "urn:ietf:params:oauth:token-type:access_token"
OTHER = "spiffe://acme.test/build/other"


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[HttpBroker]:
    async with http_broker(tmp_path) as running:
        yield running


async def claims(broker: HttpBroker, token: str) -> dict[str, Any]:
    """What a JWT library that is not ours reads from the token, by the published keys."""
    keys = jwt.PyJWKSet.from_json((await broker.get("/.well-known/jwks.json")).text)
    key = keys[jwt.get_unverified_header(token)["kid"]]
    return jwt.decode(token, key, algorithms=["ES256"], audience="https://orders.acme.test", issuer=ISSUER)


async def ask(broker: HttpBroker, assertion: str, key: ProofKey, **changes: str) -> Any:
    """By assertion, with a proof that is good."""
    proof = broker.prove(key, await broker.nonce())
    return await broker.send(broker.by_assertion(assertion, **changes), dpop=proof)


def written(folder: Path) -> bytes:
    """All that the ledger left on the disk."""
    files = [file for file in folder.iterdir() if file.name.startswith("ledger")]
    assert files
    return b"".join(file.read_bytes() for file in files)


# -- use -------------------------------------------------------------------------------------------------------------


@on_both_loops
async def test_a_client_with_an_x509_svid_gets_a_token_bound_to_that_certificate(tmp_path: Path) -> None:
    async with http_broker(tmp_path) as broker:
        svid = broker.svid()
        answer = await broker.send(broker.credentials(client_id=CALLER), svid=svid)
        assert answer.status == 200
        assert answer.headers["Cache-Control"] == "no-store"
        assert "DPoP-Nonce" not in answer.headers
        found = await claims(broker, answer.body["access_token"])
        assert found["cnf"] == {"x5t#S256": base64url(hashlib.sha256(svid.chain[0]).digest())}
        assert found["sub"] == found["client_id"] == CALLER
        assert found["authorization_details"] == answer.body["authorization_details"]
        assert answer.body["token_type"] == "Bearer"
        assert answer.body["issued_token_type"] == ACCESS_TOKEN
        assert answer.body["scope"] == found["scope"] == "orders.refund"
        assert answer.body["expires_in"] == found["exp"] - found["iat"] == 60


async def test_a_client_with_an_x509_svid_and_a_proof_gets_a_token_bound_to_that_key(broker: HttpBroker) -> None:
    key, svid = ProofKey(), broker.svid()
    first = await broker.send(broker.credentials(), svid=svid, dpop=broker.prove(key))
    assert first.said == (400, "use_dpop_nonce", "use_dpop_nonce")
    answer = await broker.send(broker.credentials(), svid=svid, dpop=broker.prove(key, first.nonce))
    assert answer.body["token_type"] == "DPoP"
    assert (await claims(broker, answer.body["access_token"]))["cnf"] == {"jkt": key.jkt}


async def test_a_client_with_a_jwt_svid_and_a_proof_gets_a_token_and_the_next_nonce(broker: HttpBroker) -> None:
    key, assertion = ProofKey(), broker.assertion()
    answer = await ask(broker, assertion, key)
    assert (answer.status, answer.body["token_type"]) == (200, "DPoP")
    again = await broker.send(broker.by_assertion(assertion), dpop=broker.prove(key, answer.nonce))
    assert again.status == 200
    assert (await claims(broker, again.body["access_token"]))["cnf"] == {"jkt": key.jkt}


async def test_a_client_exchanges_its_own_jwt_svid(broker: HttpBroker) -> None:
    key, svid = ProofKey(), broker.assertion()
    request = broker.by_exchange(svid, requested_token_type=ACCESS_TOKEN, audience="https://orders.acme.test")
    answer = await broker.send(request, dpop=broker.prove(key, await broker.nonce()))
    assert (answer.status, answer.body["issued_token_type"]) == (200, ACCESS_TOKEN)
    assert (await claims(broker, answer.body["access_token"]))["sub"] == CALLER


async def test_an_svid_under_an_intermediate_authority_is_taken(broker: HttpBroker) -> None:
    intermediate = CA(parent=broker.authority, now=broker.now())
    assert (await broker.send(broker.credentials(), svid=intermediate.svid(CALLER))).status == 200


# -- who asks --------------------------------------------------------------------------------------------------------


async def test_a_stolen_jwt_svid_is_worth_nothing_with_another_key(broker: HttpBroker) -> None:
    owner, assertion = ProofKey(), broker.assertion()
    assert (await ask(broker, assertion, owner)).status == 200
    assert (await ask(broker, assertion, ProofKey())).said == (401, "invalid_client", "key_mismatch")
    nonce = await broker.nonce()
    stolen = await broker.send(broker.by_exchange(assertion), dpop=broker.prove(ProofKey(), nonce))
    assert stolen.said == (400, "invalid_request", "key_mismatch")
    assert (await ask(broker, assertion, owner)).status == 200


async def test_a_jwt_svid_without_proof_is_worth_nothing(broker: HttpBroker) -> None:
    for request in (broker.by_assertion(broker.assertion()), broker.by_exchange(broker.assertion())):
        answer = await broker.send(request)
        assert answer.said == (400, "use_dpop_nonce", "use_dpop_nonce")
        assert answer.nonce


async def test_an_assertion_for_other_audiences_or_out_of_time_is_invalid_client(broker: HttpBroker) -> None:
    hour_ago = int((broker.now() - timedelta(hours=1)).timestamp())
    stranger = JwtAuthority()
    for assertion, reason in (
        (broker.assertion(aud=["https://other.test"]), "wrong_audience"),
        (broker.assertion(aud=[ISSUER, "https://other.test"]), "wrong_audience"),
        (broker.assertion(aud=[broker.token_url]), "wrong_audience"),
        (broker.assertion(exp=hour_ago), "expired"),
        (broker.assertion(sub="spiffe://other.test/build/agent"), "unauthenticated"),
        (stranger.token(now=broker.now(), aud=[ISSUER]), "unauthenticated"),
        ("not.a.jwt", "malformed"),
    ):
        answer = await ask(broker, assertion, ProofKey())
        assert answer.said == (401, "invalid_client", reason), assertion
        assert answer.headers["WWW-Authenticate"] == 'DPoP algs="ES256"'
    assert (await ask(broker, broker.assertion(aud=ISSUER), ProofKey())).status == 200


async def test_nobody_gets_nothing(broker: HttpBroker) -> None:
    assert (await broker.send(broker.credentials())).said == (401, "invalid_client", "unauthenticated")
    basic = {"Authorization": "Basic YWdlbnQ6aHVudGVyMg=="}
    answer = await broker.send(broker.credentials(), headers=basic, svid=broker.svid())
    assert answer.said == (401, "invalid_client", "unauthenticated")
    assert answer.headers["WWW-Authenticate"] == f'Basic realm="{ISSUER}"'


async def test_two_ways_to_authenticate_at_once_are_refused(broker: HttpBroker) -> None:
    key, svid = ProofKey(), broker.svid()
    for request in (broker.by_assertion(broker.assertion()), broker.by_exchange(broker.assertion())):
        answer = await broker.send(request, svid=svid, dpop=broker.prove(key, await broker.nonce()))
        assert answer.said == (400, "invalid_request", "malformed")


async def test_a_client_id_of_somebody_else_is_refused(broker: HttpBroker) -> None:
    answer = await broker.send(broker.credentials(client_id=OTHER), svid=broker.svid())
    assert answer.said == (401, "invalid_client", "unauthenticated")
    assert (await ask(broker, broker.assertion(), ProofKey(), client_id=OTHER)).status == 401
    assert (await ask(broker, broker.assertion(), ProofKey(), client_id=CALLER)).status == 200


@pytest.mark.parametrize("spoiled", ["foreign authority", "ended"])
async def test_tls_cuts_off_a_certificate_that_leads_nowhere(broker: HttpBroker, spoiled: str) -> None:
    authority = CA(now=broker.now()) if spoiled == "foreign authority" else broker.authority
    ended = {"not_before": broker.now() - timedelta(hours=2), "lifetime": timedelta(hours=-1)}
    svid = authority.svid(CALLER, **(ended if spoiled == "ended" else {}))
    with pytest.raises(aiohttp.ClientError):
        await broker.send(broker.credentials(), svid=svid)
    assert (await broker.send(broker.credentials(), svid=broker.svid())).status == 200


async def test_an_open_connection_counts_no_longer_than_the_trust_in_its_domain(broker: HttpBroker) -> None:
    """DESIGN invariant 5: on every request, by its own trust domain's bundle only."""
    connector = aiohttp.TCPConnector(ssl=broker.client_context(broker.svid()), limit=1)
    async with aiohttp.ClientSession(connector=connector) as session:

        async def status() -> int:
            async with session.post(f"{broker.url}/oauth2/token", data=broker.credentials()) as response:
                await response.read()
                return response.status

        assert await status() == 200
        withdrawn = CA("other.test", now=broker.now()).bundle()
        broker.trust = snapshot(withdrawn, own=broker.trust.own, revision=2)
        assert await status() == 401
        assert broker.server.connections == 1


# -- key proofs ------------------------------------------------------------------------------------------------------


async def test_a_proof_counts_once(broker: HttpBroker) -> None:
    proof, request = broker.prove(ProofKey(), await broker.nonce()), broker.by_assertion(broker.assertion())
    assert (await broker.send(request, dpop=proof)).status == 200
    replayed = await broker.send(request, dpop=proof)
    assert replayed.said == (400, "invalid_dpop_proof", "proof_replayed")
    assert replayed.nonce


async def test_a_proof_for_another_url_or_method_is_refused_whatever_the_host_header_says(broker: HttpBroker) -> None:
    request = broker.by_assertion(broker.assertion())
    for changes in (
        {"url": "https://evil.test/oauth2/token"},
        {"url": f"{broker.url}/oauth2/token"},
        {"url": f"{broker.token_url}/"},
        {"url": f"{broker.token_url}?x=1"},
        {"url": ISSUER},
        {"method": "GET"},
    ):
        proof = broker.prove(ProofKey(), await broker.nonce(), **changes)
        answer = await broker.send(request, dpop=proof, headers={"Host": "evil.test"})
        assert answer.said == (400, "invalid_dpop_proof", "invalid_dpop_proof")
    proof = broker.prove(ProofKey(), await broker.nonce())
    assert (await broker.send(request, dpop=proof, headers={"Host": "evil.test"})).status == 200


async def test_a_second_dpop_header_is_refused_even_beside_a_good_one(broker: HttpBroker) -> None:
    key, request = ProofKey(), broker.by_assertion(broker.assertion())
    good, other = broker.prove(key, await broker.nonce()), broker.prove(ProofKey(), await broker.nonce())
    for proofs in ((good, other), (other, good), (good, good), (good, "")):
        assert (await broker.send(request, dpop=proofs)).said == (400, "invalid_dpop_proof", "invalid_dpop_proof")
    assert (await broker.send(request, dpop=f"{good}, {other}")).body["error"] == "invalid_dpop_proof"
    assert (await broker.send(request, dpop=good)).status == 200


async def test_a_nonce_that_is_old_or_not_ours_is_answered_with_a_new_one(broker: HttpBroker) -> None:
    key, request, old = ProofKey(), broker.by_assertion(broker.assertion()), await broker.nonce()
    broker.ahead = timedelta(seconds=31)
    for nonce in (old, "x", "", base64url(bytes(32)), broker.exchange.nonces.issue("mtls", broker.now())):
        answer = await broker.send(request, dpop=broker.prove(key, nonce))
        assert answer.said == (400, "use_dpop_nonce", "use_dpop_nonce")
        assert answer.headers["Cache-Control"] == "no-store"
    assert (await broker.send(request, dpop=broker.prove(key, answer.nonce))).status == 200


# -- what is asked for -----------------------------------------------------------------------------------------------


async def test_what_policy_or_its_evidence_does_not_give_is_refused_without_saying_why(broker: HttpBroker) -> None:
    for asked, said in (
        (details(parameters={"amount": 51}), (403, "access_denied", "denied")),
        (details(identifier="https://billing.acme.test/1"), (403, "access_denied", "denied")),
        (details(actions=["orders.delete"], parameters={}), (403, "access_denied", "denied")),
        (details(actions=["orders.burn"]), (400, "invalid_authorization_details", "unknown_action")),
        (
            details(actions=["orders.export"], parameters={}),
            (503, "temporarily_unavailable", "attestation_unavailable"),
        ),
    ):
        answer = await broker.send(broker.credentials(authorization_details=asked), svid=broker.svid())
        assert answer.said == said
        assert set(answer.body) == {"error", "reason", "correlation_id"}
        assert answer.body["correlation_id"] == answer.headers["X-Correlation-ID"]
    assert (await broker.send(broker.credentials(), svid=broker.svid())).status == 200


async def test_what_is_malformed_is_refused_with_the_code_that_oauth_has_for_it(broker: HttpBroker) -> None:
    for changes, error in (
        ({"grant_type": "password"}, "unsupported_grant_type"),
        ({"grant_type": ""}, "invalid_request"),
        ({"authorization_details": ""}, "invalid_request"),
        ({"authorization_details": "[]"}, "invalid_authorization_details"),
        (
            {"authorization_details": read_details().replace('"type"', '"type": "action", "type"')},
            "invalid_authorization_details",
        ),
        ({"audience": "https://billing.acme.test"}, "invalid_target"),
        ({"resource": "https://billing.acme.test"}, "invalid_target"),
        ({"scope": "orders.read"}, "invalid_scope"),
        ({"actor_token": "x"}, "invalid_request"),
        ({"requested_token_type": "urn:ietf:params:oauth:token-type:jwt"}, "invalid_request"),
    ):
        answer = await broker.send(broker.credentials(**changes), svid=broker.svid())
        assert answer.said == (400, error, "malformed"), changes
        assert answer.headers["Cache-Control"] == "no-store"


async def test_a_caller_beyond_its_quota_is_told_when_to_come_back(tmp_path: Path) -> None:
    async with http_broker(tmp_path, burst=2) as broker:
        svid = broker.svid()
        statuses = [(await broker.send(broker.credentials(), svid=svid)).status for _ in range(2)]
        assert statuses == [200, 200]
        answer = await broker.send(broker.credentials(), svid=svid)
        assert answer.said == (429, "temporarily_unavailable", "quota")
        assert 1 <= int(answer.headers["Retry-After"]) <= 1000
        assert (await broker.send(broker.credentials(), svid=broker.svid(OTHER))).status == 200


async def test_without_an_identity_of_our_own_or_a_ledger_nothing_is_minted(broker: HttpBroker) -> None:
    broker.ahead = timedelta(hours=2)
    answer = await broker.send(broker.credentials(), svid=broker.svid())
    assert answer.said == (503, "temporarily_unavailable", "identity_unavailable")
    broker.ahead = timedelta()
    assert (await broker.send(broker.credentials(), svid=broker.svid())).status == 200
    await broker.exchange.ledger.close()
    answer = await broker.send(broker.credentials(), svid=broker.svid())
    assert answer.said == (503, "temporarily_unavailable", "ledger_unavailable")


# -- how it is sent --------------------------------------------------------------------------------------------------


async def test_a_body_that_is_too_large_is_not_read(broker: HttpBroker) -> None:
    svid = broker.svid()
    filled = {"grant_type": "client_credentials", "authorization_details": details(), "x": "y" * 65_000}
    assert (await broker.send(filled, svid=svid)).status == 200
    for body in (filled | {"x": "y" * 66_000}, filled | {"x": "y" * 1_000_000}):
        answer = await broker.send(body, svid=svid)
        assert answer.said == (413, "invalid_request", "malformed")
    oversized = await ask(broker, "x" * (16 * 1024 + 1), ProofKey())
    assert oversized.said == (400, "invalid_request", "malformed")


async def test_a_body_of_unknown_length_is_bounded_too(broker: HttpBroker) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b"x" * 1024

    connector = aiohttp.TCPConnector(ssl=broker.client_context(broker.svid()))
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    async with (
        aiohttp.ClientSession(connector=connector) as session,
        session.post(f"{broker.url}/oauth2/token", data=chunks(), headers=headers) as response,
    ):
        assert response.status == 413


@pytest.mark.parametrize(
    ("headers", "path", "status"),
    [
        ({"Content-Type": "application/json"}, "/oauth2/token", 415),
        ({"Content-Type": "multipart/form-data; boundary=x"}, "/oauth2/token", 415),
        ({"Content-Type": "application/x-www-form-urlencoded; charset=utf-16"}, "/oauth2/token", 415),
        ({"Content-Encoding": "deflate"}, "/oauth2/token", 415),
        ({}, "/oauth2/token?grant_type=client_credentials", 400),
        ({"Content-Type": "application/x-www-form-urlencoded; charset=UTF-8"}, "/oauth2/token", 200),
        ({}, "/oauth2/token", 200),
    ],
)
async def test_only_a_plain_form_without_query_is_a_token_request(
    broker: HttpBroker, headers: dict[str, str], path: str, status: int
) -> None:
    answer = await broker.send(broker.credentials(), svid=broker.svid(), headers=headers, path=path)
    assert answer.status == status


# -- what is left of it ----------------------------------------------------------------------------------------------


async def test_no_credential_is_in_log_or_ledger(broker: HttpBroker, tmp_path: Path) -> None:
    """DESIGN invariant 10."""
    key, assertion, nonce = ProofKey(), broker.assertion(), await broker.nonce()
    proof = broker.prove(key, nonce)
    with structlog.testing.capture_logs() as logs:
        good = await broker.send(broker.by_assertion(assertion), dpop=proof)
        bad = await broker.send(broker.by_assertion(f"{assertion}x"), dpop=proof, path=f"/oauth2/token?x={assertion}")
        lost = await broker.send(broker.by_assertion(assertion), path=f"/{assertion}")
    assert [good.status, bad.status, lost.status] == [200, 400, 404]
    await broker.exchange.ledger.close()
    kept = written(tmp_path) + repr(logs).encode()
    for secret in (assertion, proof, good.body["access_token"]):
        assert secret.encode() not in kept
        assert secret.rpartition(".")[2].encode() not in kept
    assert {entry["correlation_id"] for entry in logs} >= {good.headers["X-Correlation-ID"]}


async def test_a_known_callers_refusal_is_written_down_and_a_strangers_only_counted(broker: HttpBroker) -> None:
    denied = await broker.send(
        broker.credentials(authorization_details=details(parameters={"amount": 51})), svid=broker.svid()
    )
    malformed = await broker.send(broker.credentials(authorization_details="[]"), svid=broker.svid())
    strangers = [await broker.send(broker.credentials()), await broker.send(b"x")]
    assert [answer.status for answer in strangers] == [401, 400]
    found = await broker.records()
    refusals = {entry.correlation_id: entry for entry in found if type(entry).__name__ == "Refusal"}
    assert refusals[denied.body["correlation_id"]].reason == Reason.DENIED
    assert refusals[malformed.body["correlation_id"]].principal == CALLER
    assert len(refusals) == 2
    counted = next(entry for entry in found if type(entry).__name__ == "CountedRefusals")
    assert counted.counts == {Reason.UNAUTHENTICATED: 1, Reason.MALFORMED: 1}
