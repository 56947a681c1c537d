"""Provenance counts for the artifacts that are to be signed, while its builder is trusted and it is not too old."""

import asyncio
import contextlib
import json
import threading
from datetime import timedelta
from importlib.resources import files
from typing import Any

import pytest
from support.provenance import (
    ARTIFACT,
    BUILD_AGENT,
    BUILDER,
    COMMIT,
    FINISHED,
    MAX_AGE,
    NOW,
    OTHER_BUILDER,
    OTHER_KEY,
    REPOSITORY,
    SHA256,
    SHA512,
    TWO_BUILDER,
    at,
    authority,
    builders,
    checks,
    encoded,
    envelope,
    predicate,
    statement,
    svid_bundle,
    trust,
)

from attestors import provenance as under_test
from attestors.contract import AttestationFailed, AttestationRequest, AttestationUnavailable, Facts
from attestors.provenance import ProvenanceAttestor, appraise
from attestors.provenance_config import CurrentTrust
from attestors.provenance_signers import SignerChecks

SIGNING = {"signing": {"artifacts": [ARTIFACT], "purpose": "release", "signer": "keyless"}}


def request(evidence: Any = None, parameters: dict[str, Any] | None = None) -> AttestationRequest:
    presented = {} if evidence is None else {"provenance": encoded(evidence)}
    return AttestationRequest(
        principal="spiffe://acme.test/build/agent",
        parameters=SIGNING if parameters is None else parameters,
        evidence=presented,
    )


def judge(document: Any, *, now=NOW, **options: Any) -> Facts:
    return appraise(encoded(document), [ARTIFACT], trust(**options), checks(), now)


async def test_who_presents_nothing_has_no_facts() -> None:
    attestor = ProvenanceAttestor(trust, checks())
    assert await attestor.attest(request(envelope()), NOW) is not None
    assert await attestor.attest(request(), NOW) is None


async def test_the_facts_are_all_that_policies_may_name() -> None:
    """As `type Provenance` of the base Cedar schema has them."""
    facts = await ProvenanceAttestor(trust, checks()).attest(request(envelope()), NOW)
    assert facts is not None
    assert facts.values == {
        "builder": BUILDER,
        "build_type": "https://acme.test/make/v1",
        "source": REPOSITORY,
        "source_digest": COMMIT,
        "source_ref": "refs/heads/main",
        "config_uri": f"{REPOSITORY}/release.yml@refs/heads/main",
        "config_digest": COMMIT,
        "runner": "self-hosted",
        "invocation": f"{BUILDER}/runs/17",
        "signer": "key:release",
        "started_at": FINISHED - 60,
        "finished_at": FINISHED,
        "external_parameters": f'{{"path":"release.yml","ref":"refs/heads/main","repository":"{REPOSITORY}"}}',
        "dependencies": [
            f"git+{REPOSITORY}@refs/heads/main@gitCommit:{COMMIT}",
            "pkg:docker/debian@13@sha256:" + "ab" * 32,
        ],
        "subjects": [f"sha256:{SHA256}", f"sha512:{SHA512}"],
    }
    assert (facts.attestor, facts.attested_at) == ("provenance", NOW)


async def test_facts_say_what_the_base_schema_declares() -> None:
    """One attribute more or less, and Cedar would refuse every signing request."""
    schema = (files("broker.decision") / "base.cedarschema").read_text()
    declared = schema.partition("type Provenance = {")[2].partition("}")[0]
    names = {line.partition(":")[0].strip() for line in declared.splitlines() if ":" in line.partition("//")[0]}
    facts = judge(envelope())
    assert names == facts.values.keys()


@pytest.mark.parametrize("parameters", [{}, {"signing": {}}, {"signing": {"artifacts": []}}, {"signing": "all"}])
async def test_provenance_for_an_action_that_signs_nothing_is_refused(parameters: dict[str, Any]) -> None:
    attestor = ProvenanceAttestor(trust, checks())
    assert await attestor.attest(request(envelope()), NOW)
    with pytest.raises(AttestationFailed, match="names none to sign"):
        await attestor.attest(request(envelope(), parameters), NOW)


