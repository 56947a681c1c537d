"""A certificate for an agent's own key: where policy gives it, for a key it holds now, saying verified facts alone."""

from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import AttributeOID, ExtendedKeyUsageOID, NameOID
from support.signing import (
    ALICE,
    BUILDER,
    CONTENT,
    OWN_KEY_AGENT,
    SigningBroker,
    digests,
    example_policies,
    signing_broker,
)
from support.signing_calls import (
    NIGHTLY,
    UNLIMITED,
    acts,
    ask_certificate,
    claims_of,
    get_grant,
    nothing_signed,
    refused,
    results,
    spent,
)
from support.whole_broker import ISSUER, Said, Wire

from broker.client.signing import SigningGrant
from broker.errors import BrokerError, Reason
from broker.signing import extensions

Key = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey
Csr = x509.CertificateSigningRequestBuilder
WEAK_BITS = 1024


@pytest.fixture(scope="module")
def broker() -> Iterator[SigningBroker]:
    """Left as it was found."""
    with signing_broker(example_policies() | NIGHTLY, limits=UNLIMITED) as found:
        yield found


class Own:
    """An agent with a grant for a certificate."""

    def __init__(self, broker: SigningBroker, wire: Wire, grant: Any, envelope: bytes) -> None:
        self.broker, self.wire, self.envelope = broker, wire, [envelope]
        self.grant, self.nonce = grant.grant, grant.csr_nonce

    async def ask(self, csr: bytes, **options: Any) -> Said:
        """For a certificate."""
        grant = options.pop("grant", self.grant)
        return await ask_certificate(self.wire, grant, csr, self.envelope, spiffe_id=OWN_KEY_AGENT, **options)


@pytest.fixture
async def own(broker: SigningBroker) -> AsyncIterator[Own]:
    """After what a test tries, which signs and spends nothing, it still gets its certificate: the positive control."""
    envelope = broker.builder.envelope()
    async with broker.whole.wire() as wire:
        action = broker.nightly(signer="agent-key")
        found = Own(broker, wire, await get_grant(wire, action, [envelope], spiffe_id=OWN_KEY_AGENT), envelope)
        with nothing_signed(broker.whole):
            yield found
        assert not spent(broker.whole, found.grant)
        said = await found.ask(csr(found.nonce))
        assert said.code is grpc.StatusCode.OK, said.reason
        assert spent(broker.whole, found.grant) == "used"


def p256() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def csr(nonce: str | None, key: Key | None = None, change: Callable[[Csr], Csr] = lambda made: made) -> bytes:
    """A request by this key; nonce: None for none."""
    made = change(Csr().subject_name(x509.Name([])))
    if nonce is not None:
        made = made.add_attribute(AttributeOID.CHALLENGE_PASSWORD, nonce.encode())
    key = key or p256()
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return made.sign(key, algorithm).public_bytes(Encoding.DER)


def asking_for(value: x509.ExtensionType) -> Callable[[str], bytes]:
    return lambda nonce: csr(nonce, change=lambda made: made.add_extension(value, critical=True))


def with_anothers_key(nonce: str) -> bytes:
    """The signature is of another key than the one in it."""
    made, theirs = csr(nonce, p256()), p256().public_key()
    form = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    spki = x509.load_der_x509_csr(made).public_key().public_bytes(*form)
    return made.replace(spki, theirs.public_bytes(*form))


