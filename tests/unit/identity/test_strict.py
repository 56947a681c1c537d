"""What a client assertion must be beyond the standard; each refusal beside the same token that the standard takes."""

from datetime import timedelta
from typing import Any

import pytest
from support.pki import CA, ISSUER, NOW, JwtAuthority, seeded_ec_key, snapshot

from broker.errors import Reason, Refused
from broker.identity.jwt_svid import VerifiedJwtSvid, verify_jwt_svid
from broker.identity.strict import MAX_LIFETIME, require_client_assertion

SIGNER = JwtAuthority(key=seeded_ec_key("strict"))
TRUST = snapshot(CA().bundle(SIGNER))
SECOND = int(NOW.timestamp())
HOUR = int(MAX_LIFETIME.total_seconds())


def verified(**changes: Any) -> VerifiedJwtSvid:
    """A token that the standard takes: what follows refuses it for policy alone."""
    return verify_jwt_svid(SIGNER.token(**changes), TRUST, NOW, audience=ISSUER)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"aud": ISSUER},
        {"exp": SECOND + HOUR},
        {"iat": None, "exp": SECOND + HOUR},
        {"iat": SECOND + 5},
        {"iat": SECOND - HOUR + 300},
    ],
    ids=repr,
)
def test_an_assertion_for_us_alone_that_ends_within_the_hour_is_accepted(changes: dict[str, Any]) -> None:
    svid = verified(**changes)
    assert require_client_assertion(svid, ISSUER, NOW) is svid


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"aud": [ISSUER, "https://elsewhere.test"]}, Reason.WRONG_AUDIENCE),
        ({"aud": ["https://elsewhere.test", ISSUER]}, Reason.WRONG_AUDIENCE),
        ({"aud": [ISSUER, ISSUER]}, Reason.WRONG_AUDIENCE),
        ({"exp": SECOND + HOUR + 1}, Reason.UNAUTHENTICATED),
        ({"iat": None, "exp": SECOND + HOUR + 1}, Reason.UNAUTHENTICATED),
        ({"iat": SECOND - HOUR + 299}, Reason.UNAUTHENTICATED),
        ({"iat": SECOND + 6}, Reason.UNAUTHENTICATED),
        ({"sub": "spiffe://acme.test"}, Reason.UNAUTHENTICATED),
    ],
    ids=repr,
)
def test_an_assertion_that_only_the_standard_takes_is_refused(changes: dict[str, Any], reason: Reason) -> None:
    with pytest.raises(Refused) as error:
        require_client_assertion(verified(**changes), ISSUER, NOW)
    assert error.value.reason is reason


def test_an_assertion_for_another_issuer_is_refused_here_too() -> None:
    for issuer in ("https://elsewhere.test", ""):
        with pytest.raises(Refused) as error:
            require_client_assertion(verified(), issuer, NOW)
        assert error.value.reason is Reason.WRONG_AUDIENCE


def test_the_lifetime_left_is_judged_now_not_when_it_was_issued() -> None:
    svid = verified(iat=None, exp=SECOND + HOUR + 60)
    with pytest.raises(Refused):
        require_client_assertion(svid, ISSUER, NOW)
    assert require_client_assertion(svid, ISSUER, NOW + timedelta(seconds=60))
