"""What we want of a JWT-SVID beyond the standard, when it is a caller's assertion of who it is.

The standard lets a token have many audiences and any lifetime. As a client assertion, each audience is a party that
could show it to us as its own, and its first key stays bound until it expires. So a verified token passes here too.
"""

from datetime import datetime, timedelta

from broker.errors import Reason, Refused
from broker.identity.jwt_svid import LEEWAY, VerifiedJwtSvid

MAX_LIFETIME = timedelta(hours=1)  # twelve times SPIRE's default; how long the key bound to a token is remembered


def require_client_assertion(svid: VerifiedJwtSvid, issuer: str, now: datetime) -> VerifiedJwtSvid:
    """All of the below. Returns the same SVID. Raises: Refused."""
    require_sole_audience(svid, issuer)
    require_bounded_lifetime(svid, now)
    require_workload(svid)
    return svid


def require_sole_audience(svid: VerifiedJwtSvid, issuer: str) -> None:
    """That it is for us alone (draft-ietf-oauth-spiffe-client-auth -02: the sole `aud` is our issuer; J section 7.2).

    Raises: Refused(wrong_audience).
    """
    if not issuer or svid.audience != (issuer,):
        raise Refused(Reason.WRONG_AUDIENCE, f"a client assertion has one audience, {issuer!r}: fetch one for it alone")


def require_bounded_lifetime(svid: VerifiedJwtSvid, now: datetime) -> None:
    """That it ends within `MAX_LIFETIME` of now and, where it says when it was issued, did not live longer in all.

    Raises: Refused(unauthenticated), also when it was issued in the future.
    """
    if svid.expires_at - now > MAX_LIFETIME:
        raise Refused(Reason.UNAUTHENTICATED, f"a client assertion lives at most {MAX_LIFETIME}: shorten its TTL")
    if svid.issued_at is None:
        return
    if svid.issued_at > now + LEEWAY:
        raise Refused(Reason.UNAUTHENTICATED, "the client assertion was issued in the future: compare the clocks")
    if svid.expires_at - svid.issued_at > MAX_LIFETIME:
        raise Refused(Reason.UNAUTHENTICATED, f"a client assertion lives at most {MAX_LIFETIME}: shorten its TTL")


def require_workload(svid: VerifiedJwtSvid) -> None:
    """That it names a workload, not a trust domain: a path is a MUST for X.509-SVIDs only. Raises: Refused."""
    if not svid.spiffe_id.path:
        raise Refused(Reason.UNAUTHENTICATED, "a client assertion names a workload, and this one has no path")
