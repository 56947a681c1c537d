"""Signatures by a key that was made for one, and by keys that stay: each verified without code of ours."""

import asyncio
import base64
import hashlib
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from support.memory import private_keys
from support.receiving import fetch_of
from support.signing import AGENT, CONTENT, SigningBroker, digests, signing_broker
from support.signing_calls import (
    NIGHTLY,
    UNLIMITED,
    acts,
    ask_grant,
    ask_sign,
    claims_of,
    get_grant,
    nothing_signed,
    refused,
    results,
    spent,
)
from support.whole_broker import ISSUER, Said, Whole, Wire

from broker.credentials.jose import b64url_decode
from broker.errors import Reason
from broker.signing import extensions

STATEMENT_TYPE = "application/vnd.in-toto+json"
KEYS = {
    "p256": ec.generate_private_key(ec.SECP256R1()),
    "p384": ec.generate_private_key(ec.SECP384R1()),
    "ed25519": ed25519.Ed25519PrivateKey.generate(),
    "rsa": rsa.generate_private_key(65537, 2048),
    "p256-statements": ec.generate_private_key(ec.SECP256R1()),
    "p384-statements": ec.generate_private_key(ec.SECP384R1()),
    "rsa-statements": rsa.generate_private_key(65537, 2048),
}
STATEMENT_KEYS = ("ed25519", "p256-statements", "p384-statements", "rsa-statements")
DER, SPKI = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
STATEMENT = json.dumps(
    {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": "app", "digest": digests(CONTENT)}],
        "predicateType": "https://acme.test/released/v1",
        "predicate": {"by": "us"},
    }
).encode()


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SigningBroker]:
    """Left as it was found."""
    folder = tmp_path_factory.mktemp("keys")
    tables = {f"signing.keys.{name}": {"file": str(key_file(folder, name))} for name in KEYS}
    for name in STATEMENT_KEYS:
        tables[f"signing.keys.{name}"]["signs"] = "statements"
    with signing_broker(NIGHTLY, limits=UNLIMITED, **tables) as found:
        yield found


def key_file(folder: Path, name: str) -> Path:
    file = folder / f"{name}.pem"
    file.touch(mode=0o600)
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    file.write_bytes(KEYS[name].private_bytes(*form))
    return file


@pytest.fixture
async def wire(broker: SigningBroker) -> AsyncIterator[Wire]:
    async with broker.whole.wire() as found:
        yield found


async def sign(broker: SigningBroker, wire: Wire, signer: str = "keyless", statement: bytes = b"") -> tuple[Said, str]:
    """The answer and the grant it came of."""
    envelope = [broker.builder.envelope()]
    grant = (await get_grant(wire, broker.nightly(signer=signer), envelope)).grant
    return await ask_sign(wire, grant, envelope, statement=statement), grant


def verify(public: Any, signature: bytes, message: bytes, hash_of: hashes.HashAlgorithm | None = None) -> None:
    """As one who knows nothing of our code. Raises: InvalidSignature."""
    match public:
        case ec.EllipticCurvePublicKey():
            public.verify(signature, message, ec.ECDSA(hash_of or hashes.SHA256()))
        case rsa.RSAPublicKey():
            salted = padding.PSS(padding.MGF1(hashes.SHA256()), 32)
            public.verify(signature, message, salted, hashes.SHA256())
        case _:
            public.verify(signature, message)


def enveloped(statement: bytes) -> bytes:
    """DSSE's pre-authentication encoding, by hand."""
    head = f"DSSEv1 {len(STATEMENT_TYPE)} {STATEMENT_TYPE} {len(statement)} "
    return head.encode() + statement


@pytest.mark.parametrize("name", ["p256", "p384", "rsa"])
async def test_a_named_key_signs_the_granted_digest(broker: SigningBroker, wire: Wire, name: str) -> None:
    """Invariant 13: of exactly the artifact that was granted, in the hash that the key goes with."""
    said, grant = await sign(broker, wire, f"key:{name}")
    message = said.message
    hash_of = hashes.SHA384() if name == "p384" else hashes.SHA256()
    public = KEYS[name].public_key()
    verify(public, message.signature, CONTENT, hash_of)
    with pytest.raises(InvalidSignature):
        verify(public, message.signature, b"another artifact", hash_of)
    assert (message.public_key, list(message.certificate_chain)) == (public.public_bytes(DER, SPKI), [])

    bundle = json.loads(message.bundle)
    found = bundle["messageSignature"]
    assert base64.b64decode(found["signature"]) == message.signature
    assert base64.b64decode(found["messageDigest"]["digest"]) == hashlib.new(hash_of.name, CONTENT).digest()
    assert bundle["verificationMaterial"]["publicKey"]["hint"]
    (intent,) = [one for one in acts(broker.whole) if one.parent == claims_of(grant).jti]
    assert (intent.credential, intent.key_id) == ("signature", f"key:{name}")
    assert intent.cnf == {"spki_sha256": hashlib.sha256(message.public_key).hexdigest()}


