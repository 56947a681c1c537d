"""Approvals: what counts, for whom, for which request, and who may see, give and take back."""

import asyncio
import json
import tomllib
from collections import Counter
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from support.approving import (
    OTHER,
    REPOSITORY,
    REQUEST_ID,
    WORKLOADS,
    Approving,
    approving,
    digest_of,
    publish,
)
from support.exchanging import CORRELATION, OWN_PID
from support.oidc import CLIENT_ID, oidc_server
from support.whole_broker import AGENT, ISSUER

from attestors.approval import request_digest
from attestors.contract import FactKey, Facts
from broker.approval_text import DEFAULT, Texts
from broker.approvals import MAX_SHOWN, Approvals
from broker.decision.quota import Quota
from broker.errors import ApprovalRequired, BrokerError, Invalid, Reason, Refused, Unavailable
from broker.identity.id_token import IdTokens
from broker.identity.oidc_issuer import IssuerSettings, OidcIssuer
from broker.ledger.records import (
    ApprovalAsked,
    ApprovalWithdrawn,
    Approved,
    CountedRefusals,
    Intent,
    Operated,
    Record,
    Refusal,
)

VECTORS = Path(__file__).parents[1] / "vectors" / "approval"
ASKED = [pytest.param(tomllib.loads(path.read_text()), id=path.stem) for path in sorted((VECTORS / "asked").iterdir())]


async def play(found: Approving, steps: list[dict]) -> None:
    """Does them, each of which ends as it says."""
    for step in steps:
        action = publish(step.get("environment", "production"))
        caller, request_id = step.get("caller", "agent"), step.get("request_id", REQUEST_ID)
        digest = digest_of(action, WORKLOADS[caller], request_id)
        reason = ""
        try:
            match step["do"]:
                case "ask":
                    assert (await found.ask(action, caller, request_id)).token
                case "approve":
                    how = {name: step[name] for name in ("why", "valid_for_s") if name in step}
                    await found.approve(step["by"], digest, **how)
                case "withdraw":
                    await found.withdraw(step["by"], digest)
                case "pass":
                    found.parts.ahead += timedelta(seconds=step["seconds"])
        except BrokerError as error:
            reason = error.reason
        assert reason == step.get("gets", ""), step


def kinds(records: list[Record], *wanted: type) -> list[Record]:
    return [one for one in records if isinstance(one, wanted)]


@pytest.mark.parametrize("vector", ASKED)
async def test_what_counts_for_nothing_has_a_reason_and_a_record(vector: dict, tmp_path: Path) -> None:
    async with approving(tmp_path) as found:
        await play(found, vector["bad"])
        refusals = [one.reason for one in kinds(await found.parts.records(), Refusal)]
    assert vector["reason"] in refusals
    assert len(refusals) == sum("gets" in step for step in vector["bad"])


@pytest.mark.parametrize("vector", ASKED)
async def test_the_same_without_the_defect_counts(vector: dict, tmp_path: Path) -> None:
    async with approving(tmp_path) as found:
        await play(found, vector["good"])


def test_a_request_digest_is_what_anybody_computes_and_each_part_changes_it() -> None:
    vectors = json.loads((VECTORS / "digest" / "request-digests.json").read_text())
    for one in vectors:
        found = request_digest(one["action_digest"], one["principal"], one["request_id"])
        assert found == one["request_digest"], one["differs_in"]
    assert len({one["request_digest"] for one in vectors}) == len(vectors)


