"""`doctor` on ticket systems: unreadable files, systems that are away or refuse us, and all in order."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from support.tickets import TicketServer, ticket, ticket_server

from broker.cli.config import load
from broker.cli.doctor_finding import Finding
from broker.cli.doctor_ticket import tickets


class Desk:
    """A configuration with one ticket system."""

    def __init__(self, folder: Path, server: TicketServer) -> None:
        self.folder, self.server = folder, server
        self.credentials = self.file("desk.credentials", "broker:hunter2")
        self.secret = self.file("desk.hook", "correct horse battery staple")

    def file(self, name: str, content: str, mode: int = 0o600) -> Path:
        found = self.folder / name
        found.write_text(content)
        found.chmod(mode)
        return found

    async def look(self, *, webhook: bool = True, http: str = "127.0.0.1:0", **changes: Any) -> list[Finding]:
        """What is found. changes: keys of the system."""
        system = {
            "url": self.server.template,
            "credentials": "basic",
            "credentials_file": str(self.credentials),
            "state": "/issue/status",
            "open_states": ["open"],
            "authorises": "/issue/tables",
        } | changes
        lines = ['issuer = "https://broker.acme.test"', 'trust_domain = "acme.test"', f'http.listen = "{http}"']
        lines += ["[ticket.systems.desk]", *(f"{key} = {json.dumps(value)}" for key, value in system.items())]
        if webhook:
            lines += ["[ticket.systems.desk.webhook]", 'id = "/id"', f'secret_file = "{self.secret}"']
        found = [one async for one in tickets(load(self.file("broker.toml", "\n".join(lines) + "\n")))]
        for one in found:
            assert one.verdict == "ok" or one.fix, one
            assert "hunter2" not in one.detail + one.fix
            assert "staple" not in one.detail + one.fix
        return found


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    async with ticket_server() as server:
        yield Desk(tmp_path, server)


async def test_a_system_that_answers_and_a_webhook_with_a_secret_are_in_order(desk: Desk) -> None:
    system, webhook = await desk.look()
    assert (system.verdict, system.detail) == ("ok", "answers; there is no ticket 0")
    assert (webhook.verdict, "https://broker.acme.test/hooks/tickets/desk" in webhook.detail) == ("ok", True)
    desk.server.tickets["0"] = ticket()
    assert (await desk.look())[0].verdict == "ok"


async def test_where_no_system_is_configured_there_is_nothing_to_say(tmp_path: Path) -> None:
    file = tmp_path / "broker.toml"
    file.write_text('issuer = "https://broker.acme.test"\ntrust_domain = "acme.test"\n')
    assert [one async for one in tickets(load(file))] == []


async def test_files_that_cannot_be_read_are_broken(desk: Desk) -> None:
    desk.credentials.chmod(0o644)
    desk.secret.write_text("short")
    system, webhook = await desk.look()
    assert (system.verdict, "chmod 600" in system.detail) == ("broken", True)
    assert (webhook.verdict, "16 to 512 bytes" in webhook.detail) == ("broken", True)
    assert not desk.server.asked, "without credentials nobody is asked"
    desk.credentials.unlink()
    desk.secret.unlink()
    assert {one.verdict for one in await desk.look()} == {"broken"}
    desk.credentials = desk.file("desk.credentials", "broker:hunter2")
    desk.secret = desk.file("desk.hook", "correct horse battery staple")
    assert {one.verdict for one in await desk.look()} == {"ok"}
    (system, _) = await desk.look(ca_file="/nonexistent.pem", url="https://127.0.0.1:1/{id}")
    assert system.verdict == "broken"


@pytest.mark.parametrize("status", [302, 401, 403, 500])
async def test_a_system_that_refuses_us_or_fails_is_broken(desk: Desk, status: int) -> None:
    desk.server.says(status=status)
    system, _ = await desk.look()
    assert (system.verdict, f"status {status}" in system.detail) == ("broken", True)
    assert "credentials" in system.fix


async def test_a_system_that_hangs_or_is_away_is_broken(desk: Desk) -> None:
    desk.server.hangs()
    system, _ = await desk.look(timeout_ms=100)
    assert (system.verdict, "no answer within 0.1 s" in system.detail) == ("broken", True)
    desk.server.floods()
    system, _ = await desk.look()
    assert (system.verdict, "larger than" in system.detail) == ("warning", True)


async def test_a_webhook_that_nobody_can_call_and_a_long_interval_without_one_are_told(desk: Desk) -> None:
    _, webhook, unheard = await desk.look(http="")
    assert (webhook.verdict, unheard.verdict) == ("ok", "broken")
    system, slow = await desk.look(webhook=False, poll_ms=60_000)
    assert (system.verdict, slow.verdict) == ("ok", "warning")
    assert "after 60 s" in slow.detail
    assert len(await desk.look(webhook=True, poll_ms=60_000)) == 2
