"""A credential of ours of whichever type: each is read as what it is, and as nothing else."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.exchanging import Exchanging
from support.signing_exchange import SigningExchange, signing_exchange

from broker.credentials import credential, jose
from broker.credentials.credential import OfAnotherType
from broker.credentials.dpop import ProofKey
from broker.credentials.mint import ACTION_TOKEN, SIGNING_GRANT
from broker.errors import Invalid, Refused


@pytest.fixture
async def signing(tmp_path: Path) -> AsyncIterator[SigningExchange]:
    async with signing_exchange(tmp_path) as made:
        yield made


def verify(parts: Exchanging, text: str) -> credential.Credential:
    exchange = parts.exchange
    return credential.verify(text, issuer=exchange.issuer, key_for=exchange.keyring.public, now=parts.now())


async def test_each_type_is_read_as_what_it_is(signing: SigningExchange) -> None:
    found = verify(signing.parts, await signing.grant())
    assert (found.kind, found.claims.aud) == (SIGNING_GRANT, signing.parts.exchange.issuer)
    with pytest.raises(OfAnotherType):
        verify(signing.parts, ProofKey().prove("POST", "https://x.test", signing.parts.now()))
    assert ACTION_TOKEN.typ != SIGNING_GRANT.typ


async def test_the_type_of_a_credential_is_signed(signing: SigningExchange) -> None:
    grant = await signing.grant()
    assert verify(signing.parts, grant).kind is SIGNING_GRANT
    header, payload, signature = grant.split(".")
    text = jose.b64url_decode(header.encode()).replace(SIGNING_GRANT.typ.encode(), ACTION_TOKEN.typ.encode())
    with pytest.raises(Refused):
        verify(signing.parts, f"{jose.b64url(text)}.{payload}.{signature}")


@given(st.text(max_size=100) | st.just("." * 20_000))
def test_what_is_no_jws_has_no_type(text: str) -> None:
    with pytest.raises(Invalid):
        jose.type_of(text)


def test_the_type_is_read_from_the_header_alone() -> None:
    header = jose.b64url(b'{"alg":"RS256","typ":"JWT"}')
    assert jose.type_of(f"{header}.x.y") == "JWT"
    twice = jose.b64url(b'{"alg":"ES256","typ":"at+jwt","typ":"JWT"}')
    with pytest.raises(Invalid):
        jose.type_of(f"{twice}.x.y")
