"""A key in a file signs what its kind can sign, and is read only where nobody else can read it."""

import hashlib
import os
from pathlib import Path

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, padding, rsa, utils, x25519

from broker.errors import Invalid, Reason, Unavailable
from broker.signing.file_key import MAX_PEM, FileSigner
from broker.signing.signer import Algorithm, UnusableKey, require_valid

MESSAGE = b'{"_type":"https://in-toto.io/Statement/v1"}'
KEYS = {
    Algorithm.ECDSA_P256: ec.generate_private_key(ec.SECP256R1()),
    Algorithm.ECDSA_P384: ec.generate_private_key(ec.SECP384R1()),
    Algorithm.ED25519: ed25519.Ed25519PrivateKey.generate(),
    Algorithm.RSA_PSS: rsa.generate_private_key(65537, 2048),
}
HASHING = [algorithm for algorithm in Algorithm if algorithm.hash_name]


def pem(key, encryption=None, form=serialization.PrivateFormat.PKCS8):
    encryption = encryption or serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, form, encryption)


def write(path: Path, content: bytes, mode: int = 0o600) -> Path:
    path.write_bytes(content)
    path.chmod(mode)
    return path


def verify(public, signature: bytes, message: bytes, salt: int = 32) -> None:
    """As one who knows nothing of our code."""
    match public:
        case ec.EllipticCurvePublicKey():
            hashed = hashes.SHA384() if public.curve.name == "secp384r1" else hashes.SHA256()
            public.verify(signature, message, ec.ECDSA(hashed))
        case rsa.RSAPublicKey():
            pss = padding.PSS(padding.MGF1(hashes.SHA256()), salt)
            public.verify(signature, message, pss, hashes.SHA256())
        case _:
            public.verify(signature, message)


@pytest.mark.parametrize("algorithm", Algorithm)
async def test_a_message_is_signed_by_each_kind_of_key(tmp_path, algorithm):
    signer = FileSigner.load(write(tmp_path / "key.pem", pem(KEYS[algorithm])), "release")
    assert (signer.name, signer.algorithm, signer.public_key) == ("release", algorithm, KEYS[algorithm].public_key())
    signature = await signer.sign_message(MESSAGE)
    verify(signer.public_key, signature, MESSAGE)
    with pytest.raises(InvalidSignature):
        verify(signer.public_key, signature, MESSAGE + b" ")


@pytest.mark.parametrize("algorithm", HASHING)
async def test_a_digest_is_signed_as_the_message_it_is_of(algorithm):
    signer = FileSigner.from_key(KEYS[algorithm], "release")
    digest = hashlib.new(algorithm.hash_name, MESSAGE).digest()
    verify(signer.public_key, await signer.sign_digest(digest), MESSAGE)


@pytest.mark.parametrize("algorithm", HASHING)
@pytest.mark.parametrize("length", [0, 20, 31, 33, 47, 49, 64])
async def test_a_digest_of_another_length_is_refused(algorithm, length):
    with pytest.raises(Invalid):
        await FileSigner.from_key(KEYS[algorithm], "release").sign_digest(bytes(length))


async def test_an_ed25519_key_signs_no_digest_since_nobody_could_verify_it_as_one():
    with pytest.raises(Invalid, match="statement"):
        await FileSigner.from_key(KEYS[Algorithm.ED25519], "release").sign_digest(bytes(32))


async def test_the_salt_of_rsa_pss_is_as_long_as_the_hash_and_no_other_length_verifies():
    signature = await FileSigner.from_key(KEYS[Algorithm.RSA_PSS], "release").sign_message(MESSAGE)
    public = KEYS[Algorithm.RSA_PSS].public_key()
    verify(public, signature, MESSAGE, salt=32)
    for salt in (0, 20, 222):
        with pytest.raises(InvalidSignature):
            verify(public, signature, MESSAGE, salt=salt)


@pytest.mark.parametrize(
    "key",
    [
        ec.generate_private_key(ec.SECP521R1()),
        ec.generate_private_key(ec.SECP256K1()),
        rsa.generate_private_key(65537, 1024),  # noqa: S505 - weak on purpose
        rsa.generate_private_key(65537, 2040),  # noqa: S505 - likewise
        dsa.generate_private_key(2048),
        x25519.X25519PrivateKey.generate(),
    ],
    ids=["p521", "secp256k1", "rsa-1024", "rsa-2040", "dsa", "x25519"],
)
def test_a_key_of_another_kind_or_too_weak_is_not_loaded(tmp_path, key):
    with pytest.raises(UnusableKey):
        FileSigner.load(write(tmp_path / "key.pem", pem(key)), "release")


