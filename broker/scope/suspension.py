"""Credentials that are refused until they have been decided again, named one by one or by what they have in common."""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from broker.scope.live import Live, is_principal

BY_NAME: Final = 512
"""More than so many are named by what they have in common."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Common:
    """What all of them have in common; a field that is empty says nothing. As in `Suspension` of scope.proto."""

    policy_other_than: str = ""
    actions: frozenset[str] = frozenset()
    principal: str = ""
    trust_domain: str = ""

    def fits(self, live: Live) -> bool:
        """Whether it has all of it."""
        return (
            (not self.policy_other_than or live.policy_revision != self.policy_other_than)
            and (not self.actions or live.action in self.actions)
            and is_principal(live.principal, self.principal)
            and self.trust_domain in ("", live.trust_domain)
        )


@dataclass(slots=True, eq=False, kw_only=True)
class Suspension:
    """One of them.

    id: this process's count. cause: what changed. common: None where they are named one by one. waiting: those that are
    not decided yet, by `jti`. released: those that were decided, or came later, and count. refused: how many do not.
    untold: what is done when guards have heard of those.
    """

    id: int
    cause: str
    common: Common | None
    waiting: dict[str, Live]
    released: dict[str, str] = field(default_factory=dict)
    refused: int = 0
    untold: list[asyncio.Future[None]] = field(default_factory=list)

    @classmethod
    def of(cls, number: int, cause: str, lives: Iterable[Live], common: Common | None) -> "Suspension":
        """Of these. common: what they have in common, if there is something to name them by."""
        waiting = {one.jti: one for one in lives}
        return cls(id=number, cause=cause, common=common if len(waiting) > BY_NAME else None, waiting=waiting)

    def fits(self, live: Live) -> bool:
        """Whether a guard takes a credential that was not among them for one of them."""
        return self.common is not None and live.jti not in self.waiting and self.common.fits(live)
