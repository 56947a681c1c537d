"""The flow, as code: identify → attest → decide → record the intent → mint → record the outcome.

This is the only orchestrator. Every way in comes here with what it knows of the peer and gets back a token or a
`BrokerError`; every way out is in the ledger, or counted there when nobody was identified yet.
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final, Protocol

import msgspec

from attestors.contract import AttestationRequest
from broker.action import Action, check_random_id
from broker.artifacts import SigningRequest
from broker.credentials import action_token, dpop, mint
from broker.credentials.action_token import Confirmation
from broker.credentials.jose import b64url
from broker.credentials.keyring import KeyRing
from broker.credentials.mint import ACTION_TOKEN, Kind
from broker.credentials.nonce import Nonces
from broker.decision.attest import Attestation
from broker.decision.decide import Grant, decide
from broker.decision.lacking import lacks_approval
from broker.decision.quota import Quota
from broker.decision.store import PolicyStore
from broker.errors import ApprovalRequired, BrokerError, Reason, Refused, Unavailable
from broker.identity import identify
from broker.identity.identify import Entitlements, Identified, UnixPeer
from broker.identity.trust import TrustSnapshot
from broker.in_time import InTime
from broker.intents import intent_of
from broker.ledger.records import Outcome, Refusal
from broker.ledger.store import Ledger

MAX_CALLERS: Final = 100_000  # of whom quotas remember what they used
_PROTOCOL_STEPS: Final = {Reason.NONCE_REQUIRED, Reason.QUOTA}  # counted, not written: a caller may make many


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyProof:
    """A DPoP proof as it came, with what it must be for. binding: where we handed its nonce out."""

    proof: str | None = field(repr=False)
    method: str
    url: str
    binding: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """An identity and the key it proved, for one request."""

    identity: Identified
    confirmation: Confirmation


@dataclass(frozen=True, slots=True, kw_only=True)
class Issued:
    """A minted token. It is shown to its caller and kept nowhere."""

    token: str = field(repr=False)
    claims: action_token.Claims


@dataclass(frozen=True, slots=True, kw_only=True)
class Presented:
    """What a caller shows beside its identity, for one decision.

    request_id: its own id of this request, to which approvals are given; "" for none. evidence: not verified, by
    attestor. credential: the id of the credential that is decided again, "" where none is minted yet.
    """

    request_id: str = ""
    evidence: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    credential: str = ""


NOTHING: Final = Presented()


class ApprovalDesk(Protocol):
    """Where requests that lack approvals are laid down (approvals.py)."""

    async def needed(
        self, caller: Identified, action: Action, request_id: str, now: datetime, correlation_id: str
    ) -> ApprovalRequired:
        """Records that the request waits, and says what is to be approved. Raises: BrokerError."""


Asked = Callable[[], Action]
"""Makes the action from what was sent. The exchange calls it, so that what is malformed is recorded like all else."""


@dataclass(slots=True, kw_only=True)
class Exchange:
    """Holds the rooms together. One for each broker process.

    snapshot: the trust of this moment. entitlements: SPIRE's word on a process. quota: of one SPIFFE ID. attestations:
    of one user of this machine, whose processes nobody knows before they were attested. written: how many refusals of
    one SPIFFE ID are written down; the others are counted.
    """

    issuer: str
    snapshot: Callable[[], TrustSnapshot]
    entitlements: Entitlements
    policies: PolicyStore
    attestation: Attestation
    ledger: Ledger
    keyring: KeyRing
    quota: Quota
    attestations: Quota = field(default_factory=lambda: Quota(500, 1000, MAX_CALLERS))
    written: Quota = field(default_factory=lambda: Quota(1, 60, MAX_CALLERS))
    nonces: Nonces = field(default_factory=Nonces)
    desk: ApprovalDesk | None = None

    # -- identify ----------------------------------------------------------------------------------------------------

    async def identify_process(
        self, peer: UnixPeer, proof: KeyProof, wanted: str, now: datetime, correlation_id: str
    ) -> Caller:
        """The process behind a Unix socket: SPIRE, then the process again, then its key. Raises: BrokerError."""
        with self.counted():
            self.trust(now)
            self.attestations.take(str(peer.process.uid), asyncio.get_running_loop().time())
            async with InTime():
                identity = await identify.by_process(peer, self.entitlements, now, wanted=wanted)
        jkt = self._prove(identity, proof, now, correlation_id)
        return Caller(identity=identity, confirmation=Confirmation(jkt=jkt))

    def identify_certificate(
        self, chain: Sequence[bytes], proof: KeyProof, now: datetime, correlation_id: str
    ) -> Caller:
        """The holder of an X.509-SVID, bound to its certificate or, where it sends a proof, to that key instead."""
        identity = self.holder_of(chain, now)
        if proof.proof is not None:
            jkt = self._prove(identity, proof, now, correlation_id)
            return Caller(identity=identity, confirmation=Confirmation(jkt=jkt))
        self._admit(identity)
        if identity.leaf_sha256 is None:
            raise Unavailable(Reason.IDENTITY_UNAVAILABLE, "a certificate without a hash")
        return Caller(identity=identity, confirmation=Confirmation(x5t_s256=b64url(identity.leaf_sha256)))

    def holder_of(self, chain: Sequence[bytes], now: datetime) -> Identified:
        """Whose X.509-SVID it is, whether or not its quota is used up. Raises: BrokerError."""
        with self.counted():
            return identify.by_certificate(chain, self.trust(now), now)

    async def identify_assertion(self, assertion: str, proof: KeyProof, now: datetime, correlation_id: str) -> Caller:
        """The subject of a JWT-SVID, whose first proven key is the only one until it expires."""
        with self.counted():
            identity = identify.by_assertion(assertion, self.trust(now), now, issuer=self.issuer)
        jkt = self._prove(identity, proof, now, correlation_id)
        try:
            async with InTime(Reason.LEDGER_UNAVAILABLE):
                await self._bind(identity, jkt, now, correlation_id)
        except BrokerError as error:
            self.refused(identity, None, error, now, correlation_id, "identify")
            raise
        return Caller(identity=identity, confirmation=Confirmation(jkt=jkt))

    async def _bind(self, identity: Identified, jkt: str, now: datetime, correlation_id: str) -> None:
        """Makes `jkt` the assertion's key, unless it has another. Raises: Refused, Unavailable."""
        self._require_of_this_epoch(identity)
        if identity.assertion_sha256 is None:
            raise Unavailable(Reason.IDENTITY_UNAVAILABLE, "an assertion without a hash")
        bound = await self.ledger.bind_key(
            identity.assertion_sha256, jkt, identity.expires_at, now=now, correlation_id=correlation_id
        )
        if bound != jkt:
            raise Refused(Reason.KEY_MISMATCH, "the JWT-SVID was first used with another key")

    def _require_of_this_epoch(self, identity: Identified) -> None:
        """A store that was put back has forgotten which key an older assertion is bound to. Raises: Refused."""
        issued_at = identity.issued_at
        if self.ledger.epoch > 1 and (issued_at is None or issued_at < self.ledger.epoch_since):
            raise Refused(Reason.EXPIRED, "the JWT-SVID is older than the ledger's epoch: fetch a new one")

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Counts a refusal inside: of somebody who is not identified yet, so nothing is written for each."""
        try:
            yield
        except BrokerError as error:
            self.ledger.count_refusal(error.reason)
            raise

    def trust(self, now: datetime) -> TrustSnapshot:
        """Whom we trust now. Raises: Unavailable when our own SVID has ended."""
        snapshot = self.snapshot()
        if snapshot.own is None or now >= snapshot.own.not_after:
            # Bundles are no fresher than our own SVID: when it has ended, neither can be trusted any more.
            raise Unavailable(Reason.IDENTITY_UNAVAILABLE, "our own SVID has ended: is the SPIRE agent running?")
        return snapshot

    def admit_more(self, caller: Caller, count: int) -> None:
        """Counts `count` further requests against the caller's quota: a batch costs what it holds. Raises: Refused.

        All of them or none. The one that identified the caller stays counted, and comes again when it asks again.
        """
        self._admit(caller.identity, count, ahead=1)

    def _admit(self, identity: Identified, n: int = 1, *, ahead: int = 0) -> None:
        with self.counted():
            self.quota.take(str(identity.principal), asyncio.get_running_loop().time(), n, ahead=ahead)

    def _prove(self, identity: Identified, proof: KeyProof, now: datetime, correlation_id: str) -> str:
        """The thumbprint of the key that the caller holds. The caller is known here, so a bad proof is written down."""
        self._admit(identity)
        try:
            return self._proven_key(proof, now)
        except Refused as error:
            self.refused(identity, None, error, now, correlation_id, "identify")
            raise

    def _proven_key(self, proof: KeyProof, now: datetime) -> str:
        if proof.proof is None:
            raise Refused(Reason.NONCE_REQUIRED, "no key proof")
        proven = dpop.verify_proof(proof.proof, method=proof.method, url=proof.url, now=now)
        self.nonces.consume(proven.nonce, proof.binding, now)
        return proven.jkt

    # -- attest, decide, record, mint --------------------------------------------------------------------------------

    async def request(
        self, caller: Caller, asked: Asked, now: datetime, correlation_id: str, *, request_id: str = ""
    ) -> Issued:
        """One action token. Raises: BrokerError; then nothing was minted, and the refusal is in the ledger."""
        action = None
        try:
            action = asked()
            require_request_id(request_id)
            presented = Presented(request_id=request_id)
            async with InTime() as bound:
                try:
                    grant = await self.decide(caller.identity, action, now, presented)
                except Refused as error:
                    raise await self.unless_approved(caller, action, error, presented, now, correlation_id) from error
                bound.reason = Reason.LEDGER_UNAVAILABLE
                return await self.issue(caller, grant, now, correlation_id, presented=presented)
        except BrokerError as error:
            self.refused(caller.identity, action, error, now, correlation_id, "request")
            raise

    async def decide(
        self, identity: Identified, action: Action, now: datetime, presented: Presented = NOTHING
    ) -> Grant:
        """Fresh facts, then policy. Raises: BrokerError; Refused(APPROVAL_REQUIRED) where only approvals lack."""
        request = AttestationRequest(
            principal=str(identity.principal),
            process=identity.process,
            known=identity.known,
            parameters=action.parameters,
            action_digest=action.digest,
            request_id=presented.request_id,
            evidence=presented.evidence,
            credential=presented.credential,
        )
        while True:
            policy = self.policies.current
            piece = policy.slice(action.name)
            if piece is None:
                raise Refused(Reason.UNKNOWN_ACTION, f"no policy folder declares the action {action.name}")
            facts = await self.attestation.gather(piece, request, now)
            if policy is not self.policies.current:  # it changed while we looked, and may want other facts
                continue
            try:
                return decide(policy, identity.principal, action, facts, now, not_after=identity.expires_at)
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
            request_id=presented.request_id,
            signing=signing,
        )
        recording = self.ledger.record_intent(intended)
        try:
            intent = await asyncio.shield(recording)
        except asyncio.CancelledError:
            # The caller went away. If the intent still becomes durable, say that nothing came of it.
            recording.add_done_callback(lambda done: self._abandon(done, now, correlation_id))
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

    def _abandon(self, recording: "asyncio.Future[int]", now: datetime, correlation_id: str) -> None:
        if not recording.cancelled() and recording.exception() is None:
            self.ledger.append_later(
                Outcome(at=now, correlation_id=correlation_id, intent=recording.result(), result="failed")
            )

    def refused(
        self,
        identity: Identified,
        action: Action | None,
        error: BrokerError,
        now: datetime,
        correlation_id: str,
        stage: str,
    ) -> None:
        """Writes a known caller's refusal down; what a caller may cause in any number is counted instead."""
        if error.reason in _PROTOCOL_STEPS or not self._is_written(str(identity.principal)):
            self.ledger.count_refusal(error.reason)
            return
        self.ledger.append_later(
            Refusal(
                at=now,
                correlation_id=correlation_id,
                reason=error.reason,
                detail=error.detail,
                principal=str(identity.principal),
                action="" if action is None else action.name,
                resource="" if action is None else action.resource,
                audience="" if action is None else action.audience,
                action_digest="" if action is None else action.digest.hex(),
                edge=identity.transport,
                stage=stage,
            )
        )

    def _is_written(self, principal: str) -> bool:
        """Whether one more refusal of it is: known callers, too, must not fill the disk."""
        try:
            self.written.take(principal, asyncio.get_running_loop().time())
        except Refused:
            return False
        return True


def require_request_id(request_id: str) -> None:
    """Raises: Invalid unless it is empty or what a caller chose at random."""
    if request_id:
        check_random_id(request_id, "a request id")
