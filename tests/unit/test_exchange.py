"""The flow as code: each way out is in the ledger, and nothing is minted on the way that should not be."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from support.exchanging import CORRELATION, OWN_PID, Exchanging, act, exchanging, steps
from support.whole_broker import AGENT, BROKER, ISSUER, OPERATOR, POLICY

from attestors.contract import AttestationRequest, FactKey, Facts
from broker.credentials.dpop import ProofKey
from broker.decision.attest import Attestation
from broker.decision.quota import Quota
from broker.errors import BrokerError, Invalid, Reason, Refused, Unavailable
from broker.exchange import KeyProof
from broker.identity.peer import read_process
from broker.ledger.records import CountedRefusals, Intent, Outcome, Record, Refusal
from broker.operate import Operators, Question

URL = f"{ISSUER}/oauth2/token"


def counted(records: list[Record]) -> dict[str, int]:
    """Refusals that were counted, by reason."""
    found: dict[str, int] = {}
    for record in records:
        if isinstance(record, CountedRefusals):
            for reason, count in record.counts.items():
                found[reason] = found.get(reason, 0) + count
    return found


def proof(key: ProofKey, now: datetime, nonce: str | None, *, url: str = URL) -> KeyProof:
    return KeyProof(proof=key.prove("POST", url, now, nonce=nonce), method="POST", url=URL, binding="test")


class Peer:
    """A process on the Unix socket that stays what it is."""

    process = read_process(OWN_PID)

    def unchanged(self) -> None:
        return


async def test_a_token_has_its_intent_and_its_outcome_and_a_refusal_its_record(tmp_path: Path) -> None:
    async with exchanging(tmp_path) as found:
        issued = await found.token(act())
        with pytest.raises(Refused):
            await found.token(act("orders.closed"))
        assert issued.token not in repr(issued)
        records = await found.records()
    (intent,) = [one for one in records if isinstance(one, Intent)]
    (outcome,) = [one for one in records if isinstance(one, Outcome)]
    (refusal,) = [one for one in records if isinstance(one, Refusal)]
    assert (intent.jti, outcome.result) == (issued.claims.jti, "issued")
    assert records.index(intent) + 1 == outcome.intent
    assert (refusal.reason, refusal.action, refusal.stage) == (Reason.DENIED, "orders.closed", "request")


async def test_a_request_that_is_cancelled_anywhere_leaves_no_intent_open(tmp_path: Path) -> None:
    async with exchanging(tmp_path) as found:
        ends: list[bool] = []
        for count in (*range(12), None):
            asking = asyncio.create_task(found.token(act()))
            await (asyncio.wait((asking,)) if count is None else steps(count))
            asking.cancel()
            await asyncio.wait((asking,))
            ends.append(asking.cancelled())
        assert set(ends) == {True, False}, "some were cut off, one was not"
        records = await found.records()
    intents = [seq for seq, one in enumerate(records, 1) if isinstance(one, Intent)]
    outcomes = {one.intent: one.result for one in records if isinstance(one, Outcome)}
    assert sorted(outcomes) == intents
    assert list(outcomes.values()).count("issued") == ends.count(False)
    assert "failed" in outcomes.values(), "an intent became durable after its caller had gone"


async def test_what_asks_for_nothing_readable_is_recorded_too(tmp_path: Path) -> None:
    async with exchanging(tmp_path) as found:

        def unreadable() -> None:
            raise Invalid("no action at all")

        with pytest.raises(Invalid):
            await found.exchange.request(found.caller(), unreadable, found.now(), CORRELATION)
        (refusal,) = [one for one in await found.records() if isinstance(one, Refusal)]
    assert (refusal.reason, refusal.principal, refusal.action) == (Reason.MALFORMED, AGENT, "")


class Meddler:
    """An attestor during whose look something else happens."""

    name = "process"

    def __init__(self) -> None:
        self.meanwhile: list[Callable[[], object]] = []
        self.looks = 0

    async def attest(self, _: AttestationRequest, now: datetime) -> Facts | None:
        self.looks += 1
        for one in self.meanwhile:
            done = one()
            if asyncio.iscoroutine(done):
                await done
        values = {"uid": 1, "gid": 1, "exe": "/x", "exe_sha256": "", "cgroup": "/"}
        return Facts(attestor="process", key=FactKey("process:1"), values=values, attested_at=now)

    async def watch(self) -> AsyncIterator[FactKey]:
        yield FactKey("never")


async def test_a_policy_that_changes_while_facts_are_gathered_decides_on_its_own_facts(tmp_path: Path) -> None:
    meddler = Meddler()
    async with exchanging(tmp_path, attestors={"process": meddler}) as found:
        found.exchange.attestation = Attestation({"process": meddler, "spire": Spire(found)}, 2.0)
        caller = found.caller(pid=OWN_PID)
        assert await found.token(act("orders.attested"), caller)
        assert meddler.looks == 1

        async def forbid() -> None:
            meddler.meanwhile.clear()
            found.write_policy(
                f'{POLICY}\n@id("no") forbid (principal, action, resource) unless {{ principal == resource }};'
            )
            await found.exchange.policies.reload()

        meddler.meanwhile.append(forbid)
        with pytest.raises(Refused) as refused:
            await found.token(act("orders.attested"), caller)
        assert refused.value.reason is Reason.DENIED
        assert meddler.looks == 3, "it looked again for the new policy"


class Spire:
    """SPIRE's word as an attestor."""

    name = "spire"

    def __init__(self, found: Exchanging) -> None:
        self._found = found

    async def attest(self, request: AttestationRequest, now: datetime) -> Facts | None:
        assert request.process is not None
        return await self._found.entitlements(request.process, now)

    async def watch(self) -> AsyncIterator[FactKey]:
        yield FactKey("never")


