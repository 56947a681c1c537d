"""Redemption decides again: what changed since the grant refuses the signature, and the grant is spent for good.

A process that was replaced is in test_signing_spending.py, provenance that is not shown again in
test_signing_provenance.py.
"""

import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
from support.signing import (
    AGENT,
    ALICE,
    BOB,
    SigningBroker,
    example_policies,
    signing_broker,
)
from support.signing_calls import UNLIMITED, ask_sign, build_agent, nothing_signed, results, spent, told
from support.whole_broker import eventually

from broker.client import Client
from broker.client.signing import SigningGrant
from broker.credentials.dpop import ProofKey
from broker.errors import BrokerError, Reason
from broker.ledger.records import Redemption, Refusal

FORBID = '@id("freeze") forbid (principal, action == Action::"release.sign", resource);\n'


@pytest.fixture(scope="module")
def broker() -> Iterator[SigningBroker]:
    """Left as it was found."""
    with signing_broker(example_policies(), limits=UNLIMITED) as found:
        yield found


@dataclass
class Held:
    """A grant that could be spent now. digest: of the request that was approved."""

    broker: SigningBroker
    agent: Client
    grant: SigningGrant

    async def reason(self, idempotency_id: str | None = None) -> str:
        """Why there is no signature; empty where there is one."""
        try:
            await self.agent.signing.sign(self.grant, idempotency_id=idempotency_id)
        except BrokerError as error:
            return str(error.reason)
        return ""

    @property
    def digest(self) -> str:
        intent = self.broker.whole.intents()[self.grant.grant_id]
        assert intent.approval, "the grant used approvals up"
        return intent.approval


@asynccontextmanager
async def held(broker: SigningBroker, *approvers: str, environment: str = "staging") -> AsyncIterator[Held]:
    """One with these approvals."""
    async with broker.client() as agent:
        action, provenance = broker.action(environment=environment), (broker.builder.envelope(),)
        yield Held(broker, agent, await broker.granted(agent, action, provenance, *(approvers or (ALICE,))))


async def require_lost(found: Held, reason: Reason, mend: Callable[[], Awaitable[None]], stage: str = "sign") -> None:
    """Refused for its reason, recorded; and refused still after the reason is gone, under the same id or another."""
    broker = found.broker
    with nothing_signed(broker.whole):
        with pytest.raises(BrokerError) as error:
            await found.agent.signing.sign(found.grant, idempotency_id="i" * 20)
        assert error.value.reason is reason
        record = await broker.whole.recorded(error.value.correlation_id, Refusal)
        assert (record.reason, record.stage) == (reason, stage)
        redemption = await broker.whole.recorded(error.value.correlation_id, Redemption)
        assert (redemption.jti, redemption.by, redemption.result) == (found.grant.grant_id, AGENT, "refused")
        await mend()
        for idempotency_id in ("i" * 20, "j" * 20):
            assert await found.reason(idempotency_id) == Reason.ALREADY_USED
    async with held(broker) as control:
        assert await control.reason() == "", "a new grant is good, so nothing but the old one was lost"


async def test_what_did_not_change_signs(broker: SigningBroker) -> None:
    """The control of all that follows."""
    for environment, approvers in (("staging", (ALICE,)), ("production", (ALICE, BOB))):
        async with held(broker, *approvers, environment=environment) as found:
            signature = await found.agent.signing.sign(found.grant)
            assert results(broker.whole, signature.correlation_id) == ["issued"]
            assert spent(broker.whole, found.grant) == "used"


async def test_an_approval_that_was_withdrawn_signs_nothing(broker: SigningBroker) -> None:
    async with held(broker) as found:
        digest = found.digest
        assert await broker.tell(ALICE, f"withdraw {digest}") == "withdrawn"

        async def mend() -> None:
            for approver in (ALICE, BOB):
                assert await broker.tell(approver, f"approve {digest}") == Reason.ALREADY_USED

        await require_lost(found, Reason.APPROVAL_REQUIRED, mend)


async def test_one_of_two_approvals_that_was_withdrawn_signs_nothing(broker: SigningBroker) -> None:
    async with held(broker, ALICE, BOB, environment="production") as found:
        assert await broker.tell(BOB, f"withdraw {found.digest}") == "withdrawn"

        async def mend() -> None:
            assert await broker.tell(BOB, f"approve {found.digest}") == Reason.ALREADY_USED

        await require_lost(found, Reason.APPROVAL_REQUIRED, mend)


async def test_a_withdrawal_after_the_signature_takes_nothing_back_and_one_of_another_request_does_nothing(
    broker: SigningBroker,
) -> None:
    async with held(broker) as found, held(broker) as other:
        assert await broker.tell(ALICE, f"withdraw {other.digest}") == "withdrawn"
        first = await found.agent.signing.sign(found.grant, idempotency_id="i" * 20)
        assert await broker.tell(ALICE, f"withdraw {found.digest}") == "withdrawn"
        again = await found.agent.signing.sign(found.grant, idempotency_id="i" * 20)
        assert again.signature == first.signature


