"""A certificate that differs from what its content says, in whatever way, is not signed."""

from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID, NameOID
from support.certificates import AGENT, ISSUER, NOW, content, make_authority

from broker.signing import der, extensions, profile
from broker.signing.content import CertificateContent
from broker.signing.profile import Issuing, NotInProfile, to_be_signed

Extension = x509.Extension[x509.ExtensionType]


@pytest.fixture(scope="module")
def issuing(tmp_path_factory: pytest.TempPathFactory) -> Issuing:
    return make_authority(tmp_path_factory.mktemp("profile") / "ca").issuing


def built(wanted: CertificateContent, issuing: Issuing) -> x509.Certificate:
    """As `to_be_signed` has it before the lint."""
    serial = x509.random_serial_number()
    return profile._builder(wanted, issuing, serial).sign(issuing.throwaway, issuing.hash)


def remade(issuing: Issuing, certificate: x509.Certificate, change: Iterable[Extension], **fields: Any) -> Any:
    """The same certificate with other extensions and fields."""
    builder = (
        x509.CertificateBuilder()
        .subject_name(fields.get("subject", certificate.subject))
        .issuer_name(fields.get("issuer", certificate.issuer))
        .public_key(fields.get("key", certificate.public_key()))
        .serial_number(fields.get("serial", certificate.serial_number))
        .not_valid_before(fields.get("begin", certificate.not_valid_before_utc))
        .not_valid_after(fields.get("end", certificate.not_valid_after_utc))
    )
    for one in change:
        builder = builder.add_extension(one.value, one.critical)
    return builder.sign(issuing.throwaway, fields.get("hash", issuing.hash))


def extension(value: x509.ExtensionType, *, critical: bool = False) -> Extension:
    return x509.Extension(value.oid, critical, value)


def swap(old: list[Extension], oid: x509.ObjectIdentifier, new: Extension) -> list[Extension]:
    return [new if one.oid == oid else one for one in old]


def text(arc: int, value: str) -> Extension:
    oid = x509.ObjectIdentifier(f"1.3.6.1.4.1.57264.1.{arc}")
    return extension(x509.UnrecognizedExtension(oid, der.utf8(value)))


SAN = ExtensionOID.SUBJECT_ALTERNATIVE_NAME
UPN = x509.ObjectIdentifier("1.3.6.1.4.1.57264.1.8")
TWO = [x509.UniformResourceIdentifier(str(AGENT)), x509.UniformResourceIdentifier("spiffe://acme.test/other")]
OTHER_ATTRIBUTES = x509.UnrecognizedExtension(
    extensions.ATTRIBUTES, der.sequence(der.sequence(der.object_identifier("1.2.3"), der.set_of([der.utf8("x")])))
)
EXTENSION_DEFECTS: dict[str, Callable[[list[Extension]], list[Extension]]] = {
    "one-more": lambda old: [*old, extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)],
    "one-more-of-fulcios": lambda old: [*old[:-1], text(23, "production"), old[-1]],
    "one-less": lambda old: old[:-1],
    "another-order": lambda old: [old[1], old[0], *old[2:]],
    "name-not-critical": lambda old: swap(old, SAN, extension(x509.SubjectAlternativeName(TWO[:1]))),
    "two-names": lambda old: swap(old, SAN, extension(x509.SubjectAlternativeName(TWO), critical=True)),
    "another-name": lambda old: swap(old, SAN, extension(x509.SubjectAlternativeName(TWO[1:]), critical=True)),
    "another-issuer": lambda old: swap(old, UPN, text(8, "https://other.test")),
    "issuer-not-der": lambda old: swap(
        old, UPN, extension(x509.UnrecognizedExtension(UPN, b"\x0c\x81\x18" + ISSUER.encode()))
    ),
    "one-more-purpose": lambda old: swap(
        old,
        ExtensionOID.EXTENDED_KEY_USAGE,
        extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING, ExtendedKeyUsageOID.CLIENT_AUTH])),
    ),
    "may-sign-certificates": lambda old: swap(
        old,
        ExtensionOID.KEY_USAGE,
        extension(x509.KeyUsage(True, False, False, False, False, True, False, False, False), critical=True),
    ),
    "another-key-identifier": lambda old: swap(
        old, ExtensionOID.SUBJECT_KEY_IDENTIFIER, extension(x509.SubjectKeyIdentifier(b"x" * 20))
    ),
    "other-attributes": lambda old: [*old[:-1], extension(OTHER_ATTRIBUTES)],
    "other-artifacts": lambda old: [
        *old[:-1], extension(extensions.attributes_extension(content(artifacts=({"sha256": "cd" * 32},)).ours))
    ],
}  # fmt: skip
FIELD_DEFECTS: dict[str, Callable[[Issuing], dict[str, Any]]] = {
    "a-subject": lambda _: {"subject": x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "agent")])},
    "another-issuer": lambda _: {"issuer": x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "other")])},
    "another-key": lambda _: {"key": ec.generate_private_key(ec.SECP256R1()).public_key()},
    "the-cas-key": lambda issuing: {"key": issuing.certificate.public_key()},
    "another-serial": lambda _: {"serial": x509.random_serial_number()},
    "begins-before": lambda _: {"begin": NOW - timedelta(hours=2)},
    "ends-later": lambda _: {"end": NOW + timedelta(hours=2)},
    "another-hash": lambda _: {"hash": hashes.SHA384()},
}


@pytest.mark.parametrize("name", EXTENSION_DEFECTS)
def test_a_certificate_whose_extensions_are_not_the_profiles_is_not_signed(issuing: Issuing, name: str) -> None:
    wanted = content()
    made = built(wanted, issuing)
    same = remade(issuing, made, list(made.extensions))
    profile.lint(same, wanted, issuing, made.serial_number)
    changed = remade(issuing, made, EXTENSION_DEFECTS[name](list(made.extensions)))
    with pytest.raises(NotInProfile):
        profile.lint(changed, wanted, issuing, made.serial_number)


@pytest.mark.parametrize("name", FIELD_DEFECTS)
def test_a_certificate_whose_fields_are_not_the_profiles_is_not_signed(issuing: Issuing, name: str) -> None:
    wanted = content()
    made = built(wanted, issuing)
    profile.lint(remade(issuing, made, made.extensions), wanted, issuing, made.serial_number)
    changed = remade(issuing, made, made.extensions, **FIELD_DEFECTS[name](issuing))
    with pytest.raises(NotInProfile):
        profile.lint(changed, wanted, issuing, made.serial_number)


def test_a_serial_number_that_could_be_guessed_is_not_signed(issuing: Issuing) -> None:
    wanted = content()
    made = built(wanted, issuing)
    for serial in (1, 2**64, 2**95 - 1):
        with pytest.raises(NotInProfile, match="serial"):
            profile.lint(remade(issuing, made, made.extensions, serial=serial), wanted, issuing, serial)
    drawn = {to_be_signed(wanted, issuing).serial for _ in range(50)}
    assert len(drawn) == 50
