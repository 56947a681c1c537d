"""Signing: a grant for one signature, then the signature, by a key made for it or by a key that never leaves its token.

A key that is made for a signature signs once, is certified and is dropped: a certificate stands for one signature, and
nothing else can ever verify under it.
"""

from collections.abc import Sequence
from datetime import datetime

from broker.action import Action
from broker.acts import Certificate, Means, Signature, Signed
from broker.artifacts import SigningRequest, signing_request
from broker.credentials import mint
from broker.credentials.signing_grant import LONGEST, csr_nonce
from broker.decision.decide import Grant
from broker.errors import BrokerError, Reason, Refused
from broker.exchange import Asked, Caller, Exchange, Issued
from broker.in_time import InTime
from broker.presented import Presented
from broker.provenance import decide_by_provenance
from broker.redemption import Redemption
from broker.spending import Presenter, Spending


class Signing:
    """Grants, signatures and certificates. One for each broker process; close it to wait for what is under way."""

    def __init__(self, exchange: Exchange, means: Means) -> None:
        self._exchange, self._means = exchange, means
        self._redemption = Redemption(exchange)

    async def close(self) -> None:
        """Waits for signatures that are under way."""
        await self._redemption.close()

    async def grant(
        self,
        caller: Caller,
        asked: Asked,
        provenance: Sequence[bytes],
        presented: Presented,
        now: datetime,
        correlation_id: str,
    ) -> Issued:
        """Leave for one signature. Raises: BrokerError; ApprovalRequired where only approvals are lacking.

        It uses its approvals up, also where its answer never reaches the caller: a grant is a credential, and kept
        nowhere that it could be sent again from. Then the caller asks under another id, and is approved anew.
        """
        exchange, action = self._exchange, None
        try:
            action = asked()
            signing = signing_request(action, issuer=exchange.issuer)
            presented.require_readable()
            asked_for = action

            async def attempt(who: Caller) -> Issued:
                bound.reason = Reason.ATTESTATION_UNAVAILABLE
                grant = await self._decide(who, asked_for, signing, provenance, presented, now, correlation_id)
                self._means.require(signing, now + LONGEST)
                bound.reason = Reason.LEDGER_UNAVAILABLE
                return await exchange.issue(
                    who, grant, now, correlation_id, presented=presented, kind=mint.SIGNING_GRANT, signing=signing
                )

            async with InTime() as bound:
                return await exchange.while_it_holds(caller, now, attempt)
        except BrokerError as error:
            exchange.refused(caller.identity, action, error, now, correlation_id, "sign")
            raise

    async def _decide(
        self,
        caller: Caller,
        action: Action,
        signing: SigningRequest,
        provenance: Sequence[bytes],
        presented: Presented,
        now: datetime,
        correlation_id: str,
    ) -> Grant:
        exchange = self._exchange
        try:
            return await decide_by_provenance(
                exchange,
                caller.identity,
                action,
                provenance,
                presented,
                now,
                require=lambda grant: self._means.require_certifiable(signing, grant),
            )
        except Refused as error:
            if error.reason is Reason.APPROVAL_REQUIRED:  # nobody is asked to approve what we cannot do
                self._means.require(signing, now + LONGEST)
            raise await exchange.unless_approved(caller, action, error, presented, now, correlation_id) from error

    async def forsake(
        self, presenter: Presenter, grant: str, refusal: Refused, now: datetime, correlation_id: str
    ) -> None:
        """See Redemption.forsake."""
        await self._redemption.forsake(presenter, grant, refusal, now, correlation_id)

    async def sign(
        self, caller: Caller, spending: Spending, statement: bytes, now: datetime, correlation_id: str
    ) -> Signed:
        """The one signature of a grant. statement: what to sign as DSSE; empty to sign the artifact's digest.

        Raises: BrokerError; then no signature left.
        """
        act = Signature(self._means, statement)
        return await self._redemption.redeem(caller, spending, act, now, correlation_id, "sign")

    async def certify(
        self, caller: Caller, spending: Spending, csr: bytes, now: datetime, correlation_id: str
    ) -> tuple[bytes, ...]:
        """A certificate for the caller's own key, and the chain above it: DER, leaf first. csr: PKCS #10, DER."""
        act = Certificate(self._means, csr, csr_nonce(spending.grant))
        return await self._redemption.redeem(caller, spending, act, now, correlation_id, "certify")
