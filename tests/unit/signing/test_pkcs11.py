"""Keys in a real token (SoftHSM2): what they sign, and what happens when the token, its key or its PIN is another."""

import asyncio
import hashlib
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import structlog
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from support.softhsm import SoftHsm

from broker.errors import Invalid, Reason, Unavailable
from broker.signing.pkcs11 import Token
from broker.signing.signer import Algorithm, UnusableKey

pytestmark = pytest.mark.softhsm

MESSAGE = b'{"_type":"https://in-toto.io/Statement/v1"}'
DIGEST = hashlib.sha256(MESSAGE).digest()
KINDS = {
    "p256": Algorithm.ECDSA_P256,
    "p384": Algorithm.ECDSA_P384,
    "ed25519": Algorithm.ED25519,
    "rsa2048": Algorithm.RSA_PSS,
    "rsa3072": Algorithm.RSA_PSS,
}


@pytest.fixture
def hsm(tmp_path):
    with SoftHsm(tmp_path) as made:
        yield made


@pytest.fixture
def open_token(hsm):
    """`open_token(…)` gives a Token that is closed after the test."""
    opened = []

    def make(**settings) -> Token:
        token = Token(hsm.module, settings.pop("label", hsm.label), hsm.pin_file, **settings)
        opened.append(token)
        return token

    yield make
    for token in opened:
        token.close()


@pytest.fixture
def released(hsm, open_token):
    """A signer of the key "release", P-256, in a token of its own."""
    hsm.make_key("p256", "release")
    return open_token().signer("release", "release")


def verify(public, signature: bytes, message: bytes = MESSAGE) -> None:
    """As one who knows nothing of our code."""
    match public:
        case ec.EllipticCurvePublicKey():
            hashed = hashes.SHA384() if public.curve.name == "secp384r1" else hashes.SHA256()
            public.verify(signature, message, ec.ECDSA(hashed))
        case rsa.RSAPublicKey():
            public.verify(signature, message, padding.PSS(padding.MGF1(hashes.SHA256()), 32), hashes.SHA256())
        case _:
            public.verify(signature, message)


async def refusal(signer) -> Unavailable:
    """Why there is no signature."""
    with pytest.raises(Unavailable) as refused:
        await signer.sign_digest(DIGEST)
    assert refused.value.reason is Reason.SIGNER_UNAVAILABLE
    return refused.value


@pytest.mark.parametrize("kind", KINDS)
async def test_a_message_is_signed_by_each_kind_of_key_in_a_token(hsm, open_token, kind):
    hsm.make_key(kind, "release")
    signer = open_token().signer("release", "key-of-releases")
    assert (signer.name, signer.algorithm, signer.warnings) == ("key-of-releases", KINDS[kind], ())
    signature = await signer.sign_message(MESSAGE)
    verify(signer.public_key, signature)
    with pytest.raises(InvalidSignature):
        verify(signer.public_key, signature, MESSAGE + b" ")
    if signer.algorithm.hash_name is None:
        with pytest.raises(Invalid, match="statement"):
            await signer.sign_digest(DIGEST)
    else:
        digest = hashlib.new(signer.algorithm.hash_name, MESSAGE).digest()
        verify(signer.public_key, await signer.sign_digest(digest))
        with pytest.raises(Invalid):
            await signer.sign_digest(digest[:-1])


async def test_many_calls_at_once_get_each_its_own_signature(hsm, open_token, released):
    """SoftHSM dies of this when it was not told of the threads."""
    token = open_token(sessions=8)
    hsm.make_key("p384", "other")
    signers = [token.signer("release", "a"), token.signer("other", "b"), released]
    messages = [f"{number}".encode() for number in range(600)]
    signatures = await asyncio.gather(*(signers[i % 3].sign_message(m) for i, m in enumerate(messages)))
    for index, (message, signature) in enumerate(zip(messages, signatures, strict=True)):
        verify(signers[index % 3].public_key, signature, message)
    assert len(set(signatures)) == len(messages)


async def test_a_public_key_is_read_from_a_certificate_where_the_token_has_none_beside_the_private_one(
    hsm, open_token, released
):
    named = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "release")])
    begin = datetime(2026, 1, 1, tzinfo=UTC)
    builder = x509.CertificateBuilder().subject_name(named).issuer_name(named).serial_number(1)
    builder = builder.not_valid_before(begin).not_valid_after(begin + timedelta(days=1))
    certificate = builder.public_key(released.public_key).sign(ec.generate_private_key(ec.SECP256R1()), hashes.SHA256())
    hsm.delete("release", "PUBLIC_KEY")
    with pytest.raises(UnusableKey, match="no public key and no certificate"):
        open_token().signer("release", "release")
    hsm.put_certificate("release", certificate.public_bytes(serialization.Encoding.DER))
    signer = open_token().signer("release", "release")
    assert signer.public_key == released.public_key
    verify(signer.public_key, await signer.sign_message(MESSAGE))


