"""ID tokens of a real issuer: what is taken beside everything that is not."""

import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from support.oidc import CLIENT_ID, OidcServer, Signer, oidc_server, unsigned

from broker.errors import BrokerError, Reason, Refused
from broker.identity.id_token import MAX_GROUPS, IdTokens
from broker.identity.oidc_issuer import IssuerSettings, OidcIssuer
from broker.identity.others_jws import MAX_TOKEN
from broker.identity.person import PersonId

NONCE = "ab" * 32
NOW = datetime.now(UTC).replace(microsecond=0)


@pytest.fixture
async def oidc(tmp_path: Path) -> AsyncIterator[OidcServer]:
    async with oidc_server(tmp_path) as server:
        yield server


def tokens(oidc: OidcServer, **changes: Any) -> IdTokens:
    settings = {"issuer": oidc.issuer, "audience": CLIENT_ID, "ca_file": str(oidc.ca_file)} | changes
    return IdTokens({settings["issuer"]: OidcIssuer(IssuerSettings(**settings))})


def at(when: datetime) -> int:
    return int(when.timestamp())


async def reason(verifier: IdTokens, token: str, now: datetime = NOW) -> Reason:
    with pytest.raises(BrokerError) as refused:
        await verifier.verify(token, NONCE, now)
    assert not token or token not in str(refused.value)
    return refused.value.reason


# -- what is taken ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "alg", ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"]
)
async def test_a_token_for_this_request_names_the_person(oidc: OidcServer, alg: str) -> None:
    oidc.rotate(alg)
    oidc.person = {"sub": "u-17", "groups": ["b", "a", "b"], "email": "ada@acme.test", "email_verified": True}
    found = await tokens(oidc).verify(oidc.id_token(NONCE, NOW), NONCE, NOW)
    assert found.person == PersonId(issuer=oidc.issuer, subject="u-17")
    assert (found.groups, found.email) == (("a", "b"), "ada@acme.test")
    assert found.auth_time == found.issued_at == NOW


async def test_what_the_issuer_says_of_a_person_is_the_persons_facts_until_authentication_is_stale(
    oidc: OidcServer,
) -> None:
    identity = await tokens(oidc).identify(oidc.id_token(NONCE, NOW), NONCE, NOW)
    facts = identity.known["person"]
    assert (identity.transport, str(identity.principal)) == ("id-token", f"{oidc.issuer}/subject/dS0xNw")
    assert facts.values == {"groups": ["release-managers"], "email": ""}
    assert identity.expires_at == facts.expires_at == NOW + timedelta(seconds=300)
    soon = oidc.id_token(NONCE, NOW, exp=at(NOW) + 20)
    assert (await tokens(oidc).identify(soon, NONCE, NOW)).expires_at == NOW + timedelta(seconds=20)


async def test_groups_come_from_the_configured_claim_and_none_where_it_is_missing(oidc: OidcServer) -> None:
    token = oidc.id_token(NONCE, NOW, groups=["x"], roles=["approver"])
    assert (await tokens(oidc, groups_claim="roles").verify(token, NONCE, NOW)).groups == ("approver",)
    assert (await tokens(oidc, groups_claim="teams").verify(token, NONCE, NOW)).groups == ()


@pytest.mark.parametrize("verified", [False, None, "true", 1])
async def test_an_address_that_the_issuer_did_not_verify_is_nobodys(oidc: OidcServer, verified: Any) -> None:
    token = oidc.id_token(NONCE, NOW, email="boss@acme.test", email_verified=verified)
    assert (await tokens(oidc).verify(token, NONCE, NOW)).email == ""


async def test_one_of_several_audiences_counts_only_as_the_party_that_it_was_issued_to(oidc: OidcServer) -> None:
    both = [CLIENT_ID, "shop"]
    verifier = tokens(oidc)
    for changes in ({"aud": [CLIENT_ID]}, {"azp": CLIENT_ID}, {"aud": both, "azp": CLIENT_ID}):
        await verifier.verify(oidc.id_token(NONCE, NOW, **changes), NONCE, NOW)
    for changes in ({"aud": both}, {"aud": both, "azp": "shop"}, {"azp": "shop"}, {"aud": "shop"}, {"aud": []}):
        assert await reason(verifier, oidc.id_token(NONCE, NOW, **changes)) is Reason.WRONG_AUDIENCE
    for aud in (None, 7, [7], [CLIENT_ID, 7], {}):
        assert await reason(verifier, oidc.id_token(NONCE, NOW, aud=aud)) is Reason.MALFORMED


# -- for this request, now -------------------------------------------------------------------------------------------


