"""A private key in a token: where its public half is read, what it may do, and how it signs."""

from dataclasses import dataclass
from typing import Any, Final

import pkcs11
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa, utils
from pkcs11 import Attribute, KeyType, Mechanism, ObjectClass
from pkcs11.types import SignMixin

from broker.signing.signer import Algorithm, PublicKey, UnusableKey, algorithm_of

# CKA_EC_PARAMS: DER of the named curve (RFC 5480 section 2.1.1.1), or for Ed25519 its name as older modules give it.
_CURVES: Final = {
    bytes.fromhex("06082a8648ce3d030107"): ec.SECP256R1(),
    bytes.fromhex("06052b81040022"): ec.SECP384R1(),
}
_ED25519: Final = {bytes.fromhex("06032b6570"), b"\x13\x0cedwards25519"}
_MECHANISMS: Final = {
    Algorithm.ECDSA_P256: Mechanism.ECDSA,
    Algorithm.ECDSA_P384: Mechanism.ECDSA,
    Algorithm.ED25519: Mechanism.EDDSA,
    Algorithm.RSA_PSS: Mechanism.RSA_PKCS_PSS,
}
_PSS: Final = (Mechanism.SHA256, pkcs11.MGF.SHA256, 32)  # the salt is as long as the hash
_ROOM: Final = 1024  # bytes: an RSA signature of 8192 bits, the longest there is


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenKey:
    """What is known of a key. `warnings`: sentences about what its token would let others do with it."""

    public_key: PublicKey
    algorithm: Algorithm
    warnings: tuple[str, ...]


class NoSuchKey(UnusableKey):
    """No key of that label: perhaps since the token was taken away."""


def find_private(session: pkcs11.Session, label: str) -> SignMixin:
    """The one private key of this label.

    Raises: NoSuchKey; UnusableKey where there are two, or it may not sign; PKCS11Error.
    """
    found = _objects(session, {Attribute.CLASS: ObjectClass.PRIVATE_KEY, Attribute.LABEL: label})
    if not found:
        raise NoSuchKey(f"the token has no private key with the label {label!r}")
    if len(found) > 1:
        raise UnusableKey(f"the token has two private keys with the label {label!r}: give one another")
    if isinstance(found[0], SignMixin):
        return found[0]
    raise UnusableKey(f"the token does not let {label!r} sign (CKA_SIGN)")


def _objects(session: pkcs11.Session, template: dict[Attribute, Any]) -> list[pkcs11.Object]:
    # Read to its end: a search left open is ended where it is collected, and that may be another thread.
    return list(session.get_objects(template))


def describe(private: SignMixin, label: str) -> TokenKey:
    """Reads the public key, from its own object or a certificate beside it, and what the token says of the private one.

    Not checked: that the two belong together. Each signature is verified, so a wrong pair gives none.
    Raises: UnusableKey, PKCS11Error.
    """
    session = private.session
    public = _public_key(session, private, label)
    algorithm = algorithm_of(public)
    if _read(private, Attribute.ALWAYS_AUTHENTICATE) is True:
        raise UnusableKey(f"{label!r} wants its PIN for every signature (CKA_ALWAYS_AUTHENTICATE): use another key")
    if _MECHANISMS[algorithm] not in session.token.slot.get_mechanisms():
        raise UnusableKey(f"the token of {label!r} cannot do {_MECHANISMS[algorithm].name}, which {algorithm} needs")
    return TokenKey(public_key=public, algorithm=algorithm, warnings=_warnings(private, label))


def sign(private: SignMixin, algorithm: Algorithm, signed: bytes) -> bytes:
    """In the module, with the GIL released. `signed`: the digest; for Ed25519 the message. Raises: PKCS11Error."""
    parameters = _PSS if algorithm is Algorithm.RSA_PSS else None
    made: bytes = private.sign(signed, mechanism=_MECHANISMS[algorithm], mechanism_param=parameters, buffer_size=_ROOM)
    if algorithm not in {Algorithm.ECDSA_P256, Algorithm.ECDSA_P384}:
        return made
    half = len(made) // 2  # r and s, of equal length (PKCS#11 v2.40 current mechanisms, section 2.3.1)
    return utils.encode_dss_signature(int.from_bytes(made[:half]), int.from_bytes(made[half:]))


def _public_key(session: pkcs11.Session, private: SignMixin, label: str) -> PublicKey:
    identity = _read(private, Attribute.ID)
    beside = {Attribute.ID: identity} if identity else {Attribute.LABEL: label}
    for found in _objects(session, {Attribute.CLASS: ObjectClass.PUBLIC_KEY, **beside}):
        return _from_object(found, label)
    for found in _objects(session, {Attribute.CLASS: ObjectClass.CERTIFICATE, **beside}):
        return _from_certificate(found[Attribute.VALUE], label)
    raise UnusableKey(f"the token has no public key and no certificate with the CKA_ID of {label!r}: put one there")


def _from_object(found: pkcs11.Object, label: str) -> PublicKey:
    kind = found[Attribute.KEY_TYPE]
    try:
        if kind is KeyType.RSA:
            modulus, exponent = (int.from_bytes(found[part]) for part in (Attribute.MODULUS, Attribute.PUBLIC_EXPONENT))
            return rsa.RSAPublicNumbers(exponent, modulus).public_key()
        if kind is KeyType.EC and (curve := _CURVES.get(found[Attribute.EC_PARAMS])):
            point = _point(found[Attribute.EC_POINT], 1 + 2 * (curve.key_size // 8))
            return ec.EllipticCurvePublicKey.from_encoded_point(curve, point)
        if kind is KeyType.EC_EDWARDS and found[Attribute.EC_PARAMS] in _ED25519:
            return ed25519.Ed25519PublicKey.from_public_bytes(_point(found[Attribute.EC_POINT], 32))
    except ValueError:
        raise UnusableKey(f"the public key of {label!r} in the token is damaged") from None
    raise UnusableKey(f"{label!r} is not ECDSA P-256 or P-384, Ed25519, or RSA")


def _point(value: bytes, length: int) -> bytes:
    """CKA_EC_POINT is a DER OCTET STRING; some modules give the bytes alone. Both are shorter than 128 bytes."""
    return value if len(value) == length else value.removeprefix(bytes((0x04, length)))


def _from_certificate(der: bytes, label: str) -> PublicKey:
    try:
        public = x509.load_der_x509_certificate(der).public_key()
    except ValueError:
        raise UnusableKey(f"the certificate of {label!r} in the token is damaged") from None
    if isinstance(public, ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey | rsa.RSAPublicKey):
        return public
    raise UnusableKey(f"{label!r} is not ECDSA P-256 or P-384, Ed25519, or RSA")


def _warnings(private: SignMixin, label: str) -> tuple[str, ...]:
    told = []
    if _read(private, Attribute.EXTRACTABLE) is not False:
        told.append(f"key {label!r} can be taken out of its token (CKA_EXTRACTABLE): make one that cannot")
    if _read(private, Attribute.SENSITIVE) is not True:
        told.append(f"key {label!r} can be read in its token (CKA_SENSITIVE is not set): make one that cannot")
    if not told and _read(private, Attribute.NEVER_EXTRACTABLE) is not True:
        told.append(f"key {label!r} was not made in its token, or could once be taken out: copies of it may exist")
    return tuple(told)


def _read(private: SignMixin, attribute: Attribute) -> Any:
    """None where the token has no such attribute."""
    try:
        return private[attribute]
    except (pkcs11.AttributeTypeInvalid, pkcs11.AttributeSensitive):
        return None
