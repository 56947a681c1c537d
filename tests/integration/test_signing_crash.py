"""Signing across a broker's end: restarted, killed, put back from a backup, with a ledger that cannot be written."""

import asyncio
import random
import shutil
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field

import grpc
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import CertificateSigningRequestBuilder, Name
from cryptography.x509.oid import AttributeOID
from support.processes import until
from support.signing import OWN_KEY_AGENT, SigningBroker, signing_broker
from support.signing_calls import (
    NIGHTLY,
    UNLIMITED,
    acts,
    ask_certificate,
    ask_grant,
    ask_sign,
    claims_of,
    get_grant,
    nothing_signed,
    results,
    spent,
)
from support.signing_parts import timestamps
from support.stamping import Stamping, stamping
from support.whole_broker import Said, Wire, eventually, serving

from broker.cli.config import load
from broker.credentials.dpop import ProofKey
from broker.errors import Reason
from broker.ledger.checkpoint import Checkpointer
from broker.ledger.records import EpochStarted, Intent, Outcome, Redemption
from broker.ledger.verify import verify


@dataclass
class Setting:
    """A broker that can be ended and started again, and the authority that holds its signatures up."""

    broker: SigningBroker
    authority: Stamping
    key: ProofKey = field(default_factory=ProofKey)

    @asynccontextmanager
    async def wire(self) -> AsyncIterator[Wire]:
        """A new connection of the same caller."""
        async with self.broker.whole.wire() as wire:
            wire.key = self.key
            yield wire

    async def grant(self) -> "Grant":
        envelope = self.broker.builder.envelope()
        async with self.wire() as wire:
            return Grant(self, (await get_grant(wire, self.broker.nightly(), [envelope])).grant, envelope)

    @contextmanager
    def started_again(self) -> Iterator[None]:
        """With the same configuration and state, while the block lasts."""
        whole = self.broker.whole
        with serving(whole.broker.folder / "broker.toml", whole.domain) as whole.broker:
            yield

    def require_good_ledger(self) -> None:
        config = load(self.broker.whole.broker.folder / "broker.toml")
        key = Checkpointer(config.checkpoint_key_file, config.checkpoint_file, config.ledger_name).verifier_key
        report = verify(self.broker.whole.broker.ledger, config.checkpoint_file, str(key))
        assert report.good, report.finding


@dataclass
class Grant:
    """One of this caller's."""

    setting: Setting
    text: str
    envelope: bytes

    async def sign(self, idempotency_id: str = "i" * 20) -> Said:
        async with self.setting.wire() as wire:
            return await ask_sign(wire, self.text, [self.envelope], idempotency_id=idempotency_id)

    def signatures(self) -> list[Intent]:
        """Every one that was ever begun with it."""
        return [one for one in acts(self.setting.broker.whole) if one.parent == claims_of(self.text).jti]


@pytest.fixture
def setting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    """One for each test."""
    with stamping() as authority:
        tables = timestamps(tmp_path_factory.mktemp("tsa"), authority.url, authority.tsa.pem)
        with signing_broker(NIGHTLY, limits=UNLIMITED, **tables) as broker:
            yield Setting(broker, authority)


async def test_grants_and_signatures_outlast_a_restart(setting: Setting) -> None:
    """The control of the others: stopped in good order, all is as it was."""
    signed, unused, refused = [await setting.grant() for _ in range(3)]
    first = await signed.sign()
    assert first.code is grpc.StatusCode.OK
    refused.envelope = setting.broker.builder.envelope(predicateType="https://acme.test/none")
    assert (await refused.sign()).reason == Reason.PROVENANCE_REJECTED
    assert setting.broker.whole.broker.stop() == 0
    with setting.started_again():
        again = await signed.sign()
        assert again.message.signature == first.message.signature
        assert again.message.bundle == first.message.bundle
        assert (await signed.sign("j" * 20)).reason == Reason.ALREADY_USED
        assert (await refused.sign()).reason == Reason.ALREADY_USED
        assert (await unused.sign()).code is grpc.StatusCode.OK
    setting.require_good_ledger()


async def test_a_broker_killed_between_spending_and_answering_signs_no_second_time(setting: Setting) -> None:
    """Invariants 1 and 7: what was spent stays spent, though nobody ever got the signature."""
    grant, other = await setting.grant(), await setting.grant()
    with setting.authority.holding():
        asking = asyncio.ensure_future(grant.sign())
        await setting.authority.waits(1)
        assert spent(setting.broker.whole, grant.text) == "used"
        setting.broker.whole.broker.kill()
    assert (await asking).code is grpc.StatusCode.UNAVAILABLE
    (begun,) = grant.signatures()
    with setting.started_again():
        with nothing_signed(setting.broker.whole):
            for idempotency_id in ("i" * 20, "j" * 20):
                assert (await grant.sign(idempotency_id)).reason == Reason.ALREADY_USED
        assert (await other.sign()).code is grpc.StatusCode.OK, "a grant that was not spent is good"
        assert (await (await setting.grant()).sign()).code is grpc.StatusCode.OK
        assert results(setting.broker.whole, begun.correlation_id) == [], "nobody said what became of it"
        outcomes = [one.result for one in setting.broker.whole.records() if isinstance(one, Outcome)]
        assert outcomes.count("unknown") == 1
    setting.require_good_ledger()


