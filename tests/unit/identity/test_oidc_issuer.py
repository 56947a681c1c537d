"""An issuer's metadata and keys over real TLS: how long they count, and what is not believed."""

import asyncio
import gzip
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from support.oidc import CLIENT_ID, DISCOVERY, JWKS, OidcServer, Signer, oidc_server, secret_jwk
from support.processes import until

from broker.errors import BrokerError, Invalid, Reason, Unavailable
from broker.identity import oidc_issuer
from broker.identity.id_token import IdTokens
from broker.identity.oidc_issuer import KEEP, REFETCH, RETRY, IssuerSettings, OidcIssuer

NONCE = "ab" * 32
NOW = datetime.now(UTC).replace(microsecond=0)
LATER = timedelta(seconds=1)


@pytest.fixture
async def oidc(tmp_path: Path) -> AsyncIterator[OidcServer]:
    async with oidc_server(tmp_path) as server:
        yield server


def tokens(oidc: OidcServer, **changes: Any) -> IdTokens:
    settings = {"issuer": oidc.issuer, "audience": CLIENT_ID, "ca_file": str(oidc.ca_file)} | changes
    return IdTokens({settings["issuer"]: OidcIssuer(IssuerSettings(**settings))})


async def reason(verifier: IdTokens, token: str, now: datetime = NOW) -> Reason:
    with pytest.raises(BrokerError) as refused:
        await verifier.verify(token, NONCE, now)
    assert not token or token not in str(refused.value)
    return refused.value.reason


async def test_keys_are_fetched_once_and_kept_for_their_bound(oidc: OidcServer) -> None:
    verifier = tokens(oidc)
    await asyncio.gather(*(verifier.verify(oidc.id_token(NONCE, NOW), NONCE, NOW) for _ in range(20)))
    assert oidc.fetched == {DISCOVERY: 1, JWKS: 1}
    just_before = NOW + KEEP - LATER
    await verifier.verify(oidc.id_token(NONCE, just_before), NONCE, just_before)
    assert oidc.fetched[JWKS] == 1
    await verifier.verify(oidc.id_token(NONCE, NOW + KEEP), NONCE, NOW + KEEP)
    assert oidc.fetched[JWKS] == 2


async def test_a_withdrawn_key_counts_no_longer_than_the_bound(oidc: OidcServer) -> None:
    verifier, old = tokens(oidc), oidc.signer
    await verifier.verify(oidc.id_token(NONCE, NOW), NONCE, NOW)
    oidc.rotate()
    token = old.token(oidc.claims(NONCE, NOW + KEEP))
    assert await reason(verifier, token, NOW + KEEP) is Reason.UNAUTHENTICATED


async def test_a_new_key_is_found_at_once_and_made_up_ones_cause_a_fetch_a_minute(oidc: OidcServer) -> None:
    verifier = tokens(oidc)
    await verifier.verify(oidc.id_token(NONCE, NOW), NONCE, NOW)
    rotated = NOW + REFETCH
    oidc.rotate()
    await verifier.verify(oidc.id_token(NONCE, rotated), NONCE, rotated)
    assert oidc.fetched[JWKS] == 2
    for seconds in (0, 1, 59):
        when = rotated + timedelta(seconds=seconds)
        assert await reason(verifier, Signer().token(oidc.claims(NONCE, when)), when) is Reason.UNAUTHENTICATED
    assert oidc.fetched[JWKS] == 2
    when = rotated + REFETCH
    assert await reason(verifier, Signer().token(oidc.claims(NONCE, when)), when) is Reason.UNAUTHENTICATED
    assert oidc.fetched[JWKS] == 3


async def test_a_clock_that_was_put_back_keeps_no_key(oidc: OidcServer) -> None:
    verifier = tokens(oidc)
    await verifier.verify(oidc.id_token(NONCE, NOW), NONCE, NOW)
    before = NOW - timedelta(hours=1)
    await verifier.verify(oidc.id_token(NONCE, before), NONCE, before)
    assert oidc.fetched[JWKS] == 2