async def test_who_approved_what_by_which_policy_is_in_the_ledger_and_used_by_one_intent(tmp_path: Path) -> None:
    async with approving(tmp_path) as found:
        with pytest.raises(ApprovalRequired) as lacking:
            await found.ask()
        assert lacking.value.request_digest == found.digest == digest_of()
        assert AGENT in lacking.value.text
        assert '"production"' in lacking.value.text
        await found.approve("ann", why="read the diff")
        given = await found.approve("dora", valid_for_s=60)
        assert given.approver == "https://login.acme.test/subject/ZG9yYQ"
        issued = await found.ask()
        revision = found.parts.exchange.policies.current.revision
        records = await found.parts.records()
    (asked,) = kinds(records, ApprovalAsked)
    assert (asked.principal, asked.request_id, asked.text) == (AGENT, REQUEST_ID, lacking.value.text)
    assert asked.to_action() == publish()
    ann, dora = kinds(records, Approved)
    assert (ann.by, ann.reason, ann.method) == (WORKLOADS["ann"], "read the diff", "mtls")
    assert ann.policies == ("release.cedar#approvers",)
    assert (dora.method, dora.evidence_sha256) == ("id-token", "11" * 32)
    assert dora.policies == ("release.cedar#release-managers",)
    assert {ann.policy_revision, dora.policy_revision} == {revision}
    (intent,) = kinds(records, Intent)
    assert (intent.jti, intent.approval) == (issued.claims.jti, found.digest)
    assert intent.approvers == (dora.by, ann.by)
    assert issued.claims.exp <= dora.expires_at.timestamp(), "no credential outlives an approval under it"


async def test_deciding_again_counts_what_the_credential_itself_used_up_until_it_is_withdrawn(tmp_path: Path) -> None:
    async with approving(tmp_path) as found:
        with pytest.raises(ApprovalRequired):
            await found.ask()
        await found.approve("ann")
        await found.approve("bob")
        issued = await found.ask()
        assert await found.why_not(issued.claims.jti) is None
        assert await found.why_not("") == await found.why_not("0" * 32) == Reason.APPROVAL_REQUIRED
        with pytest.raises(Refused):
            await found.withdraw("carol")
        assert await found.why_not(issued.claims.jti) is None
        await found.withdraw("ann")
        assert await found.why_not(issued.claims.jti) is Reason.APPROVAL_REQUIRED


async def test_a_process_that_may_also_act_as_the_caller_does_not_approve(tmp_path: Path) -> None:
    """Over the Unix socket one process may have several SPIFFE IDs: it is no other identity for that."""
    async with approving(tmp_path) as found:
        with pytest.raises(ApprovalRequired):
            await found.ask()

        def process(*ids: str) -> Facts:
            return Facts(attestor="spire", key=FactKey("spire:1"), values={"ids": [*ids]}, attested_at=found.now())

        ann = found.parts.caller(WORKLOADS["ann"], pid=OWN_PID).identity
        for ids, allowed in (((WORKLOADS["ann"], AGENT), False), ((WORKLOADS["ann"], OTHER), True)):
            approver = replace(ann, known={"spire": process(*ids)})
            attempt = found.desk.approve(approver, found.digest, "", 0, found.now(), CORRELATION)
            if allowed:
                assert (await attempt).approver == WORKLOADS["ann"]
                assert [one.request.digest for one in await found.desk.pending(approver, found.now(), CORRELATION)]
                continue
            with pytest.raises(Refused) as refused:
                await attempt
            assert refused.value.reason is Reason.DENIED
            assert not await found.desk.pending(approver, found.now(), CORRELATION)


async def test_a_process_that_may_act_as_the_caller_is_refused_before_policy_is_asked(tmp_path: Path) -> None:
    async with approving(tmp_path) as found:
        with pytest.raises(ApprovalRequired):
            await found.ask()
        (tmp_path / "policy" / "more.cedar").write_text(
            '@id("nobody") forbid (principal, action == Action::"broker.approve", resource);'
        )
        await found.parts.exchange.policies.reload()
        for name in ("agent", "ann"):
            with pytest.raises(Refused):
                await found.approve(name)
        own, other = kinds(await found.parts.records(), Refusal)[-2:]
    assert "of their own" in own.detail
    assert "forbidden by more.cedar#nobody" in other.detail


@pytest.mark.parametrize("method", ["show", "approve", "withdraw"])
@pytest.mark.parametrize(
    "digest", ["", "0" * 63, "0" * 65, "A" * 64, "0" * 63 + "\n", "0" * 64 + "\n", "g" * 64, "0" * 63 + "\u0660"]
)
async def test_what_is_no_digest_is_malformed(method: str, digest: str, tmp_path: Path) -> None:
    async with approving(tmp_path) as found:
        ask = {
            "show": lambda: found.desk.show(found.who("ann"), digest, found.now(), CORRELATION),
            "approve": lambda: found.desk.approve(found.who("ann"), digest, "", 0, found.now(), CORRELATION),
            "withdraw": lambda: found.desk.withdraw(found.who("ann"), digest, "", found.now(), CORRELATION),
        }
        with pytest.raises(Invalid):
            await ask[method]()
        (refusal,) = kinds(await found.parts.records(), Refusal)
    assert (refusal.reason, refusal.stage) == (Reason.MALFORMED, method)


