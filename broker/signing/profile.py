"""The profile of signing certificates, and the only maker of what the CA key may sign.

Two steps, as a CA should take them (the habit is boulder's, `issuance`):

    tbs = to_be_signed(content, issuing)     built, parsed back, held against the profile; sealed, good for once
    der = await authority.issue(tbs)         signs exactly these bytes

The profile is Fulcio's (https://github.com/sigstore/fulcio/blob/main/docs/certificate-specification.md, "Issued
Certificate") without certificate transparency and without the deprecated extension .1.1, whose value is not DER:

1. v3, a random serial number, the issuing CA's signature algorithm and name, an empty subject
2. the lifetime is at most 5 minutes and within the issuing CA's
3. the content's key, which is not the issuing CA's
4. extensions: critical key usage digitalSignature, code signing, both key identifiers, one critical URI name, what the
   content says under Fulcio's arc and ours (extensions.py), in this order, and none more
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import InitVar, dataclass, field
from datetime import datetime
from typing import Final, NoReturn

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID, SignatureAlgorithmOID

from broker.signing import der, extensions
from broker.signing.content import MAX_LIFETIME, CertificateContent
from broker.signing.extensions import ATTRIBUTES, FULCIO_OIDS
from broker.signing.signer import spki_of

SMALLEST_SERIAL: Final = 96  # bits: 159 random ones are drawn, and fewer than this come once in 2^63
LARGEST_SERIAL: Final = 159  # bits, positive: at most 20 octets (RFC 5280 section 4.1.2.2)

_USAGE: Final = x509.KeyUsage(
    digital_signature=True,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    key_cert_sign=False,
    crl_sign=False,
    encipher_only=False,
    decipher_only=False,
)
_PURPOSE: Final = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING])
_SAME_IN_ALL: Final[tuple[x509.Extension[x509.ExtensionType], ...]] = (
    x509.Extension(_USAGE.oid, True, _USAGE),
    x509.Extension(_PURPOSE.oid, False, _PURPOSE),
)
_NOBODY: Final = x509.Name([])

# The same in DER, written by hand: the lint believes neither the builder nor the objects that it was given.
_USAGE_DER: Final = bytes.fromhex("03020780")
_PURPOSE_DER: Final = der.sequence(der.object_identifier("1.3.6.1.5.5.7.3.3"))
_HASHES: Final[dict[str, hashes.SHA256 | hashes.SHA384]] = {"secp256r1": hashes.SHA256(), "secp384r1": hashes.SHA384()}
_ALGORITHMS: Final = {
    "sha256": SignatureAlgorithmOID.ECDSA_WITH_SHA256,
    "sha384": SignatureAlgorithmOID.ECDSA_WITH_SHA384,
}

_seal = object()  # never leaves this module: what is not sealed with it was not linted


class NotInProfile(ValueError):
    """A certificate that we were about to sign is not what it has to be. Our mistake; nothing was signed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Issuing:
    """An issuing CA's certificate, and what every certificate under it takes from it. `Issuing.of` makes one.

    hash: what its key signs with. name, spki: DER. throwaway: a key on the same curve that no certificate names, to
    build with: what it signs, nobody believes.
    """

    certificate: x509.Certificate
    hash: hashes.SHA256 | hashes.SHA384
    name: bytes
    spki: bytes
    key_identifier: x509.SubjectKeyIdentifier
    sha256: bytes
    throwaway: ec.EllipticCurvePrivateKey = field(repr=False)

    @classmethod
    def of(cls, certificate: x509.Certificate) -> "Issuing":
        """Raises: NotInProfile for a key that is not P-256 or P-384, or without a subject key identifier."""
        key = certificate.public_key()
        if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name not in _HASHES:
            raise NotInProfile("an issuing CA has an ECDSA key on P-256 or P-384")
        try:
            own = certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        except x509.ExtensionNotFound:
            raise NotInProfile("an issuing CA has a subject key identifier") from None
        return cls(
            certificate=certificate,
            hash=_HASHES[key.curve.name],
            name=certificate.subject.public_bytes(),
            spki=spki_of(key),
            key_identifier=own,
            sha256=certificate.fingerprint(hashes.SHA256()),
            throwaway=ec.generate_private_key(key.curve),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ToBeSigned:
    """A linted TBSCertificate: the only thing that an issuing CA's key signs. Only `to_be_signed` makes one.

    content: its DER. issuing_sha256: of the DER of the CA that it is for. spki_sha256: of the certified key.
    """

    content: bytes = field(repr=False)
    issuing_sha256: bytes
    spki_sha256: bytes
    serial: int
    not_after: datetime
    seal: InitVar[object]
    _unspent: list[bool] = field(default_factory=lambda: [True], init=False, repr=False, compare=False)

    def __post_init__(self, seal: object) -> None:
        if seal is not _seal:
            raise TypeError("only to_be_signed() makes a ToBeSigned")

    def spend(self) -> bytes:
        """Uses it up and gives the bytes to sign. Raises: ValueError the second time."""
        try:
            self._unspent.pop()  # atomic: of two threads, one gets the only element
        except IndexError:
            raise ValueError("this certificate was signed before, or at least begun") from None
        return self.content

    def __reduce__(self) -> NoReturn:
        raise TypeError("a ToBeSigned cannot be copied or stored: build it again")


def to_be_signed(content: CertificateContent, issuing: Issuing) -> ToBeSigned:
    """Builds what the content says, parses it back and holds it against the profile.

    It is built whole, signed by a throw-away key, so that the parser sees a certificate; that signature ends here.

    Raises: NotInProfile. Not checked: that the content is true, and that the CA's own certificate is trusted.
    """
    serial = x509.random_serial_number()
    built = _builder(content, issuing, serial).sign(issuing.throwaway, issuing.hash)
    lint(built, content, issuing, serial)
    return ToBeSigned(
        content=built.tbs_certificate_bytes,
        issuing_sha256=issuing.sha256,
        spki_sha256=hashlib.sha256(content.spki).digest(),
        serial=serial,
        not_after=content.not_after,
        seal=_seal,
    )


def _builder(content: CertificateContent, issuing: Issuing, serial: int) -> x509.CertificateBuilder:
    return (
        # All extensions at once: added one by one, each is held against all before it, which the lint does once.
        x509.CertificateBuilder(extensions=[*_extensions(content, issuing)])
        .subject_name(_NOBODY)
        .issuer_name(issuing.certificate.subject)
        .public_key(content.public_key)
        .serial_number(serial)
        .not_valid_before(content.not_before)
        .not_valid_after(content.not_after)
    )


def _extensions(content: CertificateContent, issuing: Issuing) -> Iterator[x509.Extension[x509.ExtensionType]]:
    yield from _SAME_IN_ALL
    yield _extension(x509.SubjectKeyIdentifier.from_public_key(content.public_key))
    yield _extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuing.key_identifier))
    yield _extension(_names(content), critical=True)
    for name, text in content.fulcio.items():
        yield _extension(extensions.fulcio_extension(name, text))
    yield _extension(extensions.attributes_extension(content.ours))


