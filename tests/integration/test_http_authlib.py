"""An OAuth client library that is not ours (Authlib over httpx2) gets, asks about and gives back tokens.

It knows nothing about us.
"""

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx2
import pytest
from authlib.integrations.base_client import OAuthError
from authlib.integrations.httpx_client import AsyncOAuth2Client
from authlib.oauth2.rfc8414 import AuthorizationServerMetadata
from support.http_broker import CALLER, ISSUER, ORDERS, HttpBroker, details, http_broker
from support.pki import Svid

from broker.credentials.dpop import ProofKey

JWT_SPIFFE = "urn:ietf:params:oauth:client-assertion-type:jwt-spiffe"


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[HttpBroker]:
    async with http_broker(tmp_path) as running:
        yield running


def client(broker: HttpBroker, method: str, svid: Svid | None = None) -> AsyncOAuth2Client:
    made = AsyncOAuth2Client(
        client_id=CALLER, token_endpoint_auth_method=method, verify=broker.client_context(svid), trust_env=False
    )
    made.register_client_auth_method(("spiffe_jwt", present_svid(broker.assertion())))
    return made


def present_svid(assertion: str) -> Any:
    """How one adds draft-ietf-oauth-spiffe-client-auth to Authlib: two parameters in the body."""

    def prepare(_: Any, __: str, uri: str, headers: dict[str, str], body: bytes) -> tuple[str, dict[str, str], bytes]:
        added = httpx2.QueryParams({"client_assertion_type": JWT_SPIFFE, "client_assertion": assertion})
        return uri, headers, b"%b&%b" % (body, str(added).encode())

    return prepare


async def fetch(session: AsyncOAuth2Client, broker: HttpBroker, **more: Any) -> dict[str, Any]:
    url = f"{broker.url}/oauth2/token"
    return await session.fetch_token(
        url, grant_type="client_credentials", authorization_details=more.pop("asked", details()), **more
    )


async def test_authlib_takes_our_metadata_as_valid(broker: HttpBroker) -> None:
    async with httpx2.AsyncClient(verify=broker.client_context(), trust_env=False) as session:
        found = (await session.get(f"{broker.url}/.well-known/oauth-authorization-server")).json()
    metadata = AuthorizationServerMetadata(found)
    metadata.validate()
    assert metadata.issuer == ISSUER
    broken = AuthorizationServerMetadata(found | {"token_endpoint": "http://broker.acme.test/oauth2/token"})
    with pytest.raises(ValueError, match="token_endpoint"):
        broken.validate()


async def test_authlib_gets_a_certificate_bound_token_over_mutual_tls(broker: HttpBroker) -> None:
    async with client(broker, "none", broker.svid()) as session:  # "none" sends client_id; TLS does the rest
        token = await fetch(session, broker)
    assert token["token_type"] == "Bearer"
    assert token["expires_at"] <= datetime.now(UTC).timestamp() + 60
    async with client(broker, "none") as nobody:
        with pytest.raises(OAuthError, match="invalid_client"):
            await fetch(nobody, broker)


async def test_authlib_gets_a_key_bound_token_with_a_jwt_svid(broker: HttpBroker) -> None:
    key = ProofKey()
    async with client(broker, "spiffe_jwt") as session:
        with pytest.raises(OAuthError, match="use_dpop_nonce"):
            await fetch(session, broker, headers={"DPoP": broker.prove(key)})
        proof = broker.prove(key, await broker.nonce())
        token = await fetch(session, broker, headers={"DPoP": proof})
        assert token["token_type"] == "DPoP"
        with pytest.raises(OAuthError, match="invalid_dpop_proof"):
            await fetch(session, broker, headers={"DPoP": proof})


async def test_authlib_reads_our_refusals_as_oauth_errors(broker: HttpBroker) -> None:
    async with client(broker, "none", broker.svid()) as session:
        for asked, error in (
            (details(parameters={"amount": 51}), "access_denied"),
            (details(actions=["orders.burn"]), "invalid_authorization_details"),
            ("[]", "invalid_authorization_details"),
        ):
            with pytest.raises(OAuthError) as caught:
                await fetch(session, broker, asked=asked)
            assert caught.value.error == error


async def test_authlib_asks_about_a_token_and_gives_it_back(broker: HttpBroker) -> None:
    introspection, revocation = f"{broker.url}/oauth2/introspect", f"{broker.url}/oauth2/revoke"
    async with client(broker, "none", broker.svid()) as holder, client(broker, "none", broker.svid(ORDERS)) as service:
        service.client_id = ORDERS
        token = (await fetch(holder, broker))["access_token"]
        spared = (await fetch(holder, broker))["access_token"]
        for session in (holder, service):
            found = (await session.introspect_token(introspection, token=token, token_type_hint="access_token")).json()
            assert (found["active"], found["sub"], found["iss"]) == (True, CALLER, ISSUER)
        assert (await service.revoke_token(revocation, token=token)).status_code == 200
        assert (await service.introspect_token(introspection, token=token)).json()["active"], "it is not the service's"
        answer = await holder.revoke_token(revocation, token=token, token_type_hint="access_token")
        assert (answer.status_code, answer.content) == (200, b"")
        assert (await service.introspect_token(introspection, token=token)).json() == {"active": False}
        assert (await service.introspect_token(introspection, token=spared)).json()["active"]
    async with client(broker, "none") as nobody:
        for ask, url in ((nobody.introspect_token, introspection), (nobody.revoke_token, revocation)):
            refused = await ask(url, token=spared)
            assert (refused.status_code, refused.json()["error"]) == (401, "invalid_client")


async def test_authlib_asks_with_a_jwt_svid(broker: HttpBroker) -> None:
    async with client(broker, "none", broker.svid()) as holder:
        token = (await fetch(holder, broker))["access_token"]
    url, key = f"{ISSUER}/oauth2/introspect", ProofKey()
    async with client(broker, "spiffe_jwt") as session:
        proof = broker.prove(key, await broker.nonce(), url=url)
        answer = await session.introspect_token(f"{broker.url}/oauth2/introspect", token=token, headers={"DPoP": proof})
        assert answer.json()["active"]
