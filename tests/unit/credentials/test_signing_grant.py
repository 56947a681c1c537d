"""A signing grant counts at its own broker, once, for two minutes at most; nothing else is taken for one."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import msgspec
import pytest
from support.issuer import ISSUER
from support.releases import NOW, PERMIT, grant, signing

from broker.credentials import action_token, jose, mint, signing_grant
from broker.credentials.action_token import Claims, Confirmation
from broker.credentials.keys import SigningKey
from broker.credentials.mint import ACTION_TOKEN, SIGNING_GRANT, Kind
from broker.errors import BrokerError, Invalid, Reason, Refused

KEY, ANOTHER = SigningKey.generate(NOW), SigningKey.generate(NOW)
CNF = Confirmation(jkt="the-callers-key")
LONG = f'@max_ttl("300s") {PERMIT};'


def minted(kind: Kind = SIGNING_GRANT, policy: str = LONG) -> str:
    draft = mint.draft(grant(policy), CNF, issuer=ISSUER, kid=KEY.kid, now=NOW, kind=kind)
    return mint.sign(draft, KEY)


def verify(text: str, **changes: Any) -> Claims:
    known = {"issuer": ISSUER, "key_for": lambda _: KEY.private.public_key(), "now": NOW}
    return signing_grant.verify(text, **known | changes)


def forged(change: Callable[[dict[str, Any]], object], *, key: SigningKey = KEY, typ: str = signing_grant.TYPE) -> str:
    """What the broker never minted, signed by this key."""
    claims = msgspec.json.decode(jose.parse(minted(), typ=signing_grant.TYPE).payload)
    change(claims)
    header = msgspec.json.encode({"alg": "ES256", "typ": typ, "kid": KEY.kid})
    return jose.sign(header, msgspec.json.encode(claims), key.private)


def test_a_grant_is_single_use_whatever_policy_says_and_lives_two_minutes_at_most() -> None:
    """Invariants 3 and 7."""
    for policy in (LONG, f'@max_ttl("300s") @reuse("ttl") {PERMIT};'):
        claims = verify(minted(policy=policy))
        assert (claims.use, claims.exp - claims.iat) == ("single", 120)
    brief = verify(minted(policy=f'@max_ttl("30s") {PERMIT};'))
    assert brief.exp - brief.iat == 30


def test_a_grant_is_over_to_the_second() -> None:
    """Invariant 3: our own clock wrote it and reads it, so no leeway as for tokens at guards."""
    text = minted()
    assert verify(text, now=NOW + timedelta(seconds=119.9))
    with pytest.raises(Refused) as error:
        verify(text, now=NOW + timedelta(seconds=120))
    assert error.value.reason is Reason.EXPIRED


def test_an_action_token_is_no_grant_and_a_grant_no_action_token() -> None:
    """Of the very same decision: the type alone keeps them apart."""
    token, text = minted(ACTION_TOKEN), minted()
    known = {"issuer": ISSUER, "key_for": lambda _: KEY.private.public_key(), "now": NOW}
    assert action_token.verify(token, **known)
    assert verify(text)
    with pytest.raises(Invalid):
        verify(token)
    with pytest.raises(Invalid):
        action_token.verify(text, **known)


FORGED: dict[str, tuple[str, Reason]] = {
    "for another audience": (
        forged(lambda c: (c.update(aud="https://b.test"), c["authorization_details"][0].update(locations=[c["aud"]]))),
        Reason.WRONG_AUDIENCE,
    ),
    "of another issuer": (forged(lambda c: c.update(iss="https://b.test")), Reason.UNAUTHENTICATED),
    "good until it expires": (forged(lambda c: c.update(use="ttl")), Reason.UNAUTHENTICATED),
    "good once in each guard": (forged(lambda c: c.update(use="once")), Reason.UNAUTHENTICATED),
    "good for 121 seconds": (forged(lambda c: c.update(exp=c["exp"] + 1)), Reason.UNAUTHENTICATED),
    "for another client": (forged(lambda c: c.update(client_id="spiffe://acme.test/x")), Reason.UNAUTHENTICATED),
    "for another scope": (forged(lambda c: c.update(scope="release.other")), Reason.UNAUTHENTICATED),
    "without its digest": (forged(lambda c: c.pop("action_digest")), Reason.MALFORMED),
    "by another key": (forged(lambda _: None, key=ANOTHER), Reason.UNAUTHENTICATED),
    "of another type": (forged(lambda _: None, typ="JWT"), Reason.MALFORMED),
}


@pytest.mark.parametrize(("text", "reason"), FORGED.values(), ids=FORGED.keys())
def test_a_grant_that_we_would_not_mint_is_none(text: str, reason: Reason) -> None:
    """Not even where our own key has signed it."""
    assert verify(forged(lambda _: None)), "the control"
    with pytest.raises(BrokerError) as error:
        verify(text)
    assert error.value.reason is reason


def test_a_grant_is_for_the_action_that_was_decided() -> None:
    """Invariant 13: with all that is to be signed, and by whom."""
    claims = verify(minted())
    assert claims.action() == signing()
    assert claims.action_digest == signing().digest.hex()
    assert claims.cnf == CNF


def test_the_nonce_is_of_one_grant_and_tells_nothing_of_it() -> None:
    """Invariant 10: who sees a request for a certificate learns nothing of the grant."""
    first, second = minted(), minted()
    assert signing_grant.csr_nonce(first) == signing_grant.csr_nonce(first)
    assert signing_grant.csr_nonce(first) != signing_grant.csr_nonce(second)
    assert len(signing_grant.csr_nonce(first)) == 32
    assert signing_grant.csr_nonce(first) not in first
    assert signing_grant.csr_nonce(first)[:16] not in mint.fingerprint(first)
