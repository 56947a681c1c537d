"""A transmitter's keys: from a pinned URL, from where it says, or from a file; and from nowhere else."""

import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from support.oidc import JWKS, OidcServer, Signer, oidc_server, secret_jwk
from support.pki import ISSUER
from support.security_events import Transmitting

from broker.errors import Reason, Unavailable
from broker.identity.event_keys import FileKeys, configuration_url, discovered_keys, keys_at
from broker.identity.event_refused import Err, EventRefused
from broker.identity.security_event import KeySource, SecurityEvents, Transmitter, TransmitterSettings

NOW = datetime.now(UTC).replace(microsecond=0)


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[OidcServer]:
    """Serves a transmitter's keys, too: which kind of issuer it is makes no difference to them."""
    async with oidc_server(tmp_path) as running:
        yield running


def transmitting(server: OidcServer, path: str = "") -> Transmitting:
    return Transmitting(issuer=f"{server.issuer}{path}", signer=server.signer)


def events(keys: KeySource, issuer: str) -> SecurityEvents:
    return SecurityEvents(
        [Transmitter(settings=TransmitterSettings(issuer=issuer, audience=ISSUER), keys=keys)], ISSUER
    )


async def unavailable(found: SecurityEvents, token: str) -> str:
    with pytest.raises(Unavailable) as refused:
        await found.verify(token, None, NOW)
    assert refused.value.reason is Reason.IDENTITY_UNAVAILABLE
    assert refused.value.retry_after_ms == 5000
    return refused.value.detail


def describe(server: OidcServer, path: str = "", **changes: Any) -> None:
    """What the transmitter says of itself."""
    usual = {"spec_version": "1_0", "issuer": f"{server.issuer}{path}", "jwks_uri": server.issuer + JWKS}
    where = f"/.well-known/ssf-configuration{path.removesuffix('/')}"
    server.says(where, json.dumps(usual | changes).encode(), Content_Type="application/json")


async def test_keys_at_a_pinned_url_are_fetched_once_and_nothing_else_is_asked(server: OidcServer) -> None:
    by = transmitting(server)
    found = events(keys_at(server.issuer + JWKS, by.issuer, str(server.ca_file)), by.issuer)
    for _ in range(3):
        assert await found.verify(by.token(NOW), None, NOW)
    assert server.fetched == {JWKS: 1}


async def test_a_redirect_another_ca_and_no_answer_are_no_keys(server: OidcServer, tmp_path: Path) -> None:
    by = transmitting(server)
    token, url, ca_file = by.token(NOW), server.issuer + JWKS, str(server.ca_file)
    async with oidc_server(tmp_path / "other") as other:
        detail = await unavailable(events(keys_at(url, by.issuer, str(other.ca_file)), by.issuer), token)
        assert "certificate" in detail.lower()
    server.redirects(JWKS)
    assert "302" in await unavailable(events(keys_at(url, by.issuer, ca_file), by.issuer), token)
    server.behaves()
    assert await events(keys_at(url, by.issuer, ca_file), by.issuer).verify(token, None, NOW)


async def test_a_transmitter_says_where_its_keys_are(server: OidcServer) -> None:
    for path in ("", "/tenant-1/"):
        by = transmitting(server, path)
        describe(server, path)
        found = events(discovered_keys(by.issuer, str(server.ca_file)), by.issuer)
        assert await found.verify(by.token(NOW), None, NOW)


@pytest.mark.parametrize(
    "changes",
    [{"issuer": "https://evil.test"}, {"jwks_uri": "http://127.0.0.1/jwks"}, {"jwks_uri": None}, {"jwks_uri": 7}],
)
async def test_what_it_says_in_anothers_name_or_in_the_clear_is_not_believed(
    server: OidcServer, changes: dict[str, Any]
) -> None:
    by = transmitting(server)
    describe(server, **changes)
    await unavailable(events(discovered_keys(by.issuer, str(server.ca_file)), by.issuer), by.token(NOW))
    assert JWKS not in server.fetched


async def test_a_made_up_key_is_looked_for_once_in_a_while(server: OidcServer) -> None:
    by = transmitting(server)
    found = events(keys_at(server.issuer + JWKS, by.issuer, str(server.ca_file)), by.issuer)
    await found.verify(by.token(NOW), None, NOW)
    for _ in range(3):
        with pytest.raises(EventRefused) as refused:
            await found.verify(Transmitting(issuer=by.issuer).token(NOW, header={"kid": "made-up"}), None, NOW)
        assert refused.value.err is Err.INVALID_KEY
    assert server.fetched == {JWKS: 1}


@pytest.mark.parametrize(
    ("issuer", "url"),
    [
        ("https://tr.example.com", "https://tr.example.com/.well-known/ssf-configuration"),
        ("https://tr.example.com/issuer1", "https://tr.example.com/.well-known/ssf-configuration/issuer1"),
        ("https://tr.example.com/issuer1/", "https://tr.example.com/.well-known/ssf-configuration/issuer1"),
        ("https://tr.example.com:8443/", "https://tr.example.com:8443/.well-known/ssf-configuration"),
    ],
)
def test_a_transmitter_describes_itself_between_its_host_and_its_path(issuer: str, url: str) -> None:
    """SSF 1.0 section 7.2.1, with its examples."""
    assert configuration_url(issuer) == url


async def test_keys_in_a_file_are_taken_again_whole_or_not_at_all(tmp_path: Path) -> None:
    first, second = Transmitting(), Transmitting(signer=Signer("RS256", kid="k-2"))
    file = first.write_keys(tmp_path / "jwks")
    keys = FileKeys(file)
    found = events(keys, first.issuer)
    assert await found.verify(first.token(NOW), None, NOW)
    for bad in (b"", b"{}", b'{"keys": []}', json.dumps({"keys": [secret_jwk(Signer())]}).encode(), b" " * 300_000):
        file.write_bytes(bad)
        with pytest.raises(ValueError, match=r"jwks|key"):
            keys.reload()
        assert await found.verify(first.token(NOW), None, NOW)
    second.write_keys(file)
    keys.reload()
    assert await found.verify(second.token(NOW), None, NOW)
    with pytest.raises(EventRefused):
        await found.verify(first.token(NOW), None, NOW)
    file.unlink()
    with pytest.raises(OSError, match="No such file"):
        keys.reload()
    with pytest.raises(OSError, match="No such file"):
        FileKeys(file)