@pytest.mark.parametrize(
    ("attributes", "told"),
    [
        ({"EXTRACTABLE": True}, ["CKA_EXTRACTABLE"]),
        ({"EXTRACTABLE": True, "SENSITIVE": False}, ["CKA_EXTRACTABLE", "CKA_SENSITIVE"]),
    ],
)
def test_a_key_that_can_leave_its_token_is_warned_of(hsm, open_token, attributes, told):
    hsm.make_key("p256", "release", **attributes)
    with structlog.testing.capture_logs() as logs:
        signer = open_token().signer("release", "release")
    assert all(word in warning for word, warning in zip(told, signer.warnings, strict=True))
    warned = [entry["warning"] for entry in logs if entry["log_level"] == "warning"]
    assert warned == list(signer.warnings)


@pytest.mark.parametrize(
    ("kind", "attributes", "told"),
    [
        ("p256", {"SIGN": False}, "CKA_SIGN"),
        ("p256", {"ALWAYS_AUTHENTICATE": True}, "CKA_ALWAYS_AUTHENTICATE"),
        ("p521", {}, "not ECDSA P-256"),
        ("rsa1024", {}, "2048 to 8192 bits"),
    ],
    ids=["may-not-sign", "pin-each-time", "p521", "rsa-1024"],
)
def test_a_key_that_signs_nothing_here_is_refused_at_the_start(hsm, open_token, kind, attributes, told):
    hsm.make_key(kind, "release", **attributes)
    with pytest.raises(UnusableKey, match=told):
        open_token().signer("release", "release")


def test_a_key_that_is_not_there_or_there_twice_is_refused_at_the_start(hsm, open_token, released):
    with pytest.raises(UnusableKey, match="no private key"):
        open_token().signer("releases", "release")
    hsm.make_key("p256", "release")
    with pytest.raises(UnusableKey, match="two private keys"):
        open_token().signer("release", "release")


def test_a_module_that_is_missing_or_something_else_is_refused_at_the_start(hsm, tmp_path):
    (tmp_path / "text.so").write_text("no library")
    for module in (tmp_path / "missing.so", tmp_path / "text.so"):
        with pytest.raises(UnusableKey, match=r"(missing|text)\.so cannot be loaded"):
            Token(module, hsm.label, hsm.pin_file)


@pytest.mark.parametrize("sessions", [0, -1, 65])
def test_the_number_of_sessions_is_bounded(hsm, sessions):
    with pytest.raises(UnusableKey, match="1 to 64"):
        Token(hsm.module, hsm.label, hsm.pin_file, sessions)


async def test_a_token_that_is_taken_away_gives_no_signature_and_when_it_is_back_the_next_call_does(hsm, released):
    verify(released.public_key, await released.sign_message(MESSAGE))
    for _ in range(2):
        hsm.take_away()
        for _ in range(2):
            assert "'acme'" in (await refusal(released)).detail
        hsm.put_back()
        verify(released.public_key, await released.sign_message(MESSAGE))


async def test_a_token_that_goes_in_mid_call_gives_good_signatures_and_refusals_and_nothing_else(hsm, released):
    calls = [asyncio.ensure_future(released.sign_message(MESSAGE)) for _ in range(400)]
    await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
    hsm.take_away()
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    refused = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    assert {(type(each), each.reason) for each in refused} == {(Unavailable, Reason.SIGNER_UNAVAILABLE)}
    signed = [outcome for outcome in outcomes if isinstance(outcome, bytes)]
    assert signed
    for signature in signed:
        verify(released.public_key, signature)
    hsm.put_back()
    verify(released.public_key, await released.sign_message(MESSAGE))


async def test_a_token_that_is_away_leaves_the_others_of_its_module_at_work(hsm, open_token, released):
    hsm.add_token("other")
    hsm.make_key("p256", "ca", token="other")
    hsm.take_away("other")
    token = open_token(label="other", sessions=2)
    with pytest.raises(Unavailable, match="no token"):
        token.signer("ca", "ca")
    hsm.put_back("other")
    other = token.signer("ca", "ca")
    hsm.take_away("other")
    refused, signed = 0, 0

    async def ask_in_vain() -> None:
        nonlocal refused
        while refused < 4:
            await refusal(other)
            refused += 1

    async with asyncio.TaskGroup() as group:
        group.create_task(ask_in_vain())
        while refused < 4:
            verify(released.public_key, await released.sign_message(MESSAGE))
            signed += 1
    assert signed > 40  # each refusal takes a quarter of a second, and a signature a thousandth
    hsm.put_back("other")
    both = await asyncio.gather(other.sign_message(MESSAGE), released.sign_message(MESSAGE))
    for signer, signature in zip((other, released), both, strict=True):
        verify(signer.public_key, signature)