def _extension(value: x509.ExtensionType, *, critical: bool = False) -> x509.Extension[x509.ExtensionType]:
    return x509.Extension(value.oid, critical, value)


def _names(content: CertificateContent) -> x509.SubjectAlternativeName:
    return x509.SubjectAlternativeName([x509.UniformResourceIdentifier(str(content.spiffe_id))])


def lint(built: x509.Certificate, content: CertificateContent, issuing: Issuing, serial: int) -> None:
    """Raises: NotInProfile unless the certificate is in the profile (the numbers above) and says the content, no more.

    Not checked: its signature.
    """
    _lint_fields(built, issuing, serial)  # 1
    _lint_times(built, content, issuing)  # 2
    if spki_of(built.public_key()) != content.spki or content.spki == issuing.spki:  # 3
        raise NotInProfile("the key is not the one to be certified, or it is the CA's own")
    _lint_extensions(built, content, issuing)  # 4


def _lint_fields(built: x509.Certificate, issuing: Issuing, serial: int) -> None:
    if built.version != x509.Version.v3 or built.serial_number != serial:
        raise NotInProfile("the version or the serial number is not the one that was drawn")
    if serial <= 0 or not SMALLEST_SERIAL <= serial.bit_length() <= LARGEST_SERIAL:
        raise NotInProfile("the serial number is not random enough, not positive or too long")
    if built.issuer.public_bytes() != issuing.name or built.subject.rdns:
        raise NotInProfile("the issuer is not the CA, or the subject is not empty")
    if built.signature_algorithm_oid != _ALGORITHMS[issuing.hash.name]:
        raise NotInProfile("the signature algorithm is not the CA's")


