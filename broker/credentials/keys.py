"""The keys that sign action tokens: born in memory, published signed by our SVID, never shared, replaced in time.

Who can write the database cannot add a key: the record of a public key is signed by the broker's X.509-SVID and
verified against the broker's own trust domain before it is served. A new key is published `PUBLISH_AHEAD` before its
first use, so that a guard which caches the key set never meets a key that it cannot know.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa

from broker.credentials import jose
from broker.errors import Reason, Refused
from broker.identity.spiffe_id import SpiffeId
from broker.identity.trust import OwnSvid, TrustSnapshot
from broker.identity.x509_svid import verify_x509_svid

PUBLISH_AHEAD: Final = timedelta(seconds=360)  # longer than a guard keeps the key set (docs/staleness.md)
KEY_LIFETIME: Final = timedelta(hours=24)
LAST_CREDENTIAL: Final = timedelta(seconds=305)  # after a key's last use: a token's longest life, and the leeway
_LONGEST_USE: Final = int((KEY_LIFETIME + PUBLISH_AHEAD).total_seconds()) + 1  # from signing; 1: times are rounded
_CONTEXT: Final = b"action-broker signing key v1\n"  # an SVID key signs other things too: none of them starts like this


class KeyStatement(msgspec.Struct, frozen=True, kw_only=True):
    """What the broker's SVID says of a signing key. Times are seconds since 1970."""

    issuer: str
    broker: str
    kid: str
    x: str
    y: str
    signed_at: int
    use_until: int


class PublishedKey(msgspec.Struct, frozen=True, kw_only=True):
    """A statement with the signature over its bytes and the chain (DER, leaf first) of the SVID that made it."""

    statement: bytes
    signature: bytes
    chain: tuple[bytes, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SigningKey:
    """A key in use. `private` never leaves the process."""

    private: ec.EllipticCurvePrivateKey
    kid: str
    use_from: datetime
    use_until: datetime

    def __repr__(self) -> str:
        return f"SigningKey(kid={self.kid!r})"

    @classmethod
    def generate(cls, use_from: datetime, lifetime: timedelta = KEY_LIFETIME) -> "SigningKey":
        """A new P-256 key; its `kid` is its RFC 7638 thumbprint."""
        private = ec.generate_private_key(ec.SECP256R1())
        kid = jose.thumbprint(jose.to_jwk(private.public_key()))
        return cls(private=private, kid=kid, use_from=use_from, use_until=use_from + lifetime)


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifiedKey:
    """A published key whose statement was verified; `serve_until` is when its last credential has expired."""

    kid: str
    jwk: jose.Jwk
    serve_until: datetime


def publish(key: SigningKey, issuer: str, svid: OwnSvid, now: datetime) -> PublishedKey:
    """The record of `key`'s public half, signed by our SVID."""
    jwk = jose.to_jwk(key.private.public_key())
    statement = msgspec.json.encode(
        KeyStatement(
            issuer=issuer,
            broker=str(svid.spiffe_id),
            kid=key.kid,
            x=jwk.x,
            y=jwk.y,
            signed_at=int(now.timestamp()),
            use_until=int(key.use_until.timestamp()),
        )
    )
    private = serialization.load_der_private_key(svid.private_key_pkcs8, None)
    message = _CONTEXT + statement
    if isinstance(private, ec.EllipticCurvePrivateKey):
        signature = private.sign(message, jose.ES256)
    elif isinstance(private, rsa.RSAPrivateKey):
        signature = private.sign(message, padding.PSS(padding.MGF1(hashes.SHA256()), 32), hashes.SHA256())
    else:
        raise TypeError(f"an SVID with a {type(private).__name__} cannot vouch for keys: use EC or RSA in SPIRE")
    return PublishedKey(statement=statement, signature=signature, chain=svid.chain)


def verify_published(
    published: PublishedKey, *, issuer: str, broker: SpiffeId, snapshot: TrustSnapshot, now: datetime
) -> VerifiedKey:
    """The key, if this broker vouched for it with an SVID of its own trust domain.

    The SVID must have been valid when it signed (they live an hour, keys longer). Raises: Refused(UNAUTHENTICATED).
    """
    try:
        statement = msgspec.json.decode(published.statement, type=KeyStatement)
        signed_at = datetime.fromtimestamp(statement.signed_at, UTC)
    except (msgspec.DecodeError, ValueError, OverflowError, OSError) as error:
        raise Refused(Reason.UNAUTHENTICATED, "a signing key's record that is not one") from error
    jwk = jose.Jwk(kty="EC", crv="P-256", x=statement.x, y=statement.y)
    if signed_at > now + timedelta(seconds=5) or statement.issuer != issuer or statement.broker != str(broker):
        raise Refused(Reason.UNAUTHENTICATED, "a signing key of another broker, or of the future")
    if statement.use_until - statement.signed_at > _LONGEST_USE:
        # Who gets hold of an old SVID's key can date a record back into its time, but no further ahead than this.
        raise Refused(Reason.UNAUTHENTICATED, "a signing key for longer than any is used")
    svid = verify_x509_svid(published.chain, snapshot, signed_at, peer="client")
    if svid.spiffe_id != broker or statement.kid != jose.thumbprint(jwk):
        raise Refused(Reason.UNAUTHENTICATED, "a signing key that another identity vouches for")
    jose.load_jwk(jwk)
    message, public = _CONTEXT + published.statement, svid.public_key
    try:
        if isinstance(public, ec.EllipticCurvePublicKey):
            public.verify(published.signature, message, jose.ES256)
        elif isinstance(public, rsa.RSAPublicKey):
            pss = padding.PSS(padding.MGF1(hashes.SHA256()), 32)
            public.verify(published.signature, message, pss, hashes.SHA256())
        else:
            raise Refused(Reason.UNAUTHENTICATED, "a signing key vouched for by an unknown kind of key")
    except InvalidSignature as error:
        raise Refused(Reason.UNAUTHENTICATED, "a signing key that nobody vouches for") from error
    last_credential = datetime.fromtimestamp(statement.use_until, UTC) + LAST_CREDENTIAL
    return VerifiedKey(kid=statement.kid, jwk=jwk, serve_until=last_credential)


def key_set(keys: Sequence[VerifiedKey]) -> bytes:
    """A JWK set (RFC 7517 section 5)."""
    return json.dumps(
        {
            "keys": [
                {"kty": "EC", "crv": "P-256", "x": k.jwk.x, "y": k.jwk.y, "kid": k.kid, "use": "sig", "alg": "ES256"}
                for k in keys
            ]
        }
    ).encode()
