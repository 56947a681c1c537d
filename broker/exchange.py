"""The flow, as code: identify → attest → decide → record the intent → mint → record the outcome.

This is the only orchestrator. Every way in comes here with what it knows of the peer and gets back a token or a
`BrokerError`; every way out is in the ledger, or counted there when nobody was identified yet.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Final, Protocol, TypeVar

import msgspec

from attestors.contract import AttestationRequest, Facts
from broker.action import Action
from broker.artifacts import SigningRequest
from broker.callers import MAX_CALLERS, Caller, Callers, KeyProof
from broker.credentials import action_token, mint
from broker.credentials.keyring import KeyRing
from broker.credentials.mint import ACTION_TOKEN, Kind
from broker.decision.attest import Attestation
from broker.decision.decide import Grant, decide
from broker.decision.lacking import lacks_approval
from broker.decision.question import PROVENANCE
from broker.decision.rules import IDENTIFIED
from broker.decision.store import PolicyStore
from broker.errors import ApprovalRequired, BrokerError, Reason, Refused
from broker.identity import identify
from broker.identity.identify import Identified
from broker.in_time import InTime
from broker.intents import intent_of
from broker.ledger.records import Intent, Outcome
from broker.presented import NOTHING, Presented
from broker.scope.live import Live, live_of

__all__ = ["MAX_CALLERS", "Caller", "Exchange", "Issued", "KeyProof", "Presented"]

_T = TypeVar("_T")
TRIES: Final = 3  # of a request whose facts change while it is recorded; then it is refused as superseded


@dataclass(frozen=True, slots=True, kw_only=True)
class Issued:
    """A minted token. It is shown to its caller and kept nowhere."""

    token: str = field(repr=False)
    claims: action_token.Claims


class ApprovalDesk(Protocol):
    """Where requests that lack approvals are laid down (approvals.py)."""

    async def needed(
        self, caller: Identified, action: Action, request_id: str, now: datetime, correlation_id: str
    ) -> ApprovalRequired:
        """Records that the request waits, and says what is to be approved. Raises: BrokerError."""


Asked = Callable[[], Action]
"""Makes the action from what was sent. The exchange calls it, so that what is malformed is recorded like all else."""


@dataclass(slots=True, kw_only=True)
class Exchange(Callers):
    """Holds the rooms together. One for each broker process."""

    policies: PolicyStore
    attestation: Attestation
    keyring: KeyRing
    desk: ApprovalDesk | None = None

    async def request(
        self, caller: Caller, asked: Asked, now: datetime, correlation_id: str, presented: Presented = NOTHING
    ) -> Issued:
        """One action token. Raises: BrokerError; then nothing was minted, and the refusal is in the ledger."""
        action = None
        try:
            action = asked()
            presented.require_readable()
            asked_for = action
            async with InTime() as bound:
                return await self.while_it_holds(
                    caller, now, lambda who: self._request(who, asked_for, presented, bound, now, correlation_id)
                )
        except BrokerError as error:
            self.refused(caller.identity, action, error, now, correlation_id, "request")
            raise

    async def while_it_holds(self, caller: Caller, now: datetime, attempt: Callable[[Caller], Awaitable[_T]]) -> _T:
        """What `attempt` gives. Where facts changed while it was recorded it is made again, after a fresh look.

        Raises: what `attempt` does; Refused(SUPERSEDED) where that came about `TRIES` times.
        """
        left = TRIES
        while True:
            left -= 1
            try:
                return await attempt(caller)
            except Refused as error:
                if error.reason is not Reason.SUPERSEDED or not left:
                    raise
            caller = replace(caller, identity=await self.identify_again(caller.identity, now))

    async def _request(
        self,
        caller: Caller,
        action: Action,
        presented: Presented,
        bound: InTime,
        now: datetime,
        correlation_id: str,
    ) -> Issued:
        bound.reason = Reason.ATTESTATION_UNAVAILABLE
        try:
            grant = await self.decide(caller.identity, action, now, presented)
        except Refused as error:
            raise await self.unless_approved(caller, action, error, presented, now, correlation_id) from error
        bound.reason = Reason.LEDGER_UNAVAILABLE
        return await self.issue(caller, grant, now, correlation_id, presented=presented)

    async def identify_again(self, identity: Identified, now: datetime) -> Identified:
        """The same caller, after a fresh look at its process and at who vouches for it. Raises: BrokerError."""
        heard = self.scope.heard
        again = await identify.again(identity, self.entitlements, now)
        trust = self.trust(now)
        trust.bundle_for(again.spiffe_id.trust_domain)
        if again.authority_sha256 is not None:
            identify.require_authority(again.authority_sha256, again.spiffe_id, trust)
        return replace(again, heard=heard)

    def knows_all(self, action: str, known: Mapping[str, Facts]) -> bool:
        """Whether deciding on these facts asks no attestor."""
        piece = self.policies.current.slice(action)
        return piece is None or piece.attestors - IDENTIFIED <= known.keys()

    async def decide(
        self, identity: Identified, action: Action, now: datetime, presented: Presented = NOTHING
    ) -> Grant:
        """Fresh facts, then policy. Raises: BrokerError; Refused(APPROVAL_REQUIRED) where only approvals lack."""
        heard = self.scope.heard if identity.heard is None else identity.heard
        principal = str(identity.principal)
        self.scope.standing.require(principal, action.name, now)
        request = AttestationRequest(
            principal=principal,
            process=identity.process,
            known=identity.known,
            parameters=action.parameters,
            action_digest=action.digest,
            request_id=presented.request_id,
            ticket=presented.ticket,
            session=presented.session,
            confirmation=identity.confirmation,
            evidence=presented.evidence,
            credential=presented.credential,
        )
        while True:
            policy = self.policies.current
            piece = policy.slice(action.name)
            if piece is None:
                raise Refused(Reason.UNKNOWN_ACTION, f"no policy folder declares the action {action.name}")
            facts = await self.attestation.gather(piece, request, now, presented.named)
            if policy is not self.policies.current:  # it changed while we looked, and may want other facts
                heard = self.scope.heard if identity.heard is None else identity.heard
                continue
            permit = self.scope.standing.permit(principal, action.name, action.resource, now)
            try:
                return decide(
                    policy,
                    identity.principal,
                    action,
                    facts,
                    now,
                    not_after=identity.expires_at,
                    permit=permit,
                    heard=heard,
                )
            except Refused as error:
                if error.reason is Reason.DENIED and lacks_approval(policy, identity.principal, action, facts):
                    raise Refused(Reason.APPROVAL_REQUIRED, error.detail) from error
                raise

    async def unless_approved(
        self, caller: Caller, action: Action, error: Refused, presented: Presented, now: datetime, correlation_id: str
    ) -> Refused:
        """What to raise for `error`: where approvals are lacking, the request is laid down for approvers first."""
        if error.reason is not Reason.APPROVAL_REQUIRED or self.desk is None or not presented.request_id:
            return error
        return await self.desk.needed(caller.identity, action, presented.request_id, now, correlation_id)

    async def issue(
        self,
        caller: Caller,
        grant: Grant,
        now: datetime,
        correlation_id: str,
        *,
        presented: Presented = NOTHING,
        kind: Kind = ACTION_TOKEN,
        signing: SigningRequest | None = None,
    ) -> Issued:
        """Records the intent, mints, records the outcome. Raises: BrokerError; then nothing was minted."""
        key = self.keyring.current(now)
        draft = mint.draft(grant, caller.confirmation, issuer=self.issuer, kid=key.kid, now=now, kind=kind)
        intended = intent_of(
            caller.identity,
            grant,
            now,
            correlation_id,
            jti=draft.claims.jti,
            cnf=msgspec.to_builtins(draft.claims.cnf),
            use=draft.claims.use,
            expires_at=draft.claims.expires_at,
            key_id=draft.kid,
            credential=kind.credential,
            epoch=self.ledger.epoch,
            presented=presented,
            signing=signing,
        )
        live = self.enter(intended, caller.identity, grant, now)
        try:
            recording = self.ledger.record_intent(intended, current=live.is_current, evidence=evidence_of(grant))
            intent = await asyncio.shield(recording)
        except asyncio.CancelledError:
            # The caller went away. If the intent still becomes durable, say that nothing came of it.
            self.scope.leave(live)
            recording.add_done_callback(lambda done: self._abandon(done, now, correlation_id))
            raise
        except BrokerError:
            self.scope.leave(live)
            raise
        try:
            self.scope.confirm(live, intent)
        except Refused:
            self.ledger.append_later(Outcome(at=now, correlation_id=correlation_id, intent=intent, result="failed"))
            raise
        token = mint.sign(draft, key)
        self.ledger.append_later(
            Outcome(
                at=now,
                correlation_id=correlation_id,
                intent=intent,
                result="issued",
                credential_sha256=mint.fingerprint(token),
            )
        )
        return Issued(token=token, claims=draft.claims)

    def enter(self, intended: Intent, identity: Identified, grant: Grant, now: datetime) -> Live:
        """What is about to be recorded, known to scope from here on. Raises: Refused(SUPERSEDED, …), Unavailable."""
        live = live_of(intended, {**identity.known, **grant.facts}, permit=grant.permit)
        self.scope.enter(live, grant.heard, now)
        return live

    def _abandon(self, recording: "asyncio.Future[int]", now: datetime, correlation_id: str) -> None:
        if not recording.cancelled() and recording.exception() is None:
            self.ledger.append_later(
                Outcome(at=now, correlation_id=correlation_id, intent=recording.result(), result="failed")
            )


def evidence_of(grant: Grant) -> tuple[Facts, ...]:
    """Those of its facts that nobody can look at again without the caller."""
    return tuple(facts for name, facts in grant.facts.items() if name == PROVENANCE)
