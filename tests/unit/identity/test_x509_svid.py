"""X.509-SVIDs by X509-SVID.md, each MUST both ways.

Invariant 5 of the design: an identity is verified against its own trust domain's bundle only, on every request.
"""

import hashlib
from datetime import timedelta
from itertools import permutations

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID
from support.pki import BOTH, CA, NOW, WORKLOAD, Svid, der, name, snapshot, usage
from support.x509_svids import BETWEEN, CLIENT, ROOT, SERVER, TRUST, UNKNOWN, refusal, unauthenticated, verify

from broker.errors import Invalid, Reason
from broker.identity import x509_svid
from broker.identity.spiffe_id import TrustDomain
from broker.identity.trust import TrustBundle
from broker.identity.x509_svid import verify_x509_svid


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(x509_svid, "_memory", x509_svid._Memory(8))


# --- what must be accepted


def test_a_verified_svid_tells_who_and_by_which_leaf_and_until_when() -> None:
    svid = BETWEEN.svid()
    found = verify(svid)
    assert str(found.spiffe_id) == WORKLOAD
    assert found.leaf_sha256 == svid.leaf.fingerprint(svid.leaf.signature_hash_algorithm)
    assert found.not_after == NOW + timedelta(hours=1)
    assert found.public_key == svid.key.public_key()


@pytest.mark.parametrize("peer", ["client", "server"])
@pytest.mark.parametrize(
    "svid",
    [
        ROOT.svid(),
        BETWEEN.svid(),
        ROOT.svid(purposes=()),
        ROOT.svid(purposes_critical=True),
        ROOT.svid(purposes=(*BOTH, ExtendedKeyUsageOID.CODE_SIGNING)),
        ROOT.svid(basic_constraints=None),
        ROOT.svid(names_critical=True),
        ROOT.svid(subject="", names_critical=True),
        ROOT.svid(dns=["orders.acme.test", "localhost"]),
        ROOT.svid(key_usage=usage("digital_signature", "key_encipherment", "key_agreement")),
        ROOT.svid(extra=[(UNKNOWN, False)]),
        ROOT.svid("spiffe://acme.test/" + "x" * (2048 - 19)),
        ROOT.svid(key=rsa.generate_private_key(public_exponent=65537, key_size=2048)),
        ROOT.svid(key=ec.generate_private_key(ec.SECP384R1())),
        ROOT.svid(key=ed25519.Ed25519PrivateKey.generate()),
        CA(parent=ROOT, uri=None).svid(),
        CA(parent=ROOT, uri="spiffe://acme.test/").svid(),
        CA(parent=ROOT, uri="https://ca.acme.test/a").svid(),
        CA(parent=ROOT, uri="spiffe://other.test").svid(),
        CA(parent=ROOT, basic_constraints=x509.BasicConstraints(ca=True, path_length=0)).svid(),
        CA(parent=ROOT, purposes=BOTH).svid(),
        CA(parent=ROOT, purposes=[ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE]).svid(),
        CA(parent=ROOT, key_usage=usage("key_cert_sign")).svid(),
        CA(parent=CA(parent=CA(parent=BETWEEN))).svid(),
    ],
    ids=[
        "from a root",
        "from an intermediate",
        "without extended key usage",
        "critical extended key usage",
        "a further purpose",
        "without basic constraints",
        "critical names",
        "critical names without a subject",
        "DNS names beside",
        "key encipherment and agreement",
        "unknown extension, not critical",
        "the longest SPIFFE ID",
        "RSA 2048",
        "P-384",
        "Ed25519",
        "intermediate that is no SVID",
        "intermediate whose ID ends in a slash",
        "intermediate with a URI that is no SPIFFE ID",
        "intermediate of another trust domain under our root",
        "path length just enough",
        "intermediate for both purposes",
        "intermediate for any purpose",
        "intermediate without cRLSign",
        "four intermediates",
    ],
)
def test_what_the_standard_allows_is_accepted(svid: Svid, peer: x509_svid.Peer) -> None:
    assert verify(svid, peer=peer).spiffe_id.trust_domain.name == "acme.test"


