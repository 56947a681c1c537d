"""Facts from a ticket system: the ticket that a caller names, as it stands there now, and what it authorises.

The caller gives a name and nothing else. Whether the ticket is open, what it authorises and who answers for that is
read from the ticket system, anew at each request; between requests `watch` looks again. Who may write that into a
ticket is the ticket system's to say: a policy that believes it believes everybody who may.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext
from datetime import datetime
from typing import Final

from attestors.contract import AttestationFailed, AttestationRequest, AttestationUnavailable, FactKey, Facts
from attestors.ticket_mapping import TicketName
from attestors.ticket_polls import TicketPolls
from attestors.ticket_reads import Looked, TicketSystem

Look = Callable[[TicketName], Awaitable[Looked]]
"""`TicketReads.look`, of one ticket one at a time; who asks meanwhile may share the next one."""


ASKED: Final = 32
"""Looks for new requests at one system at a time; polls and re-decisions have the rest of its 100 connections."""


class _Asked:
    """Tickets of one system that new requests are about: `ASKED` at a time, with any number of requests each."""

    def __init__(self) -> None:
        self._places = asyncio.Semaphore(ASKED)
        self._about: dict[TicketName, tuple[asyncio.Task[bool], list[None]]] = {}

    @asynccontextmanager
    async def about(self, name: TicketName) -> AsyncIterator[None]:
        """While one request looks."""
        if name not in self._about:
            self._about[name] = asyncio.ensure_future(self._places.acquire()), []
        place, sharing = self._about[name]
        sharing.append(None)
        try:
            await asyncio.shield(place)
            yield
        finally:
            sharing.pop()
            if not sharing:
                del self._about[name]
                if place.done():
                    self._places.release()
                else:
                    place.cancel()


class TicketAttestor:
    """Fills `context.ticket` with `{"system", "id", "state", "authorises": [sorted], "authorised_by"}`.

    systems: by the name that callers say before the colon.
    """

    name = "ticket"

    def __init__(self, systems: Mapping[str, TicketSystem], look: Look) -> None:
        self._systems = dict(systems)
        self._look = look
        self._asked = {name: _Asked() for name in systems}
        self._polls = {name: TicketPolls(one.poll_s, look, self._note) for name, one in systems.items()}
        self._changed: dict[TicketName, float] = {}  # and when it may be told at the earliest
        self._some: asyncio.Event | None = None  # set while somebody listens

    async def attest(self, request: AttestationRequest, now: datetime) -> Facts | None:
        """Looks now. None: the caller names no ticket.

        Raises: AttestationFailed for a name that is none, another system's, or of a ticket that is not there or not
        open; AttestationUnavailable when the ticket cannot be read.
        """
        if not request.ticket:
            return None
        name = self._parse(request.ticket)
        # What callers ask for anew has a part of the connections: whoever names tickets without end shall not keep us
        # from looking at those that something rests on.
        asked = nullcontext() if request.credential else self._asked[name.system].about(name)
        async with asked:
            found = await self._look(name)
        if isinstance(found, AttestationFailed):
            self._polls[name.system].lost(name)
            raise AttestationFailed(f"{name}: {found}") from found
        if isinstance(found, AttestationUnavailable):
            raise AttestationUnavailable(f"{name}: {found}") from found
        self._polls[name.system].follow(name, found)
        return Facts(
            attestor=self.name,
            key=_key(name),
            values={
                "system": name.system,
                "id": name.id,
                "state": found.state,
                "authorises": [*found.authorises],
                "authorised_by": found.authorised_by,
            },
            attested_at=now,
        )

    def tell(self, system: str, ticket_id: str) -> bool:
        """Somebody says that this ticket may have changed: its key is told at once, and it is believed in nothing else.

        Whether the ticket is watched. Where it is not, nothing rests on it, and nobody is asked about it.
        """
        polls = self._polls.get(system)
        return polls is not None and polls.hint(TicketName(system, ticket_id))

    async def watch(self) -> AsyncIterator[FactKey]:
        """Yields the key of each ticket attested lately that changed or may have. For one reader at a time."""
        if self._some is not None:
            raise RuntimeError("tickets are watched already: one reader at a time")
        self._some = asyncio.Event()
        loop = asyncio.get_running_loop()
        polls = [loop.create_task(one.run()) for one in self._polls.values()]
        for poll in polls:
            poll.add_done_callback(lambda _: self._wake())
        try:
            while True:
                for name in await self._next(self._some, polls):
                    self._polls[name.system].was_told(name)
                    yield _key(name)
        finally:
            for poll in polls:
                poll.cancel()
            await asyncio.gather(*polls, return_exceptions=True)
            self._changed.clear()
            self._some = None

    def blind(self) -> Mapping[str, float]:
        """Systems that cannot be asked: `ticket:<system>:`, and since when."""
        since = {name: polls.blind_since for name, polls in self._polls.items()}
        return {f"{self.name}:{name}:": one for name, one in since.items() if one is not None}

    def _parse(self, text: str) -> TicketName:
        try:
            name = TicketName.parse(text)
        except ValueError as error:
            raise AttestationFailed(str(error)) from error
        system = self._systems.get(name.system)
        if system is None:
            raise AttestationFailed(f"no ticket system is called {name.system} here")
        if not system.takes(name.id):
            raise AttestationFailed(f"{name.id} is not how {name.system} numbers its tickets")
        return name

    def _note(self, name: TicketName, earliest: float) -> None:
        if self._some is not None:  # else nobody wants to know
            self._changed.setdefault(name, earliest)
            self._wake()

    def _wake(self) -> None:
        if self._some is not None:
            self._some.set()

    async def _next(self, some: asyncio.Event, polls: "Sequence[asyncio.Task[object]]") -> list[TicketName]:
        """Those that may be told now; waits until there is one."""
        loop = asyncio.get_running_loop()
        while True:
            for poll in polls:
                if poll.done():  # it never ends by itself
                    poll.result()
            some.clear()
            ready = [name for name, earliest in self._changed.items() if earliest <= loop.time()]
            if ready:
                for name in ready:
                    del self._changed[name]
                return ready
            try:
                async with asyncio.timeout_at(min(self._changed.values(), default=None)):
                    await some.wait()
            except TimeoutError:
                continue


def _key(name: TicketName) -> FactKey:
    return FactKey(f"{TicketAttestor.name}:{name}")
