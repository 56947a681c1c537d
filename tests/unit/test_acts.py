"""What a grant is spent on: a key that is made for one signature signs once, and nothing of it is left."""

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from support.pki import NOW
from support.processes import until
from support.signing import CONTENT, digests
from support.signing_exchange import SigningExchange, signing_exchange
from support.stamping import Stamping, stamping

from broker.acts import Means, Signature
from broker.artifacts import AGENT_KEY, KEYLESS, SigningRequest
from broker.errors import BrokerError, Invalid, Reason, Refused, Unavailable
from broker.sign import Signing
from broker.signing.authority import Authority
from broker.signing.file_key import FileSigner
from broker.signing.named_key import NamedKey
from broker.signing.signer import Algorithm, PublicKey
from broker.signing.timestamp import TimestampAuthority


class Watched(ec.EllipticCurvePrivateKey):
    """A real key that can be watched: how often it signs, and whether it is still there."""

    def __init__(self, key: ec.EllipticCurvePrivateKey, uses: list[str]) -> None:
        self._key, self._uses = key, uses

    def sign(self, data: bytes, signature_algorithm: ec.EllipticCurveSignatureAlgorithm) -> bytes:
        self._uses.append("sign")
        return self._key.sign(data, signature_algorithm)

    def public_key(self) -> ec.EllipticCurvePublicKey:
        return self._key.public_key()

    @property
    def curve(self) -> ec.EllipticCurve:
        return self._key.curve

    @property
    def key_size(self) -> int:
        return self._key.key_size

    def exchange(self, algorithm: ec.ECDH, peer_public_key: ec.EllipticCurvePublicKey) -> bytes:
        self._uses.append("exchange")
        return self._key.exchange(algorithm, peer_public_key)

    def private_numbers(self) -> ec.EllipticCurvePrivateNumbers:
        self._uses.append("private_numbers")
        return self._key.private_numbers()

    def private_bytes(self, *form: Any) -> bytes:
        self._uses.append("private_bytes")
        return self._key.private_bytes(*form)

    def __copy__(self) -> "Watched":
        self._uses.append("copy")
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "Watched":
        self._uses.append("copy")
        return self


class Keys:
    """Every key that is made from now on. born: references that do not keep it."""

    def __init__(self) -> None:
        self.born: list[weakref.ref[Watched]] = []
        self.uses: list[list[str]] = []
        self._make = ec.generate_private_key

    def generate(self, curve: ec.EllipticCurve) -> Watched:
        self.uses.append([])
        made = Watched(self._make(curve), self.uses[-1])
        self.born.append(weakref.ref(made))
        return made

    def alive(self) -> int:
        """How many are still there."""
        gc.collect()
        return sum(one() is not None for one in self.born)


@pytest.fixture
async def found(tmp_path: Path) -> AsyncIterator[SigningExchange]:
    async with signing_exchange(tmp_path) as made:
        yield made


@pytest.fixture
def keys(found: SigningExchange, monkeypatch: pytest.MonkeyPatch) -> Keys:
    """Watches what is made after the CA was."""
    made = Keys()
    monkeypatch.setattr(ec, "generate_private_key", made.generate)
    return made


@pytest.fixture(scope="module")
def authority() -> Iterator[Stamping]:
    with stamping() as found:
        yield found


async def test_a_key_of_keyless_signing_signs_once_and_no_reference_to_it_survives(
    found: SigningExchange, keys: Keys
) -> None:
    grants = [await found.grant() for _ in range(4)]
    assert not keys.born, "none is made before it is needed"
    signed = [await found.sign(grant) for grant in grants]
    assert keys.uses == [["sign"]] * 4
    assert keys.alive() == 0
    assert len({one.public_key for one in signed}) == 4
    for one in signed:
        leaf = x509.load_der_x509_certificate(one.certificate_chain[0])
        leaf.public_key().verify(one.signature, CONTENT, ec.ECDSA(hashes.SHA256()))

    kept = keys.generate(ec.SECP256R1())
    assert keys.alive() == 1, "the watch sees what is kept"
    del kept


async def test_an_answer_that_is_fetched_again_makes_no_key(found: SigningExchange, keys: Keys) -> None:
    grant = await found.grant()
    first = await found.sign(grant)
    assert await found.sign(grant) == first
    with pytest.raises(Refused):
        await found.sign(grant, "j" * 20)
    assert keys.uses == [["sign"]]


async def test_a_key_whose_signature_is_refused_signs_nothing(found: SigningExchange, keys: Keys) -> None:
    grant = await found.grant()
    for options in ({"provenance": []}, {"statement": b"{}"}):
        with pytest.raises(Refused):
            await found.sign(grant, **options)
    assert keys.uses == []
    assert keys.alive() == 0


async def test_of_two_that_ask_at_once_at_most_one_key_signs(found: SigningExchange, keys: Keys) -> None:
    """Invariant 7: the one that lost the race may have been made; it never signed, and it is gone as well."""
    grant = await found.grant()
    asking = [asyncio.ensure_future(found.sign(grant, f"{number:020}")) for number in range(20)]
    done = await asyncio.gather(*asking, return_exceptions=True)
    assert [one.reason for one in done if isinstance(one, BrokerError)] == [Reason.ALREADY_USED] * 19
    del done, asking
    assert [use for uses in keys.uses for use in uses] == ["sign"]
    await until(lambda: not keys.alive(), "the event loop has let go of those that lost")


