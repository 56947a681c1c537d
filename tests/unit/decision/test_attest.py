"""Gathering facts: only what a policy needs, at once, and a no whenever one could not be had."""

import asyncio
from datetime import timedelta

import pytest
from support.releases import PERMIT, policy

from attestors.contract import (
    AttestationFailed,
    AttestationRequest,
    AttestationUnavailable,
    FactKey,
    Facts,
)
from broker.decision.attest import Attestation
from broker.errors import Reason, Refused, Unavailable

NEEDS_BOTH = 'permit (principal, action == Action::"orders.refund", resource) when { context has process };'


class Scripted:
    """An attestor that does what the test says and notes that it was asked."""

    def __init__(self, name, answer):
        self.name = name
        self.answer = answer
        self.asked = 0

    async def attest(self, request, now):
        self.asked += 1
        answer = self.answer(request, now)
        return await answer if asyncio.iscoroutine(answer) else answer

    def watch(self):
        raise AssertionError("gathering facts watches nothing")


def saying(name, values=None, *, expires_at=None, claims=None):
    return Scripted(
        name,
        lambda _request, now: Facts(
            attestor=claims or name, key=FactKey(name), values=values or {}, attested_at=now, expires_at=expires_at
        ),
    )


def raising(name, error):
    def answer(_request, _now):
        raise error

    return Scripted(name, answer)


class Gathering:
    def __init__(self, world):
        self.world = world
        self.part = world.policy(NEEDS_BOTH).slice("orders.refund")

    async def __call__(self, *attestors, known=None, deadline_s=5.0):
        attestation = Attestation({one.name: one for one in attestors}, deadline_s)
        request = AttestationRequest(principal=str(self.world.agent), known=known or {})
        return await attestation.gather(self.part, request, self.world.now)


@pytest.fixture
def gather(world):
    return Gathering(world)


async def test_facts_come_by_the_attestors_name(gather):
    found = await gather(saying("spire", {"ids": []}), saying("process", {"uid": 1}))
    assert {name: facts.values for name, facts in found.items()} == {"spire": {"ids": []}, "process": {"uid": 1}}


async def test_an_attestor_that_no_policy_needs_does_not_run(gather):
    idle = raising("ticket", AssertionError("asked although nothing needs it"))
    assert await gather(saying("spire"), saying("process"), idle)
    assert idle.asked == 0


async def test_an_attestor_with_nothing_to_say_is_left_out(gather):
    found = await gather(saying("spire"), Scripted("process", lambda *_: None))
    assert set(found) == {"spire"}


async def test_attestors_run_side_by_side(gather):
    meeting = asyncio.Barrier(2)

    def meet(name):
        async def answer(now):
            await meeting.wait()  # one after the other, the first would wait for ever
            return Facts(attestor=name, key=FactKey(name), values={}, attested_at=now)

        return Scripted(name, lambda _request, now: answer(now))

    assert set(await gather(meet("spire"), meet("process"))) == {"spire", "process"}


async def test_facts_from_identification_are_not_looked_for_again(gather, world):
    attestor = raising("process", AssertionError("asked although it is known"))
    found = await gather(saying("spire"), attestor, known=world.process)
    assert found["process"] == world.process["process"]
    assert attestor.asked == 0


async def test_evidence_that_is_wrong_refuses(gather):
    with pytest.raises(Refused) as caught:
        await gather(saying("spire"), raising("process", AttestationFailed("another executable")))
    assert caught.value.reason is Reason.NOT_ATTESTED
    assert caught.value.detail == "process: another executable"


@pytest.mark.parametrize(
    "error", [AttestationUnavailable("no socket"), OSError("gone"), KeyError("secret"), TimeoutError()]
)
async def test_invariant_6_whatever_else_goes_wrong_in_an_attestor_refuses(gather, error):
    with pytest.raises(Unavailable) as caught:
        await gather(saying("spire"), raising("process", error))
    assert caught.value.reason is Reason.ATTESTATION_UNAVAILABLE
    assert "secret" not in caught.value.detail


async def test_invariant_6_an_attestor_that_does_not_answer_in_time_refuses(gather):
    hanging = Scripted("process", lambda *_: asyncio.Event().wait())
    with pytest.raises(Unavailable) as caught:
        await gather(saying("spire"), hanging, deadline_s=0.01)
    assert caught.value.reason is Reason.ATTESTATION_UNAVAILABLE


