"""Signing with nothing embedded: SPIRE, SoftHSM2, a timestamp authority, cosign; build agent and approvers as users."""

import asyncio
import base64
import json
import os
import secrets
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from support.processes import Child, until
from support.signing import CONTENT, statement
from support.signing_parts import public_key
from support.signing_spire import AGENT, ALICE, BOB, UIDS, AgentProcess, SpireSigning, action, digest_of, signing_on
from support.sigstore_tools import timestamp_authority
from support.softhsm import SoftHsm
from support.spire import Spire
from support.verifiers import Verifiers

from broker.action import Action
from broker.errors import Reason
from broker.ledger.records import Approved, Intent, Outcome, Redemption

pytestmark = [pytest.mark.spire, pytest.mark.root, pytest.mark.cosign, pytest.mark.softhsm]

NOTICED_S = 15.0
"""How long SPIRE may take until a changed entry reaches its agent."""


@pytest.fixture(scope="module")
def hsm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SoftHsm]:
    with SoftHsm(tmp_path_factory.mktemp("hsm")) as found:
        found.make_key("p256", "release-2026")
        yield found


@pytest.fixture(scope="module")
def broker(spire, hsm) -> Iterator[SpireSigning]:
    with timestamp_authority() as tsa, signing_on(spire, hsm, tsa) as found:
        yield found


@dataclass
class People:
    """Who takes part, each a process of its own user. entries: of SPIRE, by SPIFFE ID."""

    broker: SpireSigning
    agent: AgentProcess
    approvers: dict[str, Child]
    entries: dict[str, str]

    async def approve(self, asked: Action, request_id: str, *who: str) -> None:
        """These say yes to the digest that is computed here."""
        for one in who:
            self.approvers[one].tell(f"approve {digest_of(asked, request_id)}")
            assert await self.approvers[one].line() == "approved"

    async def granted(self, asked: Action, agent: AgentProcess | None = None) -> str:
        """The id of a grant that two approved."""
        agent, request_id = agent or self.agent, secrets.token_urlsafe(24)
        assert (await agent.grant(asked, request_id))["reason"] == Reason.APPROVAL_REQUIRED
        await self.approve(asked, request_id, ALICE, BOB)
        answer = await agent.grant(asked, request_id)
        assert answer["reason"] == "", answer
        return answer["grant_id"]

    async def asks_until(self, wanted: str) -> None:
        """The agent asks for a grant that nobody approves: what changes at the server takes a moment to be noticed."""
        answer: Any = None
        try:
            async with asyncio.timeout(NOTICED_S):
                while True:
                    answer = await self.agent.grant(action(), "nobody-approves-this-one")
                    if answer["reason"] == wanted:
                        return
                    await asyncio.sleep(0.05)
        except TimeoutError:
            pytest.fail(f"still {answer!r}, not {wanted!r}")

    def signatures(self, grant_id: str) -> list[Intent]:
        """What was signed on a grant, or was about to be."""
        return [one for one in self.broker.records() if isinstance(one, Intent) and one.parent == grant_id]

    def refused(self, grant_id: str, answer: dict[str, Any], reason: Reason) -> None:
        """Nothing came but the reason; it is recorded that this request used the grant up, and nothing was signed."""
        assert answer["reason"] == reason
        assert set(answer) == {"reason", "correlation_id"}
        used = [one for one in self.broker.records() if isinstance(one, Redemption) and one.jti == grant_id]
        assert [(one.result, one.by, one.correlation_id) for one in used] == [
            ("refused", AGENT, answer["correlation_id"])
        ]
        assert self.signatures(grant_id) == []


@pytest.fixture(scope="module")
def entries(spire: Spire) -> Iterator[dict[str, str]]:
    """Of all who take part, by SPIFFE ID, for all tests alike.

    Where each test had entries of its own, SPIRE's agent would still know the last one's, and then for a moment none.
    """
    made = {who: spire.create_entry(who.removeprefix("spiffe://acme.test/"), uid=uid) for who, uid in UIDS.items()}
    yield made
    for entry_id in made.values():
        spire.delete_entry(entry_id)


@asynccontextmanager
async def _people(broker: SpireSigning, entries: dict[str, str]) -> AsyncIterator[People]:
    async with AsyncExitStack() as stack:
        agent = stack.enter_context(broker.agent())
        approvers = {who: stack.enter_context(broker.approver(who)) for who in (ALICE, BOB)}
        await agent.ready()
        for one in approvers.values():
            assert await one.line() == "ready"
        found = People(broker, agent, approvers, entries)
        await found.asks_until(Reason.APPROVAL_REQUIRED)
        for one in approvers.values():
            await _attested(one)
        yield found


async def _attested(approver: Child) -> None:
    """SPIRE's agent knows of the entry."""
    async with asyncio.timeout(NOTICED_S):
        approver.tell("pending")
        while (await approver.line()) == Reason.NOT_ATTESTED:
            await asyncio.sleep(0.05)
            approver.tell("pending")


@pytest.fixture
async def people(broker, entries) -> AsyncIterator[People]:
    async with _people(broker, entries) as found:
        yield found


@pytest.fixture
def verifiers(broker: SpireSigning, tmp_path: Path) -> Verifiers:
    found = Verifiers(tmp_path)
    found.export(broker.ca_folder, broker.tsa_pem)
    return found


async def _ended(answer: dict[str, Any]) -> None:
    leaf = x509.load_der_x509_certificate(base64.b64decode(answer["chain"][0]))
    await until(lambda: datetime.now(UTC) > leaf.not_valid_after_utc, "the certificate has ended")


