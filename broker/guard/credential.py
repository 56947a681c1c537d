"""Reading a credential off a request, and answering one that is refused: what the gRPC and HTTP edges share."""

import hashlib
import logging
import secrets
import ssl
from collections.abc import Callable, Sequence
from typing import Final, Literal

from broker.errors import BrokerError, Invalid, Reason, Refused
from broker.guard.verify import Presented

_log = logging.getLogger("broker.guard")
Scheme = Literal["DPoP", "Bearer"]
_SCHEMES: Final[dict[str, Scheme]] = {"dpop": "DPoP", "bearer": "Bearer"}  # RFC 9110 section 11.1: any case


def read_credential(
    authorizations: Sequence[str],
    proofs: Sequence[str],
    *,
    leaf_pem: Callable[[], str | None],
    method: str,
    urls: tuple[str, ...],
) -> Presented:
    """What a request presents.

    authorizations, proofs: all values of `authorization` and `dpop`. The scheme says how the key is proved: `DPoP` by
    exactly one proof (RFC 9449 section 7.1), `Bearer` by the connection's certificate (RFC 8705 section 3).
    leaf_pem: the peer's certificate on this very TLS connection; asked only where it counts.

    Raises: Refused(UNAUTHENTICATED) without a credential; Invalid for two of them, another scheme, or a proof that
    nothing asks for.
    """
    if not authorizations:
        raise Refused(Reason.UNAUTHENTICATED, "no authorization")
    if len(authorizations) > 1 or len(proofs) > 1:
        raise Invalid("more than one credential or proof")
    name, space, token = authorizations[0].partition(" ")
    scheme = _SCHEMES.get(name.lower())
    if scheme is None or not space or not token:
        raise Invalid("authorization is not 'DPoP <token>' or 'Bearer <token>'")
    if scheme == "Bearer":
        if proofs:
            raise Invalid("a proof beside a certificate-bound token")
        pem = leaf_pem()
        leaf = None if pem is None else hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem)).digest()
        return Presented(token=token, certificate_sha256=leaf)
    if not proofs:
        raise Refused(Reason.INVALID_PROOF, "a DPoP-bound token without a proof")
    return Presented(token=token, proof=proofs[0], method=method, urls=urls)


def log_refusal(error: BrokerError, method: str) -> str:
    """Writes a refusal to the service's own log. Returns the correlation id, which finds it there."""
    correlation_id = secrets.token_hex(16)
    facts = {"reason": str(error.reason), "detail": error.detail, "correlation_id": correlation_id}
    _log.info("refused %r: %s", method, error.reason, extra=facts)  # %r: a path may hold a line feed
    _log.debug("refused because", exc_info=error, extra=facts)
    return correlation_id
