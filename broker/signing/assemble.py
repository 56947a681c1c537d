"""Puts a certificate together from bytes that are fixed and the signature over them."""

import hashlib
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec

from broker.errors import Reason, Unavailable
from broker.signing import der
from broker.signing.signer import Algorithm, Signer

# AlgorithmIdentifier of ecdsa-with-SHA256 and -SHA384 (RFC 5758 section 3.2): no parameters.
ALGORITHMS: Final = {
    Algorithm.ECDSA_P256: der.sequence(der.object_identifier("1.2.840.10045.4.3.2")),
    Algorithm.ECDSA_P384: der.sequence(der.object_identifier("1.2.840.10045.4.3.3")),
}


async def sign_certificate(content: bytes, signer: Signer) -> bytes:
    """Signs a TBSCertificate and puts the certificate together (RFC 5280 section 4.1); the DER.

    content: DER; its signature field names the algorithm of this signer, an ECDSA one.

    Raises: Unavailable when the key cannot be reached, or what comes out does not verify or is not about `content`.
    """
    signature = await signer.sign_digest(hashlib.new(signer.algorithm.hash_name or "", content).digest())
    made = der.sequence(content, ALGORITHMS[signer.algorithm], der.bit_string(signature))
    if not _is_sound(made, content, signer):
        raise Unavailable(Reason.SIGNER_UNAVAILABLE, "what the CA's key gave does not verify: look at the key")
    return made


def _is_sound(made: bytes, content: bytes, signer: Signer) -> bool:
    """Whether it parses, is about these bytes, and is signed by this key."""
    key = signer.public_key
    try:
        parsed = x509.load_der_x509_certificate(made)
        algorithm = parsed.signature_algorithm_parameters
        if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(algorithm, ec.ECDSA):
            return False
        key.verify(parsed.signature, parsed.tbs_certificate_bytes, algorithm)
    except (ValueError, InvalidSignature):
        return False
    return parsed.tbs_certificate_bytes == content
