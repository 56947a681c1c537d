"""Makes the certificates of roots and issuing CAs, as Fulcio's certificate specification wants them.

Signed like all else here: built with a throw-away key, then the very same bytes are signed where the key is.
"""

from datetime import datetime, timedelta
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from broker.signing.assemble import sign_certificate
from broker.signing.ca_folder import CaError
from broker.signing.signer import Algorithm, Signer, hash_of

ROOT_LIFETIME: Final = timedelta(days=3650)
ISSUING_LIFETIME: Final = timedelta(days=365)  # its key is online, so it does not live as long as it could
BACKDATED: Final = timedelta(hours=1)  # leaves are backdated too, and clocks of verifiers may be behind
_LONGEST_NAME: Final = 64  # characters: ub-common-name, ub-organization-name (RFC 5280 appendix A.1)

_CURVES: Final = {Algorithm.ECDSA_P256: ec.SECP256R1, Algorithm.ECDSA_P384: ec.SECP384R1}


async def make_root(
    signer: Signer, name: str, organization: str, now: datetime, lifetime: timedelta
) -> x509.Certificate:
    """A root that certifies issuing CAs alone, signed by its own key. Raises: CaError, Unavailable."""
    subject = _name(name, organization)
    builder = _builder(signer.public_key, subject, subject, now, now + lifetime, path_length=1)
    return await _sign(builder, signer)


async def make_issuing(
    key: Signer,
    name: str,
    organization: str,
    root: x509.Certificate,
    root_signer: Signer,
    now: datetime,
    lifetime: timedelta,
) -> x509.Certificate:
    """A CA that certifies for code signing alone, and no further CA. It never outlives its root.

    Raises: CaError where the root has ended or its key is another; Unavailable.
    """
    if root_signer.public_key != root.public_key():
        raise CaError("the root's key is not the one in its certificate: bring back the right key")
    if now >= root.not_valid_after_utc:
        raise CaError("the root has ended: make a new one with `action-broker ca rotate --root`")
    if key.public_key == root_signer.public_key:
        raise CaError("the issuing CA needs a key of its own, not the root's")
    own = root.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    until = min(now + lifetime, root.not_valid_after_utc)
    builder = _builder(key.public_key, _name(name, organization), root.subject, now, until, path_length=0)
    builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING]), critical=False)
    builder = builder.add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own), critical=False)
    return await _sign(builder, root_signer)


def _builder(
    key: object, subject: x509.Name, issuer: x509.Name, now: datetime, until: datetime, *, path_length: int
) -> x509.CertificateBuilder:
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise CaError("a CA has an ECDSA key on P-256 or P-384: make one in the token, or leave the token out")
    usage = x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before((now - BACKDATED).replace(microsecond=0))
        .not_valid_after(until.replace(microsecond=0))
        .add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


async def _sign(builder: x509.CertificateBuilder, signer: Signer) -> x509.Certificate:
    if signer.algorithm not in _CURVES:
        raise CaError("a CA has an ECDSA key on P-256 or P-384: make one in the token, or leave the token out")
    throwaway = ec.generate_private_key(_CURVES[signer.algorithm]())
    content = builder.sign(throwaway, hash_of(signer.algorithm)).tbs_certificate_bytes
    return x509.load_der_x509_certificate(await sign_certificate(content, signer))


def _name(name: str, organization: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, organization[:_LONGEST_NAME]),
            x509.NameAttribute(NameOID.COMMON_NAME, f"Action Broker signing {name}"[:_LONGEST_NAME]),
        ]
    )