@pytest.mark.parametrize("name", STATEMENT_KEYS)
async def test_a_named_key_signs_a_statement_about_what_was_granted(
    broker: SigningBroker, wire: Wire, name: str
) -> None:
    """Invariant 13: as DSSE, with its very bytes in the bundle."""
    said, _ = await sign(broker, wire, f"key:{name}", STATEMENT)
    assert said.code is grpc.StatusCode.OK, said.reason
    public, hash_of = KEYS[name].public_key(), hashes.SHA384() if "p384" in name else hashes.SHA256()
    verify(public, said.message.signature, enveloped(STATEMENT), hash_of)
    for other in (STATEMENT, enveloped(STATEMENT + b" ")):
        with pytest.raises(InvalidSignature):
            verify(public, said.message.signature, other, hash_of)
    envelope = json.loads(said.message.bundle)["dsseEnvelope"]
    assert base64.b64decode(envelope["payload"]) == STATEMENT
    assert envelope["payloadType"] == STATEMENT_TYPE
    assert [base64.b64decode(one["sig"]) for one in envelope["signatures"]] == [said.message.signature]


@pytest.mark.parametrize("name", KEYS)
async def test_a_named_key_signs_one_kind_of_thing(broker: SigningBroker, wire: Wire, name: str) -> None:
    """An artifact may be the very bytes that a signature over a statement is made of: no key signs both."""
    envelope, takes_statements = [broker.builder.envelope()], name in STATEMENT_KEYS
    grant = (await get_grant(wire, broker.nightly(signer=f"key:{name}"), envelope)).grant
    right, wrong = (STATEMENT, b"") if takes_statements else (b"", STATEMENT)
    with nothing_signed(broker.whole):
        await refused(broker, await ask_sign(wire, grant, envelope, statement=wrong), Reason.MALFORMED)
    assert not spent(broker.whole, grant), "what is malformed costs nothing"
    said = await ask_sign(wire, grant, envelope, statement=right)
    assert said.code is grpc.StatusCode.OK, said.reason


async def test_an_artifact_that_looks_like_a_statements_encoding_gives_no_statement(
    broker: SigningBroker, wire: Wire
) -> None:
    """By a one-time key all it is worth is one certificate, which names that artifact and nothing inside it."""
    forged = enveloped(STATEMENT)
    envelope = [broker.builder.envelope(forged)]
    for signer in ("key:p256", "keyless"):
        grant = (await get_grant(wire, broker.nightly(forged, signer=signer), envelope)).grant
        said = await ask_sign(wire, grant, envelope)
        assert "messageSignature" in json.loads(said.message.bundle)
        if signer == "keyless":
            leaf = x509.load_der_x509_certificate(said.message.certificate_chain[0])
            assert extensions.read(leaf).artifacts == tuple(sorted(f"{k}:{v}" for k, v in digests(forged).items()))


async def test_a_digest_that_the_key_goes_with_has_to_be_named(broker: SigningBroker, wire: Wire) -> None:
    """P-384 goes with sha384. No grant is given that could not be kept."""
    envelope, brief = [broker.builder.envelope()], [{"sha256": digests(CONTENT)["sha256"]}]
    with nothing_signed(broker.whole):
        said = await ask_grant(wire, broker.nightly(signer="key:p384", artifacts=brief), envelope)
        await refused(broker, said, Reason.MALFORMED)
    for signer in ("key:p256", "key:p384-statements"):
        assert (await get_grant(wire, broker.nightly(signer=signer, artifacts=brief), envelope)).grant


