"""The action token's claims: what they say, byte for byte, and that they cannot say two things."""

import base64
import json
from datetime import timedelta

import pytest
from support.issuer import ISSUER, NOW, REFUND, Issuer

from broker.credentials import action_token
from broker.credentials.action_token import Attestation, Claims, Confirmation
from broker.errors import Invalid, Reason, Refused

SIGNER = Issuer()
CLAIMS = Claims(
    iss=ISSUER,
    sub="spiffe://acme.test/build/agent",
    aud=REFUND.audience,
    exp=1_900_000_060,
    iat=1_900_000_000,
    jti="00112233445566778899aabbccddeeff",
    client_id="spiffe://acme.test/build/agent",
    scope=REFUND.name,
    authorization_details=(action_token.detail_of(REFUND),),
    cnf=Confirmation(x5t_s256="A4DtL2JmUMhAsvJj5tKyn64SqzmuXbMrJa0n761y5v0"),
    action_digest=REFUND.digest.hex(),
    use="once",
    attestation=Attestation(environment="sha256:" + "0" * 64, policy="sha256:0123456789ab"),
)


def verify(token: str, **changes: object) -> Claims:
    arguments = {"issuer": ISSUER, "key_for": lambda _: SIGNER.key.public_key(), "now": NOW} | changes
    return action_token.verify(token, **arguments)


def test_the_claims_are_these_bytes_and_no_others() -> None:
    """Pinned: what other JWT libraries and RFC 9068, 9396, 8705 readers rely on."""
    assert action_token.encode(CLAIMS) == (
        b'{"iss":"https://broker.acme.test","sub":"spiffe://acme.test/build/agent",'
        b'"aud":"spiffe://acme.test/service/orders","exp":1900000060,"iat":1900000000,'
        b'"jti":"00112233445566778899aabbccddeeff","client_id":"spiffe://acme.test/build/agent",'
        b'"scope":"orders.refund","authorization_details":[{"type":"action","actions":["orders.refund"],'
        b'"identifier":"https://orders.acme.test/v1/orders/17","locations":["spiffe://acme.test/service/orders"],'
        b'"parameters":{"amount":30,"currency":"EUR"}}],'
        b'"cnf":{"x5t#S256":"A4DtL2JmUMhAsvJj5tKyn64SqzmuXbMrJa0n761y5v0"},'
        b'"action_digest":"0c841d8bb21c534ecb05b22dd505c3aa06bd46215566ee5c37ce23aaec31516c","use":"once",'
        b'"attestation":{"environment":"sha256:0000000000000000000000000000000000000000000000000000000000000000",'
        b'"policy":"sha256:0123456789ab"}}'
    )


def test_a_key_bound_token_names_the_key_alone() -> None:
    bound = json.loads(action_token.encode(Claims(**{**_members(CLAIMS), "cnf": Confirmation(jkt="thumbprint")})))
    assert bound["cnf"] == {"jkt": "thumbprint"}


def _members(claims: Claims) -> dict[str, object]:
    return {name: getattr(claims, name) for name in claims.__struct_fields__}


@pytest.mark.parametrize("keys", [{}, {"jkt": "a", "x5t_s256": "b"}])
def test_a_confirmation_names_exactly_one_key(keys: dict[str, str]) -> None:
    assert Confirmation(jkt="a").jkt == "a"
    with pytest.raises(ValueError, match="exactly one"):
        Confirmation(**keys)


def test_what_was_encoded_is_what_is_verified() -> None:
    token = SIGNER.token()
    found = verify(token)
    assert found.action() == REFUND
    assert found.expires_at == NOW + timedelta(seconds=60)
    payload = token.split(".")[1]
    assert json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))["jti"] == found.jti


def test_a_token_counts_within_its_time_and_the_leeway_of_two_clocks() -> None:
    token = SIGNER.token()
    for seconds, reason in ((-5, None), (-5.5, Reason.UNAUTHENTICATED), (64.9, None), (65, Reason.EXPIRED)):
        now = NOW + timedelta(seconds=seconds)
        if reason is None:
            assert verify(token, now=now)
        else:
            with pytest.raises(Refused) as caught:
                verify(token, now=now)
            assert caught.value.reason is reason


def test_invariant_3_no_token_counts_for_longer_than_300_seconds_whoever_signed_it() -> None:
    """Invariant 3, where tokens are read: even our own signature under a longer life is refused."""
    issued = int(NOW.timestamp())
    assert verify(SIGNER.token(exp=issued + 300))
    with pytest.raises(Refused):
        verify(SIGNER.token(exp=issued + 301))


def test_the_key_is_asked_for_by_kid_and_a_token_without_one_is_malformed() -> None:
    asked = []

    def key_for(kid: str) -> object:
        asked.append(kid)
        return SIGNER.key.public_key()

    assert verify(SIGNER.token(), key_for=key_for)
    assert asked == [SIGNER.kid]
    with pytest.raises(Invalid):
        verify(SIGNER.sign(SIGNER.header(kid=None), SIGNER.claims()), key_for=key_for)
    assert asked == [SIGNER.kid]