BAD: dict[str, tuple[Callable[[str], bytes], Reason]] = {
    "wanting to be a CA": (asking_for(x509.BasicConstraints(ca=True, path_length=None)), Reason.MALFORMED),
    "wanting another name": (
        asking_for(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(ALICE)])),
        Reason.MALFORMED,
    ),
    "wanting an issuer's extension": (
        asking_for(x509.UnrecognizedExtension(x509.ObjectIdentifier("1.3.6.1.4.1.57264.1.8"), b"\x0c\x01x")),
        Reason.MALFORMED,
    ),
    "of a weak RSA key": (
        lambda nonce: csr(nonce, rsa.generate_private_key(65537, WEAK_BITS)),
        Reason.MALFORMED,
    ),
    "of an RSA key with exponent 3": (lambda nonce: csr(nonce, rsa.generate_private_key(3, 2048)), Reason.MALFORMED),
    "of a curve that nobody verifies": (
        lambda nonce: csr(nonce, ec.generate_private_key(ec.SECP256K1())),
        Reason.MALFORMED,
    ),
    "without a nonce": (lambda _: csr(None), Reason.MALFORMED),
    "with an empty nonce": (lambda _: csr(""), Reason.PROOF_REPLAYED),
    "with another nonce": (lambda _: csr("A" * 32), Reason.PROOF_REPLAYED),
    "with a part of the nonce": (lambda nonce: csr(nonce[:-1]), Reason.PROOF_REPLAYED),
    "with more than the nonce": (lambda nonce: csr(f"{nonce}A"), Reason.PROOF_REPLAYED),
    "with another's key": (with_anothers_key, Reason.KEY_MISMATCH),
    "that was changed after it was signed": (
        lambda nonce: csr("A" * len(nonce)).replace(b"A" * len(nonce), nonce.encode()),
        Reason.KEY_MISMATCH,
    ),
    "in PEM": (
        lambda nonce: x509.load_der_x509_csr(csr(nonce)).public_bytes(Encoding.PEM),
        Reason.MALFORMED,
    ),
    "with a byte too many": (lambda nonce: csr(nonce) + b"\0", Reason.MALFORMED),
    "of nothing": (lambda _: b"", Reason.MALFORMED),
    "of 9,000 bytes": (lambda nonce: csr(nonce).ljust(9000, b"\0"), Reason.MALFORMED),
}


@pytest.mark.parametrize(("make", "reason"), BAD.values(), ids=BAD.keys())
async def test_a_request_that_proves_nothing_or_wants_more_is_refused(
    broker: SigningBroker, own: Own, make: Callable[[str], bytes], reason: Reason
) -> None:
    record = await refused(broker, await own.ask(make(own.nonce)), reason)
    assert (record.principal, record.stage) == (OWN_KEY_AGENT, "certify")


async def test_the_nonce_of_another_grant_is_of_no_use(broker: SigningBroker, own: Own) -> None:
    """A request that was made for one grant, seen by somebody or not, gives nothing under another."""
    action = broker.nightly(signer="agent-key")
    other = await get_grant(own.wire, action, own.envelope, spiffe_id=OWN_KEY_AGENT)
    assert other.csr_nonce != own.nonce
    await refused(broker, await own.ask(csr(other.csr_nonce)), Reason.PROOF_REPLAYED)
    await refused(broker, await own.ask(csr(own.nonce), grant=other.grant), Reason.PROOF_REPLAYED)


async def test_a_nonce_that_gave_a_certificate_gives_no_other(broker: SigningBroker) -> None:
    """Invariant 7: the same request again is the same answer; another with its nonce is a replay of a spent grant."""
    async with broker.whole.wire() as wire:
        envelope = broker.builder.envelope()
        action = broker.nightly(signer="agent-key")
        found = Own(broker, wire, await get_grant(wire, action, [envelope], spiffe_id=OWN_KEY_AGENT), envelope)
        mine = csr(found.nonce)
        first = await found.ask(mine, idempotency_id="i" * 20)
        assert first.code is grpc.StatusCode.OK
        with nothing_signed(broker.whole):
            again = await found.ask(mine, idempotency_id="i" * 20)
            assert again.message.certificate_chain == first.message.certificate_chain
            await refused(broker, await found.ask(mine), Reason.ALREADY_USED)
            replayed = csr(found.nonce)
            await refused(broker, await found.ask(replayed, idempotency_id="i" * 20), Reason.ALREADY_USED)
            await refused(broker, await found.ask(replayed), Reason.ALREADY_USED)


def certified(said: Said) -> tuple[x509.Certificate, ...]:
    assert said.code is grpc.StatusCode.OK, said.reason
    return tuple(x509.load_der_x509_certificate(one) for one in said.message.certificate_chain)


KEYS: dict[str, Callable[[], Key]] = {
    "P-256": p256,
    "P-384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "Ed25519": ed25519.Ed25519PrivateKey.generate,
    "RSA-2048": lambda: rsa.generate_private_key(65537, 2048),
}