async def test_invariant_6_an_attestor_that_a_policy_names_and_nobody_configured_refuses(gather):
    with pytest.raises(Unavailable) as caught:
        await gather(saying("spire"))
    assert "process attestor, which is not configured" in caught.value.detail


async def test_a_refusal_outweighs_what_could_not_be_looked_at(gather):
    with pytest.raises(Refused) as caught:
        await gather(raising("spire", OSError()), raising("process", AttestationFailed("no")))
    assert caught.value.reason is Reason.NOT_ATTESTED


@pytest.mark.parametrize("late", [timedelta(0), timedelta(seconds=1)])
async def test_facts_that_have_expired_are_refused(gather, world, late):
    with pytest.raises(Refused) as caught:
        await gather(saying("spire"), saying("process", expires_at=world.now - late))
    assert caught.value.reason is Reason.EXPIRED
    assert await gather(saying("spire"), saying("process", expires_at=world.now + timedelta(seconds=1)))


async def test_an_attestor_cannot_speak_for_another(gather):
    with pytest.raises(Unavailable):
        await gather(saying("spire"), saying("process", claims="spire"))


async def test_cancelling_the_request_ends_its_attestors(gather):
    begun, ended = asyncio.Event(), asyncio.Event()

    async def hang():
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    hanging = Scripted("process", lambda *_: hang())
    task = asyncio.create_task(gather(saying("spire"), hanging))
    async with asyncio.timeout(5):
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await ended.wait()


class TestProvenanceAndPeople:
    """Evidence about the artifacts has reasons of its own; what an issuer says of a person nobody looks for."""

    @pytest.fixture
    def signing(self, world):
        part = policy(f"{PERMIT} when {{ context has process && context has approval }};").slice("release.sign")

        async def gather(*attestors, known=None):
            request = AttestationRequest(principal="spiffe://acme.test/a", known=known or {})
            return await Attestation({one.name: one for one in attestors}, 5.0).gather(part, request, world.now)

        return gather

    async def test_provenance_that_is_wrong_is_rejected_as_provenance(self, signing):
        wrong = raising("provenance", AttestationFailed("signed by another builder"))
        with pytest.raises(Refused) as caught:
            await signing(wrong, saying("process"), saying("approval"))
        assert caught.value.reason is Reason.PROVENANCE_REJECTED
        assert set(await signing(saying("provenance"), saying("process"), saying("approval"))) == {
            "provenance",
            "process",
            "approval",
        }

    @pytest.mark.parametrize(
        ("old", "reason"), [("provenance", Reason.PROVENANCE_REJECTED), ("process", Reason.EXPIRED)]
    )
    async def test_provenance_that_is_too_old_is_rejected_as_provenance(self, signing, world, old, reason):
        names = {"provenance", "process", "approval"} - {old}
        with pytest.raises(Refused) as caught:
            await signing(saying(old, expires_at=world.now), *map(saying, names))
        assert caught.value.reason is reason

    async def test_provenance_that_could_not_be_looked_at_is_not_rejected(self, signing):
        away = raising("provenance", AttestationUnavailable("no trust file"))
        with pytest.raises(Unavailable):
            await signing(away, saying("process"), saying("approval"))

    async def test_what_is_known_of_a_person_is_taken_and_otherwise_left_out(self, world):
        person = 'permit (principal, action == Action::"broker.approve", resource) when { context has person };'
        part = world.policy(person).slice("broker.approve")
        known = world.facts(person={"groups": [], "email": ""})
        request = AttestationRequest(principal="https://login.acme.test/subject/YQ", known=known)
        assert await Attestation({}, 5.0).gather(part, request, world.now) == known
        nobody = AttestationRequest(principal="spiffe://acme.test/a")
        assert await Attestation({}, 5.0).gather(part, nobody, world.now) == {}


@pytest.mark.parametrize("name", ["parameters", "audience", "person", "other"])
def test_no_attestor_can_fill_the_callers_parameters_or_anothers_place(name):
    with pytest.raises(ValueError, match="cannot fill"):
        Attestation({name: saying("parameters" if name == "other" else name)}, 1.0)
    assert Attestation({"spire": saying("spire")}, 1.0).names == {"spire"}
