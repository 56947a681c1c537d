"""May this subject do that, at me? For services that ask instead of verifying by themselves (edges/authzen.py).

With a credential that the subject showed, the answer is what Check says of it, or Redeem where it is single-use: that
it counts now, for exactly this action of this subject. Without one it is a dry decision: what policy says of the
subject by the facts that can be had while it is not here, so without its process, its key and its evidence. That is
no credential: nothing was minted, nothing that the subject has was looked at, and a moment later it may be another.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

from broker.action import Action
from broker.callers import Caller
from broker.credentials import action_token
from broker.credentials.action_token import MAX_LIFETIME, VerifiedClaims
from broker.errors import BrokerError, Invalid, Reason, Refused
from broker.exchange import Exchange
from broker.identity.identify import Identified
from broker.identity.person import PersonId, Principal, parse_principal
from broker.identity.spiffe_id import SpiffeId
from broker.in_time import InTime
from broker.recheck import Recheck

WORKLOAD: Final = "workload"
PERSON: Final = "person"


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is asked, once its words make sense.

    token: that the subject showed, "" for none. idempotency_id: of the asker's own making, to use a single-use token
    up; "" for none.
    """

    subject: Principal
    action: Action
    token: str = field(repr=False)
    idempotency_id: str


def subject_of(kind: str, text: str) -> Principal:
    """A workload or a person by name. Raises: Invalid for whatever else has no name here."""
    found = parse_principal(text)
    wanted = PERSON if isinstance(found, PersonId) else WORKLOAD
    if kind != wanted or (isinstance(found, SpiffeId) and not found.path):  # a trust domain alone is nobody
        raise Invalid(f"a subject is a {WORKLOAD}, by its SPIFFE ID, or a {PERSON}, by issuer and subject")
    return found


class Evaluation:
    """One for each broker process."""

    def __init__(self, exchange: Exchange, recheck: Recheck) -> None:
        self._exchange, self._recheck = exchange, recheck

    def require_own(self, asker: Caller, audience: str, now: datetime, correlation_id: str) -> None:
        """Raises: Refused(WRONG_AUDIENCE), and records it, where the asker asks about another's actions."""
        try:
            self._require_own(asker, audience)
        except Refused as error:
            self._exchange.refused(asker.identity, None, error, now, correlation_id, "evaluate")
            raise

    def _require_own(self, asker: Caller, audience: str) -> None:
        if not self._recheck.speaks_for(asker.identity, audience):
            raise Refused(Reason.WRONG_AUDIENCE, "a service asks about actions at its own audience alone")

    async def evaluate(
        self, asker: Caller, asked: Callable[[], Question], now: datetime, correlation_id: str
    ) -> VerifiedClaims | None:
        """Yes, by these claims, or by none where no token was shown. Raises: BrokerError: no, and recorded.

        Not checked: that the subject holds the key that the token is bound to, and that a token which counts once is
        shown for the first time. Both are the asker's to see to.
        """
        claims, action = None, None
        try:
            question = asked()
            action = question.action
            self._require_own(asker, question.action.audience)
            if question.token:
                claims = self._shown(question, now)
            else:
                await self._decide(question, now)
        except BrokerError as error:
            self._exchange.refused(asker.identity, action, error, now, correlation_id, "evaluate")
            raise
        if claims is not None:
            await self._look(asker, question, claims, now, correlation_id)
        return claims

    def _shown(self, question: Question, now: datetime) -> VerifiedClaims:
        """Raises: Refused where it is none of ours, or another's than the subject's."""
        exchange = self._exchange
        claims = action_token.verify(question.token, issuer=exchange.issuer, key_for=exchange.keyring.public, now=now)
        if claims.sub != str(question.subject):
            raise Refused(Reason.OUT_OF_SCOPE, "the token is another subject's")
        if (claims.use == "single") is not bool(question.idempotency_id):
            raise Invalid("an idempotency_id uses a single-use token up, and no other")
        return claims

    async def _look(
        self, asker: Caller, question: Question, claims: VerifiedClaims, now: datetime, correlation_id: str
    ) -> None:
        """Both record what they refuse."""
        token, action = question.token, question.action
        if claims.use == "single":
            await self._recheck.redeem(asker, token, lambda: action, question.idempotency_id, now, correlation_id)
        else:
            await self._recheck.check(asker, token, lambda: action, now, correlation_id)

    async def _decide(self, question: Question, now: datetime) -> None:
        """The grant goes nowhere, so that nothing can be minted from it. Raises: BrokerError."""
        subject, exchange = question.subject, self._exchange
        if isinstance(subject, PersonId):
            identity = Identified(principal=subject, transport="id-token", expires_at=now + MAX_LIFETIME)
        else:
            exchange.trust(now).bundle_for(subject.trust_domain)
            identity = Identified(principal=subject, transport="mtls", expires_at=now + MAX_LIFETIME)
        async with InTime():
            await exchange.decide(identity, question.action, now)