async def test_an_agent_known_by_its_process_signs_what_two_other_users_approved(people, verifiers):
    request_id, asked = "release-1-0-request-1", action()
    assert (await people.agent.grant(asked, request_id))["reason"] == Reason.APPROVAL_REQUIRED
    await people.approve(asked, request_id, ALICE)
    await people.approve(asked, request_id, ALICE)
    assert (await people.agent.grant(asked, request_id))["reason"] == Reason.APPROVAL_REQUIRED, "one approved, twice"
    await people.approve(asked, request_id, BOB)
    with people.broker.agent(uid=1800) as stranger:
        await stranger.ready()
        assert (await stranger.grant(asked, request_id))["reason"] == Reason.NOT_ATTESTED
    granted = await people.agent.grant(asked, request_id)
    assert granted["reason"] == ""
    signed = await people.agent.sign()
    assert signed["reason"] == ""
    assert (await people.agent.sign())["reason"] == Reason.ALREADY_USED

    await _ended(signed)
    assert verifiers.certified(signed["bundle"], CONTENT).both
    assert not verifiers.certified(signed["bundle"], CONTENT + b"\0").both
    assert not verifiers.certified(signed["bundle"], CONTENT, identity=ALICE).both

    records = people.broker.records()
    (intent,) = people.signatures(granted["grant_id"])
    assert (intent.principal, intent.process.uid, intent.credential) == (AGENT, UIDS[AGENT], "signature")
    assert {"spire", "provenance", "approval"} <= set(intent.facts)
    digest = digest_of(asked, request_id)
    assert {one.by for one in records if isinstance(one, Approved) and one.request_digest == digest} == {ALICE, BOB}
    outcomes = [one for one in records if isinstance(one, Outcome) and one.correlation_id == signed["correlation_id"]]
    assert [one.result for one in outcomes] == ["issued"]


async def test_a_statement_is_signed_by_a_one_time_key_too(people, verifiers):
    await people.granted(action())
    signed = await people.agent.sign(statement=json.dumps(statement()).encode())
    assert signed["reason"] == ""
    await _ended(signed)
    assert verifiers.certified(signed["bundle"], CONTENT).both
    assert not verifiers.certified(signed["bundle"], b"something else").both


async def test_the_key_in_the_token_signs_in_the_same_broker(people, verifiers, hsm):
    grant_id = await people.granted(action("key:release"))
    signed = await people.agent.sign()
    assert (signed["reason"], signed["chain"]) == ("", [])
    key = public_key(hsm, "release-2026")
    assert verifiers.keyed(signed["bundle"], CONTENT, key, root="root.json").both
    assert not verifiers.keyed(signed["bundle"], b"something else", key, root="root.json").both
    assert [one.key_id for one in people.signatures(grant_id)] == ["key:release"]


async def test_an_entry_that_is_deleted_at_the_server_after_the_grant_ends_it(people, spire):
    grant_id = await people.granted(action())
    spire.delete_entry(people.entries[AGENT])
    await people.asks_until(Reason.NOT_ATTESTED)
    people.refused(grant_id, await people.agent.sign(), Reason.NOT_ATTESTED)

    people.entries[AGENT] = spire.create_entry("build/agent", uid=UIDS[AGENT])
    await people.asks_until(Reason.APPROVAL_REQUIRED)
    assert (await people.agent.sign())["reason"] == Reason.ALREADY_USED, "it does not come back"
    await people.granted(action())
    assert (await people.agent.sign())["reason"] == ""


@pytest.fixture
def another_exe(tmp_path: Path) -> Path:
    """The same program in another file, so that another program runs which can do the same."""
    return Path(shutil.copy(os.path.realpath("/proc/self/exe"), tmp_path / "another"))


async def test_another_program_in_the_same_process_gets_no_signature_by_the_grant_and_the_key(people, another_exe):
    grant_id = await people.granted(action())
    assert await people.agent.do("replace", exe=str(another_exe)) == "ready"
    people.refused(grant_id, await people.agent.sign(), Reason.NOT_ATTESTED)
    await people.granted(action())
    assert (await people.agent.sign())["reason"] == "", "what it is granted itself, it signs"


async def test_another_process_of_the_same_workload_gets_no_signature_by_the_grant_and_the_key(people):
    grant_id = await people.granted(action())
    taken = await people.agent.do("hand_over")
    with people.broker.agent() as successor:
        await successor.ready()
        people.agent.child.end()
        await successor.do("take", **taken)
        people.refused(grant_id, await successor.sign(), Reason.NOT_ATTESTED)
        await people.granted(action(), successor)
        assert (await successor.sign())["reason"] == ""


async def test_an_agent_of_spire_that_is_away_refuses_for_now_and_leaves_the_grant_as_it_is(people, spire):
    grant_id = await people.granted(action())
    spire.kill_agent()
    try:
        away = await people.agent.sign(idempotency_id="the-first-and-only")
    finally:
        spire.start_agent()
    assert away["reason"] == Reason.ATTESTATION_UNAVAILABLE
    assert [one for one in people.broker.records() if isinstance(one, Redemption) and one.jti == grant_id] == []
    await people.asks_until(Reason.APPROVAL_REQUIRED)
    assert (await people.agent.sign(idempotency_id="the-first-and-only"))["reason"] == ""
    assert [one.credential for one in people.signatures(grant_id)] == ["signature"]
