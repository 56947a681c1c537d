"""From what a ticket system answers to what a ticket says: where its state stands, and what it authorises.

Every system has another form, so an operator declares where things are. Nothing is guessed: what a declared pointer
does not lead to makes the ticket unreadable.
"""

import re
from dataclasses import dataclass
from typing import Any, Final

from attestors.contract import AttestationFailed, AttestationUnavailable
from attestors.json_pointer import Pointer
from attestors.strict_json import parse_object

MAX_AUTHORISED: Final = 1000  # strings
MAX_TEXT: Final = 16 * 1024  # characters of all that is taken from one ticket: it is remembered, and decided on

# Unreserved characters of RFC 3986 alone, the first a letter or digit: whatever it is, it is one piece of one segment
# of a path or of one value in a query, and never "." or "..".
_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SYSTEM: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True)
class TicketName:
    """Which ticket: `<system>:<id>`. system: as configured. id: as the system calls it. Made by `parse`."""

    system: str
    id: str

    @classmethod
    def parse(cls, text: str) -> "TicketName":
        """What a caller sent. Raises: ValueError."""
        system, colon, ticket_id = text.partition(":")
        if not colon or not _SYSTEM.fullmatch(system) or not is_ticket_id(ticket_id):
            raise ValueError("a ticket is named <system>:<id>")
        return cls(system, ticket_id)

    def __str__(self) -> str:
        return f"{self.system}:{self.id}"


def is_ticket_id(text: str) -> bool:
    """Whether it can be a ticket's id: 1 to 64 letters, digits, `.`, `_` and `-`, the first a letter or digit."""
    return bool(_ID.fullmatch(text))


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """What an open ticket says. authorises: sorted, each once. authorised_by: "" where that is not mapped."""

    state: str
    authorises: tuple[str, ...]
    authorised_by: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TicketMapping:
    """Where things stand in a system's answer.

    state: a string; a whole number, true and false count as their JSON text. open_states: in which a ticket authorises.
    authorises: a string, a list of strings, or, with `each`, a list of things in which `each` leads to one.
    authorised_by: a string. id: the ticket's own id, a string or a whole number. Some systems answer to several names
    of one ticket, or to a search: only the ticket that calls itself as it was called is taken, and where no id stands
    there is no such ticket.
    """

    state: Pointer
    open_states: frozenset[str]
    authorises: Pointer
    each: Pointer | None = None
    authorised_by: Pointer | None = None
    id: Pointer | None = None

    def read(self, body: bytes, ticket_id: str) -> Content:
        """What the ticket says. The caller has bounded the size of `body`.

        Raises: AttestationFailed where it is not open, or is another ticket; AttestationUnavailable where that cannot
        be told: no JSON object, a pointer that leads to nothing or to something else, or too much.
        """
        try:
            document = parse_object(body, "the ticket")
        except ValueError as error:
            raise AttestationUnavailable(str(error)) from error
        self._require_this(document, ticket_id)
        state = _as_text(_found(self.state, document, "state"))
        if state is None:
            raise _unreadable("state")
        if state not in self.open_states:
            raise AttestationFailed(f"the ticket is {state[:64]!r}, which is not among the open states")
        authorised_by = "" if self.authorised_by is None else _found(self.authorised_by, document, "authorised_by")
        if not isinstance(authorised_by, str):
            raise _unreadable("authorised_by")
        authorises = self._authorised(_found(self.authorises, document, "authorises"))
        if len(authorises) > MAX_AUTHORISED or sum(map(len, authorises)) + len(authorised_by) + len(state) > MAX_TEXT:
            raise AttestationUnavailable("the ticket says more than is read of one")
        return Content(state=state, authorises=tuple(sorted(authorises)), authorised_by=authorised_by)

    def _require_this(self, document: Any, ticket_id: str) -> None:
        if self.id is None:
            return
        try:
            found = self.id.find(document)
        except LookupError as error:
            raise AttestationFailed("the ticket system has found no such ticket") from error
        if _as_text(found) != ticket_id:
            raise AttestationFailed("the ticket system calls this ticket by another id: name it by that")

    def _authorised(self, found: Any) -> set[str]:
        """An empty field, which many systems give as null, authorises nothing."""
        if found is None:
            return set()
        if isinstance(found, list):
            every = found if self.each is None else [_found(self.each, one, "authorises_each") for one in found]
        else:
            every = [found] if self.each is None else [None]
        if not all(isinstance(one, str) for one in every):
            raise _unreadable("authorises")
        return {one for one in every if one}


def _found(pointer: Pointer, document: Any, what: str) -> Any:
    """Raises: AttestationUnavailable."""
    try:
        return pointer.find(document)
    except LookupError as error:
        raise AttestationUnavailable(f"the pointer to {what} leads to nothing in the ticket system's answer") from error


def _as_text(found: Any) -> str | None:
    """A string, whole number or truth value as text; None for anything else."""
    if isinstance(found, bool):
        return "true" if found else "false"
    return str(found) if isinstance(found, int | str) else None


def _unreadable(what: str) -> AttestationUnavailable:
    return AttestationUnavailable(f"the pointer to {what} leads to something else in the ticket system's answer")
