"""Whose SVID signed is said by today's bundles, at the time that it is asked for."""

from datetime import timedelta

import pytest
from support.pki import CA, NOW, WORKLOAD, snapshot

from attestors.contract import AttestationUnavailable
from broker.errors import Reason, Unavailable
from broker.identity.svid_check import SvidCheck
from broker.identity.trust import TrustSnapshot

ACME = CA()
SVID = ACME.svid()


def test_a_chain_speaks_for_its_spiffe_id_while_it_is_valid() -> None:
    check = SvidCheck(lambda: snapshot(ACME.bundle()))
    assert check(SVID.chain, NOW) == WORKLOAD
    with pytest.raises(ValueError, match="has expired"):
        check(SVID.chain, NOW + timedelta(hours=2))
    with pytest.raises(ValueError, match="no path"):
        check(SVID.chain, NOW - timedelta(hours=1))


def test_a_chain_of_a_domain_without_a_bundle_speaks_for_nobody() -> None:
    with pytest.raises(ValueError, match="no trust bundle"):
        SvidCheck(lambda: snapshot(CA("other.test").bundle()))(SVID.chain, NOW)


@pytest.mark.parametrize("chain", [(), (b"",), (b"0" * 70_000,), SVID.chain * 6])
def test_what_is_no_chain_speaks_for_nobody(chain: tuple[bytes, ...]) -> None:
    with pytest.raises(ValueError, match=r"X\.509-SVID"):
        SvidCheck(lambda: snapshot(ACME.bundle()))(chain, NOW)


def test_while_we_trust_nobody_it_cannot_be_said() -> None:
    """Invariant 6: that is no, and neither is it a refusal of this chain."""

    def ended() -> TrustSnapshot:
        raise Unavailable(Reason.IDENTITY_UNAVAILABLE, "our own SVID has ended")

    with pytest.raises(AttestationUnavailable, match="our own SVID has ended"):
        SvidCheck(ended)(SVID.chain, NOW)
