"""What operators do: an action like any other, decided by policy and recorded. There is no admin token."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from attestors.contract import AttestationRequest, FactKey, Facts
from broker.action import Action, parse_parameters
from broker.decision.decide import Grant
from broker.decision.explain import Explanation, explain
from broker.errors import BrokerError, Invalid, Reason
from broker.exchange import Asked, Caller, Exchange
from broker.identity.peer import look
from broker.identity.person import Principal, parse_principal
from broker.in_time import InTime
from broker.ledger.records import Operated

OPERATE: Final = "broker.operate"


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What an operator asks Explain. facts: JSON object, assumed. pid: a process to look at now, 0 for none."""

    principal: str
    asked: Asked
    facts: str
    pid: int


class Operators:
    """Explain, and the one way to be allowed it."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    async def authorise(self, caller: Caller, what: str, now: datetime, correlation_id: str) -> Grant:
        """Leave to do `what`, which is in the ledger when this returns, and is spent. Raises: BrokerError."""
        exchange = self._exchange
        action = Action(OPERATE, f"{exchange.issuer}/{what}", exchange.issuer)
        try:
            async with InTime():
                grant = await exchange.decide(caller.identity, action, now)
        except BrokerError as error:
            exchange.refused(caller.identity, action, error, now, correlation_id, what)
            raise
        grant.spend()
        operated = Operated(
            at=now,
            correlation_id=correlation_id,
            principal=str(grant.principal),
            action=action.name,
            resource=action.resource,
            policies=grant.policies,
            policy_revision=grant.policy_revision,
        )
        async with InTime(Reason.LEDGER_UNAVAILABLE):
            await exchange.ledger.append(operated)
        return grant

    async def explain(self, caller: Caller, question: Question, now: datetime, correlation_id: str) -> Explanation:
        """What would be decided, and which condition failed. Nothing is minted. Raises: BrokerError."""
        await self.authorise(caller, "explain", now, correlation_id)
        try:
            principal, action = parse_principal(question.principal), question.asked()
            async with InTime():
                facts = await self._look(principal, action, question.pid, now) if question.pid else {}
            assumed = _assumed(question.facts, now)
            return explain(self._exchange.policies.current, principal, action, {**facts, **assumed})
        except BrokerError as error:
            self._exchange.refused(caller.identity, None, error, now, correlation_id, "explain")
            raise

    async def _look(self, principal: Principal, action: Action, pid: int, now: datetime) -> Mapping[str, Facts]:
        piece = self._exchange.policies.current.slice(action.name)
        if piece is None:
            return {}
        process = look(pid)
        known = {"spire": await self._exchange.entitlements(process, now)}
        request = AttestationRequest(
            principal=str(principal),
            process=process,
            known=known,
            parameters=action.parameters,
            action_digest=action.digest,
        )
        return await self._exchange.attestation.gather(piece, request, now)


def _assumed(text: str, now: datetime) -> dict[str, Facts]:
    """Facts to take for granted: a JSON object, attestor name to its facts. Raises: Invalid."""
    found = {}
    for name, values in parse_parameters(text).items():
        if not isinstance(values, dict):
            raise Invalid("facts are an object of objects: attestor name to its facts")
        found[name] = Facts(attestor=name, key=FactKey(f"assumed:{name}"), values=values, attested_at=now)
    return found
