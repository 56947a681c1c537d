"""RFC 3161 timestamps: which time a signature is proven to have existed at, and by whose word.

A time counts when the authority's answer is granted, is about these very bytes (SHA-256 or stronger), answers our
nonce where we sent one, is signed by a certificate for time stamping alone that leads to a root we were given, every
certificate on the way being valid at that time, and the authority is trusted at that time.

The cryptography is rfc3161-client's (OpenSSL's PKCS7_verify); what it leaves to its caller is checked here.
Not checked: revocation, and the ESSCertID attribute (RFC 3161 section 2.4.2), which matters only where the authority's
own certificate is not pinned: name it first in the chain, as Sigstore's trusted roots do.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID
from rfc3161_client import PKIStatus, TimeStampResponse, VerificationError, VerifierBuilder, decode_timestamp_response

MAX_RESPONSE: Final = 64 * 1024
"""Bytes of an answer: one with four RSA-4096 certificates has 9,000."""

_MAX_CERTIFICATES: Final = 8
_UNREADABLE = (ValueError, TypeError, OverflowError, x509.InvalidVersion, x509.DuplicateExtension)
_CHAIN = "Error while verifying certificates"  # rfc3161-client's; an OpenSSL error stack follows
_BEGINNING: Final = datetime.min.replace(tzinfo=UTC)
_END: Final = datetime.max.replace(tzinfo=UTC)


class TimestampError(ValueError):
    """It proves no time. The message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TimestampRoot:
    """One authority whose times are believed.

    chain: its own certificate first where it is known (then no other is accepted), intermediates, the root last.
    valid_from, valid_until: when its word counts, both included.
    """

    chain: tuple[x509.Certificate, ...]
    valid_from: datetime = _BEGINNING
    valid_until: datetime = _END

    def __post_init__(self) -> None:
        if not self.chain:
            raise ValueError("a timestamp authority has at least one certificate: its root")
        if not _is_authority(self.chain[-1]):
            raise ValueError("a timestamp authority's chain ends with a root, not with the authority's own certificate")


def verify_timestamp(
    response_der: bytes, message: bytes, authorities: Sequence[TimestampRoot], *, nonce: int | None = None
) -> datetime:
    """The time at which `message` existed, to the second or better, in UTC.

    response_der: a whole TimeStampResp. message: what was stamped, not its hash. nonce: of our request, where this is
    the answer to one.

    Raises: TimestampError where no authority proves one.
    """
    if not authorities:
        raise TimestampError("no timestamp authority is trusted")
    response = _parse(response_der)
    why = ""
    for authority in authorities:
        try:
            return _verify(response, message, authority, nonce)
        except TimestampError as error:
            why = why or str(error)
    raise TimestampError(why)


def read_chain(pem: bytes) -> TimestampRoot:
    """An authority from its certificates in PEM, in the order that `TimestampRoot` wants. Raises: ValueError."""
    return TimestampRoot(chain=tuple(x509.load_pem_x509_certificates(pem)))


def _parse(response_der: bytes) -> TimeStampResponse:
    if len(response_der) > MAX_RESPONSE:
        raise TimestampError(f"the timestamp is larger than {MAX_RESPONSE} bytes")
    try:
        response = decode_timestamp_response(response_der)
        granted = response.status == PKIStatus.GRANTED
        ders = response.signed_data.certificates if granted else set()  # a refusal holds no token
        certificates = [x509.load_der_x509_certificate(one) for one in ders]
        names = Counter((one.issuer.public_bytes(), one.serial_number) for one in certificates)
    except _UNREADABLE as error:
        raise TimestampError("the timestamp cannot be read") from error
    if not granted:
        raise TimestampError("the authority did not grant a timestamp")
    if len(certificates) > _MAX_CERTIFICATES:
        raise TimestampError(f"the timestamp holds more than {_MAX_CERTIFICATES} certificates")
    # rfc3161-client and OpenSSL each look the signer up by issuer and serial: two of one name could be two answers.
    if names and max(names.values()) > 1:
        raise TimestampError("the timestamp holds two certificates of the same issuer and serial number")
    return response


def _verify(response: TimeStampResponse, message: bytes, authority: TimestampRoot, nonce: int | None) -> datetime:
    *others, root = authority.chain
    own = others[0] if others and not _is_authority(others[0]) else None
    verifier = VerifierBuilder(
        tsa_certificate=own,
        intermediates=others[1:] if own else others,
        roots=[root],
        nonce=nonce,
    ).build()
    try:
        verifier.verify_message(response, message)
        if not _stamps_time_alone(own or _signer(response)):
            raise TimestampError("the authority's certificate is not for time stamping alone")
        at = response.tst_info.gen_time
    except VerificationError as error:
        told = str(error)
        if told.startswith(_CHAIN):
            told = "it is not signed by a trusted authority, or a certificate of its chain was not valid then"
        raise TimestampError(f"the timestamp does not verify: {told[:1].lower()}{told[1:]}") from error
    except _UNREADABLE as error:
        raise TimestampError("the timestamp cannot be read") from error
    if at.tzinfo is None:
        at = at.replace(tzinfo=UTC)  # GeneralizedTime of a TSTInfo is UTC by RFC 3161 section 2.4.2
    if not authority.valid_from <= at <= authority.valid_until:
        raise TimestampError("the timestamp's authority is not trusted at the time that it states")
    return at


def _is_authority(certificate: x509.Certificate) -> bool:
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        return False


def _signer(response: TimeStampResponse) -> x509.Certificate:
    (signer,) = response.signed_data.signer_infos
    for der in response.signed_data.certificates:
        certificate = x509.load_der_x509_certificate(der)
        if (certificate.issuer, certificate.serial_number) == (signer.issuer, signer.serial_number):
            return certificate
    raise TimestampError("the timestamp does not hold its signer's certificate")


def _stamps_time_alone(certificate: x509.Certificate) -> bool:
    """RFC 3161 section 2.3: exactly one purpose, critical (that it is critical rfc3161-client looks at)."""
    purposes = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    return list(purposes) == [ExtendedKeyUsageOID.TIME_STAMPING]