async def test_killed_again_and_again_it_signs_nothing_twice_and_nothing_unrecorded(setting: Setting) -> None:
    """Invariants 1 and 7: whatever the moment; who asks again with its id gets the one signature, or none ever."""
    moment, got = random.Random(4), Counter[tuple[str, bytes]]()  # noqa: S311 - moments, not secrets
    grants: list[Grant] = []

    async def work() -> None:
        with suppress(AssertionError):  # the broker is gone
            while True:
                grant = await setting.grant()
                grants.append(grant)
                for _ in range(2):
                    said = await grant.sign()
                    if said.message is not None:
                        got[grant.text, said.message.signature] += 1

    for _ in range(4):
        with ExitStack() as stack:
            if setting.broker.whole.broker.process.poll() is not None:
                stack.enter_context(setting.started_again())
            working = [asyncio.ensure_future(work()) for _ in range(4)]
            before = len(got)
            await until(lambda count=before: len(got) > count, "some are signed")
            # Not a wait for anything: the moment itself is to be random.
            await asyncio.sleep(moment.random() * 0.3)
            setting.broker.whole.broker.kill()
            await asyncio.wait(working)
    with setting.started_again():
        for grant in grants[-8:]:
            said = await grant.sign()
            if said.message is not None:
                got[grant.text, said.message.signature] += 1
            else:
                assert said.reason == Reason.ALREADY_USED
        begun = Counter(one.parent for one in acts(setting.broker.whole))
    assert set(begun.values()) == {1}, "no grant was ever spent on two"
    signed = Counter(grant for grant, _ in got)
    assert set(signed.values()) == {1}, "nobody got two for one grant"
    assert {claims_of(grant).jti for grant in signed} <= begun.keys(), "nothing was signed without its intent"
    used = Counter(one.jti for one in setting.broker.whole.records() if isinstance(one, Redemption))
    assert used == begun
    setting.require_good_ledger()


async def test_no_grant_counts_after_its_ledger_was_put_back(setting: Setting) -> None:
    """Invariant 7: a restored store starts a new epoch, in which no earlier grant counts, nor its stored signature."""
    whole = setting.broker.whole
    unused, later = await setting.grant(), await setting.grant()
    signed = await setting.grant()
    assert (await signed.sign()).code is grpc.StatusCode.OK
    whole.broker.stop()
    backup = whole.broker.folder / "backup"
    shutil.copytree(whole.broker.folder / "state", backup)
    with setting.started_again():
        assert (await later.sign()).code is grpc.StatusCode.OK, "a plain restart"
    for file in backup.glob("ledger*"):  # the checkpoint is elsewhere, as it should be
        shutil.copy(file, whole.broker.folder / "state" / file.name)
    with setting.started_again():
        with nothing_signed(whole):
            for grant in (unused, later, signed):
                assert (await grant.sign()).reason in {Reason.REVOKED, Reason.UNAUTHENTICATED}
        assert (await (await setting.grant()).sign()).code is grpc.StatusCode.OK
        assert [one.epoch for one in whole.records() if isinstance(one, EpochStarted)] == [1, 2]


def csr(nonce: str) -> bytes:
    builder = CertificateSigningRequestBuilder().subject_name(Name([]))
    made = builder.add_attribute(AttributeOID.CHALLENGE_PASSWORD, nonce.encode())
    return made.sign(ec.generate_private_key(ec.SECP256R1()), hashes.SHA256()).public_bytes(Encoding.DER)


async def test_nothing_is_granted_signed_or_certified_that_the_ledger_did_not_take_first(setting: Setting) -> None:
    """Invariant 1: for grants, signatures and certificates; and what could not be recorded was not spent either."""
    broker, whole = setting.broker, setting.broker.whole
    grant = await setting.grant()
    async with setting.wire() as wire:
        action, envelope = broker.nightly(signer="agent-key"), [broker.builder.envelope()]
        own = await get_grant(wire, action, envelope, spiffe_id=OWN_KEY_AGENT)

        async def certify() -> Said:
            return await ask_certificate(wire, own.grant, csr(own.csr_nonce), envelope, spiffe_id=OWN_KEY_AGENT)

        before = whole.intents().keys()
        whole.limit_files(1)
        try:
            said = [await grant.sign(), await certify(), await ask_grant(wire, broker.nightly(), envelope)]
        finally:
            whole.limit_files(-1)
        assert [one.reason for one in said] == [Reason.LEDGER_UNAVAILABLE] * 3
        assert [one.message for one in said] == [None] * 3
        assert whole.intents().keys() == before

        async def signs() -> str:
            return (await grant.sign()).reason

        await eventually(signs, "")
        assert (await certify()).code is grpc.StatusCode.OK, "it recovers by itself"
    made = Counter(one.credential for one in acts(whole))
    assert made == {"signature": 1, "signing_certificate": 1}


async def test_a_signature_whose_answer_cannot_be_stored_does_not_leave(setting: Setting) -> None:
    """Invariants 1 and 7: it could be asked for again, and would have to be made again."""
    whole, grant = setting.broker.whole, await setting.grant()
    with setting.authority.holding():
        asking = asyncio.ensure_future(grant.sign())
        await setting.authority.waits(1)
        whole.limit_files(1)
    try:
        said = await asking
    finally:
        whole.limit_files(-1)
    assert (said.reason, said.message) == (Reason.LEDGER_UNAVAILABLE, None)

    async def grants() -> str:
        async with setting.wire() as wire:
            return (await ask_grant(wire, setting.broker.nightly(), [grant.envelope])).reason

    await eventually(grants, "")
    with nothing_signed(whole):
        for idempotency_id in ("i" * 20, "j" * 20):
            assert (await grant.sign(idempotency_id)).reason == Reason.ALREADY_USED
    (begun,) = grant.signatures()
    assert results(whole, begun.correlation_id) == [], "nobody can say that it was issued"
