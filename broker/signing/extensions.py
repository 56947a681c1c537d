"""What a signing certificate says beside its name and key: Fulcio's extensions, and our own attributes.

Fulcio's are DER UTF8Strings (https://github.com/sigstore/fulcio/blob/main/docs/oid-info.md). Ours stand under a UUID
arc (ITU-T X.667) inside one subjectDirectoryAttributes extension (RFC 5280 section 4.2.1.8), not as extensions of
their own: Go's crypto/x509, and so cosign, cannot parse a certificate with an extension whose OID has an arc over 31
bits, and every UUID is longer. docs/certificate-profile.md is for those who read them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from cryptography import x509

from broker.signing import der

ISSUER: Final = "issuer"
FULCIO_ARC: Final = "1.3.6.1.4.1.57264.1"
FULCIO: Final[Mapping[str, int]] = MappingProxyType(
    {
        ISSUER: 8,
        "build_signer_uri": 9,
        "build_signer_digest": 10,
        "runner_environment": 11,
        "source_repository_uri": 12,
        "source_repository_digest": 13,
        "source_repository_ref": 14,
        "source_repository_identifier": 15,
        "source_repository_owner_uri": 16,
        "source_repository_owner_identifier": 17,
        "build_config_uri": 18,
        "build_config_digest": 19,
        "build_trigger": 20,
        "run_invocation_uri": 21,
        "source_repository_visibility": 22,
        "deployment_environment": 23,
        "token_subject": 24,
    }
)
"""The last arc of each of Fulcio's extensions, by its name in Fulcio's directory."""

OUR_ARC: Final = "2.25.44012727524414043203381243493637502922"  # UUID 211c8b01-37ee-4f3f-b6b0-a80b225d37ca
OURS: Final[Mapping[str, int]] = MappingProxyType(
    {"grant_id": 1, "action_digest": 2, "artifact": 3, "policy_revision": 4, "node": 5, "pod_uid": 6}
)
"""The last arc of each of our attributes. A number is never given another meaning."""

ATTRIBUTES: Final = x509.ObjectIdentifier("2.5.29.9")
FULCIO_OIDS: Final[Mapping[x509.ObjectIdentifier, str]] = MappingProxyType(
    {x509.ObjectIdentifier(f"{FULCIO_ARC}.{arc}"): name for name, arc in FULCIO.items()}
)
_OIDS: Final = {name: oid for oid, name in FULCIO_OIDS.items()}
_TYPES: Final = {name: der.object_identifier(f"{OUR_ARC}.{arc}") for name, arc in OURS.items()}
_NAMES: Final = {der.take_all(der.OBJECT_IDENTIFIER, encoded): name for name, encoded in _TYPES.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Certified:
    """What one certificate says. Only as true as its signature: verify that first.

    uri: the one name. build: Fulcio's extensions by name, without the issuer. artifacts: "<algorithm>:<hex>", sorted.
    action_digest: "sha256:<hex>". What the certificate does not say is "".
    """

    uri: str
    issuer: str
    build: Mapping[str, str]
    grant_id: str
    action_digest: str
    artifacts: tuple[str, ...]
    policy_revision: str
    node: str
    pod_uid: str


def fulcio_extension(name: str, text: str) -> x509.UnrecognizedExtension:
    """One of Fulcio's. Raises: KeyError for a name that is not in `FULCIO`."""
    return x509.UnrecognizedExtension(_OIDS[name], der.utf8(text))


def attributes_extension(values: Mapping[str, tuple[str, ...]]) -> x509.UnrecognizedExtension:
    """Ours: Attribute ::= SEQUENCE {type, SET OF UTF8String}, in the order of `OURS`. values: none empty."""
    attributes = [
        der.sequence(_TYPES[name], der.set_of(map(der.utf8, values[name]))) for name in OURS if name in values
    ]
    return x509.UnrecognizedExtension(ATTRIBUTES, der.sequence(*attributes))


def read_attributes(encoded: bytes) -> dict[str, tuple[str, ...]]:
    """The other way; foreign attributes are passed over. Raises: ValueError for anything that is not as we write it."""
    found: dict[str, tuple[str, ...]] = {}
    rest = der.take_all(der.SEQUENCE, encoded)
    while rest:
        attribute, rest = der.take(der.SEQUENCE, rest)
        kind, values = der.take(der.OBJECT_IDENTIFIER, attribute)
        name = _NAMES.get(kind)
        if name in found:
            raise ValueError(f"the attribute {name} stands there twice")
        if name is not None:
            found[name] = _texts(der.take_all(der.SET, values))
    return found


def _texts(values: bytes) -> tuple[str, ...]:
    encoded: list[bytes] = []
    while values:
        text, values = der.take(der.UTF8_STRING, values)
        encoded.append(der.tlv(der.UTF8_STRING, text))
    if not encoded or encoded != sorted(set(encoded)):
        raise ValueError("an attribute whose values are none, twice the same or out of order")
    return tuple(map(der.read_utf8, encoded))


def read(certificate: x509.Certificate) -> Certified:
    """What the certificate says.

    Raises: ValueError when an extension is not encoded as we do it, or the certificate has not exactly one URI name.
    Not checked: any signature, time, or the rest of the profile.
    """
    build: dict[str, str] = {}
    ours: dict[str, tuple[str, ...]] = {}
    try:
        extensions = certificate.extensions
        names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.DuplicateExtension, x509.ExtensionNotFound, x509.UnsupportedGeneralNameType) as error:
        raise ValueError("the certificate names nobody, or its extensions cannot be read") from error
    for extension in extensions:
        if not isinstance(extension.value, x509.UnrecognizedExtension):
            continue
        if name := FULCIO_OIDS.get(extension.oid):
            build[name] = der.read_utf8(extension.value.value)
        elif extension.oid == ATTRIBUTES:
            ours = read_attributes(extension.value.value)
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    if len(list(names)) != 1 or len(uris) != 1:
        raise ValueError("the certificate has not exactly one name, a URI")
    return Certified(
        uri=uris[0],
        issuer=build.pop(ISSUER, ""),
        build=MappingProxyType(build),
        grant_id=_only(ours, "grant_id"),
        action_digest=_only(ours, "action_digest"),
        artifacts=ours.get("artifact", ()),
        policy_revision=_only(ours, "policy_revision"),
        node=_only(ours, "node"),
        pod_uid=_only(ours, "pod_uid"),
    )


def _only(ours: Mapping[str, tuple[str, ...]], name: str) -> str:
    values = ours.get(name, ("",))
    if len(values) != 1:
        raise ValueError(f"the attribute {name} has more than one value")
    return values[0]
