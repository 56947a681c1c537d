"""Who is asking, for one request: the first stage of the flow, and where refusals are written down.

Every way in comes here with what it knows of the peer and gets back a caller or a `BrokerError`.
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Final

from broker.action import Action
from broker.credentials import dpop
from broker.credentials.action_token import Confirmation
from broker.credentials.jose import b64url
from broker.credentials.nonce import Nonces
from broker.decision.quota import Quota
from broker.errors import BrokerError, Reason, Refused, Unavailable
from broker.identity import identify
from broker.identity.identify import Entitlements, Identified, UnixPeer
from broker.identity.trust import TrustSnapshot
from broker.in_time import InTime
from broker.ledger.records import Refusal
from broker.ledger.store import Ledger
from broker.scope.scope import Scope

MAX_CALLERS: Final = 100_000  # of whom quotas remember what they used
_PROTOCOL_STEPS: Final = {Reason.NONCE_REQUIRED, Reason.QUOTA}  # counted, not written: a caller may make many


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyProof:
    """A DPoP proof as it came, with what it must be for. binding: where we handed its nonce out.

    token: shown beside it in `Authorization`, whose hash it then must have (RFC 9449 section 4.3, point 12).
    """

    proof: str | None = field(repr=False)
    method: str
    url: str
    binding: str
    token: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """An identity and the key it proved, for one request."""

    identity: Identified
    confirmation: Confirmation


@dataclass(slots=True, kw_only=True)
class Callers:
    """Identifies callers. The exchange is one.

    snapshot: the trust of this moment. entitlements: SPIRE's word on a process. quota: of one SPIFFE ID. attestations:
    of one user of this machine, whose processes nobody knows before they were attested. written: how many refusals of
    one SPIFFE ID are written down; the others are counted. scope: what is live, and what changed.
    """

    issuer: str
    snapshot: Callable[[], TrustSnapshot]
    entitlements: Entitlements
    ledger: Ledger
    quota: Quota
    attestations: Quota = field(default_factory=lambda: Quota(500, 1000, MAX_CALLERS))
    written: Quota = field(default_factory=lambda: Quota(1, 60, MAX_CALLERS))
    nonces: Nonces = field(default_factory=Nonces)
    scope: Scope = field(default_factory=Scope)

    async def identify_process(
        self, peer: UnixPeer, proof: KeyProof, wanted: str, now: datetime, correlation_id: str
    ) -> Caller:
        """The process behind a Unix socket: SPIRE, then the process again, then its key. Raises: BrokerError."""
        with self.counted():
            self.trust(now)
            self.attestations.take(str(peer.process.uid), asyncio.get_running_loop().time())
            heard = self.scope.heard  # before the look, so that what changes during it is a change since
            async with InTime():
                identity = await identify.by_process(peer, self.entitlements, now, wanted=wanted)
        jkt = self._prove(identity, proof, now, correlation_id)
        return _holding(replace(identity, heard=heard), Confirmation(jkt=jkt))

    def identify_certificate(
        self, chain: Sequence[bytes], proof: KeyProof, now: datetime, correlation_id: str
    ) -> Caller:
        """The holder of an X.509-SVID, bound to its certificate or, where it sends a proof, to that key instead."""
        identity = self.holder_of(chain, now)
        if proof.proof is not None:
            jkt = self._prove(identity, proof, now, correlation_id)
            return _holding(identity, Confirmation(jkt=jkt))
        self._admit(identity)
        if identity.leaf_sha256 is None:
            raise Unavailable(Reason.IDENTITY_UNAVAILABLE, "a certificate without a hash")
        return _holding(identity, Confirmation(x5t_s256=b64url(identity.leaf_sha256)))

    def holder_of(self, chain: Sequence[bytes], now: datetime) -> Identified:
        """Whose X.509-SVID it is, whether or not its quota is used up. Raises: BrokerError."""
        with self.counted():
            return replace(identify.by_certificate(chain, self.trust(now), now), heard=self.scope.heard)

    async def identify_assertion(self, assertion: str, proof: KeyProof, now: datetime, correlation_id: str) -> Caller:
        """The subject of a JWT-SVID, whose first proven key is the only one until it expires."""
        with self.counted():
            identity = identify.by_assertion(assertion, self.trust(now), now, issuer=self.issuer)
        identity = replace(identity, heard=self.scope.heard)
        jkt = self._prove(identity, proof, now, correlation_id)
        try:
            async with InTime(Reason.LEDGER_UNAVAILABLE):
                await self._bind(identity, jkt, now, correlation_id)
        except BrokerError as error:
            self.refused(identity, None, error, now, correlation_id, "identify")
            raise
        return _holding(identity, Confirmation(jkt=jkt))

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
        proven = dpop.verify_proof(proof.proof, method=proof.method, url=proof.url, now=now, token=proof.token)
        self.nonces.consume(proven.nonce, proof.binding, now)
        return proven.jkt

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


def _holding(identity: Identified, confirmation: Confirmation) -> Caller:
    """The caller, who proved this key."""
    key = confirmation.jkt or confirmation.x5t_s256 or ""
    return Caller(identity=replace(identity, confirmation=key), confirmation=confirmation)