@pytest.mark.parametrize("make", KEYS.values(), ids=KEYS.keys())
async def test_a_certificate_is_for_the_agents_key_and_its_chain_verifies(
    broker: SigningBroker, make: Callable[[], Key]
) -> None:
    async with broker.whole.wire() as wire:
        key, envelope = make(), broker.builder.envelope()
        action = broker.nightly(signer="agent-key")
        found = Own(broker, wire, await get_grant(wire, action, [envelope], spiffe_id=OWN_KEY_AGENT), envelope)
        said = await found.ask(csr(found.nonce, key))
    leaf, issuing, root = certified(said)
    assert leaf.public_key() == key.public_key()
    leaf.verify_directly_issued_by(issuing)
    issuing.verify_directly_issued_by(root)
    root.verify_directly_issued_by(root)
    assert root.public_bytes(Encoding.PEM) in [one.read_bytes() for one in broker.ca_folder.rglob("*.pem")]
    (made,) = [one for one in acts(broker.whole) if one.correlation_id == said.correlation_id]
    assert (made.credential, made.parent) == ("signing_certificate", claims_of(found.grant).jti)
    assert results(broker.whole, said.correlation_id) == ["issued"]


async def test_a_certificate_says_verified_facts_and_nothing_of_the_request(broker: SigningBroker) -> None:
    """Invariant 3: and it ends with its grant at the latest. Names in the request are passed over."""
    named = x509.Name(
        [
            x509.NameAttribute(NameOID.COMMON_NAME, "Root of Everything"),
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, ALICE),
        ]
    )
    async with broker.whole.wire() as wire:
        envelope = broker.builder.envelope()
        action = broker.nightly(signer="agent-key")
        grant = await get_grant(wire, action, [envelope], spiffe_id=OWN_KEY_AGENT)
        found = Own(broker, wire, grant, envelope)
        asked = csr(found.nonce, change=lambda _: Csr().subject_name(named))
        said = await found.ask(asked)
    leaf = certified(said)[0]
    assert not leaf.subject.rdns
    assert b"Root of Everything" not in leaf.public_bytes(Encoding.DER)
    assert found.nonce.encode() not in leaf.public_bytes(Encoding.DER)
    told = extensions.read(leaf)
    assert (told.uri, told.issuer, told.node) == (OWN_KEY_AGENT, ISSUER, "node-7")
    assert dict(told.build) == {
        "build_signer_uri": BUILDER,
        "source_repository_uri": "https://git.acme.test/acme/app",
        "source_repository_digest": "8" * 40,
        "source_repository_ref": "refs/heads/main",
        "run_invocation_uri": "https://ci.acme.test/runs/17",
        "token_subject": OWN_KEY_AGENT,
    }
    claims = claims_of(found.grant)
    assert told.grant_id == claims.jti
    assert told.action_digest == f"sha256:{action.digest.hex()}"
    assert told.policy_revision == claims.attestation.policy
    assert told.artifacts == tuple(sorted(f"{name}:{value}" for name, value in digests(CONTENT).items()))
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert names.critical
    assert list(names.value) == [x509.UniformResourceIdentifier(OWN_KEY_AGENT)]
    assert list(leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [
        ExtendedKeyUsageOID.CODE_SIGNING
    ]
    assert leaf.not_valid_after_utc <= claims.expires_at
    assert leaf.not_valid_after_utc - leaf.not_valid_before_utc <= timedelta(minutes=5)
    assert leaf.not_valid_before_utc <= datetime.now(UTC) <= leaf.not_valid_after_utc


async def test_the_example_gives_its_one_agent_a_certificate_once_it_is_approved(broker: SigningBroker) -> None:
    """As examples/release-signing has it, by our own client: in staging, with an approval, and for that agent alone."""
    envelope = (broker.builder.envelope(),)
    async with broker.client(OWN_KEY_AGENT) as agent, broker.client() as other:
        action = broker.action(signer="agent-key")
        grant = await broker.granted(agent, action, envelope, ALICE)
        assert isinstance(grant, SigningGrant)
        chain = await agent.signing.certify(grant, csr(grant.csr_nonce), idempotency_id="i" * 20)
        assert len(chain) == 3
        for client, asked in ((other, action), (agent, broker.action(signer="agent-key", environment="production"))):
            with pytest.raises(BrokerError) as error:
                await client.signing.grant(asked, envelope, request_id="r" * 20)
            assert error.value.reason is Reason.DENIED, "approvals would not help, so nobody is asked for any"
