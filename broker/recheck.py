"""Is it still good? The same decision as at minting, on fresh facts, whenever a receiving service asks.

A credential is in scope exactly while minting it again would succeed. What can be attested again is: the process,
SPIRE's word on it, every attestor that the policy names. Only a token's own audience may ask, and about what a token
says of itself its holder as well.
"""

import hashlib
from collections.abc import Mapping
from datetime import datetime

from broker.action import Action, check_random_id
from broker.again import Again
from broker.credentials import action_token, credential
from broker.credentials.action_token import VerifiedClaims
from broker.credentials.credential import Credential
from broker.decision.decide import Grant
from broker.decision.question import PROVENANCE
from broker.errors import BrokerError, Invalid, Reason, Refused
from broker.exchange import Asked, Caller, Exchange
from broker.identity.identify import Identified
from broker.in_time import InTime
from broker.intents import used_approvals
from broker.ledger.approvals import Counted
from broker.ledger.operations import CredentialRow
from broker.scope.deciding import Deciding
from broker.scope.live import Live, live_of


def _require_same(claims: VerifiedClaims, action: Action) -> None:
    if claims.action_digest != action.digest.hex():
        raise Refused(Reason.OUT_OF_SCOPE, "the token is for another action")


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
    """Check, Redeem and introspection.

    audiences: for an audience that is no SPIFFE ID, which identities speak for it.
    """

    def __init__(
        self, exchange: Exchange, again: Again, deciding: Deciding, audiences: Mapping[str, frozenset[str]]
    ) -> None:
        self._exchange, self._again, self._deciding, self._audiences = exchange, again, deciding, audiences

    def speaks_for(self, asker: Identified, audience: str) -> bool:
        """Whether it is this audience."""
        return str(asker.principal) in self._audiences.get(audience, frozenset((audience,)))

    async def check(self, caller: Caller, token: str, asked: Asked, now: datetime, correlation_id: str) -> None:
        """Whether the token would be minted again now, for this action. Raises: BrokerError with the reason why not."""
        action = None
        try:
            action = asked()
            async with InTime(Reason.LEDGER_UNAVAILABLE) as bound:
                _, row = await self._own_token(caller.identity, token, action, now)
                _require_unused(row)
                bound.reason = Reason.ATTESTATION_UNAVAILABLE
                await self._decide_again(row, action, now)
        except BrokerError as error:
            self._exchange.refused(caller.identity, action, error, now, correlation_id, "check")
            raise

    async def introspect(self, caller: Caller, shown: str, now: datetime, correlation_id: str) -> Credential:
        """A credential that would be minted again now, for what it says itself that it is for (RFC 7662).

        Its own audience may ask, and its holder; it is not used up. Raises: BrokerError with the reason why not.
        """
        asker, action, exchange = caller.identity, None, self._exchange
        try:
            found = credential.verify(shown, issuer=exchange.issuer, key_for=exchange.keyring.public, now=now)
            claims = found.claims
            action = claims.action()
            if claims.client_id != str(asker.principal) and not self.speaks_for(asker, claims.aud):
                raise Refused(Reason.WRONG_AUDIENCE, "only a token's own audience and its holder may ask about it")
            _require_same(claims, action)
            async with InTime(Reason.LEDGER_UNAVAILABLE) as bound:
                row = await self._known(claims)
                _require_unused(row)
                bound.reason = Reason.ATTESTATION_UNAVAILABLE
                await self._decide_again(row, action, now)
        except BrokerError as error:
            exchange.refused(asker, action, error, now, correlation_id, "introspect")
            raise
        return found

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
                    grant = await self._decide_again(row, action, now)
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
        if not self.speaks_for(asker, claims.aud):
            raise Refused(Reason.WRONG_AUDIENCE, "only a token's own audience may ask about it")
        _require_same(claims, action)
        return claims, await self._known(claims)

    async def _known(self, claims: VerifiedClaims) -> CredentialRow:
        """What the ledger has of it, if it is neither refused nor suspended. Raises: BrokerError."""
        row = await self._exchange.ledger.credential(claims.jti)
        if row is None:
            raise Refused(Reason.REVOKED, "the ledger does not know the token in this epoch")
        self._exchange.scope.require(claims.jti)
        return row

    async def _decide_again(self, row: CredentialRow, action: Action, now: datetime) -> Grant:
        """The same decision on fresh facts; nothing is minted. A no is final: guards hear of it as well."""
        live = self._exchange.scope.live.get(row.jti) or live_of(row.intent, {}, seq=row.seq)
        kept = {name: facts for name, facts in live.facts.items() if name == PROVENANCE}
        try:
            grant, _ = await self._again.grant(live, action, kept, now)
        except Refused as error:
            await self._refuse(live, error)
            raise
        self._exchange.scope.require(row.jti)  # it may have been revoked while we looked
        return grant

    async def _refuse(self, live: Live, error: Refused) -> None:
        """Keeps and tells the refusal, where this credential is still looked after."""
        if live.seq and self._exchange.scope.live.get(live.jti) is live:
            await self._deciding.refuse([live], error.reason, "check", detail=error.detail)