async def test_an_issuer_that_fails_is_not_asked_again_at_once_and_then_is_heard(oidc: OidcServer) -> None:
    verifier = tokens(oidc)
    oidc.says(JWKS, b"{}", status=500)
    for seconds in (0, 1, 4):
        when = NOW + timedelta(seconds=seconds)
        assert await reason(verifier, oidc.id_token(NONCE, when), when) is Reason.IDENTITY_UNAVAILABLE
    assert oidc.fetched[JWKS] == 1
    oidc.behaves()
    later = NOW + RETRY + LATER  # what the fetch took is waited for as well
    await verifier.verify(oidc.id_token(NONCE, later), NONCE, later)


async def test_the_pause_after_a_slow_failure_begins_at_its_end(
    oidc: OidcServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else one made-up key id after the other keeps a fetch under way at all times."""
    monkeypatch.setattr(oidc_issuer, "FETCH_TIMEOUT_S", 0.5)
    verifier = tokens(oidc)
    oidc.hangs(JWKS)
    assert await reason(verifier, oidc.id_token(NONCE, NOW)) is Reason.IDENTITY_UNAVAILABLE
    oidc.behaves()
    soon, later = NOW + RETRY + timedelta(seconds=0.4), NOW + RETRY + timedelta(seconds=2)
    assert await reason(verifier, oidc.id_token(NONCE, soon), soon) is Reason.IDENTITY_UNAVAILABLE
    assert oidc.fetched[JWKS] == 1
    await verifier.verify(oidc.id_token(NONCE, later), NONCE, later)


async def test_a_made_up_key_id_at_a_slow_issuer_holds_up_nobody_whose_key_is_known(oidc: OidcServer) -> None:
    verifier = tokens(oidc)
    await verifier.verify(oidc.id_token(NONCE, NOW), NONCE, NOW)
    oidc.hangs(JWKS)
    when = NOW + REFETCH
    made_up = asyncio.create_task(reason(verifier, Signer().token(oidc.claims(NONCE, when)), when))
    await until(lambda: oidc.fetched[JWKS] == 2, "it is being looked for")
    async with asyncio.timeout(oidc_issuer.FETCH_TIMEOUT_S / 2):
        await verifier.verify(oidc.id_token(NONCE, when), NONCE, when)
    assert not made_up.done()
    oidc.closing.set()
    assert await made_up is Reason.IDENTITY_UNAVAILABLE


async def test_who_shows_a_made_up_key_id_and_goes_away_causes_no_further_fetch(oidc: OidcServer) -> None:
    verifier = tokens(oidc)
    await verifier.verify(oidc.id_token(NONCE, NOW), NONCE, NOW)
    oidc.hangs(JWKS)
    when = NOW + REFETCH
    for _ in range(5):
        gone = asyncio.create_task(verifier.verify(Signer().token(oidc.claims(NONCE, when)), NONCE, when))
        await until(lambda: oidc.fetched[JWKS] == 2, "it is being looked for")
        await asyncio.wait((gone,), timeout=0.05)  # time enough for a fetch of its own
        gone.cancel()
        await asyncio.wait((gone,))
    assert oidc.fetched == {DISCOVERY: 2, JWKS: 2}
    oidc.closing.set()


async def test_keys_past_their_bound_are_not_used_on_hope(oidc: OidcServer) -> None:
    verifier = tokens(oidc)
    await verifier.verify(oidc.id_token(NONCE, NOW), NONCE, NOW)
    oidc.says(DISCOVERY, b"", status=503)
    assert await reason(verifier, oidc.id_token(NONCE, NOW + KEEP), NOW + KEEP) is Reason.IDENTITY_UNAVAILABLE


@pytest.mark.parametrize("path", [DISCOVERY, JWKS])
async def test_an_issuer_that_redirects_floods_compresses_or_says_no_json_is_not_believed(
    oidc: OidcServer, path: str
) -> None:
    token = oidc.id_token(NONCE, NOW)

    async def refused() -> str:
        with pytest.raises(Unavailable) as error:
            await tokens(oidc).verify(token, NONCE, NOW)
        oidc.behaves()
        return error.value.detail

    oidc.redirects(path)
    assert "status 302" in await refused()
    assert oidc.fetched[f"/moved{path}"] == 0
    oidc.floods(path)
    assert "larger than" in await refused()
    oidc.says(path, gzip.compress(b" " * 10**6), Content_Encoding="gzip")
    assert "compressed" in await refused()
    for body in (b"", b"[]", b"<html>", b'{"a":1,"a":1}', b"\xff"):
        oidc.says(path, body)
        await refused()
    await tokens(oidc).verify(token, NONCE, NOW)


@pytest.mark.parametrize("path", [DISCOVERY, JWKS])
async def test_an_issuer_that_hangs_is_waited_for_within_a_bound(
    oidc: OidcServer, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oidc_issuer, "FETCH_TIMEOUT_S", 0.2)
    verifier = tokens(oidc)
    oidc.hangs(path)
    token = oidc.id_token(NONCE, NOW)
    refusals = await asyncio.gather(*(reason(verifier, token) for _ in range(10)))
    assert set(refusals) == {Reason.IDENTITY_UNAVAILABLE}
    assert oidc.fetched[path] == 1  # those who waited for the same fetch do not wait for one each


async def test_metadata_of_another_issuer_or_that_leads_outside_tls_is_not_believed(oidc: OidcServer) -> None:
    token = oidc.id_token(NONCE, NOW)
    for metadata in (
        {"issuer": "https://evil.test"},
        {"issuer": f"{oidc.issuer}/"},
        {"issuer": None},
        {"jwks_uri": oidc.issuer.replace("https", "http") + JWKS},
        {"jwks_uri": "file:///etc/passwd"},
        {"jwks_uri": f"https://user@127.0.0.1:{oidc.port}{JWKS}"},
        {"jwks_uri": "https://["},
        {"jwks_uri": ""},
        {"jwks_uri": 7},
        {"token_endpoint": "http://127.0.0.1/token"},
    ):
        oidc.metadata = metadata
        assert await reason(tokens(oidc), token) is Reason.IDENTITY_UNAVAILABLE
    oidc.behaves()
    await tokens(oidc).verify(token, NONCE, NOW)


async def test_a_key_set_with_a_secret_in_it_is_refused_whole(oidc: OidcServer) -> None:
    token = oidc.id_token(NONCE, NOW)
    for extra in (secret_jwk(Signer()), {"kty": "oct", "kid": "s", "k": "c2VjcmV0"}):
        oidc.published = [oidc.signer.jwk(), extra]
        assert await reason(tokens(oidc), token) is Reason.IDENTITY_UNAVAILABLE
    oidc.published = [oidc.signer.jwk(kid=str(number)) for number in range(65)]
    assert await reason(tokens(oidc), token) is Reason.IDENTITY_UNAVAILABLE


async def test_an_issuer_whose_certificate_leads_nowhere_is_not_believed(oidc: OidcServer) -> None:
    assert await reason(tokens(oidc, ca_file=None), oidc.id_token(NONCE, NOW)) is Reason.IDENTITY_UNAVAILABLE
    other_name = oidc.issuer.replace("127.0.0.1", "localhost")
    token = oidc.id_token(NONCE, NOW, iss=other_name)
    assert await reason(tokens(oidc, issuer=other_name), token) is Reason.IDENTITY_UNAVAILABLE
    assert oidc.fetched.total() == 0


def test_settings_that_cannot_be_are_refused() -> None:
    good = {"issuer": "https://login.acme.test", "audience": "broker"}
    IssuerSettings(**good)
    for changes in (
        {"issuer": "http://login.acme.test"},
        {"audience": ""},
        {"max_auth_age": timedelta()},
        {"max_auth_age": timedelta(hours=2)},
    ):
        with pytest.raises(Invalid):
            IssuerSettings(**(good | changes))
    with pytest.raises(OSError):
        OidcIssuer(IssuerSettings(**good, ca_file="/nowhere.pem"))
    with pytest.raises(ValueError):
        IdTokens({"https://other.test": OidcIssuer(IssuerSettings(**good))})
