"""Can this broker mint now, and if not, why not: what `/readyz` and grpc.health.v1 say."""

from dataclasses import dataclass
from datetime import datetime

from broker.errors import BrokerError
from broker.exchange import Exchange


@dataclass(frozen=True, slots=True, kw_only=True)
class Readiness:
    """Looks at each room. It names what is wrong in words for operators; no caller's data is among them."""

    exchange: Exchange
    trust_domain: str

    def problems(self, now: datetime) -> list[str]:
        """What keeps us from minting; empty when nothing does."""
        found = []
        try:
            self.exchange.trust(now)
        except BrokerError as error:
            found.append(f"identity: {error.detail}")
        try:
            self.exchange.keyring.current(now)
        except BrokerError as error:
            found.append(f"signing key: {error.detail}")
        ledger = self.exchange.ledger.health()
        if ledger is not None:
            found.append(f"ledger: {ledger}")
        return found
