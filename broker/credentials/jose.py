"""The two compact JWS that are ours, parsed strictly: action tokens (RFC 9068) and DPoP proofs (RFC 9449).

Both are ES256 and nothing else, so the algorithm is never the sender's choice. This file is the whole parser: small,
so that it can be fuzzed and read in one sitting. Tokens that others issue are PyJWT's business, in identity/.
"""

import base64
import binascii
import functools
import hashlib
from typing import Any, Final, TypeVar

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature

from broker.action import parse_json
from broker.errors import Invalid, Reason, Refused

MAX_TOKEN: Final = 16 * 1024  # WIRE.md: refused unread beyond it; parameters may take most of it
ES256: Final = ec.ECDSA(hashes.SHA256())
_T = TypeVar("_T")
_COORDINATE: Final = 32  # bytes of a P-256 field element, RFC 7518 section 3.4


class Jwk(msgspec.Struct, frozen=True, kw_only=True):
    """A P-256 public key as JWK (RFC 7517). A private member `d` is refused, as RFC 9449 section 4.3 demands."""

    kty: str
    crv: str
    x: str
    y: str
    d: Any = None


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """The JOSE header members that we know. `crit` is refused: we understand no extension (RFC 7515 section 4.1.11)."""

    alg: str
    typ: str
    kid: str | None = None
    jwk: Jwk | None = None
    crit: Any = msgspec.UNSET
    b64: bool = True


class Jws(msgspec.Struct, frozen=True, kw_only=True):
    """A parsed compact JWS whose signature has NOT been verified."""

    header: Header
    payload: bytes
    signing_input: bytes
    signature: bytes


_header = msgspec.json.Decoder(Header)
_compact: Final = msgspec.json.Encoder().encode


def b64url(data: bytes) -> str:
    """Base64url without padding (RFC 7515 section 2)."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def b64url_decode(text: bytes) -> bytes:
    """The inverse, for the one spelling that `b64url` writes. Raises: Invalid for any other."""
    try:
        data = base64.b64decode(text + b"=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError) as error:
        raise Invalid("not base64url") from error
    # Trailing bits and padding would give one value several spellings; "+" and "/" pass altchars on some versions.
    if base64.urlsafe_b64encode(data).rstrip(b"=") != text:
        raise Invalid("not canonical base64url")
    return data


def decode_unique(text: bytes, decoder: "msgspec.json.Decoder[_T]", what: str) -> _T:
    """JSON `text` by `decoder`, with duplicate names refused at every depth. Raises: Invalid naming `what`."""
    try:
        value = decoder.decode(text)
        # An encoder writes no name twice, so bytes that come back unchanged hold none. Ours do; others' are looked at.
        if _compact(value) != text:
            parse_json(text, what)
    except (msgspec.DecodeError, msgspec.ValidationError, ValueError, RecursionError) as error:
        raise Invalid(f"{what} is not what it should be: {error}") from error
    return value


def _parse_header(text: bytes) -> Header:
    return decode_unique(b64url_decode(text), _header, "the JOSE header")


_repeated_header = functools.lru_cache(maxsize=1024)(_parse_header)  # pure; an issuer's and a client's repeat
_SHORT: Final = 512  # bytes; longer headers are not ours, and strangers shall not fill memory with them


def parse(token: str | bytes, *, typ: str) -> Jws:
    """Splits and decodes a compact JWS of type `typ` with alg ES256.

    Raises: Invalid for anything else. Not checked: the signature.
    """
    raw = token.encode("ascii", "replace") if isinstance(token, str) else token
    if len(raw) > MAX_TOKEN:
        raise Invalid(f"a token of more than {MAX_TOKEN} bytes")
    parts = raw.split(b".")
    if len(parts) != 3:
        raise Invalid("not a compact JWS")
    header = _repeated_header(parts[0]) if len(parts[0]) <= _SHORT else _parse_header(parts[0])
    if header.alg != "ES256" or header.typ != typ:
        raise Invalid(f"not an ES256 token of type {typ}")
    if header.crit is not msgspec.UNSET or not header.b64:
        raise Invalid("the JOSE header demands an extension")
    signature = b64url_decode(parts[2])
    if len(signature) != 2 * _COORDINATE:
        raise Invalid("not an ES256 signature")
    return Jws(
        header=header,
        payload=b64url_decode(parts[1]),
        signing_input=raw[: len(parts[0]) + 1 + len(parts[1])],
        signature=signature,
    )


def type_of(token: str) -> str:
    """The `typ` that a compact JWS claims, whatever signed it. Raises: Invalid where it is none, or has none.

    Not checked: anything else of it.
    """
    parts = token.encode("ascii", "replace").split(b".")
    if len(token) > MAX_TOKEN or len(parts) != 3:
        raise Invalid("not a compact JWS")
    return _parse_header(parts[0]).typ


def verify(jws: Jws, key: ec.EllipticCurvePublicKey) -> None:
    """Verifies the signature. Raises: Refused(UNAUTHENTICATED)."""
    r, s = int.from_bytes(jws.signature[:_COORDINATE]), int.from_bytes(jws.signature[_COORDINATE:])
    try:
        key.verify(encode_dss_signature(r, s), jws.signing_input, ES256)
    except InvalidSignature as error:
        raise Refused(Reason.UNAUTHENTICATED, "the token's signature does not verify") from error


def sign(header: bytes, payload: bytes, key: ec.EllipticCurvePrivateKey) -> str:
    """A compact JWS over `payload`; `header` is JSON that says ES256."""
    signing_input = f"{b64url(header)}.{b64url(payload)}"
    r, s = decode_dss_signature(key.sign(signing_input.encode(), ES256))
    return f"{signing_input}.{b64url(r.to_bytes(_COORDINATE) + s.to_bytes(_COORDINATE))}"


@functools.lru_cache(maxsize=4096)  # pure: the same coordinates are the same key
def _point(x: str, y: str) -> ec.EllipticCurvePublicKey:
    values = [b64url_decode(part.encode("ascii", "replace")) for part in (x, y)]
    if any(len(value) != _COORDINATE for value in values):
        raise Invalid("a coordinate of a P-256 key has 32 bytes")
    try:
        numbers = ec.EllipticCurvePublicNumbers(int.from_bytes(values[0]), int.from_bytes(values[1]), ec.SECP256R1())
        return numbers.public_key()
    except ValueError as error:
        raise Invalid("not a point on P-256") from error


def load_jwk(jwk: Jwk) -> ec.EllipticCurvePublicKey:
    """The key of a public P-256 JWK. Raises: Invalid for another kind, a private key, or no point on the curve."""
    if jwk.kty != "EC" or jwk.crv != "P-256" or jwk.d is not None:
        raise Invalid("not a public P-256 key")
    return _point(jwk.x, jwk.y)


def to_jwk(key: ec.EllipticCurvePublicKey) -> Jwk:
    """`key` as JWK."""
    numbers = key.public_numbers()
    return Jwk(
        kty="EC",
        crv="P-256",
        x=b64url(numbers.x.to_bytes(_COORDINATE)),
        y=b64url(numbers.y.to_bytes(_COORDINATE)),
    )


@functools.lru_cache(maxsize=4096)  # pure
def thumbprint(jwk: Jwk) -> str:
    """RFC 7638 thumbprint, base64url: the `jkt` of a key."""
    text = f'{{"crv":"{jwk.crv}","kty":"{jwk.kty}","x":"{jwk.x}","y":"{jwk.y}"}}'
    return b64url(hashlib.sha256(text.encode()).digest())