async def test_a_request_is_shown_to_who_may_approve_it_and_to_nobody_else(tmp_path: Path) -> None:
    async with approving(tmp_path) as found:
        with pytest.raises(ApprovalRequired) as lacking:
            await found.ask()
        await found.approve("bob", why="fine")
        for name in ("stranger", "agent", "visitor"):
            with pytest.raises(Refused) as refused:
                await found.desk.show(found.who(name), found.digest, found.now(), CORRELATION)
            assert refused.value.reason is Reason.DENIED
        with pytest.raises(Refused) as never:
            await found.desk.show(
                found.who("ann"), digest_of(request_id="never-asked-so-far"), found.now(), CORRELATION
            )
        assert never.value.reason is Reason.DENIED, "who may not cannot tell it from what was never asked"
        shown = await found.desk.show(found.who("ann"), found.digest, found.now(), CORRELATION)
        records = await found.parts.records()
    assert (shown.text, shown.state, shown.request.action) == (lacking.value.text, "waiting", publish())
    assert [(one.approver, one.reason) for one in shown.approvals] == [(WORKLOADS["bob"], "fine")]
    (operated,) = kinds(records, Operated)
    assert (operated.principal, operated.action, operated.resource) == (WORKLOADS["ann"], "broker.approve", REPOSITORY)
    assert [one.stage for one in kinds(records, Refusal)] == ["request", *(["show"] * 4)]


async def test_pending_has_what_the_asker_may_approve_and_nothing_else(tmp_path: Path) -> None:
    only_bob = """
    @id("secret-is-bobs") forbid (principal, action == Action::"broker.approve",
      resource in Resource::"https://git.acme.test/shop/secret")
    unless { principal == Workload::"spiffe://acme.test/approvers/bob" };
    """
    async with approving(tmp_path, more_policy=only_bob) as found:
        assert not await found.desk.pending(found.who("ann"), found.now(), CORRELATION)
        secret = publish(resource=f"{REPOSITORY}/secret")
        for action, caller in ((publish(), "agent"), (secret, "agent"), (publish(), "other")):
            with pytest.raises(ApprovalRequired):
                await found.ask(action, caller)

        async def pending(name: str) -> set[tuple[str, str]]:
            shown = await found.desk.pending(found.who(name), found.now(), CORRELATION)
            return {(one.request.principal, one.request.action.resource) for one in shown}

        everybodys = {(AGENT, REPOSITORY), (OTHER, REPOSITORY)}
        assert await pending("bob") == everybodys | {(AGENT, f"{REPOSITORY}/secret")}
        assert await pending("ann") == await pending("emil") == everybodys
        assert await pending("other") == {(AGENT, REPOSITORY)}, "its own is not for itself"
        assert await pending("stranger") == await pending("visitor") == set()
        await found.approve("ann")
        await found.approve("bob")
        await found.ask()
        assert await pending("ann") == {(OTHER, REPOSITORY)}, "what was used waits no longer"
        found.parts.ahead += timedelta(hours=2)
        assert await pending("ann") == set()
        records = await found.parts.records()
    refusals = [one for one in kinds(records, Refusal) if one.stage == "pending"]
    assert {one.principal.rpartition("/")[2] for one in refusals} == {"stranger", "dmlzaXRvcg"}
    operated = [one for one in kinds(records, Operated) if one.resource == f"{ISSUER}/approvals"]
    assert any("secret-is-bobs" not in str(one.policies) and one.policies for one in operated)


async def test_who_asks_for_much_hides_nobody_elses_request(tmp_path: Path) -> None:
    async with approving(tmp_path) as found:
        for number in range(MAX_SHOWN):
            with pytest.raises(ApprovalRequired):
                await found.ask(request_id=f"request-number-{number}")
        with pytest.raises(Refused) as too_many:
            await found.ask(request_id="request-number-too-many")
        assert too_many.value.reason is Reason.QUOTA
        with pytest.raises(ApprovalRequired):
            await found.ask(caller="other")
        shown = await found.desk.pending(found.who("ann"), found.now(), CORRELATION)
    assert len(shown) == MAX_SHOWN
    assert [one.request.principal for one in shown].count(OTHER) == 1


