"""Tickets that are watched, with the attestor wired as the broker wires it, and what was told of them."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from typing import Any

from support.processes import until
from support.tickets import MAPPING, TicketServer

from attestors.contract import AttestationRequest
from attestors.ticket import TicketAttestor
from attestors.ticket_polls import TicketPolls
from attestors.ticket_reads import TicketReads, TicketSystem
from broker.identity.turns import Turns

NOW = datetime(2031, 5, 6, 7, 8, 9, tzinfo=UTC)
LONG_S = 3600.0
SHORT_S = 0.1


class Watched:
    """An attestor and who listens to it. told: the ids of what was told, in order."""

    def __init__(self, attestor: TicketAttestor) -> None:
        self.attestor = attestor
        self.told: list[str] = []
        self._listening: asyncio.Task[None] | None = None

    @property
    def polls(self) -> TicketPolls:
        return self.attestor._polls["desk"]

    async def attest(self, *ids: str) -> None:
        for ticket_id in ids:
            request = AttestationRequest(principal="spiffe://acme.test/agent", ticket=f"desk:{ticket_id}")
            assert await self.attestor.attest(request, NOW)

    async def listen(self) -> None:
        async for key in self.attestor.watch():
            self.told.append(key.removeprefix("ticket:desk:"))

    async def hears(self, *ids: str) -> None:
        """Exactly these are told, in any order."""
        await until(lambda: len(self.told) >= len(ids), f"{ids} are told")
        assert sorted(self.told) == sorted(ids)
        self.told.clear()

    @property
    def is_blind(self) -> bool:
        return set(self.attestor.blind()) == {"ticket:desk:"}


@asynccontextmanager
async def watching(server: TicketServer, poll_s: float = LONG_S, **options: Any) -> AsyncIterator[Watched]:
    async with server.source(**options) as source:
        systems = {"desk": TicketSystem(source=source, mapping=MAPPING, poll_s=poll_s)}
        turns = Turns(TicketReads(systems).look)
        watched = Watched(TicketAttestor(systems, turns.ask))
        listening = asyncio.create_task(watched.listen())
        await until(lambda: watched.attestor._some is not None, "it is listened to")
        try:
            yield watched
        finally:
            listening.cancel()
            with suppress(asyncio.CancelledError):
                await listening
            await turns.close()


async def looked_again(server: TicketServer, *ids: str) -> None:
    """Twice, so that one look was begun and ended after now."""
    before = {ticket_id: server.asked[ticket_id] for ticket_id in ids}
    await until(lambda: all(server.asked[one] >= count + 2 for one, count in before.items()), "it is looked at")
