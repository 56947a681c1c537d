"""How risky a session is, as a workload says: an action like any other, decided by policy and recorded.

A score makes the session, so who may score decides also which sessions there are. Nobody scores one of their own: an
agent that was led astray would say that all is well.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Final

from attestors.session import LEVELS, Level, is_session_id
from broker.action import Action
from broker.errors import BrokerError, Invalid, Reason, Refused
from broker.exchange import Caller, Exchange
from broker.identity.identify import Identified
from broker.identity.spiffe_id import SpiffeId
from broker.in_time import InTime
from broker.ledger.scope_records import SessionScored
from broker.ledger.session_store import Sessions
from broker.ledger.sessions import SessionRow

SCORE: Final = "broker.score"
MAX_REASON: Final = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """What somebody says of a session. principal: whose it is. reason: in their own words, for the ledger.

    Raises: Invalid when a part cannot be.
    """

    session: str
    principal: str
    level: Level
    reason: str

    @classmethod
    def parse(cls, session: str, principal: str, level: str, reason: str) -> "Scored":
        """From the wire. Raises: Invalid."""
        if not is_session_id(session):
            raise Invalid("a session is named by 1 to 128 characters of A-Z a-z 0-9 . _ ~ -")
        known = next((one for one in LEVELS if one == level), None)
        if known is None:
            raise Invalid(f"a level is one of {', '.join(LEVELS)}")
        if len(reason) > MAX_REASON or not reason.isprintable():
            raise Invalid(f"a reason is at most {MAX_REASON} printable characters, on one line")
        return cls(session=session, principal=str(SpiffeId.parse(principal)), level=known, reason=reason)


class Scoring:
    """Scores sessions for whoever policy lets do that."""

    def __init__(self, exchange: Exchange, sessions: Sessions) -> None:
        self._exchange, self._sessions = exchange, sessions

    async def score(
        self, caller: Caller, session: str, principal: str, level: str, reason: str, now: datetime, correlation_id: str
    ) -> SessionRow:
        """Scores it, and makes it where it is unknown: as it is then, durably.

        Raises: Invalid; Refused DENIED for a session of the caller's own, for who may not, for another principal's and
        where it was scored up meanwhile; Unavailable. Each refusal is in the ledger.
        """
        exchange, identity = self._exchange, caller.identity
        action = None
        try:
            said = Scored.parse(session, principal, level, reason)
            async with InTime(Reason.LEDGER_UNAVAILABLE) as bound:
                known = await self._sessions.find(said.session, now)
                lowers = known is not None and known.is_lowered_by(said.level)
                action = self._act(said, lowers=lowers)
                _require_anothers(identity, said.principal)
                bound.reason = Reason.ATTESTATION_UNAVAILABLE
                grant = await exchange.decide(identity, action, now)
                grant.spend()
                bound.reason = Reason.LEDGER_UNAVAILABLE
                scored = SessionScored(
                    at=now,
                    correlation_id=correlation_id,
                    session=said.session,
                    principal=said.principal,
                    level=said.level,
                    by=str(identity.principal),
                    policies=grant.policies,
                    detail=said.reason,
                )
                return await self._sessions.score(scored, lowers=lowers)
        except BrokerError as error:
            exchange.refused(identity, action, error, now, correlation_id, "score")
            raise

    def _act(self, said: Scored, *, lowers: bool) -> Action:
        """What is decided about who scores."""
        issuer = self._exchange.issuer
        parameters = {"level": said.level, "principal": said.principal, "lowers": lowers}
        return Action(SCORE, f"{issuer}/sessions/{said.session}", issuer, parameters)


def _require_anothers(identity: Identified, principal: str) -> None:
    """Raises: Refused where it is the caller's own session: by its name, or that of a process SPIRE entitles to it."""
    spire = identity.known.get("spire")
    ids = spire.values["ids"] if spire is not None else []
    if principal in (str(identity.principal), *(ids if isinstance(ids, list) else [])):
        raise Refused(Reason.DENIED, "nobody scores a session of their own")
