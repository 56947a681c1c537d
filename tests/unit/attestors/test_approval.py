"""The facts on approvals: whose count, how often, for which request, and until when."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import pytest

from attestors.approval import ApprovalAttestor, ApprovalSeen, request_digest
from attestors.contract import AttestationRequest, AttestationUnavailable

NOW = datetime(2026, 11, 22, 23, 7, tzinfo=UTC)
AGENT = "spiffe://acme.test/build/agent"
ANN, BOB = "spiffe://acme.test/ann", "spiffe://acme.test/bob"
DORA = "https://login.acme.test/subject/ZG9yYQ"
EMIL = "https://login.acme.test/subject/ZW1pbA"
REQUEST = AttestationRequest(principal=AGENT, action_digest=b"\xaa" * 32, request_id="request-number-one")
DIGEST = request_digest("aa" * 32, AGENT, "request-number-one")


@dataclass
class Written:
    """Approvals in memory. used_by: the credential that used them up."""

    approvals: dict[str, list[ApprovalSeen]] = field(default_factory=dict)
    used_by: str = ""
    away: bool = False
    heard: asyncio.Event = field(default_factory=asyncio.Event)
    hearing: list[Callable[[str], None]] = field(default_factory=list)

    async def current(self, request_digest: str, now: datetime, credential: str) -> Sequence[ApprovalSeen]:
        if self.away:
            raise AttestationUnavailable("it cannot be read")
        assert now == NOW
        return [] if self.used_by not in ("", credential) else self.approvals.get(request_digest, [])

    def subscribe(self, changed: Callable[[str], None]) -> Callable[[], None]:
        self.hearing.append(changed)
        self.heard.set()
        return lambda: self.hearing.remove(changed)


def seen(*by: str, lives_s: int = 600) -> list[ApprovalSeen]:
    return [ApprovalSeen(by=one, expires_at=NOW + timedelta(seconds=lives_s)) for one in by]


def attestor(*approvals: ApprovalSeen, **more: object) -> ApprovalAttestor:
    return ApprovalAttestor(Written({DIGEST: [*approvals]}, **more))


async def test_people_and_workloads_are_told_apart_and_counted() -> None:
    facts = await attestor(*seen(BOB, DORA, ANN)).attest(REQUEST, NOW)
    assert facts.values == {"count": 3, "by": [DORA, ANN, BOB], "people": 1, "workloads": 2}
    assert (facts.attestor, facts.key, facts.attested_at) == ("approval", f"approval:{DIGEST}", NOW)


async def test_before_anybody_approved_there_are_facts_that_say_so() -> None:
    facts = await attestor().attest(REQUEST, NOW)
    assert facts.values == {"count": 0, "by": [], "people": 0, "workloads": 0}
    assert facts.expires_at is None


async def test_the_callers_own_approval_never_counts() -> None:
    assert (await attestor(*seen(AGENT)).attest(REQUEST, NOW)).values["count"] == 0
    facts = await attestor(*seen(AGENT, ANN)).attest(REQUEST, NOW)
    assert (facts.values["count"], facts.values["by"]) == (1, [ANN])


async def test_one_approver_counts_once() -> None:
    facts = await attestor(*seen(ANN, DORA), *seen(ANN, DORA, lives_s=60)).attest(REQUEST, NOW)
    assert facts.values == {"count": 2, "by": [DORA, ANN], "people": 1, "workloads": 1}
    assert facts.expires_at == NOW + timedelta(seconds=60)


async def test_two_people_of_one_issuer_are_two() -> None:
    assert (await attestor(*seen(DORA, EMIL)).attest(REQUEST, NOW)).values["people"] == 2


@pytest.mark.parametrize(("lives_s", "count"), [(1, 2), (0, 1), (-1, 1)])
async def test_an_approval_that_has_ended_does_not_count(lives_s: int, count: int) -> None:
    facts = await attestor(*seen(ANN), *seen(BOB, lives_s=lives_s)).attest(REQUEST, NOW)
    assert facts.values["count"] == count


async def test_facts_end_with_the_first_approval_that_counts() -> None:
    facts = await attestor(*seen(ANN), *seen(BOB, lives_s=30), *seen(AGENT, lives_s=5)).attest(REQUEST, NOW)
    assert facts.expires_at == NOW + timedelta(seconds=30)


@pytest.mark.parametrize(
    "changes",
    [
        {"principal": "spiffe://acme.test/build/other"},
        {"action_digest": b"\xab" + b"\xaa" * 31},
        {"request_id": "request-number-two"},
        {"request_id": ""},
    ],
)
async def test_with_anything_changed_approvals_count_for_nothing(changes: dict[str, object]) -> None:
    asked = {"principal": AGENT, "action_digest": b"\xaa" * 32, "request_id": "request-number-one"}
    source = attestor(*seen(ANN, BOB))
    assert (await source.attest(AttestationRequest(**(asked | changes)), NOW)).values["count"] == 0
    assert (await source.attest(AttestationRequest(**asked), NOW)).values["count"] == 2


async def test_without_a_request_id_nothing_is_looked_up() -> None:
    facts = await attestor(away=True).attest(AttestationRequest(principal=AGENT), NOW)
    assert facts.values["count"] == 0


async def test_what_gave_a_credential_counts_for_that_one_alone() -> None:
    source = attestor(*seen(ANN), used_by="the-grant")
    for credential, count in (("the-grant", 1), ("", 0), ("another", 0)):
        request = AttestationRequest(
            principal=AGENT, action_digest=b"\xaa" * 32, request_id="request-number-one", credential=credential
        )
        assert (await source.attest(request, NOW)).values["count"] == count


async def test_approvals_that_cannot_be_read_are_not_none() -> None:
    with pytest.raises(AttestationUnavailable):
        await attestor(away=True).attest(REQUEST, NOW)


async def test_each_changed_request_is_told_and_who_leaves_is_forgotten() -> None:
    source = Written()
    watching = ApprovalAttestor(source).watch()
    first = asyncio.create_task(anext(watching))
    await source.heard.wait()
    for digest in ("a", "b", "a"):
        source.hearing[0](digest)
    assert [await first, await anext(watching)] == ["approval:a", "approval:b"]
    later = asyncio.create_task(anext(watching))
    await asyncio.sleep(0)
    source.hearing[0]("c")
    assert await later == "approval:c"
    await watching.aclose()
    assert not source.hearing
