"""A certificate signing request (PKCS #10, RFC 2986) is read for one thing: a key, and proof of its possession now.

Names in it are passed over, and extensions refused: what a certificate says comes from verified facts alone, so nothing
is ever copied from here. The challengePassword (RFC 2985 section 5.4.1) is the grant's nonce: a request that was made
before, for another grant or by somebody else does not have it.
"""

import hmac
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.x509.oid import AttributeOID

from broker.errors import Invalid, Reason, Refused
from broker.signing import der
from broker.signing.content import require_certifiable
from broker.signing.signer import PublicKey

MAX_CSR: Final = 8 * 1024  # bytes; one with an RSA-4096 key has 1.7 KiB
_ASKS_FOR_EXTENSIONS: Final = frozenset(
    {
        x509.ObjectIdentifier("1.2.840.113549.1.9.14"),  # extensionRequest, RFC 2985 section 5.4.2
        x509.ObjectIdentifier("1.3.6.1.4.1.311.2.1.14"),  # Microsoft's, the same by another name
    }
)
_HASHES: Final = (hashes.SHA256, hashes.SHA384, hashes.SHA512)


def verified_key(encoded: bytes, nonce: str) -> PublicKey:
    """The key, when the request proves that its holder has it and knows the nonce.

    encoded: DER. In this order, the cheap before the dear: its size and form; the kind of key; no extensions; exactly
    one challengePassword, the nonce; the signature.

    Raises: Invalid for what is no such request, asks for extensions, or has a key that we do not certify.
    Refused(PROOF_REPLAYED) for another nonce. Refused(KEY_MISMATCH) when the signature is not of this key.
    """
    if len(encoded) > MAX_CSR:
        raise Invalid(f"the CSR is larger than {MAX_CSR} bytes")
    try:
        der.take_all(der.SEQUENCE, encoded)  # the parser may be lazy about what stands behind
        request = x509.load_der_x509_csr(encoded)
        attributes = list(request.attributes)
        public_key = request.public_key()
        digest = request.signature_hash_algorithm
    except (ValueError, TypeError, x509.InvalidVersion, UnsupportedAlgorithm) as error:
        raise Invalid(
            "the CSR cannot be read: send one PKCS #10 request in DER, each attribute with one value"
        ) from error
    key = require_certifiable(public_key)
    if any(one.oid in _ASKS_FOR_EXTENSIONS for one in attributes):
        raise Invalid("the CSR asks for extensions: leave them out, they come from verified facts alone")
    _require_nonce([one for one in attributes if one.oid == AttributeOID.CHALLENGE_PASSWORD], nonce)
    if digest is not None and not isinstance(digest, _HASHES):  # None: Ed25519, which needs no choice
        raise Invalid("the CSR is not signed with SHA-256, SHA-384 or SHA-512")
    try:
        sound = request.is_signature_valid
    except (ValueError, UnsupportedAlgorithm) as error:
        raise Invalid("the CSR's signature is of a kind that cannot be verified") from error
    if not sound:
        raise Refused(Reason.KEY_MISMATCH, "the CSR is not signed by the key in it")
    return key


def _require_nonce(found: list[x509.Attribute], nonce: str) -> None:
    if len(found) != 1:
        raise Invalid("the CSR needs exactly one challengePassword: the grant's csr_nonce")
    if not nonce or not hmac.compare_digest(found[0].value, nonce.encode()):
        raise Refused(Reason.PROOF_REPLAYED, "the CSR's challengePassword is not this grant's csr_nonce")