async def test_without_an_identity_of_our_own_nobody_is_identified(tmp_path: Path) -> None:
    async with exchanging(tmp_path) as found:
        exchange, key = found.exchange, ProofKey()
        chain = found.authority.svid(AGENT).chain
        no_proof = KeyProof(proof=None, method="POST", url=URL, binding="test")
        assert exchange.identify_certificate(chain, no_proof, found.now(), CORRELATION)
        own = found.trust.own
        assert own is not None
        for trust in (replace(found.trust, own=None), replace(found.trust, own=replace(own, not_after=found.now()))):
            found.trust = trust
            now = found.now()
            with pytest.raises(Unavailable) as away:
                exchange.identify_certificate(chain, no_proof, now, CORRELATION)
            assert away.value.reason is Reason.IDENTITY_UNAVAILABLE
            with pytest.raises(Unavailable):
                await exchange.identify_process(Peer(), proof(key, now, None), "", now, CORRELATION)
            with pytest.raises(Unavailable):
                await exchange.identify_assertion(
                    found.signer.token(now=now, aud=[ISSUER]), proof(key, now, None), now, CORRELATION
                )
        assert counted(await found.records()) == {Reason.IDENTITY_UNAVAILABLE: 6}


async def test_a_process_is_known_by_spires_word_and_its_key(tmp_path: Path) -> None:
    async with exchanging(tmp_path) as found:
        exchange, key = found.exchange, ProofKey()

        async def identify(*, wanted: str = "", nonce: str | None = None, url: str = URL) -> str:
            now = found.now()
            shown = proof(key, now, nonce or exchange.nonces.issue("test", now), url=url)
            return str((await exchange.identify_process(Peer(), shown, wanted, now, CORRELATION)).identity.spiffe_id)

        assert await identify() == AGENT
        found.ids = [AGENT, BROKER]
        assert await identify(wanted=BROKER) == BROKER
        refusals: list[tuple[Reason, dict[str, str]]] = [
            (Reason.NOT_ATTESTED, {}),
            (Reason.NOT_ATTESTED, {"wanted": "spiffe://acme.test/somebody/else"}),
            (Reason.NONCE_REQUIRED, {"wanted": AGENT, "nonce": "A" * 43}),
            (Reason.INVALID_PROOF, {"wanted": AGENT, "url": f"{ISSUER}/elsewhere"}),
        ]
        for reason, how in refusals:
            with pytest.raises(Refused) as refused:
                await identify(**how)
            assert refused.value.reason is reason
        found.ids = Unavailable(Reason.ATTESTATION_UNAVAILABLE, "SPIRE is away")
        with pytest.raises(Unavailable):
            await identify()
        records = await found.records()
    assert counted(records) == {
        Reason.NOT_ATTESTED: 2,
        Reason.NONCE_REQUIRED: 1,
        Reason.ATTESTATION_UNAVAILABLE: 1,
    }
    (refusal,) = [one for one in records if isinstance(one, Refusal)]
    assert (refusal.reason, refusal.principal, refusal.stage) == (Reason.INVALID_PROOF, AGENT, "identify")