def test_a_verified_svid_tells_which_authority_of_the_bundle_vouched() -> None:
    other = CA(seed="another root")
    trust = snapshot(
        TrustBundle(
            trust_domain=TrustDomain.parse("acme.test"),
            x509_authorities=tuple(one for ca in (other, ROOT) for one in ca.bundle().x509_authorities),
        )
    )
    by_root, by_other = ROOT.bundle().x509_authorities[0], other.bundle().x509_authorities[0]
    assert verify(BETWEEN.svid(), trust).authority_sha256 == x509_svid.authority_digest(by_root)
    assert verify(ROOT.svid(), trust).authority_sha256 == hashlib.sha256(der(by_root)).digest()
    assert verify(other.svid(), trust).authority_sha256 == hashlib.sha256(der(by_other)).digest()


def test_intermediates_may_come_in_any_order() -> None:
    svid = CA(parent=BETWEEN).svid()
    for order in permutations(svid.chain[1:]):
        assert str(verify_x509_svid([svid.chain[0], *order], TRUST, NOW, peer="client").spiffe_id) == WORKLOAD


def test_a_root_that_is_no_svid_may_stand_in_a_bundle() -> None:
    corporate = CA(uri=None, key_usage_critical=False)
    assert verify(corporate.svid(), snapshot(corporate.bundle()))


def test_the_root_may_be_sent_along() -> None:
    svid = BETWEEN.svid()
    assert verify_x509_svid([*svid.chain, der(ROOT.certificate)], TRUST, NOW, peer="client")


def test_while_a_root_rotates_both_count() -> None:
    new = CA()
    both = TrustBundle(trust_domain=ROOT.trust_domain, x509_authorities=(ROOT.certificate, new.certificate))
    assert verify(ROOT.svid(), snapshot(both))
    assert verify(new.svid(), snapshot(both))


def test_federated_domains_are_each_verified_by_their_own_bundle() -> None:
    other = CA("other.test")
    trust = snapshot(ROOT.bundle(), other.bundle())
    assert verify(ROOT.svid(), trust).spiffe_id.trust_domain.name == "acme.test"
    assert verify(other.svid("spiffe://other.test/x"), trust).spiffe_id.trust_domain.name == "other.test"


# --- who may vouch for whom


def test_an_authority_of_another_domain_cannot_speak_for_ours_even_when_we_federate_with_it() -> None:
    other = CA("other.test")
    trust = snapshot(ROOT.bundle(), other.bundle())
    unauthenticated(other.svid(WORKLOAD), "no path to an authority of spiffe://acme.test", trust)
    unauthenticated(CA("other.test", parent=other).svid(WORKLOAD), "no path", trust)
    unauthenticated(ROOT.svid("spiffe://other.test/x"), "no path to an authority of spiffe://other.test", trust)


def test_an_authority_with_our_roots_name_is_not_our_root() -> None:
    unauthenticated(CA(common_name="root of acme.test").svid(), "no path")


def test_a_root_sent_along_is_not_trusted_for_that() -> None:
    stranger = CA(parent=CA())
    svid = stranger.svid()
    chain = (*svid.chain, der(stranger.root.certificate))
    unauthenticated(Svid(leaf=svid.leaf, key=svid.key, chain=chain), "no path")


def test_a_domain_without_a_bundle_is_refused() -> None:
    unauthenticated(CA("other.test").svid("spiffe://other.test/x"), "no trust bundle for spiffe://other.test")


def test_an_empty_bundle_trusts_nobody() -> None:
    unauthenticated(ROOT.svid(), "no X.509 authorities", snapshot(TrustBundle(trust_domain=ROOT.trust_domain)))


def test_a_leaf_in_the_bundle_is_no_authority() -> None:
    svid = ROOT.svid()
    wrong = TrustBundle(trust_domain=ROOT.trust_domain, x509_authorities=(svid.leaf,))
    unauthenticated(svid, "the bundle holds the leaf itself", snapshot(wrong))


def test_a_leaf_cannot_issue() -> None:
    caught = ROOT.svid()
    forger = CA(parent=ROOT)
    forger.certificate, forger.key, forger.name = caught.leaf, caught.key, name("a workload")
    unauthenticated(forger.svid("spiffe://acme.test/admin"), "no path")


# --- the leaf


