"""Writes tests/vectors/csr/*.json: certificate signing requests with one defect each, named for it, and sound ones.

Run it from the root: `PYTHONPATH=.:tests python -m vectors.make_csr_vectors`. It writes the same bytes each time; a
test holds the committed files to that. The DER is put together here, since no library makes most of these.
"""

import base64
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID
from support.pki import seeded_ec_key, seeded_rsa_key

from broker.signing import der

FOLDER = Path(__file__).parent / "csr"
SEED = "action broker csr vectors"
NONCE = "Wk3vFh0fZ1s8q2J9d7T4nA"
CHALLENGE = "1.2.840.113549.1.9.7"
EXTENSIONS = "1.2.840.113549.1.9.14"
EXTENSIONS_MICROSOFT = "1.3.6.1.4.1.311.2.1.14"
UTF8, PRINTABLE, BMP = 0x0C, 0x13, 0x1E
EC_WITH = {"sha1": "1.2.840.10045.4.1", "sha256": "1.2.840.10045.4.3.2", "sha384": "1.2.840.10045.4.3.3"}
RSA_SHA256 = der.sequence(der.object_identifier("1.2.840.113549.1.1.11"), b"\x05\x00")
HASHES: dict[str, hashes.HashAlgorithm] = {
    "sha1": hashes.SHA1(),  # noqa: S303 - the defect
    "sha256": hashes.SHA256(),
    "sha384": hashes.SHA384(),
}
Key = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey
Named = Iterator[tuple[str, dict[str, Any]]]


def attribute(oid: str, *values: bytes) -> bytes:
    return der.sequence(der.object_identifier(oid), der.set_of(values))


def challenge(text: str = NONCE, tag: int = UTF8) -> bytes:
    return attribute(CHALLENGE, der.tlv(tag, text.encode("utf-16-be" if tag == BMP else "utf-8")))


def asks_for_ca(oid: str = EXTENSIONS) -> bytes:
    wanted = der.sequence(
        der.sequence(der.object_identifier("2.5.29.19"), b"\x01\x01\xff", der.tlv(4, bytes.fromhex("30030101ff")))
    )
    return attribute(oid, wanted)


def spki(key: Key | rsa.RSAPublicKey | ec.EllipticCurvePublicKey) -> bytes:
    public = key if isinstance(key, rsa.RSAPublicKey | ec.EllipticCurvePublicKey) else key.public_key()
    return public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def sign(key: Key, info: bytes, digest: str) -> tuple[bytes, bytes]:
    """AlgorithmIdentifier and signature, the same ones each time."""
    match key:
        case ec.EllipticCurvePrivateKey():
            signature = key.sign(info, ec.ECDSA(HASHES[digest], deterministic_signing=True))
            return der.sequence(der.object_identifier(EC_WITH[digest])), signature
        case rsa.RSAPrivateKey():
            return RSA_SHA256, key.sign(info, padding.PKCS1v15(), hashes.SHA256())
    return der.sequence(der.object_identifier("1.3.101.112")), key.sign(info)


def request(
    *attributes: bytes,
    key: Key | None = None,
    public: bytes | None = None,
    subject: x509.Name | None = None,
    digest: str = "sha256",
    version: int = 0,
) -> bytes:
    """RFC 2986 section 4. public: another SubjectPublicKeyInfo than that of the key which signs."""
    signing = key or seeded_ec_key(SEED)
    info = der.sequence(
        bytes((2, 1, version)),
        (subject or x509.Name([])).public_bytes(),
        public or spki(signing),
        der.tlv(0xA0, b"".join(attributes)),
    )
    algorithm, signature = sign(signing, info, digest)
    return der.sequence(info, algorithm, der.bit_string(signature))


def vector(csr: bytes, why: str, expect: str = "malformed") -> dict[str, Any]:
    return {"expect": expect, "why": why, "nonce": NONCE, "csr": base64.b64encode(csr).decode()}


def sound() -> Named:
    yield "sound", vector(request(challenge()), "P-256, the nonce, nothing else", "accepted")
    p384 = seeded_ec_key(SEED, ec.SECP384R1())
    yield "sound-p384", vector(request(challenge(), key=p384, digest="sha384"), "P-384", "accepted")
    ed = ed25519.Ed25519PrivateKey.from_private_bytes(SEED.encode().ljust(32)[:32])
    yield "sound-ed25519", vector(request(challenge(), key=ed), "Ed25519", "accepted")
    yield "sound-rsa-2048", vector(request(challenge(), key=seeded_rsa_key(SEED, 2048)), "RSA", "accepted")
    yield "sound-printable", vector(request(challenge(tag=PRINTABLE)), "the nonce as PrintableString", "accepted")
    named = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "root of everything")])
    yield "sound-with-a-name", vector(request(challenge(), subject=named), "a name, which is passed over", "accepted")


