"""What `serve` makes of `[ticket]`: attestor, webhooks, files that are taken anew, and what it does not start with."""

import contextlib
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from support.tickets import TicketServer, ticket, ticket_server

from attestors.contract import AttestationRequest, AttestationUnavailable
from broker.cli.config import Config, load
from broker.cli.serve_evidence import Evidence, open_evidence
from broker.cli.serve_signing import SetupError, Watches

NOW = datetime(2031, 5, 6, 7, 8, 9, tzinfo=UTC)
SECRET = "correct horse battery staple"


class Place:
    """A folder with a configuration, credentials and a webhook's secret."""

    def __init__(self, folder: Path, server: TicketServer) -> None:
        self.folder, self.server = folder, server
        self.credentials = self.file("credentials", "broker:hunter2")
        self.secret = self.file("hook", SECRET)

    def file(self, name: str, content: str, mode: int = 0o600) -> Path:
        found = self.folder / name
        found.write_text(content)
        found.chmod(mode)
        return found

    def config(self, **changes: Any) -> Config:
        """changes: keys of the system `desk`."""
        keys = {
            "url": self.server.template,
            "credentials": "basic",
            "credentials_file": str(self.credentials),
            "state": "/issue/status",
            "open_states": ["open"],
            "authorises": "/issue/tables",
            "authorised_by": "/issue/owner/login",
        } | changes
        lines = ['issuer = "https://broker.acme.test"', 'trust_domain = "acme.test"', "[ticket.systems.desk]"]
        lines += [f"{key} = {json.dumps(value)}" for key, value in keys.items()]
        lines += ["[ticket.systems.desk.webhook]", 'id = "/id"', f'secret_file = "{self.secret}"', ""]
        return load(self.file("broker.toml", "\n".join(lines)))


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    async with ticket_server(_17=ticket()) as server:
        yield Place(tmp_path, server)


async def attest(evidence: Evidence) -> Any:
    request = AttestationRequest(principal="spiffe://acme.test/agent", ticket="desk:17")
    return await evidence.attestors["ticket"].attest(request, NOW)


async def test_without_a_ticket_system_there_is_no_attestor_and_no_webhook(tmp_path: Path) -> None:
    file = tmp_path / "broker.toml"
    file.write_text('issuer = "https://broker.acme.test"\ntrust_domain = "acme.test"\n')
    watches = Watches()
    async with contextlib.AsyncExitStack() as stack:
        assert await open_evidence(stack, load(file), watches) == Evidence()
    assert watches.files == []


async def test_what_is_configured_is_attested_and_its_webhook_tells_it(place: Place) -> None:
    async with contextlib.AsyncExitStack() as stack:
        evidence = await open_evidence(stack, place.config(), Watches())
        facts = await attest(evidence)
        assert (facts.key, facts.values["authorised_by"]) == ("ticket:desk:17", "dora")
        (hook,) = evidence.hooks
        assert (hook.system, hook.proof.header, hook.proof.secrets()) == (
            "desk",
            "X-Hub-Signature-256",
            (SECRET.encode(),),
        )
        assert hook.tell("17") is True
        assert hook.tell("18") is False


async def test_credentials_and_secrets_are_taken_anew_and_the_old_ones_stay_where_they_cannot_be(place: Place) -> None:
    watches = Watches()
    async with contextlib.AsyncExitStack() as stack:
        evidence = await open_evidence(stack, place.config(), watches)
        assert await attest(evidence)
        place.server.expects = "Basic YnJva2VyOmh1bnRlcjM="  # broker:hunter3
        with pytest.raises(AttestationUnavailable):
            await attest(evidence)
        place.file("credentials", "broker:hunter3")
        place.file("hook", f"{SECRET} again")
        watches.reload()
        assert await attest(evidence)
        assert evidence.hooks[0].proof.secrets() == (f"{SECRET} again".encode(),)
        place.file("credentials", "")
        place.secret.unlink()
        watches.reload()
        assert [one.last_error is not None for one in watches.files] == [True, True]
        assert await attest(evidence)
        assert evidence.hooks[0].proof.secrets() == (f"{SECRET} again".encode(),)


async def test_every_file_that_cannot_be_used_is_told_at_the_start_and_no_secret_is(place: Place) -> None:
    place.file("credentials", "hunter2")
    place.file("hook", "too short")
    async with contextlib.AsyncExitStack() as stack:
        with pytest.raises(SetupError) as refused:
            await open_evidence(stack, place.config(), Watches())
        told = str(refused.value)
        assert "\n  ticket.systems.desk.webhook: " in f"\n{told}"
        assert "\n  ticket.systems.desk: " in f"\n{told}"
        assert "hunter2" not in told
        assert "too short" not in told
        place.file("credentials", "broker:hunter2")
        place.file("hook", SECRET)
        https, no_pem = {"url": "https://t.test/{id}"}, place.file("no.pem", "no certificate")
        for ca_file in (Path("/nonexistent.pem"), no_pem):
            with pytest.raises(SetupError, match=f"ticket.systems.desk: ca_file {ca_file}"):
                await open_evidence(stack, place.config(**https, ca_file=str(ca_file)), Watches())
        assert (await open_evidence(stack, place.config(**https), Watches())).attestors
