"""A trust domain with a root and an intermediate, and how ours takes their X.509-SVIDs."""

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID
from support.pki import CA, NOW, Svid, snapshot

from broker.errors import Reason, Refused
from broker.identity import x509_svid
from broker.identity.trust import TrustSnapshot
from broker.identity.x509_svid import VerifiedX509Svid, verify_x509_svid

ROOT = CA()
BETWEEN = CA(parent=ROOT)
TRUST = snapshot(ROOT.bundle())
CLIENT, SERVER = ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH
UNKNOWN = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4.5"), b"\x05\x00")


def verify(svid: Svid, trust: TrustSnapshot = TRUST, peer: x509_svid.Peer = "client") -> VerifiedX509Svid:
    return verify_x509_svid(svid.chain, trust, NOW, peer=peer)


def refusal(svid: Svid, trust: TrustSnapshot = TRUST, peer: x509_svid.Peer = "client") -> Refused:
    """How the SVID is refused; a plain one from the same authority is not."""
    with pytest.raises(Refused) as error:
        verify(svid, trust, peer)
    assert verify(ROOT.svid(), TRUST, peer).spiffe_id.path == "/build/agent"
    return error.value


def unauthenticated(svid: Svid, why: str, trust: TrustSnapshot = TRUST, peer: x509_svid.Peer = "client") -> None:
    found = refusal(svid, trust, peer)
    assert found.reason is Reason.UNAUTHENTICATED
    assert why in found.detail
