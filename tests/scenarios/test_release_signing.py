"""A build agent releases: nothing is signed without provenance, environment and approval, each time anew."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.broker import ISSUER
from support.shop import say
from support.signing import AGENT, ALICE, BOB, CONTENT, SigningBroker, signing_broker

from broker.client import Client, Refused
from broker.errors import ApprovalRequired, Reason
from broker.ledger.records import Intent, Outcome

REQUEST_ID = "release-1-0-request-1"


async def test_a_build_agent_signs_what_was_built_looked_at_and_approved_and_nothing_else(tmp_path: Path) -> None:
    with signing_broker() as broker:
        async with broker.client() as agent:
            await _signs_with_approval(broker, agent, tmp_path)
            await _is_refused_without_provenance(broker, agent)
            await _is_refused_when_an_approval_is_withdrawn(broker, agent)
            await _is_refused_when_its_entry_is_gone(broker, agent)
        records = broker.whole.records()
        signed = [one for one in records if isinstance(one, Intent) and one.credential == "signature"]
        issued = [one.intent for one in records if isinstance(one, Outcome) and one.result == "issued"]
        assert len(signed) == 1
        assert len(issued) == 4  # three grants, one signature
        say("The ledger has three grants and one signature: who, what, on which facts, by whose approval.")


async def _signs_with_approval(broker: SigningBroker, agent: Client, folder: Path) -> None:
    say("The agent built release 1.0 and asks to sign it for production. It shows the builder's provenance.")
    action, provenance = broker.action(environment="production"), (broker.builder.envelope(),)
    with pytest.raises(ApprovalRequired) as lacking:
        await agent.signing.grant(action, provenance, request_id=REQUEST_ID)
    say("approval_required. What approvers read is written by the broker, from the fields alone:")
    for line in lacking.value.text.splitlines():
        say(f"    {line}")
    await broker.approve(lacking.value.request_digest, ALICE)
    with pytest.raises(ApprovalRequired):
        await agent.signing.grant(action, provenance, request_id=REQUEST_ID)
    say("Alice approves. Production wants two: approval_required.")
    await broker.approve(lacking.value.request_digest, BOB)
    grant = await agent.signing.grant(action, provenance, request_id=REQUEST_ID)
    say(f"Bob approves. A grant until {grant.expires_at:%H:%M:%S}, for these digests, this process and its key alone.")
    signature = await agent.signing.sign(grant)
    say("Everything is looked at again; a key is made, signs once, is certified and dropped.")
    with pytest.raises(Refused) as used:
        await agent.signing.sign(grant)
    assert used.value.reason is Reason.ALREADY_USED
    say("The same grant again: already_used.")

    (folder / "app").write_bytes(CONTENT)
    (folder / "bundle.json").write_text(signature.bundle)
    root = _cli("ca", "trusted-root", str(broker.ca_folder))
    (folder / "root.json").write_text(root.stdout)
    command = ("verify", str(folder / "app"), "--bundle", str(folder / "bundle.json"))
    options = ("--trusted-root", str(folder / "root.json"), "--issuer", ISSUER, "--identity", AGENT)
    verified = _cli(*command, *options)
    assert verified.returncode == 0, verified.stderr
    for line in verified.stdout.splitlines():
        say(f"    {line}")
    (folder / "app").write_bytes(CONTENT + b"and a backdoor\n")
    assert _cli(*command, *options).returncode == 3
    say("With one line more in the file, `action-broker verify` refuses.")


async def _is_refused_without_provenance(broker: SigningBroker, agent: Client) -> None:
    with pytest.raises(Refused) as refused:
        await agent.signing.grant(broker.action(b"built on a laptop\n"), request_id="laptop-build-request")
    assert refused.value.reason is Reason.PROVENANCE_MISSING
    say("A second artifact, without provenance: provenance_missing. Nobody was asked to approve it.")


async def _is_refused_when_an_approval_is_withdrawn(broker: SigningBroker, agent: Client) -> None:
    action, provenance = broker.action(), (broker.builder.envelope(),)
    request_id = "staging-request-number-1"
    with pytest.raises(ApprovalRequired) as lacking:
        await agent.signing.grant(action, provenance, request_id=request_id)
    await broker.approve(lacking.value.request_digest, ALICE)
    grant = await agent.signing.grant(action, provenance, request_id=request_id)
    assert await broker.tell(ALICE, f"withdraw {lacking.value.request_digest}") == "withdrawn"
    with pytest.raises(Refused) as refused:
        await agent.signing.sign(grant)
    assert refused.value.reason is Reason.APPROVAL_REQUIRED
    say("Staging: Alice approves, the agent has its grant, Alice withdraws, the agent signs: approval_required.")
    assert await broker.tell(BOB, f"approve {lacking.value.request_digest}") == Reason.ALREADY_USED
    with pytest.raises(Refused) as spent:
        await agent.signing.sign(grant)
    assert spent.value.reason is Reason.ALREADY_USED
    say("Bob would approve instead: already_used, and the grant is spent. What was refused does not come back.")


async def _is_refused_when_its_entry_is_gone(broker: SigningBroker, agent: Client) -> None:
    grant = await broker.granted(agent, broker.action(), (broker.builder.envelope(),), BOB)
    broker.whole.domain.delete(broker.whole.entries[AGENT])
    with pytest.raises(Refused) as refused:
        await agent.signing.sign(grant)
    assert refused.value.reason is Reason.NOT_ATTESTED
    broker.whole.entries[AGENT] = broker.whole.domain.entry("build/agent", os.getpid())
    with pytest.raises(Refused) as spent:
        await agent.signing.sign(grant)
    assert spent.value.reason is Reason.ALREADY_USED
    say("A last grant, then the agent's registration entry is deleted: not_attested, and nothing is signed.")
    say("The entry comes back, the grant does not: already_used.")


def _cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "broker.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