async def test_every_artifact_has_to_be_a_subject() -> None:
    attestor = ProvenanceAttestor(trust, checks())
    more = [ARTIFACT, {"sha256": "0" * 64}]
    both = statement(subject=[{"digest": ARTIFACT}, {"digest": {"sha256": "0" * 64}}])
    assert await attestor.attest(request(envelope(both), {"signing": {"artifacts": more}}), NOW)
    with pytest.raises(AttestationFailed, match="is not about"):
        await attestor.attest(request(envelope(), {"signing": {"artifacts": more}}), NOW)


def test_facts_end_when_the_provenance_is_too_old() -> None:
    facts = judge(envelope())
    assert facts.expires_at == NOW - timedelta(seconds=600) + MAX_AGE
    last = facts.expires_at - timedelta(seconds=1)
    assert judge(envelope(), now=last)
    with pytest.raises(AttestationFailed, match="older than"):
        judge(envelope(), now=facts.expires_at)


def test_a_shorter_age_refuses_what_a_longer_one_took() -> None:
    assert judge(envelope(), max_age=timedelta(seconds=601))
    with pytest.raises(AttestationFailed, match="older than"):
        judge(envelope(), max_age=timedelta(seconds=600))


@pytest.mark.parametrize("year", ["0001-01-01T00:00:00Z", "1970-01-01T00:00:00Z"])
def test_a_time_that_stands_for_none_is_none(year: str) -> None:
    """Some tools write their language's zero time."""
    assert judge(envelope(statement(predicate=predicate(startedOn=year)))).values["started_at"] == -1
    with pytest.raises(AttestationFailed, match="cannot be bounded"):
        judge(envelope(statement(predicate=predicate(startedOn=year, finishedOn=year))))


def test_clocks_may_differ_by_a_minute() -> None:
    assert judge(envelope(statement(predicate=predicate(finishedOn=at(-60)))))
    with pytest.raises(AttestationFailed, match="of the future"):
        judge(envelope(statement(predicate=predicate(finishedOn=at(-61)))))


async def test_a_builder_taken_out_is_refused_at_the_next_look() -> None:
    kept = builders()
    current = CurrentTrust(lambda: trust(dict(kept)))
    attestor = ProvenanceAttestor(current, checks())
    assert await attestor.attest(request(envelope()), NOW)
    del kept[BUILDER]
    assert await attestor.attest(request(envelope()), NOW), "not before it is read"
    current.reload()
    with pytest.raises(AttestationFailed, match="is not trusted"):
        await attestor.attest(request(envelope()), NOW)


async def test_the_same_evidence_has_the_same_key_and_another_builder_another() -> None:
    attestor = ProvenanceAttestor(trust, checks())
    one, again = [await attestor.attest(request(envelope()), NOW) for _ in range(2)]
    key = envelope(statement(predicate=predicate(OTHER_BUILDER)), keys=[OTHER_KEY])
    other = await attestor.attest(request(key), NOW)
    assert one is not None
    assert again is not None
    assert other is not None
    assert one.key == again.key != other.key
    assert BUILDER not in one.key, "a caller's text is in no key"


async def test_the_watch_tells_of_builders_whose_trust_changed_and_of_no_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(under_test, "POLL_S", 0.001)
    kept = builders()
    current = CurrentTrust(lambda: trust(dict(kept)))
    attestor = ProvenanceAttestor(current, checks())
    facts = judge(envelope())
    told = attestor.watch()
    first = asyncio.ensure_future(anext(told))
    await asyncio.sleep(0)
    current.reload()  # the same again: nothing to tell
    kept[OTHER_BUILDER] = kept[TWO_BUILDER]
    del kept[BUILDER]
    current.reload()
    seen = {await asyncio.wait_for(first, 5), await asyncio.wait_for(anext(told), 5)}
    assert facts.key in seen
    assert len(seen) == 2
    nothing = asyncio.ensure_future(anext(told))
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(asyncio.shield(nothing), 0.05)
    assert not nothing.done()
    nothing.cancel()


