"""Scope around an exchange that a test made: what `serve` wires, without who watches."""

from collections.abc import Mapping
from typing import Any

from broker.again import Again
from broker.break_glass import Emergencies
from broker.edges.grpc_peer import Identifier
from broker.edges.grpc_revocation import RevocationCalls
from broker.exchange import Exchange
from broker.ledger.scope_store import ScopeStore
from broker.operator_revocation import Revocations
from broker.recheck import Recheck
from broker.scope.deciding import Deciding
from broker.scope.feed import Feed


class ScopeAround:
    """One for each exchange. now: its clock."""

    def __init__(self, exchange: Exchange, now: Any) -> None:
        self.exchange, self.now = exchange, now
        self.feed, self.again = Feed(), Again(exchange)
        self.store = ScopeStore(exchange.ledger.submit, exchange.ledger.append_later)
        self.deciding = Deciding(exchange.scope, self.store, self.feed, self.again, now)
        self.revocations = Revocations(exchange, self.deciding, self.store)
        self.emergencies = Emergencies(exchange, self.store)

    def revocation(self, identifier: Identifier) -> RevocationCalls:
        return RevocationCalls(self.revocations, self.emergencies, identifier)

    def recheck(self, audiences: Mapping[str, frozenset[str]]) -> Recheck:
        return Recheck(self.exchange, self.again, self.deciding, audiences)