async def test_a_key_whose_signature_gets_no_timestamp_is_gone_like_any_other(
    tmp_path: Path, authority: Stamping, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        TimestampAuthority(authority.url, [authority.tsa.root]) as stamps,
        signing_exchange(tmp_path, timestamps=stamps) as found,
    ):
        grants, keys = [await found.grant() for _ in range(2)], Keys()
        monkeypatch.setattr(ec, "generate_private_key", keys.generate)
        with authority.answering(http_status=500):
            with pytest.raises(Unavailable) as error:
                await found.sign(grants[0])
            assert error.value.reason is Reason.TIMESTAMP_UNAVAILABLE
        del error
        assert (await found.sign(grants[1])).timestamp
        assert keys.uses == [["sign"]] * 2
        assert keys.alive() == 0


async def test_a_key_of_a_caller_that_went_away_is_gone_when_its_signature_is_made(
    tmp_path: Path, authority: Stamping, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        TimestampAuthority(authority.url, [authority.tsa.root]) as stamps,
        signing_exchange(tmp_path, timestamps=stamps) as found,
    ):
        grant, keys, asked = await found.grant(), Keys(), authority.asked
        monkeypatch.setattr(ec, "generate_private_key", keys.generate)
        with authority.holding():
            asking = asyncio.ensure_future(found.sign(grant))
            await authority.waits(asked + 1)
            asking.cancel()
            await asyncio.wait((asking,))
        await found.signing.close()
        del asking
        assert keys.uses == [["sign"]]
        assert keys.alive() == 0
        assert (await found.sign(grant)).timestamp, "its signature waits for it"


@dataclass
class Exchanged:
    """A signer whose key was exchanged for another behind its back."""

    right: FileSigner
    wrong: FileSigner
    name: str = "issuing-1"

    @property
    def algorithm(self) -> Algorithm:
        return self.right.algorithm

    @property
    def public_key(self) -> PublicKey:
        return self.right.public_key

    async def sign_digest(self, digest: bytes) -> bytes:
        return await self.wrong.sign_digest(digest)

    async def sign_message(self, message: bytes) -> bytes:
        return await self.wrong.sign_message(message)


async def test_a_ca_whose_key_is_another_lets_no_signature_out(
    found: SigningExchange, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was signed before that leaves with its key."""
    grant, keys = await found.grant(), Keys()
    right = found.signing._means.ca()
    another = FileSigner.from_key(ec.generate_private_key(ec.SECP256R1()), "another")
    broken = Authority(right.name, right.chain, right.issuing, Exchanged(right._signer, another))
    found.signing = Signing(found.parts.exchange, replace(found.signing._means, authority=lambda: broken))
    monkeypatch.setattr(ec, "generate_private_key", keys.generate)
    with pytest.raises(Unavailable) as error:
        await found.sign(grant)
    assert error.value.reason is Reason.SIGNER_UNAVAILABLE
    del error
    assert keys.uses == [["sign"]]
    await until(lambda: not keys.alive(), "the event loop has let go of it")
    with pytest.raises(Refused):
        await found.sign(grant)


ARTIFACT = digests(CONTENT)


def asked(signer: str = KEYLESS, *artifacts: dict[str, str]) -> SigningRequest:
    return SigningRequest(artifacts=artifacts or (ARTIFACT,), purpose="release", signer=signer)


async def test_what_cannot_be_signed_as_asked_is_refused_before_anything_is_spent() -> None:
    p384 = FileSigner.from_key(ec.generate_private_key(ec.SECP384R1()), "p384")
    means = Means(issuer="https://broker.acme.test", keys={"p384": NamedKey.of(p384)})
    brief = {"sha256": ARTIFACT["sha256"]}
    wrong: list[tuple[SigningRequest, type[BrokerError]]] = [
        (asked(AGENT_KEY), Refused),
        (asked(KEYLESS, ARTIFACT, digests(b"another")), Invalid),
        (asked("key:p384", brief), Invalid),
        (asked("key:unheard"), Unavailable),
    ]
    for signing, kind in wrong:
        with pytest.raises(kind):
            await Signature(means, b"").check(signing)
    for signing in (asked(), asked(KEYLESS, brief), asked("key:p384")):
        await Signature(means, b"").check(signing)


def test_no_grant_is_given_for_what_could_not_be_signed() -> None:
    means = Means(issuer="https://broker.acme.test")
    for signer in (KEYLESS, AGENT_KEY, "key:release"):
        with pytest.raises(Unavailable) as error:
            means.require(asked(signer), NOW)
        assert error.value.reason is Reason.SIGNER_UNAVAILABLE
    release = FileSigner.from_key(ec.generate_private_key(ec.SECP256R1()), "release")
    named = Means(issuer="https://broker.acme.test", keys={"release": NamedKey.of(release)})
    named.require(asked("key:release"), NOW)