async def test_an_assertion_keeps_its_first_key_and_the_second_is_written_down(tmp_path: Path) -> None:
    async with exchanging(tmp_path) as found:
        exchange, first, second = found.exchange, ProofKey(), ProofKey()
        now = found.now()
        assertion = found.signer.token(now=now, aud=[ISSUER])
        nonces = [exchange.nonces.issue("test", now) for _ in range(3)]
        for nonce in nonces[:2]:
            caller = await exchange.identify_assertion(assertion, proof(first, now, nonce), now, CORRELATION)
            assert caller.confirmation.jkt == first.jkt
        with pytest.raises(Refused) as refused:
            await exchange.identify_assertion(assertion, proof(second, now, nonces[2]), now, CORRELATION)
        assert refused.value.reason is Reason.KEY_MISMATCH
        (refusal,) = [one for one in await found.records() if isinstance(one, Refusal)]
    assert (refusal.reason, refusal.stage) == (Reason.KEY_MISMATCH, "identify")


async def test_an_assertion_of_an_earlier_epoch_is_refused_and_written_down(tmp_path: Path) -> None:
    """Its first key may have been forgotten with the records that are gone."""
    async with exchanging(tmp_path) as found:
        assert found.exchange.ledger.epoch == 1
    (tmp_path / "checkpoint").unlink()
    async with exchanging(tmp_path) as found:
        exchange, key = found.exchange, ProofKey()
        assert exchange.ledger.epoch == 2
        earlier, now = found.now() - timedelta(seconds=30), found.now()
        nonces = [exchange.nonces.issue("test", now) for _ in range(2)]
        with pytest.raises(Refused) as refused:
            await exchange.identify_assertion(
                found.signer.token(now=earlier, aud=[ISSUER]), proof(key, now, nonces[0]), now, CORRELATION
            )
        assert refused.value.reason is Reason.EXPIRED
        later = now + timedelta(seconds=1)
        fresh = found.signer.token(now=later, aud=[ISSUER])
        assert await exchange.identify_assertion(fresh, proof(key, later, nonces[1]), later, CORRELATION)
        refusals = [one for one in await found.records() if isinstance(one, Refusal)]
    assert [(one.reason, one.principal) for one in refusals] == [(Reason.EXPIRED, AGENT)]


async def test_over_its_quota_a_caller_is_counted_and_not_written_down(tmp_path: Path) -> None:
    async with exchanging(tmp_path, burst=3) as found:
        exchange = found.exchange
        no_proof = KeyProof(proof=None, method="POST", url=URL, binding="test")

        def identify(spiffe_id: str) -> object:
            chain = found.authority.svid(spiffe_id).chain
            return exchange.identify_certificate(chain, no_proof, found.now(), CORRELATION)

        for _ in range(3):
            identify(AGENT)
        for _ in range(5):
            with pytest.raises(Refused) as refused:
                identify(AGENT)
            assert refused.value.reason is Reason.QUOTA
            assert refused.value.retry_after_ms
        caller = identify(BROKER)
        with pytest.raises(Refused):
            exchange.admit_more(caller, 3)
        records = await found.records()
    assert counted(records) == {Reason.QUOTA: 6}
    assert not [one for one in records if isinstance(one, Refusal)]


async def test_a_closed_ledger_mints_nothing(tmp_path: Path) -> None:
    async with exchanging(tmp_path) as found:
        assert await found.token(act())
        await found.exchange.ledger.close()
        with pytest.raises(BrokerError) as refused:
            await found.token(act())
        assert refused.value.reason is Reason.LEDGER_UNAVAILABLE


async def test_one_user_has_spire_asked_so_often_whatever_its_processes_are(tmp_path: Path) -> None:
    async with exchanging(tmp_path) as found:
        exchange, key, asked = found.exchange, ProofKey(), []
        exchange.attestations = Quota(0.001, 3, 10)
        found.asked.append(lambda: asked.append(1))
        found.ids = []
        reasons = []
        for _ in range(5):
            now = found.now()
            with pytest.raises(Refused) as refused:
                await exchange.identify_process(Peer(), proof(key, now, None), "", now, CORRELATION)
            reasons.append(refused.value.reason)
        records = await found.records()
    assert reasons == [Reason.NOT_ATTESTED] * 3 + [Reason.QUOTA] * 2
    assert len(asked) == 3
    assert counted(records) == {Reason.NOT_ATTESTED: 3, Reason.QUOTA: 2}