async def test_a_builder_that_is_trusted_no_more_signs_nothing(broker: SigningBroker) -> None:
    async with held(broker) as found:
        broker.builder.distrusted()
        await broker.reloaded()

        async def mend() -> None:
            broker.builder.trusted()
            await broker.reloaded()

        await require_lost(found, Reason.PROVENANCE_REJECTED, mend)


async def test_a_policy_that_forbids_it_since_signs_nothing(broker: SigningBroker) -> None:
    freeze = broker.whole.broker.folder / "policy" / "freeze.cedar"
    async with held(broker) as found:
        freeze.write_text(FORBID)
        await broker.reloaded()

        async def mend() -> None:
            freeze.unlink()
            await broker.reloaded()

        await require_lost(found, Reason.DENIED, mend)


async def test_a_permit_that_is_gone_signs_nothing(broker: SigningBroker) -> None:
    file = broker.whole.broker.folder / "policy" / "release.cedar"
    before = file.read_text()
    async with held(broker) as found:
        file.write_text(before.replace('@id("staging")', '@id("staging") @key("release")'))  # keyless no more
        await broker.reloaded()

        async def mend() -> None:
            file.write_text(before)
            await broker.reloaded()

        await require_lost(found, Reason.DENIED, mend)


async def test_a_policy_that_changed_without_refusing_it_takes_nothing(broker: SigningBroker) -> None:
    """What counts is the decision, not that it is the same document."""
    file = broker.whole.broker.folder / "policy" / "more.cedar"
    async with held(broker) as found:
        file.write_text('@id("weekend") forbid (principal, action == Action::"broker.operate", resource);\n')
        await broker.reloaded()
        try:
            assert await found.reason() == ""
        finally:
            file.unlink()
            await broker.reloaded()


async def test_a_workload_whose_entry_was_deleted_signs_nothing(broker: SigningBroker) -> None:
    """Also when it gets its entry back while the grant would still last: refused before it is known, it is spent."""
    whole = broker.whole
    async with held(broker) as found:
        whole.domain.delete(whole.entries.pop(AGENT))
        with nothing_signed(whole):
            assert await found.reason("i" * 20) == Reason.NOT_ATTESTED
            assert spent(whole, found.grant) == "refused"
            whole.entries[AGENT] = whole.domain.entry("build/agent", os.getpid())
            for idempotency_id in ("i" * 20, "j" * 20):
                await eventually(lambda name=idempotency_id: found.reason(name), Reason.ALREADY_USED)
    async with held(broker) as control:
        assert await control.reason() == ""


async def test_a_workload_that_became_more_than_it_was_signs_nothing(broker: SigningBroker) -> None:
    """What SPIRE says of the process is part of what was granted, another ID beside the caller's own too."""
    whole = broker.whole
    async with held(broker) as found:
        more = whole.domain.entry("build/deployer", os.getpid())

        async def mend() -> None:
            whole.domain.delete(more)

        await require_lost(found, Reason.EVIDENCE_MISMATCH, mend)


async def test_spire_that_cannot_be_asked_signs_nothing_and_spends_nothing(broker: SigningBroker) -> None:
    """Invariant 6: that nobody could look is a no, and no answer: the grant is as good as before."""
    async with held(broker) as found:
        broker.whole.domain.down()
        try:
            with nothing_signed(broker.whole):
                assert await found.reason() == Reason.ATTESTATION_UNAVAILABLE
        finally:
            broker.whole.domain.up()
        assert not spent(broker.whole, found.grant)
        await eventually(found.reason, "")
        assert spent(broker.whole, found.grant) == "used"


async def test_nobody_can_have_anothers_grant_spent_by_being_refused(broker: SigningBroker) -> None:
    """Who is refused before it is known spends what was given to it, and nothing that it only knows of."""
    whole = broker.whole
    envelope = whole.broker.folder / "envelope.json"
    async with held(broker) as found:
        envelope.write_bytes(found.grant.provenance[0])
        for paths in ((), ("build/somebody",)):
            with build_agent(broker, ProofKey(), *paths) as stranger:
                assert await stranger.line() == "ready"
                said = await told(stranger, "sign", found.grant.grant, envelope, "i" * 20)
                assert said == Reason.NOT_ATTESTED
        async with whole.mtls(whole.domain.svid("build/agent", of="other.test")) as outsider:
            assert (await ask_sign(outsider, found.grant.grant)).reason == Reason.UNAUTHENTICATED
        assert not spent(whole, found.grant)
        assert await found.reason() == ""