@pytest.mark.parametrize("mode", [0o604, 0o606, 0o644, 0o602, 0o601, 0o620, 0o660, 0o650])
def test_a_key_that_others_can_read_or_replace_is_not_loaded(tmp_path, mode):
    with pytest.raises(UnusableKey, match="chmod 600"):
        FileSigner.load(write(tmp_path / "key.pem", pem(KEYS[Algorithm.ECDSA_P256]), mode), "release")


@pytest.mark.parametrize("mode", [0o400, 0o600, 0o440, 0o640])
def test_a_key_of_ours_and_our_group_is_loaded_also_through_a_link(tmp_path, mode):
    write(tmp_path / "key.pem", pem(KEYS[Algorithm.ECDSA_P256]), mode)
    (tmp_path / "link").symlink_to("key.pem")
    assert FileSigner.load(tmp_path / "link", "release").algorithm is Algorithm.ECDSA_P256


@pytest.mark.root
def test_a_key_of_another_user_is_not_loaded_since_he_may_have_put_it_there(tmp_path):
    path = write(tmp_path / "key.pem", pem(KEYS[Algorithm.ECDSA_P256]))
    os.chown(path, 12345, -1)
    with pytest.raises(UnusableKey, match="another user"):
        FileSigner.load(path, "release")


SEC1 = pem(KEYS[Algorithm.ECDSA_P256], form=serialization.PrivateFormat.TraditionalOpenSSL)
SECRET = pem(KEYS[Algorithm.ECDSA_P256])


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "openssl pkcs8"),
        (SEC1, "openssl pkcs8"),
        (pem(KEYS[Algorithm.ECDSA_P256], serialization.BestAvailableEncryption(b"x")), "openssl pkcs8"),
        (SECRET[:60] + b"\n-----END PRIVATE KEY-----\n", "damaged"),
        (SECRET + b"\n" * MAX_PEM, "longer than"),
    ],
    ids=["empty", "sec1", "encrypted", "cut", "too-long"],
)
def test_what_is_no_plain_pkcs8_key_is_refused_without_showing_it(tmp_path, content, told):
    with pytest.raises(UnusableKey, match=told) as refused:
        FileSigner.load(write(tmp_path / "key.pem", content), "release")
    assert SECRET.splitlines()[1].decode()[:20] not in str(refused.value)


def test_a_file_that_is_missing_or_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe", 0o600)
    for name in ("missing", "pipe", "."):
        with pytest.raises(UnusableKey):
            FileSigner.load(tmp_path / name, "release")


def test_a_signer_never_shows_its_key():
    signer = FileSigner.from_key(KEYS[Algorithm.ECDSA_P256], "release")
    assert repr(signer) == "FileSigner(name='release', algorithm='ecdsa-p256-sha256')"
    assert not hasattr(signer, "__dict__")


@pytest.mark.parametrize("algorithm", Algorithm)
async def test_a_signature_of_another_key_does_not_leave_a_signer(algorithm):
    """What a faulty token would return: each signer looks at its signatures with this function."""
    ours = FileSigner.from_key(KEYS[algorithm], "release")
    signed = hashlib.new(algorithm.hash_name, MESSAGE).digest() if algorithm.hash_name else MESSAGE
    good = await ours.sign_message(MESSAGE)
    require_valid(algorithm, ours.public_key, good, signed)
    flipped = bytes([*good[:-1], good[-1] ^ 1])
    for bad in (flipped, b"", good + b"\0", bytes(len(good)), utils.encode_dss_signature(0, 0)):
        with pytest.raises(Unavailable) as refused:
            require_valid(algorithm, ours.public_key, bad, signed)
        assert refused.value.reason is Reason.SIGNER_UNAVAILABLE
    with pytest.raises(Unavailable):
        require_valid(algorithm, ours.public_key, good, signed[:-1] + b"\0")


async def test_a_key_is_read_once_and_what_its_file_holds_later_signs_nothing(tmp_path):
    file = write(tmp_path / "key.pem", pem(KEYS[Algorithm.ECDSA_P256]))
    signer = FileSigner.load(file, "release")
    write(file, pem(ec.generate_private_key(ec.SECP256R1())))
    verify(KEYS[Algorithm.ECDSA_P256].public_key(), await signer.sign_message(MESSAGE), MESSAGE)
    file.unlink()
    verify(KEYS[Algorithm.ECDSA_P256].public_key(), await signer.sign_message(MESSAGE), MESSAGE)
