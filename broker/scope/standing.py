"""What operators said beside policy: denials that stand, and permits for an emergency. No I/O.

A denial outweighs everything. A permit (break-glass) stands in for a policy that permits, and for nothing else: where a
policy forbids, evidence is missing, or an attestor says no, it changes nothing.
"""

from collections.abc import Iterable
from datetime import datetime

from broker.decision.decide import Permit
from broker.errors import Reason, Refused
from broker.ledger.scope_records import BreakGlass, StandingDenial
from broker.scope.live import is_principal

Entry = StandingDenial | BreakGlass


class Standing:
    """The entries in force, by id."""

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self._entries: dict[str, Entry] = {one.id: one for one in entries}

    def __len__(self) -> int:
        return len(self._entries)

    def entries(self, now: datetime) -> list[Entry]:
        """Those whose time is not over, the oldest first."""
        return sorted((one for one in self._entries.values() if _counts(one, now)), key=lambda one: one.at)

    def add(self, entry: Entry) -> None:
        """It counts from now on."""
        self._entries[entry.id] = entry

    def get(self, entry_id: str) -> Entry | None:
        """The one with this id."""
        return self._entries.get(entry_id)

    def remove(self, entry_id: str) -> None:
        """It counts no more."""
        self._entries.pop(entry_id, None)

    def given_by(self, approval: str, approver: str) -> list[BreakGlass]:
        """The permits that this approver's approval of the request with this digest gave."""
        permits = [one for one in self._entries.values() if isinstance(one, BreakGlass)]
        return [one for one in permits if one.approval == approval and approver in one.approvers]

    def permits(self) -> int:
        """How many break-glass permits are open."""
        return sum(isinstance(one, BreakGlass) for one in self._entries.values())

    def forget(self, now: datetime) -> list[Entry]:
        """Drops those whose time is over, and says which they were."""
        over = [one for one in self._entries.values() if not _counts(one, now)]
        for one in over:
            del self._entries[one.id]
        return over

    def require(self, principal: str, action: str, now: datetime) -> None:
        """Raises: Refused(REVOKED) where a denial stands against this."""
        for one in self._entries.values():
            if isinstance(one, StandingDenial) and _counts(one, now) and denies(one, principal, action):
                raise Refused(Reason.REVOKED, f"a standing denial: {one.id} by {one.by}")

    def permit(self, principal: str, action: str, resource: str, now: datetime) -> Permit | None:
        """The break-glass permit for exactly this, the one that lasts longest."""
        found = [
            one
            for one in self._entries.values()
            if isinstance(one, BreakGlass)
            and _counts(one, now)
            and (one.principal, one.action, one.resource) == (principal, action, resource)
        ]
        if not found:
            return None
        longest = max(found, key=lambda one: one.until)
        return Permit(id=longest.id, until=longest.until)


def denies(denial: StandingDenial, principal: str, action: str) -> bool:
    """Whether a denial is against this action of this principal."""
    return (
        denial.action in ("", action)
        and is_principal(principal, denial.principal)
        and denial.trust_domain in ("", principal.removeprefix("spiffe://").partition("/")[0])
    )


def _counts(entry: Entry, now: datetime) -> bool:
    return entry.until is None or now < entry.until