async def test_a_token_for_another_request_counts_for_nothing(oidc: OidcServer) -> None:
    verifier = tokens(oidc)
    for nonce in ("cd" * 32, NONCE.upper(), NONCE + "\n", "", "\ud800"):
        assert await reason(verifier, oidc.id_token(nonce, NOW)) is Reason.UNAUTHENTICATED
    assert await reason(verifier, oidc.signer.token(oidc.claims("", NOW, nonce=None))) is Reason.MALFORMED
    with pytest.raises(Refused):
        await verifier.verify(oidc.id_token("", NOW), "", NOW)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"auth_time": -300}, None),
        ({"auth_time": -301}, Reason.EXPIRED),
        ({"auth_time": 5}, None),
        ({"auth_time": 6}, Reason.UNAUTHENTICATED),
        ({"exp": 1}, None),
        ({"exp": 0}, Reason.EXPIRED),
        ({"iat": 5}, None),
        ({"iat": 6}, Reason.UNAUTHENTICATED),
        ({"nbf": 5}, None),
        ({"nbf": 6}, Reason.UNAUTHENTICATED),
    ],
)
async def test_a_token_counts_only_while_authentication_is_fresh(
    oidc: OidcServer, changes: dict[str, int], expected: Reason | None
) -> None:
    token = oidc.id_token(NONCE, NOW, **{name: at(NOW) + seconds for name, seconds in changes.items()})
    if expected is None:
        await tokens(oidc).verify(token, NONCE, NOW)
    else:
        assert await reason(tokens(oidc), token) is expected


async def test_how_fresh_is_the_operators_to_say(oidc: OidcServer) -> None:
    token = oidc.id_token(NONCE, NOW, auth_time=at(NOW) - 61)
    await tokens(oidc).verify(token, NONCE, NOW)
    assert await reason(tokens(oidc, max_auth_age=timedelta(seconds=60)), token) is Reason.EXPIRED


@pytest.mark.parametrize("name", ["iss", "sub", "exp", "iat", "auth_time"])
@pytest.mark.parametrize("value", [None, True, [], {}, -1, 1e20, float("inf")])
async def test_a_claim_that_is_missing_or_no_such_thing_is_malformed(oidc: OidcServer, name: str, value: Any) -> None:
    assert await reason(tokens(oidc), oidc.id_token(NONCE, NOW, **{name: value})) is Reason.MALFORMED


@pytest.mark.parametrize("sub", ["", "a" * 256, "a\nb", "jürgen", "\ud800"])
async def test_a_subject_that_cannot_be_is_malformed(oidc: OidcServer, sub: str) -> None:
    assert await reason(tokens(oidc), oidc.id_token(NONCE, NOW, sub=sub)) is Reason.MALFORMED


@pytest.mark.parametrize(
    "groups", ["admins", 7, [7], [""], ["a" * 256], ["a\x00b"], ["\ud800"], ["g"] * (MAX_GROUPS + 1), {"a": 1}]
)
async def test_groups_that_cannot_be_are_malformed(oidc: OidcServer, groups: Any) -> None:
    assert await reason(tokens(oidc), oidc.id_token(NONCE, NOW, groups=groups)) is Reason.MALFORMED


@pytest.mark.parametrize("email", [7, "", "a" * 256, "a\nb"])
async def test_an_address_that_cannot_be_is_malformed(oidc: OidcServer, email: Any) -> None:
    token = oidc.id_token(NONCE, NOW, email=email, email_verified=True)
    assert await reason(tokens(oidc), token) is Reason.MALFORMED


# -- signed by the issuer --------------------------------------------------------------------------------------------


async def test_a_token_that_nobody_or_somebody_else_signed_is_refused(oidc: OidcServer) -> None:
    verifier, claims = tokens(oidc), oidc.claims(NONCE, NOW)
    await verifier.verify(oidc.signer.token(claims), NONCE, NOW)
    stranger = Signer(kid=oidc.signer.kid)
    for token in (stranger.token(claims), stranger.token(claims, jwk=stranger.jwk()), Signer().token(claims)):
        assert await reason(verifier, token) is Reason.UNAUTHENTICATED
    head, _, signature = oidc.signer.token(claims).split(".")
    _, body, _ = oidc.signer.token(claims | {"sub": "u-1"}).split(".")
    assert await reason(verifier, f"{head}.{body}.{signature}") is Reason.UNAUTHENTICATED


@pytest.mark.parametrize("alg", ["none", "None", "HS256", "HS512", "ES256K", "RS1", "", None, 7])
async def test_an_algorithm_outside_the_list_is_refused_whatever_the_key(oidc: OidcServer, alg: Any) -> None:
    token = oidc.signer.token(oidc.claims(NONCE, NOW), alg=alg)
    assert await reason(tokens(oidc), token) is Reason.UNAUTHENTICATED
    assert await reason(tokens(oidc), unsigned(oidc.claims(NONCE, NOW))) is Reason.MALFORMED
    assert oidc.fetched.total() == 0  # nobody is asked about what cannot be


async def test_a_key_signs_only_what_its_kind_and_its_issuer_say(oidc: OidcServer) -> None:
    rsa = oidc.rotate("RS256")
    claims = oidc.claims(NONCE, NOW)
    other = Signer("PS256", kid=rsa.kid, key=rsa.key)
    assert await reason(tokens(oidc), other.token(claims)) is Reason.UNAUTHENTICATED  # the key says alg RS256
    oidc.published = [rsa.jwk(alg=None)]
    await tokens(oidc).verify(other.token(claims), NONCE, NOW)
    curve = Signer("ES384")
    oidc.published = [curve.jwk(alg=None)]
    assert await reason(tokens(oidc), curve.token(claims, alg="ES256")) is Reason.UNAUTHENTICATED
    assert await reason(tokens(oidc), curve.token(claims, alg="RS256")) is Reason.UNAUTHENTICATED
    assert await reason(tokens(oidc), curve.token(claims, alg="EdDSA")) is Reason.UNAUTHENTICATED