def _lint_times(built: x509.Certificate, content: CertificateContent, issuing: Issuing) -> None:
    begin, end = built.not_valid_before_utc, built.not_valid_after_utc
    if (begin, end) != (content.not_before, content.not_after):
        raise NotInProfile("the times are not those that were asked for")
    if not begin < end <= begin + MAX_LIFETIME:
        raise NotInProfile(f"the lifetime is not within {MAX_LIFETIME}")
    if begin < issuing.certificate.not_valid_before_utc or end > issuing.certificate.not_valid_after_utc:
        raise NotInProfile("the certificate would live before or after its CA: run `action-broker ca rotate`")


def _lint_extensions(built: x509.Certificate, content: CertificateContent, issuing: Issuing) -> None:
    wanted = list(_expected(content, issuing))
    found = list(built.extensions)
    if [(one.oid, one.critical) for one in found] != [(oid, critical) for oid, critical, _ in wanted]:
        raise NotInProfile("the extensions, their order or their critical flags are not the profile's")
    for one, (oid, _, value) in zip(found, wanted, strict=True):
        if not _says(one.value.public_bytes(), value):
            raise NotInProfile(f"the extension {oid.dotted_string} does not say what it should")


def _says(encoded: bytes, value: bytes | str | Mapping[str, tuple[str, ...]]) -> bool:
    """Whether an extension is this DER, a UTF8String of this text, or these attributes."""
    try:
        match value:
            case bytes():
                return encoded == value
            case str():
                return der.read_utf8(encoded) == value
            case _:
                return extensions.read_attributes(encoded) == value
    except ValueError:
        return False


def _expected(
    content: CertificateContent, issuing: Issuing
) -> Iterator[tuple[x509.ObjectIdentifier, bool, bytes | str | Mapping[str, tuple[str, ...]]]]:
    """Every extension in its order: OID, critical, and what `_says` holds it against."""
    uri = str(content.spiffe_id).encode()
    # RFC 5280 section 4.2.1.2, method 1: SHA-1 of the key's bits. A name for it, not a protection.
    bits = der.take_all(der.BIT_STRING, _key_bits(content.spki))[1:]
    identifier = hashlib.sha1(bits, usedforsecurity=False).digest()
    yield ExtensionOID.KEY_USAGE, True, _USAGE_DER
    yield ExtensionOID.EXTENDED_KEY_USAGE, False, _PURPOSE_DER
    yield ExtensionOID.SUBJECT_KEY_IDENTIFIER, False, der.tlv(0x04, identifier)
    yield ExtensionOID.AUTHORITY_KEY_IDENTIFIER, False, der.sequence(der.tlv(0x80, issuing.key_identifier.digest))
    yield ExtensionOID.SUBJECT_ALTERNATIVE_NAME, True, der.sequence(der.tlv(0x86, uri))
    for oid, name in FULCIO_OIDS.items():
        if name in content.fulcio:
            yield oid, False, content.fulcio[name]
    yield ATTRIBUTES, False, content.ours


def _key_bits(spki: bytes) -> bytes:
    return der.take(der.SEQUENCE, der.take_all(der.SEQUENCE, spki))[1]