def nonces() -> Named:
    yield "nonce-missing", vector(request(), "no challengePassword: it could be an old request")
    yield "nonce-twice", vector(request(challenge(), challenge("x" * 22)), "two challengePasswords: which one counts?")
    two = attribute(CHALLENGE, der.utf8(NONCE), der.utf8("x" * 22))
    yield "nonce-of-two-values", vector(request(two), "one attribute with two values")
    for name, text in {"empty": "", "of-another-grant": "x" * 22, "with-more": NONCE + "=", "cut": NONCE[:-1]}.items():
        yield f"nonce-{name}", vector(request(challenge(text)), "not this grant's nonce", "proof_replayed")
    yield "nonce-in-utf-16", vector(request(challenge(tag=BMP)), "other bytes than the nonce's", "proof_replayed")


def keys() -> Named:
    yield "key-rsa-1024", vector(request(challenge(), key=seeded_rsa_key(SEED, 1024)), "RSA under 2048 bits")
    modulus = seeded_rsa_key(SEED, 2048).public_key().public_numbers().n
    three = rsa.RSAPublicNumbers(e=3, n=modulus).public_key()
    yield "key-rsa-exponent-3", vector(request(challenge(), public=spki(three)), "a public exponent of 3")
    large = rsa.RSAPublicNumbers(e=65537, n=(1 << 8191) | modulus).public_key()
    yield "key-rsa-8192", vector(request(challenge(), public=spki(large)), "RSA over 4096 bits")
    curves = {"secp256k1": ec.SECP256K1(), "p521": ec.SECP521R1()}
    for name, curve in curves.items():
        key = seeded_ec_key(SEED, curve)
        yield f"key-{name}", vector(request(challenge(), key=key), "a curve that nobody here verifies with")
    # SEC 2 version 1: the base point of secp192r1, as libraries no longer make such keys.
    point = bytes.fromhex(
        "04188da80eb03090f67cbf20eb43a18800f4ff0afd82ff101207192b95ffc8da78631011ed6b24cdd573f977a11e794811"
    )
    identifier = der.sequence(der.object_identifier("1.2.840.10045.2.1"), der.object_identifier("1.2.840.10045.3.1.1"))
    yield "key-p192", vector(request(challenge(), public=der.sequence(identifier, der.bit_string(point))), "P-192")
    good = spki(seeded_ec_key(SEED))
    off = good[:-1] + bytes((good[-1] ^ 1,))
    yield "key-off-its-curve", vector(request(challenge(), public=off), "a point that is not on P-256")


def extensions() -> Named:
    yield "extensions-a-ca", vector(request(challenge(), asks_for_ca()), "asks to be a CA")
    microsoft = request(challenge(), asks_for_ca(EXTENSIONS_MICROSOFT))
    yield "extensions-by-microsofts-name", vector(microsoft, "asks to be a CA, by Microsoft's name for it")


def signatures() -> Named:
    other = spki(seeded_ec_key(SEED + " of another"))
    yield "signature-of-another-key", vector(request(challenge(), public=other), "somebody else's key", "key_mismatch")
    made = request(challenge())
    changed = made.replace(NONCE.encode(), NONCE[::-1].encode())
    back = vector(changed, "the nonce was put in after it was signed", "key_mismatch")
    yield "signature-over-another-nonce", back | {"nonce": NONCE[::-1]}
    yield "signature-broken", vector(made[:-1] + bytes((made[-1] ^ 1,)), "one bit of it", "key_mismatch")
    yield "signature-with-sha1", vector(request(challenge(), digest="sha1"), "over SHA-1")
    info = der.take(der.SEQUENCE, der.take_all(der.SEQUENCE, made))[0]
    none = der.sequence(
        der.tlv(der.SEQUENCE, info), der.sequence(der.object_identifier("1.2.3.4")), der.bit_string(b"")
    )
    yield "signature-of-no-known-kind", vector(none, "an algorithm that does not exist")


def forms() -> Named:
    made = request(challenge())
    yield "form-empty", vector(b"", "nothing")
    yield "form-no-der", vector(b"hello", "no DER")
    yield "form-cut-off", vector(made[:-1], "one byte too few")
    yield "form-trailing-byte", vector(made + b"\0", "one byte too many")
    yield "form-twice", vector(made + made, "two requests")
    pem = x509.load_der_x509_csr(made).public_bytes(Encoding.PEM)
    yield "form-pem", vector(pem, "PEM, not DER")
    yield "form-version-2", vector(request(challenge(), version=1), "a version that does not exist")
    yield "form-too-large", vector(request(challenge(), challenge("x" * 8192)), "over 8 KiB, unread past that")
    long_form = made[:1] + b"\x83\x00" + made[2:] if made[1] == 0x82 else made[:1] + b"\x82\x00" + made[2:]
    yield "form-ber-length", vector(long_form, "a length that is not the shortest: BER")


@functools.cache
def build() -> dict[str, dict[str, Any]]:
    """Every vector by its name."""
    found = [one for make in (sound, nonces, keys, extensions, signatures, forms) for one in make()]
    if len(dict(found)) != len(found):
        raise ValueError("two vectors have one name")
    return dict(found)


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, found in build().items():
        (FOLDER / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