async def test_keys_that_are_not_for_signing_or_too_weak_do_not_count(oidc: OidcServer) -> None:
    token = oidc.id_token(NONCE, NOW)
    for changes in ({"use": "enc"}, {"key_ops": ["encrypt"]}, {"key_ops": "verify"}, {"x": "AA"}, {"crv": "P-521"}):
        oidc.published = [oidc.signer.jwk(**changes)]
        assert await reason(tokens(oidc), token) is Reason.UNAUTHENTICATED
    oidc.published = [oidc.signer.jwk(use="enc"), {"kty": "PQC", "kid": "x"}, 7, oidc.signer.jwk(use=None)]
    await tokens(oidc).verify(token, NONCE, NOW)
    oidc.rotate("RS256")
    oidc.published = [oidc.signer.jwk(n="x" * 170)]  # 1020 bits
    assert await reason(tokens(oidc), oidc.id_token(NONCE, NOW)) is Reason.UNAUTHENTICATED


async def test_a_token_without_key_id_counts_only_where_the_issuer_has_one_key(oidc: OidcServer) -> None:
    claims = oidc.claims(NONCE, NOW)
    token = oidc.signer.token(claims, kid=None)
    await tokens(oidc).verify(token, NONCE, NOW)
    oidc.published.append(Signer().jwk())
    assert await reason(tokens(oidc), token) is Reason.UNAUTHENTICATED
    await tokens(oidc).verify(oidc.signer.token(claims), NONCE, NOW)


async def test_an_issuer_speaks_for_its_own_people_alone(oidc: OidcServer, tmp_path: Path) -> None:
    async with oidc_server(tmp_path / "other") as other:
        both = IdTokens(
            {
                one.issuer: OidcIssuer(IssuerSettings(issuer=one.issuer, audience=CLIENT_ID, ca_file=str(one.ca_file)))
                for one in (oidc, other)
            }
        )
        await both.verify(oidc.id_token(NONCE, NOW), NONCE, NOW)
        assert (await both.verify(other.id_token(NONCE, NOW), NONCE, NOW)).person.issuer == other.issuer
        foreign = other.signer.token(oidc.claims(NONCE, NOW))
        assert await reason(both, foreign) is Reason.UNAUTHENTICATED
        assert await reason(tokens(oidc), other.id_token(NONCE, NOW)) is Reason.UNAUTHENTICATED
    for iss in (f"{oidc.issuer}/", oidc.issuer.upper(), "", "https://nobody.test"):
        assert await reason(tokens(oidc), oidc.id_token(NONCE, NOW, iss=iss)) is Reason.UNAUTHENTICATED


# -- bytes -----------------------------------------------------------------------------------------------------------


async def test_what_is_no_small_plain_jws_is_malformed(oidc: OidcServer) -> None:
    good = oidc.id_token(NONCE, NOW)
    head, body, signature = good.split(".")
    verifier = tokens(oidc)
    bad = ["", "..", good + ".", good + "\n", f" {good}", f"{head}.{body}", f"{head}.{body}.{signature}.x.y", "a.b.c"]
    bad += [f"{head}=.{body}.{signature}", f"{head}.{body}+.{signature}", f"{head}.{body[:-1]}.{signature}"]
    bad += ["a" * (MAX_TOKEN + 1)]
    for token in bad:
        assert await reason(verifier, token) is Reason.MALFORMED
    assert oidc.fetched.total() == 0
    await verifier.verify(good, NONCE, NOW)


@pytest.mark.parametrize(
    "header", [{"crit": ["exp"]}, {"b64": False}, {"typ": "at+jwt"}, {"typ": 7}, {"typ": "logout+jwt"}, {"kid": 7}]
)
async def test_a_header_that_changes_how_a_token_is_read_is_malformed(oidc: OidcServer, header: dict[str, Any]) -> None:
    claims = oidc.claims(NONCE, NOW)
    assert await reason(tokens(oidc), oidc.signer.token(claims, **header)) is Reason.MALFORMED
    for harmless in ({"typ": None}, {"typ": "jwt"}, {"x5t": "abc"}):
        await tokens(oidc).verify(oidc.signer.token(claims, **harmless), NONCE, NOW)


async def test_a_claim_that_stands_twice_is_malformed(oidc: OidcServer) -> None:
    text = json.dumps(oidc.claims(NONCE, NOW))
    verifier = tokens(oidc)
    await verifier.verify(oidc.signer.token(text.encode()), NONCE, NOW)
    assert await reason(verifier, oidc.signer.token(f'{text[:-1]}, "sub": "u-1"}}'.encode())) is Reason.MALFORMED
    for payload in (b"[]", b"\xff", b"{", b'{"exp": NaN}', b"[" * 5000):
        assert await reason(verifier, oidc.signer.token(payload)) is Reason.MALFORMED
