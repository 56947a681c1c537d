"""Looks at tickets, and remembers what each said, so that a system that knows ETags need not say it again.

Every look is a question to the ticket system. What is remembered counts only where the system itself says, now, that
nothing has changed, or sends the same bytes again.
"""

import hashlib
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Protocol

from attestors.contract import AttestationFailed, AttestationUnavailable
from attestors.ticket_mapping import Content, TicketMapping, TicketName, is_ticket_id

REMEMBERED: Final = 16_384  # tickets, of all systems; 16 KiB each at most, and a few hundred bytes as a rule


class SystemAway(AttestationUnavailable):
    """The ticket system could not be asked, or would not tell: nothing was learned, and not of this ticket alone."""


@dataclass(frozen=True, slots=True)
class Version:
    """Which state of a ticket a system spoke of. etag: its own word for it. generation: of what we asked with."""

    etag: str
    generation: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """A ticket as it came. body: None where the known one still holds. version: None where the system told none."""

    body: bytes | None
    version: Version | None


class TicketSource(Protocol):
    """Asks a ticket system. Bounded in time and size."""

    async def get(self, ticket_id: str, known: Version | None = None) -> Page | None:
        """What it says of a ticket now. None: there is no such ticket.

        Raises: SystemAway; AttestationUnavailable where it answered, and that cannot be taken.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class TicketSystem:
    """source: asks it. mapping: what its answers mean. poll_s: between two looks at a watched ticket.

    ids: what a whole id looks like there, beyond what all ids are; None for no more.
    """

    source: TicketSource
    mapping: TicketMapping
    poll_s: float = 1.0
    ids: re.Pattern[str] | None = None

    def takes(self, ticket_id: str) -> bool:
        """Whether this can be the id of a ticket there."""
        return is_ticket_id(ticket_id) and (self.ids is None or self.ids.fullmatch(ticket_id) is not None)


Looked = Content | AttestationFailed | AttestationUnavailable
"""What a look at a ticket showed: what it says; that it is not open, or not there; or that it could not be read."""


@dataclass(frozen=True, slots=True)
class _Remembered:
    version: Version | None
    sha256: bytes
    content: Content


class TicketReads:
    """Looks at tickets of these systems. For one event loop, and of one ticket one look at a time."""

    def __init__(self, systems: Mapping[str, TicketSystem]) -> None:
        self._systems = dict(systems)
        self._remembered: OrderedDict[TicketName, _Remembered] = OrderedDict()

    async def look(self, name: TicketName) -> Looked:
        """Asks now. Returns its errors, so that who shares a look shares no traceback."""
        known = self._remembered.pop(name, None)
        try:
            found = await self._ask(name, known)
        except (AttestationFailed, AttestationUnavailable) as error:
            if known is not None and isinstance(error, SystemAway):
                self._remember(name, known)
            return error
        self._remember(name, found)
        return found.content

    async def _ask(self, name: TicketName, known: _Remembered | None) -> _Remembered:
        system = self._systems[name.system]
        page = await system.source.get(name.id, None if known is None else known.version)
        if page is None:
            raise AttestationFailed("the ticket system has no such ticket")
        if page.body is None:
            if known is None:
                raise SystemAway("nothing has changed, it says, and nothing is known")
            return known
        sha256 = hashlib.sha256(page.body).digest()
        if known is not None and known.sha256 == sha256:
            return _Remembered(page.version, sha256, known.content)
        return _Remembered(page.version, sha256, system.mapping.read(page.body, name.id))

    def _remember(self, name: TicketName, found: _Remembered) -> None:
        self._remembered[name] = found
        if len(self._remembered) > REMEMBERED:
            self._remembered.popitem(last=False)