async def test_pending_costs_its_asker_what_it_decides(tmp_path: Path) -> None:
    async with approving(tmp_path) as found:
        for number in range(20):
            with pytest.raises(ApprovalRequired):
                await found.ask(request_id=f"request-number-{number:02}")
        found.parts.exchange.quota = Quota(0.001, 5, 10)

        async def pending(name: str) -> int:
            return len(await found.desk.pending(found.who(name), found.now(), CORRELATION))

        assert await pending("ann") == 6, "five, and the one that it was identified for"
        assert await pending("ann") == 1
        with pytest.raises(Refused) as often:
            found.parts.exchange.quota.take(WORKLOADS["ann"], asyncio.get_running_loop().time())
        assert often.value.reason is Reason.QUOTA, "no further request of it is admitted"
        assert await pending("bob") == 6, "and nobody else pays for it"


async def test_what_nobody_could_read_is_not_laid_down(tmp_path: Path) -> None:
    async with approving(tmp_path) as found:
        with pytest.raises(ApprovalRequired):
            await found.ask(publish(notes="x" * 3900))
        with pytest.raises(Invalid):
            await found.ask(publish(notes="\u00e9" * 1900))  # six characters each, where only ASCII is shown
        assert len(kinds(await found.parts.records(), ApprovalAsked)) == 1


async def test_the_operators_words_are_shown_and_recorded(tmp_path: Path) -> None:
    texts = Texts({"release.publish": "${principal} publishes to ${parameters.environment}"})
    async with approving(tmp_path, texts=texts) as found:
        with pytest.raises(ApprovalRequired) as lacking:
            await found.ask()
    assert lacking.value.text == f'{AGENT} publishes to "production"'
    assert DEFAULT.template not in lacking.value.text


async def test_a_desk_without_a_ledger_gives_nothing(tmp_path: Path) -> None:
    async with approving(tmp_path) as found:
        with pytest.raises(ApprovalRequired):
            await found.ask()
        await found.parts.exchange.ledger.close()
        for attempt in (found.ask(), found.approve("ann"), found.withdraw("ann")):
            with pytest.raises(Unavailable):
                await attempt


# -- people ------------------------------------------------------------------------------------------------------------


async def test_an_id_token_speaks_for_the_request_that_its_nonce_names(tmp_path: Path) -> None:
    async with approving(tmp_path) as found, oidc_server(tmp_path) as oidc:
        desk, elsewhere = found.desk, digest_of(caller=OTHER)
        with pytest.raises(Refused) as nobody:
            await desk.person(oidc.id_token(found.digest), found.digest, found.now())
        assert nobody.value.reason is Reason.UNAUTHENTICATED
        settings = IssuerSettings(issuer=oidc.issuer, audience=CLIENT_ID, ca_file=str(oidc.ca_file))
        people = IdTokens({oidc.issuer: OidcIssuer(settings)})
        desk = Approvals(found.parts.exchange, Texts(), people)
        person = await desk.person(oidc.id_token(found.digest), found.digest, found.now())
        assert str(person.principal) == f"{oidc.issuer}/subject/dS0xNw"
        for nonce, digest in ((found.digest, elsewhere), (elsewhere, found.digest), ("", ""), ("x", "x")):
            with pytest.raises(Refused):
                await desk.person(oidc.id_token(nonce), digest, found.now())
        found.parts.exchange.quota = Quota(0.001, 1, 10)
        await desk.person(oidc.id_token(found.digest), found.digest, found.now())
        with pytest.raises(Refused) as often:
            await desk.person(oidc.id_token(found.digest), found.digest, found.now())
        assert often.value.reason is Reason.QUOTA
        records = await found.parts.records()
    counts = Counter[str]()
    for counted in kinds(records, CountedRefusals):
        counts.update(counted.counts)
    assert counts == {Reason.UNAUTHENTICATED: 3, Reason.MALFORMED: 2, Reason.QUOTA: 1}
    assert not kinds(records, Refusal, Approved, ApprovalWithdrawn)
