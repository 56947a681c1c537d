"""Whose X.509-SVID signed something, for attestors, which know nothing of trust domains."""

from collections.abc import Callable
from datetime import datetime

from attestors.contract import AttestationUnavailable
from broker.errors import Refused, Unavailable
from broker.identity.trust import TrustSnapshot
from broker.identity.x509_svid import verify_x509_svid


class SvidCheck:
    """Verifies chains against today's bundles. It is what `attestors.provenance_trust.X509SvidCheck` wants.

    snapshot: whom we trust now. It raises Unavailable when that cannot be said, as when our own SVID has ended.
    """

    def __init__(self, snapshot: Callable[[], TrustSnapshot]) -> None:
        self._snapshot = snapshot

    def __call__(self, chain: tuple[bytes, ...], at: datetime) -> str:
        """The SPIFFE ID of the leaf. chain: DER, leaf first. at: when every certificate on the path has to be valid.

        An SVID that has ended since counts by its time, but only while its authority still is in its domain's bundle:
        who was taken out vouches for nothing, not even for the past.

        Raises: ValueError with the reason; AttestationUnavailable.
        """
        try:
            return str(verify_x509_svid(chain, self._snapshot(), at, peer="client").spiffe_id)
        except Refused as error:
            raise ValueError(error.detail) from error
        except Unavailable as error:
            raise AttestationUnavailable(error.detail) from error