async def test_so_many_refusals_of_one_caller_are_written_and_the_others_counted(tmp_path: Path) -> None:
    async with exchanging(tmp_path) as found:
        found.exchange.written = Quota(0.001, 60, 10)
        for caller, count in ((found.caller(), 100), (found.caller(BROKER), 1)):
            for _ in range(count):
                with pytest.raises(Refused):
                    await found.token(act("orders.closed"), caller)
        records = await found.records()
    principals = [one.principal for one in records if isinstance(one, Refusal)]
    assert (principals.count(AGENT), principals.count(BROKER)) == (60, 1)
    assert counted(records) == {Reason.DENIED: 40}


async def test_a_decision_that_takes_too_long_is_written_down_as_what_it_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("broker.in_time.REQUEST_TIMEOUT_S", 0.05)
    meddler = Meddler()
    async with exchanging(tmp_path, attestors={"process": meddler}) as found:
        found.exchange.attestation = Attestation({"process": meddler, "spire": Spire(found)}, 2.0)
        caller = found.caller(pid=OWN_PID)
        assert await found.token(act("orders.attested"), caller)
        meddler.meanwhile.append(asyncio.Event().wait)
        with pytest.raises(Unavailable) as late:
            await found.token(act("orders.attested"), caller)
        assert late.value.reason is Reason.ATTESTATION_UNAVAILABLE
        records = await found.records()
    (refusal,) = [one for one in records if isinstance(one, Refusal)]
    assert (refusal.reason, refusal.detail, refusal.action) == (
        Reason.ATTESTATION_UNAVAILABLE,
        "out of time",
        "orders.attested",
    )


async def test_recording_that_takes_too_long_is_written_down_and_its_intent_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("broker.in_time.REQUEST_TIMEOUT_S", 0.0)
    async with exchanging(tmp_path) as found:
        with pytest.raises(Unavailable) as late:
            await found.token(act())
        assert late.value.reason is Reason.LEDGER_UNAVAILABLE
        monkeypatch.undo()
        assert await found.token(act())
        records = await found.records()
    (refusal,) = [one for one in records if isinstance(one, Refusal)]
    assert (refusal.reason, refusal.stage) == (Reason.LEDGER_UNAVAILABLE, "request")
    outcomes = {one.intent: one.result for one in records if isinstance(one, Outcome)}
    assert sorted(outcomes) == [seq for seq, one in enumerate(records, 1) if isinstance(one, Intent)]
    assert sorted(outcomes.values()) == ["failed", "issued"]


async def test_a_callers_identification_that_takes_too_long_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("broker.in_time.REQUEST_TIMEOUT_S", 0.05)
    async with exchanging(tmp_path) as found:

        async def never(*_: object) -> Facts:
            await asyncio.Event().wait()
            raise AssertionError

        found.exchange.entitlements = never
        now = found.now()
        with pytest.raises(Unavailable):
            await found.exchange.identify_process(Peer(), proof(ProofKey(), now, None), "", now, CORRELATION)
        assert counted(await found.records()) == {Reason.ATTESTATION_UNAVAILABLE: 1}


async def test_an_explanation_that_cannot_be_given_is_recorded(tmp_path: Path) -> None:
    async with exchanging(tmp_path) as found:
        operators, operator = Operators(found.exchange), found.caller(OPERATOR)
        for parameters in ({"__entity": 1}, {}):
            asked = act("orders.refund", **({"amount": 5} | parameters))
            question = Question(principal=AGENT, asked=lambda asked=asked: asked, facts='{"spire": {"ids": []}}', pid=0)
            if not parameters:
                assert await operators.explain(operator, question, found.now(), CORRELATION)
                continue
            with pytest.raises(Invalid):
                await operators.explain(operator, question, found.now(), CORRELATION)
        (refusal,) = [one for one in await found.records() if isinstance(one, Refusal)]
    assert (refusal.reason, refusal.principal, refusal.stage) == (Reason.MALFORMED, OPERATOR, "explain")
