"""An exchange whose tools ask for a session, those who score it, and a transmitter that moves it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from support.exchanging import CORRELATION, Exchanging, exchanging
from support.security_events import Transmitting
from support.whole_broker import AGENT, ISSUER, OPERATOR

from attestors.contract import FactKey, Facts
from attestors.session import SessionAttestor
from broker.action import Action
from broker.credentials.action_token import Confirmation
from broker.decision.attest import Attestation
from broker.errors import BrokerError
from broker.exchange import Caller, Issued, Presented
from broker.identity.security_event import SecurityEvents, Transmitter
from broker.ledger.records import Record
from broker.ledger.session_store import Sessions
from broker.ledger.sessions import SessionRow
from broker.scoring import Scoring
from broker.session_events import EventReceiver
from broker.session_records import RecordedSessions

GUARDRAIL = "spiffe://acme.test/guardrail"
OTHER_AGENT = "spiffe://acme.test/build/other"
STRANGER = "spiffe://acme.test/stranger"
KEY, OTHER_KEY = "key-of-the-agent", "key-of-somebody"

SCHEMA = """
action "tools.narrow", "tools.wide" appliesTo {
  principal: [Workload], resource: [Resource], context: { session: Session }
};
action "tools.maybe" appliesTo { principal: [Workload], resource: [Resource], context: { session?: Session } };
"""
POLICY = """
@id("narrow") permit (principal, action == Action::"tools.narrow", resource);
@id("wide") permit (principal, action == Action::"tools.wide", resource) when { context.session.level == "LOW" };
@id("maybe") permit (principal, action == Action::"tools.maybe", resource)
unless { context has session && context.session.level != "LOW" };
@id("operators-score") permit (
  principal == Workload::"spiffe://acme.test/operator", action == Action::"broker.score", resource
);
@id("guardrails-score-up") permit (
  principal == Workload::"spiffe://acme.test/guardrail", action == Action::"broker.score", resource
) unless { context.parameters.lowers };
@id("builders-score") permit (
  principal in Path::"spiffe://acme.test/build", action == Action::"broker.score", resource
);
"""
POLICIES = {"tools.cedarschema": SCHEMA, "tools.cedar": POLICY}


def tool(name: str = "narrow") -> Action:
    return Action(f"tools.{name}", "https://tools.acme.test/search", "spiffe://acme.test/service/tools")


@dataclass
class Scored:
    """The parts, for tests to turn."""

    parts: Exchanging
    sessions: Sessions
    scoring: Scoring
    receiver: EventReceiver
    transmitting: Transmitting
    told: list[str] = field(default_factory=list)

    def now(self) -> datetime:
        return self.parts.now()

    def who(self, spiffe_id: str, key: str = KEY, ids: list[str] | None = None) -> Caller:
        """Somebody with a key, whom SPIRE entitles to `ids` as well."""
        found = self.parts.caller(spiffe_id)
        known = {}
        if ids is not None:
            known["spire"] = Facts(
                attestor="spire", key=FactKey("spire:1"), values={"ids": [*ids]}, attested_at=self.now()
            )
        return Caller(
            identity=replace(found.identity, confirmation=key, known=known), confirmation=Confirmation(jkt=key)
        )

    async def score(
        self,
        level: str,
        session: str = "s-1",
        *,
        by: str | Caller = OPERATOR,
        principal: str = AGENT,
        reason: str = "looked at it",
    ) -> SessionRow:
        caller = self.who(by, "key-of-who-scores") if isinstance(by, str) else by
        return await self.scoring.score(caller, session, principal, level, reason, self.now(), CORRELATION)

    async def ask(
        self,
        name: str = "narrow",
        session: str = "s-1",
        *,
        key: str = KEY,
        credential: str = "",
    ) -> Issued:
        caller = self.who(AGENT, key)
        presented = Presented(session=session, credential=credential)
        return await self.parts.exchange.request(caller, lambda: tool(name), self.now(), CORRELATION, presented)

    async def why_not(self, name: str = "narrow", session: str = "s-1", **how: Any) -> str:
        """Why there is no token; "" where there is one."""
        try:
            await self.ask(name, session, **how)
        except BrokerError as error:
            return error.reason
        return ""

    async def take(self, token: str, shown: str | None = None) -> None:
        await self.receiver.take(token, shown, self.now(), CORRELATION)

    async def event(self, level: str = "HIGH", **how: Any) -> None:
        """An event that the transmitter sends now."""
        await self.take(self.transmitting.token(self.now(), level, **how))

    async def level(self, session: str = "s-1") -> str | None:
        row = await self.sessions.find(session, self.now())
        return row and row.level

    async def records(self, *kinds: type) -> list[Record]:
        return [one for one in await self.parts.records() if not kinds or isinstance(one, kinds)]


@asynccontextmanager
async def scored(
    folder: Path,
    *,
    transmitting: Transmitting | None = None,
    transmitter: Transmitter | None = None,
    burst: int = 1000,
    **settings: Any,
) -> AsyncIterator[Scored]:
    """One in `folder`. transmitter: as it is configured; else with its keys in a file, and with these settings."""
    transmitting = transmitting or Transmitting(audience=ISSUER)
    async with exchanging(folder, policies=POLICIES, burst=burst) as parts:
        exchange = parts.exchange
        sessions = Sessions(exchange.ledger.submit)
        exchange.attestation = Attestation({"session": SessionAttestor(RecordedSessions(sessions))}, 2.0)
        events = SecurityEvents([transmitter or transmitting.configured(folder, **settings)], ISSUER)
        receiver = EventReceiver(exchange, sessions, events)
        found = Scored(parts, sessions, Scoring(exchange, sessions), receiver, transmitting)
        sessions.subscribe(found.told.append)
        yield found