@pytest.mark.parametrize(
    ("svid", "why"),
    [
        (ROOT.svid(uris=[WORKLOAD, WORKLOAD + "2"]), "2 URI names"),
        (ROOT.svid(uris=[WORKLOAD, WORKLOAD]), "2 URI names"),
        (ROOT.svid(uris=[WORKLOAD, "https://acme.test/"]), "2 URI names"),
        (ROOT.svid(uris=[]), "0 URI names"),
        (ROOT.svid(uris=[], dns=["acme.test"]), "0 URI names"),
        (ROOT.svid(subject="", names_critical=False), "no subject"),
        (ROOT.svid("spiffe://acme.test"), "not a workload"),
        (ROOT.svid(basic_constraints=x509.BasicConstraints(ca=True, path_length=None)), "is a CA"),
        (ROOT.svid(basic_constraints=x509.BasicConstraints(ca=True, path_length=0)), "is a CA"),
        (ROOT.svid(key_usage=usage("digital_signature", "key_cert_sign")), "may sign certificates"),
        (ROOT.svid(key_usage=usage("digital_signature", "crl_sign")), "may sign certificates"),
        (ROOT.svid(key_usage=usage("key_encipherment")), "may not make digital signatures"),
        (ROOT.svid(key_usage=None), "no critical key usage"),
        (ROOT.svid(key_usage_critical=False), "no critical key usage"),
        (ROOT.svid(purposes=[SERVER]), "limits its purposes"),
        (ROOT.svid(purposes=[CLIENT]), "limits its purposes"),
        (ROOT.svid(purposes=[ExtendedKeyUsageOID.CODE_SIGNING]), "limits its purposes"),
        (ROOT.svid(purposes=[ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE]), "limits its purposes"),
        (
            ROOT.svid(extra=[(x509.NameConstraints([x509.UniformResourceIdentifier("acme.test")], None), True)]),
            "name constraints",
        ),
        (ROOT.svid(extra=[(x509.NameConstraints([x509.DNSName("acme.test")], None), False)]), "name constraints"),
        (ROOT.svid(extra=[(UNKNOWN, True)]), "critical extensions"),
        (ROOT.svid(key=rsa.generate_private_key(public_exponent=65537, key_size=1024)), "RSA key under 2048"),  # noqa: S505
    ],
)
@pytest.mark.parametrize("peer", ["client", "server"])
def test_what_is_no_leaf_svid_authenticates_nobody(svid: Svid, why: str, peer: x509_svid.Peer) -> None:
    unauthenticated(svid, why, peer=peer)


@pytest.mark.parametrize(
    "uri",
    [
        "https://acme.test/x",
        "spiffe://acme.test/../x",
        "spiffe://acme.test/x/",
        "spiffe://acme.test//x",
        "spiffe://acme.test/%61",
        "spiffe://Acme.test/x",
        "SPIFFE://acme.test/x",
        "spiffe://acme.test:8443/x",
        "spiffe://other.test@acme.test/x",
        "spiffe://acme.test/x?y",
        "spiffe://acme.test/x\x00.other.test",
        "spiffe://acme.test/" + "x" * 2048,
    ],
)
def test_a_name_that_is_no_spiffe_id_is_malformed(uri: str) -> None:
    assert refusal(ROOT.svid(uri)).reason is Reason.MALFORMED


def test_a_signing_certificate_authenticates_nobody() -> None:
    unauthenticated(Svid(leaf=BETWEEN.certificate, key=BETWEEN.key, chain=BETWEEN.chain), "is a CA")
    unauthenticated(Svid(leaf=ROOT.certificate, key=ROOT.key, chain=(der(ROOT.certificate),)), "is a CA")


# --- the path


