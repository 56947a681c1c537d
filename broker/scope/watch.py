"""Hears of changes: from attestors, from policies, from trust bundles; and notices who sees no more.

Each source is followed by one task. A source that ends, or fails, is begun anew; what it may have missed meanwhile is
taken as changed. What a source cannot see for `Bounds.blind_s` is refused, with all that rests on it.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Final

import structlog

from attestors.contract import Attestor, FactKey
from broker.decision.policy import Policy, Slice
from broker.errors import Reason
from broker.identity import identify
from broker.identity.spiffe_id import TrustDomain
from broker.identity.trust import TrustBundle, TrustSnapshot
from broker.scope.case import Cause
from broker.scope.deciding import Deciding
from broker.scope.live import Live
from broker.scope.scope import Scope
from broker.scope.suspension import Common

LOOK_S: Final = 0.25
"""How often it is looked who sees no more."""
FORGET_S: Final = 1.0
MAX_NAMED: Final = 64
"""Actions named in one suspension; more of them are all that the policy did not give."""
APPROVE: Final = "broker.approve"
_FIRST_PAUSE_S: Final = 0.1
_LONGEST_PAUSE_S: Final = 2.0

_log = structlog.get_logger(__name__)


class Watch:
    """One for each broker process. `run` it as a task.

    attestors: by name. policy, snapshot: what is in force, and trusted, when this is made; later ones are offered.
    """

    def __init__(
        self,
        scope: Scope,
        deciding: Deciding,
        attestors: Mapping[str, Attestor],
        clock: Callable[[], datetime],
        *,
        policy: Policy,
        snapshot: TrustSnapshot,
    ) -> None:
        self._scope, self._deciding, self._attestors, self._clock = scope, deciding, attestors, clock
        self._policy, self._bundles = policy, dict(snapshot.bundles)
        self._lost: dict[str, float] = {}  # attestors whose watch has ended, since when
        scope.told = self._told

    def _told(self, key: FactKey) -> None:
        """A fact changed, or may have."""
        source, _, rest = key.partition(":")
        if source != "action":  # those come together, with the policy
            common = Common(trust_domain=rest) if source == "bundle" else None
            self._deciding.note(Cause(name=key, key=key, common=common))

    async def run(self) -> None:
        """Watches until it is cancelled."""
        async with asyncio.TaskGroup() as group:
            for attestor in self._attestors.values():
                group.create_task(self._follow(attestor))
            group.create_task(self._look())

    async def _follow(self, attestor: Attestor) -> None:
        loop, pause = asyncio.get_running_loop(), _FIRST_PAUSE_S
        while True:
            started = loop.time()
            try:
                self._seen_again(attestor.name)
                async for key in attestor.watch():
                    self._scope.tell(key)
                why = "it ended"
            except Exception as error:  # noqa: BLE001 -- the edge to attestors: one that fails takes no other with it
                why = f"{type(error).__name__}: {error}"
            self._lost.setdefault(attestor.name, loop.time())
            _log.error("watch_failed", attestor=attestor.name, why=why)
            pause = _FIRST_PAUSE_S if loop.time() - started > pause else min(2 * pause, _LONGEST_PAUSE_S)
            await asyncio.sleep(pause)

    def _seen_again(self, name: str) -> None:
        if self._lost.pop(name, None) is not None:
            for key in self._scope.live.keys(f"{name}:"):
                self._scope.tell(key)

    async def _look(self) -> None:
        forget_at = 0.0
        while True:
            await asyncio.sleep(LOOK_S)
            now = asyncio.get_running_loop().time()
            if now >= forget_at:
                forget_at = now + FORGET_S
                self._scope.forget(self._clock())
            for prefix in self.blind(now - self._deciding.bounds.blind_s):
                await self._refuse_unseen(prefix)

    def blind(self, since: float) -> list[str]:
        """Prefixes of fact keys that have not been seen since then, in the event loop's seconds."""
        found = {f"{name}:": lost for name, lost in self._lost.items()}
        for attestor in self._attestors.values():
            for prefix, lost in attestor.blind().items():
                found[prefix] = min(lost, found.get(prefix, lost))
        return sorted(prefix for prefix, lost in found.items() if lost <= since)

    async def _refuse_unseen(self, prefix: str) -> None:
        unseen: dict[str, Live] = {}
        for key in self._scope.live.keys(prefix):
            lives = [one for one in self._scope.live.dependents(key) if not self._scope.is_refused(one.jti)]
            if lives:
                self._scope.tell(key)  # for what is about to be recorded
                unseen |= {one.jti: one for one in lives}
        if unseen:
            detail = f"nobody could look at {prefix} for {self._deciding.bounds.blind_s:g} s"
            why = Reason.ATTESTATION_UNAVAILABLE
            await self._deciding.refuse(unseen.values(), why, f"blind:{prefix}", detail=detail)

    # -- what decides ------------------------------------------------------------------------------------------------

    def offer_policy(self, policy: Policy) -> None:
        """Another policy decides from now on. Only what it decides about may have changed."""
        before, self._policy = self._policy, policy
        changed = frozenset(_changed(before.slices, policy.slices))
        if not changed:
            return
        for action in sorted(changed):
            self._scope.tell(FactKey(f"action:{action}"))
        if APPROVE in changed:  # whether an approval counts is those policies' to say, so each is looked at again
            for key in self._scope.live.keys("approval:"):
                self._scope.tell(key)
        named = changed if len(changed) <= MAX_NAMED else frozenset[str]()
        common = Common(policy_other_than=policy.revision, actions=named)
        self._deciding.note(Cause(name=f"policy:{policy.revision}", common=common, actions=changed))

    def offer_trust(self, snapshot: TrustSnapshot) -> None:
        """Other bundles are trusted from now on. An authority that came takes nothing away: only one that went does."""
        before, self._bundles = self._bundles, dict(snapshot.bundles)
        for domain in _changed_domains(before, self._bundles):
            self._scope.tell(FactKey(f"bundle:{domain.name}"))


def _changed(before: Mapping[str, Slice], after: Mapping[str, Slice]) -> Iterable[str]:
    for name in before.keys() | after.keys():
        old, new = before.get(name), after.get(name)
        if old is None or new is None or old.digest != new.digest:
            yield name


def _changed_domains(
    before: Mapping[TrustDomain, TrustBundle], after: Mapping[TrustDomain, TrustBundle]
) -> Iterable[TrustDomain]:
    for domain, bundle in before.items():
        left = after.get(domain)
        if left is None or (left != bundle and not identify.authorities(bundle) <= identify.authorities(left)):
            yield domain
