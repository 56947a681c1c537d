"""A receiving service beside a whole broker: its guard with the broker's own key set; and callers of the HTTP edge."""

import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import msgspec
from cryptography.hazmat.primitives import serialization
from support.broker import ISSUER
from support.http_broker import Answer
from support.whole_broker import BROKER, ORDERS, Whole, utc_now

from broker.action import Action
from broker.credentials import jose
from broker.credentials.action_token import Claims
from broker.credentials.dpop import ProofKey
from broker.guard import Guard, KeyCache, Memory, Presented, spiffe_fetch
from broker.identity.spiffe_id import SpiffeId
from broker.identity.trust import TrustSnapshot

URL = "https://orders.acme.test/acme.Orders/Refund"


def fetch_of(whole: Whole, path: str = "service/orders") -> Any:
    """Fetches the broker's key set as the workload with this ID, from nobody but the broker."""
    seen = whole.domain.svid(path)
    url = f"https://127.0.0.1:{whole.broker.http_port}/.well-known/jwks.json"
    return spiffe_fetch(url, SpiffeId.parse(BROKER), lambda: seen)


async def key_ids(whole: Whole) -> set[str]:
    """Which keys the broker publishes now."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=tls_of(whole.domain.svid("anybody")))) as http:
        url = f"https://127.0.0.1:{whole.broker.http_port}/.well-known/jwks.json"
        async with http.get(url) as response:
            return {key["kid"] for key in (await response.json())["keys"]}


@asynccontextmanager
async def guard_of(whole: Whole, **changes: Any) -> AsyncIterator[Guard]:
    """A guard of ORDERS with a memory of its own. changes: its arguments."""
    keys = KeyCache(fetch_of(whole))
    try:
        assert await keys.refetch(), keys.last_error
        arguments = {"issuer": ISSUER, "audience": ORDERS, "keys": keys, "memory": Memory(), "clock": utc_now}
        yield Guard(**(arguments | changes))
    finally:
        await keys.close()


def shown(token: str, key: ProofKey, *, url: str = URL) -> Presented:
    """What a request to the service shows: the token and a proof for it by `key`."""
    proof = key.prove("POST", url, utc_now(), token=token)
    return Presented(token=token, proof=proof, method="POST", urls=(URL,))


def as_action(name: str, parameters: Mapping[str, Any] | None = None, resource: str = "") -> Action:
    """The act that a request to the service means."""
    return Action(name, resource or "https://orders.acme.test/orders/17", ORDERS, parameters or {})


def tls_of(snapshot: TrustSnapshot) -> ssl.SSLContext:
    """A client's TLS that trusts what `snapshot` does, and shows no certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False  # an SVID names no host
    for bundle in snapshot.bundles.values():
        for authority in bundle.x509_authorities:
            context.load_verify_locations(cadata=authority.public_bytes(serialization.Encoding.DER))
    return context


async def post_token(whole: Whole, form: Mapping[str, str], dpop: str | None = None) -> Answer:
    """One request to the token endpoint."""
    headers = {} if dpop is None else {"DPoP": dpop}
    connector = aiohttp.TCPConnector(ssl=tls_of(whole.domain.svid("anybody")))
    async with (
        aiohttp.ClientSession(connector=connector) as http,
        http.post(f"https://127.0.0.1:{whole.broker.http_port}/oauth2/token", data=form, headers=headers) as response,
    ):
        return Answer(response.status, response.headers, await response.text())


def by_assertion(assertion: str, details: str) -> dict[str, str]:
    """A request for one's own action, authenticated by a JWT-SVID."""
    return {
        "grant_type": "client_credentials",
        "authorization_details": details,
        "client_assertion_type": "urn:ietf:params:oauth:client-assertion-type:jwt-spiffe",
        "client_assertion": assertion,
    }


_claims = msgspec.json.Decoder(Claims)


def claims_of(token: str) -> Claims:
    """What a token says, read and not verified."""
    return jose.decode_unique(jose.parse(token, typ="at+jwt").payload, _claims, "the token")
