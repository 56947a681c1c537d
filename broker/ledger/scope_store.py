"""The ledger as scope sees it: refusals, standing entries, and what a process finds when it starts."""

import asyncio
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, Protocol, cast

from broker.ledger import records, scope_steps
from broker.ledger.operations import Operation
from broker.ledger.scope_records import BreakGlass, StandingDenial, StandingLifted, Suspended, SuspensionEnded
from broker.ledger.scope_steps import Kept


class Submit(Protocol):
    """`Ledger.submit`."""

    def __call__(self, operation: Operation, *, uses: str = "") -> "asyncio.Future[Any]":
        """See there."""


class ScopeStore:
    """Of one ledger. Every method that waits raises Unavailable, as the ledger's own do."""

    def __init__(self, submit: Submit, append_later: Callable[[records.Record], None]) -> None:
        self._submit, self._append_later = submit, append_later

    async def kept(self, now: datetime) -> Kept:
        """What was live, refused and standing when the process before this one ended."""
        return cast("Kept", await self._submit(scope_steps.FindKept(now=now)))

    async def refuse(self, refused: records.ScopeRefused, ends: Sequence[int]) -> int:
        """Keeps that they count no more, durably. ends: when each expires, seconds since 1970."""
        step = scope_steps.RefuseCredentials(body=records.encode(refused), jtis=refused.jtis, ends=tuple(ends))
        return cast("int", await self._submit(step))

    def append_later(self, record: Suspended | SuspensionEnded) -> None:
        """With the next commit."""
        self._append_later(record)

    async def deny(self, denial: StandingDenial) -> None:
        """Keeps a standing denial, durably, and covered by a checkpoint outside, as what follows."""
        await self._submit(scope_steps.Deny(denial=denial))

    async def permit(self, permit: BreakGlass) -> None:
        """Keeps a break-glass permit, and uses up the approvals of its request, both or neither.

        Raises: Refused APPROVAL_REQUIRED where they are used up, or one of its approvers' counts no more.
        """
        await self._submit(scope_steps.Permit(permit=permit), uses=permit.approval)

    async def lift(self, lifted: StandingLifted) -> None:
        """Ends one of them. Not checked: that there is one."""
        await self._submit(scope_steps.Lift(lifted=lifted))

    async def prove(self) -> int:
        """Reads the store now. How many records it has."""
        return cast("int", await self._submit(scope_steps.Prove()))