@pytest.mark.parametrize(
    "between",
    [
        CA(parent=ROOT, uri="spiffe://acme.test/ca"),
        CA(parent=ROOT, uri="spiffe://other.test/ca"),
        CA(parent=ROOT, key_usage_critical=False),
        CA(parent=ROOT, key_usage=usage("digital_signature")),
        CA(parent=ROOT, key_usage=None),
        CA(parent=ROOT, basic_constraints=x509.BasicConstraints(ca=False, path_length=None)),
        CA(parent=ROOT, basic_constraints=None),
        CA(parent=ROOT, purposes=[ExtendedKeyUsageOID.CODE_SIGNING]),
        CA(parent=ROOT, extra=[(UNKNOWN, True)]),
        CA(
            parent=ROOT,
            extra=[(x509.NameConstraints([x509.UniformResourceIdentifier("other.test")], None), True)],
        ),
        CA(
            parent=ROOT,
            extra=[(x509.NameConstraints(None, [x509.UniformResourceIdentifier("acme.test")]), False)],
        ),
        CA(parent=ROOT, not_before=NOW + timedelta(seconds=1)),
        CA(parent=CA(parent=ROOT, basic_constraints=x509.BasicConstraints(ca=True, path_length=0))),
    ],
    ids=[
        "its SPIFFE ID has a path",
        "its foreign SPIFFE ID has a path",
        "its key usage is not critical",
        "no keyCertSign",
        "no key usage",
        "not a CA",
        "no basic constraints",
        "for another purpose",
        "unknown critical extension",
        "URI name constraint to another domain",
        "URI name constraint that excludes ours",
        "not valid yet",
        "beyond the path length",
    ],
)
def test_a_path_over_what_is_no_signing_certificate_leads_nowhere(between: CA) -> None:
    unauthenticated(between.svid(), "no path to an authority of spiffe://acme.test")


def test_an_intermediate_for_one_purpose_vouches_for_that_kind_of_peer_only() -> None:
    servers = CA(parent=ROOT, purposes=[SERVER]).svid()
    assert verify(servers, peer="server")
    unauthenticated(servers, "not for authenticating a client", peer="client")
    clients = CA(parent=ROOT, purposes=[CLIENT]).svid()
    assert verify(clients, peer="client")
    unauthenticated(clients, "not for authenticating a server", peer="server")


def test_a_bad_signing_certificate_does_not_spoil_a_good_path_beside_it() -> None:
    bad = CA(parent=ROOT, uri="spiffe://acme.test/ca")
    good = CA(parent=ROOT, key=bad.key)
    svid = bad.svid()
    unauthenticated(svid, "no path")
    for chain in ((svid.chain[0], *bad.chain, *good.chain), (svid.chain[0], *good.chain, *bad.chain)):
        assert verify_x509_svid(chain, TRUST, NOW, peer="client")


def test_a_chain_that_lacks_an_intermediate_leads_nowhere() -> None:
    svid = CA(parent=BETWEEN).svid()
    assert verify(svid)
    for kept in (svid.chain[:1], svid.chain[:2], (svid.chain[0], svid.chain[2])):
        unauthenticated(Svid(leaf=svid.leaf, key=svid.key, chain=kept), "no path")


def test_a_chain_over_five_certificates_is_refused_unread() -> None:
    svid = CA(parent=CA(parent=CA(parent=CA(parent=BETWEEN)))).svid()
    assert len(svid.chain) == 6
    assert refusal(svid).reason is Reason.MALFORMED
    padded = ROOT.svid()
    assert verify_x509_svid([*padded.chain, *BETWEEN.chain * 4], TRUST, NOW, peer="client")
    with pytest.raises(Invalid):
        verify_x509_svid([*padded.chain, *BETWEEN.chain * 5], TRUST, NOW, peer="client")


@pytest.mark.parametrize("chain", [[], [b""], [b"\x30\x00"], [b"x" * 65 * 1024], [b"-----BEGIN CERTIFICATE-----"]])
def test_what_is_no_certificate_is_malformed(chain: list[bytes]) -> None:
    with pytest.raises(Invalid):
        verify_x509_svid(chain, TRUST, NOW, peer="client")


def test_bytes_after_a_certificate_are_refused() -> None:
    with pytest.raises(Invalid):
        verify_x509_svid([ROOT.svid().chain[0] + b"\x00"], TRUST, NOW, peer="client")


def test_a_changed_byte_of_the_signature_is_refused() -> None:
    svid = ROOT.svid()
    forged = svid.chain[0][:-1] + bytes([svid.chain[0][-1] ^ 1])
    unauthenticated(Svid(leaf=svid.leaf, key=svid.key, chain=(forged,)), "signature does not match")
