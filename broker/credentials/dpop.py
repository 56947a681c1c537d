"""DPoP proofs (RFC 9449): that the sender holds a key, now, for this one request."""

import hashlib
import secrets
from datetime import datetime, timedelta
from typing import Final

import msgspec
from cryptography.hazmat.primitives.asymmetric import ec

from broker.credentials import jose
from broker.errors import Invalid, Reason, Refused

TYPE: Final = "dpop+jwt"
MAX_AGE: Final = timedelta(seconds=60)  # without a nonce; with one the nonce's own 30 s bound it further
SKEW: Final = timedelta(seconds=5)  # a proof "from the future" is a clock ahead of ours, not an attack


class ProofClaims(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The payload, RFC 9449 section 4.2."""

    jti: str
    htm: str
    htu: str
    iat: int
    ath: str | None = None
    nonce: str | None = None


class Proof(msgspec.Struct, frozen=True, kw_only=True):
    """A verified proof: the holder of `jkt` made it for the method and URL it was checked against."""

    jkt: str
    jti: str
    nonce: str | None
    issued_at: datetime


_claims = msgspec.json.Decoder(ProofClaims)


def access_token_hash(token: str) -> str:
    """`ath`, RFC 9449 section 4.2."""
    return jose.b64url(hashlib.sha256(token.encode()).digest())


def verify_proof(
    proof: str, *, method: str, url: str | tuple[str, ...], now: datetime, token: str | None = None
) -> Proof:
    """Checks RFC 9449 section 4.3, points 2 to 9 and 11 and 12.

    url: ours, without query and fragment; several where the server has several names of its own.
    token: the access token presented beside it, whose hash must be in `ath`.

    Raises: Refused(INVALID_PROOF) with what is wrong.
    Not checked: the nonce and that `jti` is new (the caller knows which apply); that `jkt` is the expected key.
    """
    try:
        jws = jose.parse(proof, typ=TYPE)
        if jws.header.jwk is None:
            raise Invalid("the proof carries no key")
        jose.verify(jws, jose.load_jwk(jws.header.jwk))
        claims = jose.decode_unique(jws.payload, _claims, "the proof")
        issued_at = datetime.fromtimestamp(claims.iat, now.tzinfo)
    except (Refused, OverflowError, OSError, ValueError) as error:
        raise Refused(Reason.INVALID_PROOF, str(error)) from error
    if claims.htm != method or claims.htu not in ((url,) if isinstance(url, str) else url):
        raise Refused(Reason.INVALID_PROOF, "the proof is for another request")
    if not now - MAX_AGE <= issued_at <= now + SKEW:
        raise Refused(Reason.INVALID_PROOF, "the proof is too old, or a clock is wrong")
    if token is not None and claims.ath != access_token_hash(token):
        raise Refused(Reason.INVALID_PROOF, "the proof is for another token")
    if not 8 <= len(claims.jti) <= 256:
        raise Refused(Reason.INVALID_PROOF, "a proof's jti has 8 to 256 characters")
    return Proof(jkt=jose.thumbprint(jws.header.jwk), jti=claims.jti, nonce=claims.nonce, issued_at=issued_at)


class ProofKey:
    """A caller's key: proves possession, never leaves the process."""

    def __init__(self, private: ec.EllipticCurvePrivateKey | None = None) -> None:
        self._private = private or ec.generate_private_key(ec.SECP256R1())
        self.jwk: Final = jose.to_jwk(self._private.public_key())
        self.jkt: Final = jose.thumbprint(self.jwk)
        self._header = msgspec.json.encode(
            {"alg": "ES256", "typ": TYPE, "jwk": {"kty": "EC", "crv": "P-256", "x": self.jwk.x, "y": self.jwk.y}}
        )

    def __repr__(self) -> str:
        return f"ProofKey(jkt={self.jkt!r})"

    def prove(self, method: str, url: str, now: datetime, *, nonce: str | None = None, token: str | None = None) -> str:
        """A proof for one request, with the server's last nonce and, where a token is presented, its hash."""
        claims = ProofClaims(
            jti=secrets.token_urlsafe(16),
            htm=method,
            htu=url,
            iat=int(now.timestamp()),
            nonce=nonce,
            ath=None if token is None else access_token_hash(token),
        )
        return jose.sign(self._header, msgspec.json.encode(claims), self._private)
