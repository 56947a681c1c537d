"""Registration entries: which process may have which SPIFFE ID, by selectors that must all hold, as in SPIRE."""

import re
import secrets
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from attestors.contract import Process
from broker.errors import Invalid
from broker.identity.peer import read_process
from broker.identity.spiffe_id import SpiffeId, TrustDomain

MAX_ENTRIES = 10_000
MAX_SELECTORS = 16
_SELECTOR = re.compile(
    r"unix:[ug]id:(0|[1-9][0-9]{0,9})|unix:path:/[^\0\n]{1,4095}|dev:process:[1-9][0-9]{0,9}:[0-9]{1,20}"
)
_PROCESS = "dev:process:"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One SPIFFE ID for the processes that have all of the selectors."""

    entry_id: str
    spiffe_id: SpiffeId
    selectors: frozenset[str]


class Entries:
    """The entries of one trust domain, in the order of their creation. on_change: called after each change."""

    def __init__(self, trust_domain: TrustDomain, on_change: Callable[[], None]) -> None:
        self._trust_domain = trust_domain
        self._on_change = on_change
        self._entries: dict[str, Entry] = {}

    def create(self, spiffe_id: str, selectors: Collection[str]) -> Entry:
        """Raises: Invalid when the ID is none of this domain's workloads, a selector is unknown, or there are too many.

        Entries for single processes that are gone are dropped on this occasion.
        """
        parsed = SpiffeId.parse(spiffe_id)
        if parsed.trust_domain != self._trust_domain or not parsed.path:
            raise Invalid(f"the SPIFFE ID is not {self._trust_domain}/something")
        if parsed.path.startswith("/spire/"):
            raise Invalid("/spire/ is kept for SPIRE's own servers and agents: choose another path")
        if not 0 < len(selectors) <= MAX_SELECTORS:
            raise Invalid(f"an entry has 1 to {MAX_SELECTORS} selectors")
        for selector in selectors:
            if not _SELECTOR.fullmatch(selector):
                raise Invalid(
                    "a selector is none of unix:uid:N, unix:gid:N, unix:path:/absolute/path, dev:process:PID:START_TIME"
                )
        self._entries = {key: entry for key, entry in self._entries.items() if not _gone(entry)}
        if len(self._entries) >= MAX_ENTRIES:
            raise Invalid(f"there are {MAX_ENTRIES} entries: delete one first")
        entry = Entry(entry_id=secrets.token_hex(16), spiffe_id=parsed, selectors=frozenset(selectors))
        self._entries[entry.entry_id] = entry
        self._on_change()
        return entry

    def delete(self, entry_id: str) -> bool:
        """Whether there was such an entry."""
        found = self._entries.pop(entry_id, None) is not None
        if found:
            self._on_change()
        return found

    def ids_of(self, process: Process) -> tuple[SpiffeId, ...]:
        """What this process may have now: each ID once, the oldest entry's first.

        Raises: OSError as read_process does, also when the process changed since `process` was read.
        """
        held = _selectors_of(process)
        found = [entry.spiffe_id for entry in self._entries.values() if entry.selectors <= held]
        return tuple(dict.fromkeys(found))


def _selectors_of(process: Process) -> frozenset[str]:
    path = Path(f"/proc/{process.pid}/exe").readlink()
    if read_process(process.pid) != process:  # looked at last: the path was this process's
        raise ProcessLookupError(f"process {process.pid} changed while it was looked at")
    return frozenset(
        {
            f"unix:uid:{process.uid}",
            f"unix:gid:{process.gid}",
            f"unix:path:{path}",
            f"{_PROCESS}{process.pid}:{process.start_time}",
        }
    )


def _gone(entry: Entry) -> bool:
    """Whether it is for one process, and that has exited."""
    for selector in entry.selectors:
        if selector.startswith(_PROCESS):
            pid, _, start_time = selector.removeprefix(_PROCESS).partition(":")
            try:
                return read_process(int(pid)).start_time != int(start_time)
            except ProcessLookupError:
                return True
            except PermissionError:  # there is one; whether it is the same we may not see
                return False
    return False