async def test_evidence_that_takes_long_holds_no_other_request_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is judged in a thread: the loop goes on."""
    attestor = ProvenanceAttestor(trust, checks())
    big = statement(subject=[{"digest": ARTIFACT}] * 1024)
    judging = asyncio.ensure_future(attestor.attest(request(envelope(big)), NOW))
    turns = 0
    while not judging.done():
        await asyncio.sleep(0)
        turns += 1
    assert turns > 1
    assert judging.result() is not None


async def test_no_digest_of_something_else_rides_along_with_the_one_that_was_built() -> None:
    """Or a key that signs by SHA-384 would sign what nobody built."""
    attestor = ProvenanceAttestor(trust, checks())
    built = envelope(statement(subject=[{"digest": {"sha256": SHA256}}]))
    assert await attestor.attest(request(built, {"signing": {"artifacts": [{"sha256": SHA256}]}}), NOW)
    for added in ({"sha384": "e" * 96}, {"sha512": SHA512}, {"sha384": "e" * 96, "sha512": "e" * 128}):
        asked = {"signing": {"artifacts": [{"sha256": SHA256} | added]}}
        with pytest.raises(AttestationFailed, match=f"gives the {min(added)} of sha256:{SHA256} as well"):
            await attestor.attest(request(built, asked), NOW)


async def test_evidence_waits_for_a_thread_and_no_more_of_it_than_may_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who gives up while waiting costs nothing; who is one too many is told at once that we cannot look."""
    monkeypatch.setattr(under_test, "WAITING", 2)
    looked, go_on = threading.Semaphore(0), threading.Semaphore(0)

    def slowly(chain: tuple[bytes, ...], when: Any) -> str:
        looked.release()
        assert go_on.acquire(timeout=20)
        return BUILD_AGENT

    attestor = ProvenanceAttestor(trust, SignerChecks(x509_svid=slowly))
    evidence = request(svid_bundle(authority().svid(BUILD_AGENT)))
    begun = [asyncio.ensure_future(attestor.attest(evidence, NOW)) for _ in range(under_test.AT_ONCE)]
    for _ in begun:
        assert await asyncio.to_thread(looked.acquire, timeout=20)
    waiting = [asyncio.ensure_future(attestor.attest(evidence, NOW)) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(AttestationUnavailable, match="ask again"):
        await attestor.attest(evidence, NOW)
    for one in (begun[0], waiting[0]):  # their time is up
        one.cancel()
        with pytest.raises(asyncio.CancelledError):
            await one
    after = asyncio.ensure_future(attestor.attest(evidence, NOW))
    await asyncio.sleep(0)
    assert not after.done(), "there was room again"
    with pytest.raises(AttestationUnavailable):
        await attestor.attest(evidence, NOW)
    for _ in range(4):
        go_on.release()
    assert all(await asyncio.gather(*begun[1:], *waiting[1:], after))
    assert sum(looked.acquire(blocking=False) for _ in range(9)) == 2, "of five that asked, four were looked at"


async def test_who_cannot_say_whose_svid_it_is_refuses() -> None:
    def cannot(chain: tuple[bytes, ...], when: Any) -> str:
        raise AttestationUnavailable("our own SVID has ended")

    evidence = svid_bundle(authority().svid(BUILD_AGENT))
    assert await ProvenanceAttestor(trust, checks()).attest(request(evidence), NOW)
    with pytest.raises(AttestationUnavailable):
        await ProvenanceAttestor(trust, SignerChecks(x509_svid=cannot)).attest(request(evidence), NOW)
    with pytest.raises(AttestationFailed):
        await ProvenanceAttestor(trust).attest(request(evidence), NOW)


def test_what_is_presented_is_in_no_refusal() -> None:
    """The ledger is told why, not the payload; and a long name is cut."""
    document = statement(predicate=predicate("https://evil.test/" + "a" * 5000))
    with pytest.raises(AttestationFailed) as refused:
        judge(envelope(document))
    assert len(str(refused.value)) < 400
    assert "secret" not in repr(request(json.dumps({"payload": "secret"})))
