"""Whether a CA that is believed vouched for a signing certificate, at the time when it signed."""

from collections.abc import Sequence
from datetime import datetime

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.x509.oid import ExtendedKeyUsageOID
from cryptography.x509.verification import Criticality, ExtensionPolicy, Policy, PolicyBuilder, Store, VerificationError

from broker.signing.read_trusted_root import CertificateAuthority

# What reading a hostile certificate may raise: parsing is lazy, so any look at one can.
UNREADABLE = (
    ValueError,
    TypeError,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.ExtensionNotFound,
    x509.UnsupportedGeneralNameType,
    UnsupportedAlgorithm,
)


class NotVouchedFor(ValueError):
    """No CA that is believed says what the certificate says, at that time. The message says why."""


def require_vouched_for(
    leaf: x509.Certificate, authorities: Sequence[CertificateAuthority], times: Sequence[datetime]
) -> None:
    """That, at each of the times, the certificate was valid, for code signing, and under a CA that counted then.

    times: aware; at least one. RFC 5280 path validation by cryptography's verifier, against one authority at a time.

    Raises: NotVouchedFor. Not checked: revocation (a certificate lives minutes), and what it says.
    """
    try:
        why = _usage_fault(leaf) or next(filter(None, (_fault_at(at, leaf, authorities) for at in times)), None)
    except UNREADABLE as error:
        raise NotVouchedFor("the certificate cannot be read") from error
    if why is not None:
        raise NotVouchedFor(why)


def _usage_fault(leaf: x509.Certificate) -> str | None:
    usage = leaf.extensions.get_extension_for_class(x509.KeyUsage).value
    purposes = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    if not usage.digital_signature or usage.key_cert_sign or usage.crl_sign:
        return "the certificate is not one for signatures, or one of a CA"
    if ExtendedKeyUsageOID.CODE_SIGNING not in purposes:
        return "the certificate is not one for code signing"
    return None


def _fault_at(at: datetime, leaf: x509.Certificate, authorities: Sequence[CertificateAuthority]) -> str | None:
    if at < leaf.not_valid_before_utc:
        return f"the certificate begins at {_told(leaf.not_valid_before_utc)}, after {_told(at)}"
    if at > leaf.not_valid_after_utc:
        return f"the certificate ended at {_told(leaf.not_valid_after_utc)}, before {_told(at)}"
    if not any(_vouches(authority, leaf, at) for authority in authorities):
        return f"no CA of the trusted root that counted at {_told(at)} signed the certificate"
    return None


def _vouches(authority: CertificateAuthority, leaf: x509.Certificate, at: datetime) -> bool:
    if not authority.valid_from <= at <= authority.valid_until:
        return False
    *intermediates, root = authority.chain
    verifier = (
        PolicyBuilder()
        .store(Store([root]))
        .time(at.replace(microsecond=0))  # certificates count seconds, the last one included (RFC 5280 4.1.2.5)
        .max_chain_depth(len(authority.chain))
        .extension_policies(ca_policy=_CA, ee_policy=_LEAF)
        .build_client_verifier()  # names are not looked at by it; a server's would be DNS names
    )
    try:
        path = verifier.verify(leaf, intermediates).chain
    except VerificationError:
        return False
    return len(path) > 1  # a root that signs for itself is no CA


def _signs_code(_: Policy, __: x509.Certificate, purposes: x509.ExtendedKeyUsage | None) -> None:
    """A CA's extended key usage limits what stands below it, as Go and OpenSSL read it. Raises: ValueError for no."""
    allowed = {ExtendedKeyUsageOID.CODE_SIGNING, ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE}
    if purposes is not None and allowed.isdisjoint(purposes):
        raise ValueError("a CA that is not for code signing")


def _told(at: datetime) -> str:
    return f"{at:%Y-%m-%d %H:%M:%S} UTC"


_CA = ExtensionPolicy.webpki_defaults_ca().may_be_present(x509.ExtendedKeyUsage, Criticality.AGNOSTIC, _signs_code)
_LEAF = ExtensionPolicy.permit_all()
