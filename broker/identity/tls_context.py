"""TLS settings made of a TrustSnapshot. Keys pass through memory only."""

import base64
import os
import ssl
from collections.abc import Iterable
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from broker.errors import Reason, Unavailable
from broker.identity.spiffe_id import TrustDomain
from broker.identity.trust import OwnSvid, TrustSnapshot

_DER = 2  # _ssl.ENCODING_DER


def own_svid(snapshot: TrustSnapshot) -> OwnSvid:
    """Our SVID. Raises: Unavailable(identity_unavailable) where there is none."""
    if snapshot.own is None:
        raise Unavailable(Reason.IDENTITY_UNAVAILABLE, "we have no SVID: create a registration entry for this process")
    return snapshot.own


def client_context(snapshot: TrustSnapshot, trust_domain: TrustDomain, alpn: str) -> ssl.SSLContext:
    """For dialling servers of one trust domain.

    It checks the path to that domain's bundle. Not checked: the server's SPIFFE ID, which verify_x509_svid finds.
    Raises: Refused where we have no bundle of that domain; Unavailable without an SVID of our own.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    _fill(context, own_svid(snapshot), snapshot.bundle_for(trust_domain).x509_authorities)
    context.set_alpn_protocols([alpn])
    return context


def server_context(snapshot: TrustSnapshot) -> ssl.SSLContext:
    """For serving HTTP/1.1, where a client may, but need not, show an X.509-SVID.

    All domains' authorities count in the handshake. Not checked, so to be done for each request: that a certificate
    leads to the bundle of its own trust domain. Raises: Unavailable without an SVID of our own.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_OPTIONAL
    context.num_tickets = 0  # a resumed session would skip the look at the client's chain
    _fill(context, own_svid(snapshot), pooled_authorities(snapshot))
    context.set_alpn_protocols(["http/1.1"])
    return context


def pooled_authorities(snapshot: TrustSnapshot) -> tuple[x509.Certificate, ...]:
    """The authorities of all trust domains: good enough to let a handshake through, never to say who is there."""
    return tuple(authority for bundle in snapshot.bundles.values() for authority in bundle.x509_authorities)


def _fill(context: ssl.SSLContext, own: OwnSvid, authorities: Iterable[x509.Certificate]) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    # What stands in a SPIFFE bundle is trusted as it is, whether it signed itself or not.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    roots = b"".join(authority.public_bytes(Encoding.DER) for authority in authorities)
    if roots:  # OpenSSL takes no empty list; without any it trusts nobody, as it should
        context.load_verify_locations(cadata=roots)
    # ssl loads a key from a file only. This one is in memory, without a name, and gone when it is closed.
    file = os.memfd_create("svid", os.MFD_CLOEXEC)
    try:
        with open(file, "wb", closefd=False) as pem:
            pem.write(key_pem(own) + chain_pem(own))
        context.load_cert_chain(f"/proc/self/fd/{file}")
    finally:
        os.close(file)


def key_pem(own: OwnSvid) -> bytes:
    """The private key. Secret."""
    return _pem("PRIVATE KEY", own.private_key_pkcs8)


def chain_pem(own: OwnSvid) -> bytes:
    """The chain, leaf first."""
    return b"".join(_pem("CERTIFICATE", der) for der in own.chain)


def _pem(label: str, der: bytes) -> bytes:
    text = base64.encodebytes(der).decode()  # lines of 76; RFC 7468 section 3 lets parsers take them
    return f"-----BEGIN {label}-----\n{text}-----END {label}-----\n".encode()


def peer_chain(connection: ssl.SSLObject | ssl.SSLSocket) -> tuple[bytes, ...]:
    """The certificates that the other side sent, DER, leaf first; empty if it sent none. Nothing about them is checked.

    Python 3.13 has get_unverified_chain(); before it only the object inside had. Either is wrong where there is none.
    """
    if connection.getpeercert(binary_form=True) is None:
        return ()
    if hasattr(connection, "get_unverified_chain"):
        return tuple(connection.get_unverified_chain())
    inside: Any = connection._sslobj  # type: ignore[union-attr]  # noqa: SLF001
    return tuple(certificate.public_bytes(_DER) for certificate in inside.get_unverified_chain())