async def test_a_key_deleted_by_another_process_signs_no_more_and_one_put_in_its_place_does_not_sign_for_it(
    hsm, open_token, released
):
    hsm.delete("release")
    assert "no private key" in (await refusal(released)).detail
    hsm.make_key("p256", "release")
    assert "exchanged" in (await refusal(released)).detail
    again = open_token().signer("release", "release")
    assert again.public_key != released.public_key
    verify(again.public_key, await again.sign_message(MESSAGE))


async def test_a_pin_that_is_refused_is_not_tried_again_until_the_file_has_another_one(hsm, open_token):
    """Tokens lock themselves after a few wrong ones."""
    hsm.make_key("p256", "release")
    hsm.write_pin("55554444")
    token = open_token()
    told = []
    with structlog.testing.capture_logs() as logs:
        for expected in ("refused the PIN", "refused before", "refused before"):
            with pytest.raises(UnusableKey, match=expected) as refused:
                token.signer("release", "release")
            told += [repr(refused.value), repr(token)]
    assert "55554444" not in f"{told} {logs}"
    hsm.write_pin(hsm.pin)
    signer = token.signer("release", "release")
    verify(signer.public_key, await signer.sign_message(MESSAGE))
    hsm.write_pin("55554444")
    verify(signer.public_key, await signer.sign_message(MESSAGE))
    hsm.take_away()
    await refusal(signer)
    hsm.put_back()
    assert "the PIN" in (await refusal(signer)).detail


@pytest.mark.parametrize("mode", [0o604, 0o644, 0o660])
async def test_a_pin_that_others_can_read_is_not_used(hsm, open_token, mode):
    hsm.make_key("p256", "release")
    hsm.pin_file.chmod(mode)
    with pytest.raises(UnusableKey, match="chmod 600") as refused:
        open_token().signer("release", "release")
    assert hsm.pin not in str(refused.value)


async def test_a_pin_file_that_is_lost_while_we_run_is_needed_at_the_next_login_only(hsm, released):
    content = hsm.pin_file.read_bytes()
    hsm.pin_file.unlink()
    verify(released.public_key, await released.sign_message(MESSAGE))
    hsm.take_away()
    await refusal(released)
    hsm.put_back()
    assert "cannot be read" in (await refusal(released)).detail
    hsm.pin_file.touch(mode=0o600)
    hsm.pin_file.write_bytes(content)
    verify(released.public_key, await released.sign_message(MESSAGE))


async def test_a_module_that_hangs_is_given_up_in_time_and_used_again_when_it_answers(hsm, open_token):
    hsm.make_key("p256", "release")
    token = open_token(sessions=2, timeout_s=0.3)
    signer = token.signer("release", "release")
    loop = asyncio.get_running_loop()
    with hsm.hanging():
        for _ in range(4):
            begun = loop.time()
            refusals = await asyncio.gather(*(refusal(signer) for _ in range(3)))
            assert loop.time() - begun < 3
            assert all(each.retry_after_ms for each in refusals)
        ours = [thread for thread in threading.enumerate() if thread.name == f"token {hsm.label!r}"]
        assert 2 <= len(ours) <= 4
    for _ in range(20):  # a hung call may still be on its way back
        try:
            signature = await signer.sign_message(MESSAGE)
            break
        except Unavailable:
            continue
    verify(signer.public_key, signature)


async def test_a_caller_that_goes_leaves_the_token_usable(released):
    for _ in range(20):
        call = asyncio.ensure_future(released.sign_message(MESSAGE))
        await asyncio.sleep(0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
    verify(released.public_key, await released.sign_message(MESSAGE))


async def test_a_closed_token_signs_nothing_and_keeps_no_thread(hsm, open_token):
    hsm.make_key("p256", "release")
    token = open_token()
    signer = token.signer("release", "release")
    token.close()
    assert "closed" in (await refusal(signer)).detail
    assert not [thread for thread in threading.enumerate() if thread.name == f"token {hsm.label!r}"]


def test_tokens_in_other_folders_are_seen_when_the_module_is_opened_again(hsm, open_token, tmp_path: Path):
    """Its configuration is read at its initialisation: tests depend on this."""
    hsm.make_key("p256", "release")
    open_token().close()
    with SoftHsm(tmp_path / "second", "second") as second:
        with pytest.raises(Unavailable, match="no token"), Token(hsm.module, hsm.label, hsm.pin_file) as token:
            token.signer("release", "release")
        second.make_key("p384", "release")
        with Token(second.module, "second", second.pin_file) as token:
            assert token.signer("release", "release").algorithm is Algorithm.ECDSA_P384