async def test_a_keyless_signature_verifies_under_its_certificate_and_that_under_our_root(
    broker: SigningBroker, wire: Wire
) -> None:
    """Invariants 3 and 13: it is of the granted artifact; the certificate names it, and ends with the grant."""
    said, grant = await sign(broker, wire)
    leaf, issuing, root = map(x509.load_der_x509_certificate, said.message.certificate_chain)
    verify(leaf.public_key(), said.message.signature, CONTENT)
    with pytest.raises(InvalidSignature):
        verify(leaf.public_key(), said.message.signature, b"another artifact")
    leaf.verify_directly_issued_by(issuing)
    issuing.verify_directly_issued_by(root)
    assert leaf.public_key().public_bytes(DER, SPKI) == said.message.public_key
    claims, found = claims_of(grant), extensions.read(leaf)
    assert (found.uri, found.issuer, found.grant_id, found.node) == (AGENT, ISSUER, claims.jti, "node-7")
    assert found.action_digest == f"sha256:{broker.nightly().digest.hex()}"
    assert f"sha256:{digests(CONTENT)['sha256']}" in found.artifacts
    assert leaf.not_valid_after_utc <= claims.expires_at
    assert results(broker.whole, said.message.correlation_id) == ["issued"]


async def test_a_keyless_statement_verifies_under_its_certificate(broker: SigningBroker, wire: Wire) -> None:
    said, _ = await sign(broker, wire, statement=STATEMENT)
    leaf = x509.load_der_x509_certificate(said.message.certificate_chain[0])
    verify(leaf.public_key(), said.message.signature, enveloped(STATEMENT))
    with pytest.raises(InvalidSignature):
        verify(leaf.public_key(), said.message.signature, CONTENT)


async def test_no_key_of_a_keyless_signature_is_used_twice(broker: SigningBroker, wire: Wire) -> None:
    """A certificate stands for one signature: as many keys, certificates and serial numbers as signatures."""
    made = [(await sign(broker, wire, statement=some))[0].message for some in (b"", STATEMENT) * 8]
    leaves = [x509.load_der_x509_certificate(one.certificate_chain[0]) for one in made]
    for distinct in (
        {one.public_key for one in made},
        {one.serial_number for one in leaves},
        {one.signature for one in made},
    ):
        assert len(distinct) == len(made)
    for one in made:
        verified = [leaf for leaf in leaves if accepts(leaf, one.signature)]
        assert [leaf.public_key().public_bytes(DER, SPKI) for leaf in verified] == [one.public_key]


def accepts(leaf: x509.Certificate, signature: bytes) -> bool:
    for message in (CONTENT, enveloped(STATEMENT)):
        try:
            verify(leaf.public_key(), signature, message)
        except InvalidSignature:
            continue
        return True
    return False


async def test_no_key_of_a_keyless_signature_is_kept(broker: SigningBroker, wire: Wire) -> None:
    """Neither on the disk nor in memory, where the same search does find the key that signs grants."""
    whole = broker.whole
    made = [(await sign(broker, wire, statement=some))[0].message for some in (b"", STATEMENT) * 4]
    used = {x_of(serialization.load_der_public_key(one.public_key)) for one in made}
    grants = await published(whole)
    found = await asyncio.to_thread(private_keys, whole.broker.process.pid, used | grants)
    assert found & grants, "what is kept is found"
    assert not found & used
    ledger = b"".join(file.read_bytes() for file in (whole.broker.folder / "state").glob("ledger*"))
    assert made[0].signature in ledger, "the answer, which may be asked for again"
    assert b"PRIVATE KEY" not in ledger


def x_of(public: Any) -> int:
    return public.public_numbers().x


async def published(whole: Whole) -> set[int]:
    """The keys that sign tokens and grants, by the x of their points."""
    return {int.from_bytes(b64url_decode(key["x"].encode())) for key in json.loads(await fetch_of(whole)())["keys"]}


async def test_a_key_that_is_not_configured_gives_no_grant(broker: SigningBroker, wire: Wire) -> None:
    """Invariant 6: nor does a name that only looks like one of those."""
    for name in ("p521", "p256 ", "P256", "p256/../rsa"):
        with nothing_signed(broker.whole):
            action = broker.nightly()
            action.parameters["signing"]["signer"] = f"key:{name}"
            said = await ask_grant(wire, action, [broker.builder.envelope()])
            assert said.reason in {Reason.DENIED, Reason.MALFORMED}
            assert said.message is None
