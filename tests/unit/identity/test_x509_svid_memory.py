"""How long an X.509-SVID counts, and what is remembered of one that was verified."""

from datetime import timedelta

import pytest
from support.pki import CA, NOW, snapshot
from support.x509_svids import BETWEEN, ROOT, SERVER, TRUST, unauthenticated, verify

from broker.errors import Invalid, Reason, Refused
from broker.identity import x509_svid
from broker.identity.spiffe_id import TrustDomain
from broker.identity.trust import TrustBundle
from broker.identity.x509_svid import verify_x509_svid


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(x509_svid, "_memory", x509_svid._Memory(8))


# --- time


def test_an_svid_counts_from_its_first_to_its_last_second() -> None:
    svid = ROOT.svid(not_before=NOW, lifetime=timedelta(minutes=5))
    second = timedelta(seconds=1)
    for inside in (NOW, NOW + timedelta(minutes=5), NOW + timedelta(minutes=5, microseconds=999_999)):
        for _ in range(2):  # the second answer comes from memory
            assert verify_x509_svid(svid.chain, TRUST, inside, peer="client")
    with pytest.raises(Refused) as late:
        verify_x509_svid(svid.chain, TRUST, NOW + timedelta(minutes=5) + second, peer="client")
    assert late.value.reason is Reason.EXPIRED
    with pytest.raises(Refused) as early:
        verify_x509_svid(svid.chain, TRUST, NOW - second, peer="client")
    assert early.value.reason is Reason.UNAUTHENTICATED


def test_an_svid_ends_with_the_first_certificate_of_its_path() -> None:
    short = CA(parent=ROOT, not_after=NOW + timedelta(minutes=2))
    svid = short.svid(lifetime=timedelta(hours=1))
    assert verify(svid).not_after == NOW + timedelta(minutes=2)
    with pytest.raises(Refused) as error:
        verify_x509_svid(svid.chain, TRUST, NOW + timedelta(minutes=3), peer="client")
    assert error.value.reason is Reason.EXPIRED
    expired_root = CA(not_after=NOW + timedelta(minutes=2))
    trust = snapshot(expired_root.bundle())
    assert verify(expired_root.svid(), trust).not_after == NOW + timedelta(minutes=2)
    with pytest.raises(Refused):
        verify_x509_svid(expired_root.svid().chain, trust, NOW + timedelta(minutes=3), peer="client")


# --- memory


def test_what_was_verified_is_remembered_and_what_was_refused_is_not() -> None:
    svid = BETWEEN.svid()
    first = verify(svid)
    assert verify(svid) is first
    assert len(x509_svid._memory) == 1
    for bad in (ROOT.svid(uris=[]), CA().svid()):
        with pytest.raises(Refused):
            verify(bad)
    assert len(x509_svid._memory) == 1


def test_memory_ends_when_the_bundle_loses_the_root_or_the_domain() -> None:
    svid = ROOT.svid()
    assert verify(svid)
    with pytest.raises(Refused):
        verify(svid, snapshot(CA().bundle(), revision=1))  # same revision, other content
    assert verify(svid)
    with pytest.raises(Refused):
        verify(svid, snapshot(revision=2))
    with pytest.raises(Refused):
        verify(svid, snapshot(TrustBundle(trust_domain=TrustDomain(name="acme.test"))))


def test_memory_lasts_while_the_bundle_says_the_same() -> None:
    svid = ROOT.svid()
    assert verify(svid) is verify(svid, snapshot(ROOT.bundle(), revision=2))


def test_what_was_remembered_of_a_server_is_not_true_of_a_client() -> None:
    svid = CA(parent=ROOT, purposes=[SERVER]).svid()
    assert verify(svid, peer="server")
    unauthenticated(svid, "not for authenticating a client", peer="client")


def test_memory_does_not_join_what_was_split_differently() -> None:
    leaf, between = BETWEEN.svid().chain
    assert verify_x509_svid([leaf, between], TRUST, NOW, peer="client")
    for chain in ([leaf + between], [leaf[:-1], leaf[-1:] + between]):
        with pytest.raises(Invalid):
            verify_x509_svid(chain, TRUST, NOW, peer="client")


def test_memory_is_bounded_and_forgets_the_least_recently_used() -> None:
    kept = ROOT.svid()
    first = verify(kept)
    for _ in range(20):
        verify(ROOT.svid())
        assert verify(kept) is first
    assert len(x509_svid._memory) == 8
