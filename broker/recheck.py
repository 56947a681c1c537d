"""Is it still good? The same decision as at minting, on fresh facts, whenever a receiving service asks.

A credential is in scope exactly while minting it again would succeed. What can be attested again is: the process,
SPIRE's word on it, every attestor that the policy names. Only a token's own audience may ask.
"""

import hashlib
from collections.abc import Mapping
from datetime import datetime

from attestors.contract import JsonValue, Process
from broker.action import Action, check_random_id
from broker.credentials import action_token
from broker.credentials.action_token import VerifiedClaims
from broker.decision.decide import Grant
from broker.errors import BrokerError, Invalid, Reason, Refused
from broker.exchange import Asked, Caller, Exchange, Presented
from broker.identity import identify
from broker.identity.identify import Identified
from broker.identity.peer import look
from broker.identity.spiffe_id import SpiffeId
from broker.in_time import InTime
from broker.intents import used_approvals
from broker.ledger.approvals import Counted
from broker.ledger.operations import CredentialRow


def _strings(value: JsonValue) -> list[str]:
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []


def _require_redeemable(claims: VerifiedClaims, idempotency_id: str) -> None:
    check_random_id(idempotency_id, "an idempotency id")
    if claims.use != "single":
        raise Invalid(f"only a single-use token is redeemed, and this one's use is {claims.use}")


def _require_unused(row: CredentialRow) -> None:
    if row.redeemed_at is not None:
        raise Refused(Reason.ALREADY_USED, "the token was redeemed")


def _counted(grant: Grant, row: CredentialRow, now: datetime) -> Counted | None:
    digest, approvers = used_approvals(grant, row.intent.request_id)
    return Counted(digest=digest, approvers=approvers, credential=row.jti, at=now.timestamp()) if digest else None


class Recheck:
    """Check and Redeem. audiences: for an audience that is no SPIFFE ID, which identities speak for it."""

    def __init__(self, exchange: Exchange, audiences: Mapping[str, frozenset[str]]) -> None:
        self._exchange, self._audiences = exchange, audiences

    async def check(self, caller: Caller, token: str, asked: Asked, now: datetime, correlation_id: str) -> None:
        """Whether the token would be minted again now, for this action. Raises: BrokerError with the reason why not."""
        action = None
        try:
            action = asked()
            async with InTime(Reason.LEDGER_UNAVAILABLE) as bound:
                claims, row = await self._own_token(caller.identity, token, action, now)
                _require_unused(row)
                bound.reason = Reason.ATTESTATION_UNAVAILABLE
                await self._decide_again(claims, row, action, now)
        except BrokerError as error:
            self._exchange.refused(caller.identity, action, error, now, correlation_id, "check")
            raise

    async def redeem(
        self, caller: Caller, token: str, asked: Asked, idempotency_id: str, now: datetime, correlation_id: str
    ) -> datetime:
        """Uses a single-use token up, once in the world. Returns when; the same again for the same idempotency id.

        Raises: BrokerError; Refused(ALREADY_USED) for everyone but the first.
        """
        asker, action = caller.identity, None
        try:
            action = asked()
            async with InTime(Reason.LEDGER_UNAVAILABLE) as bound:
                claims, row = await self._own_token(asker, token, action, now)
                _require_redeemable(claims, idempotency_id)
                counted = None
                if row.redeemed_at is None:  # else a lost answer or a second use: the ledger knows which
                    bound.reason = Reason.ATTESTATION_UNAVAILABLE
                    grant = await self._decide_again(claims, row, action, now)
                    counted = _counted(grant, row, now)
                    bound.reason = Reason.LEDGER_UNAVAILABLE
                redeemed = await self._exchange.ledger.redeem(
                    claims.jti,
                    idempotency_id,
                    str(asker.principal),
                    hashlib.sha256(token.encode()).digest(),
                    now=now,
                    correlation_id=correlation_id,
                    counted=counted,
                )
        except BrokerError as error:
            self._exchange.refused(asker, action, error, now, correlation_id, "redeem")
            raise
        return redeemed.redeemed_at

    async def _own_token(
        self, asker: Identified, token: str, action: Action, now: datetime
    ) -> tuple[VerifiedClaims, CredentialRow]:
        """A token of ours, presented by its own audience, for exactly this action, and known to the ledger."""
        exchange = self._exchange
        claims = action_token.verify(token, issuer=exchange.issuer, key_for=exchange.keyring.public, now=now)
        if str(asker.principal) not in self._audiences.get(claims.aud, frozenset((claims.aud,))):
            raise Refused(Reason.WRONG_AUDIENCE, "only a token's own audience may ask about it")
        if claims.action_digest != action.digest.hex():
            raise Refused(Reason.OUT_OF_SCOPE, "the token is for another action")
        row = await exchange.ledger.credential(claims.jti)
        if row is None:
            raise Refused(Reason.REVOKED, "the ledger does not know the token in this epoch")
        return claims, row

    async def _decide_again(self, claims: VerifiedClaims, row: CredentialRow, action: Action, now: datetime) -> Grant:
        """The same decision on fresh facts; the approvals that the token used up count for it. Nothing is minted."""
        principal = SpiffeId.parse(claims.sub)
        trust = self._exchange.trust(now)
        trust.bundle_for(principal.trust_domain)  # federation may have been withdrawn since
        if row.intent.process is None:
            # An SVID is not shown again: who vouched for it must still be believed, as for a new one.
            identify.require_authority(bytes.fromhex(row.intent.authority_sha256), principal, trust)
        identity = await self._identify_again(principal, row, min(claims.expires_at, row.expires_at), now)
        presented = Presented(request_id=row.intent.request_id, credential=claims.jti)
        return await self._exchange.decide(identity, action, now, presented)

    async def _identify_again(
        self, principal: SpiffeId, row: CredentialRow, expires_at: datetime, now: datetime
    ) -> Identified:
        """The caller as it is now; where it was no process of ours, its SVID's end bounds the token's already."""
        if row.intent.process is None:
            return Identified(principal=principal, transport=row.intent.method, expires_at=expires_at)
        process = Process(**{name: getattr(row.intent.process, name) for name in Process.__slots__})
        if look(process.pid) != process:
            raise Refused(Reason.NOT_ATTESTED, "the process that got the token exited or was replaced")
        facts = await self._exchange.entitlements(process, now)
        if look(process.pid) != process or str(principal) not in _strings(facts.values["ids"]):
            raise Refused(Reason.NOT_ATTESTED, "SPIRE no longer gives the process this identity")
        return Identified(
            principal=principal,
            transport=row.intent.method,
            expires_at=expires_at,
            process=process,
            known={"spire": facts},
        )
