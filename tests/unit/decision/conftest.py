"""One small policy world: two order actions in a group, a support agent who may refund, and facts about it."""

from datetime import UTC, datetime, timedelta

import pytest

from attestors.contract import FactKey, Facts
from broker.action import Action
from broker.decision.decide import decide
from broker.decision.policy import compile_policy
from broker.identity.spiffe_id import SpiffeId

SCHEMA = """
action "money";
action "orders.refund" in ["money"] appliesTo {
  principal: [Workload], resource: [Resource],
  context: { spire: Spire, process?: Process, parameters?: { amount: Long } }
};
action "orders.read" appliesTo { principal: [Workload], resource: [Resource], context: { spire?: Spire } };
"""
NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)


class World:
    """What the tests here speak of."""

    now = NOW
    not_after = NOW + timedelta(hours=1)
    schema = SCHEMA
    agent = SpiffeId.parse("spiffe://acme.test/support/agent")
    refund = Action("orders.refund", "https://orders.acme.test/orders/17", "spiffe://acme.test/orders", {"amount": 30})
    read = Action("orders.read", "https://orders.acme.test/orders/17", "spiffe://acme.test/orders")
    allow = '@id("allow") permit (principal, action in [Action::"orders.refund", Action::"orders.read"], resource);'
    process_values = {"uid": 1600, "gid": 1600, "exe": "/usr/bin/agent", "exe_sha256": "", "cgroup": "/"}  # noqa: RUF012

    @staticmethod
    def facts(*, expires_at=None, **values):
        return {
            name: Facts(attestor=name, key=FactKey(f"{name}:1"), values=value, attested_at=NOW, expires_at=expires_at)
            for name, value in values.items()
        }

    @property
    def spire(self):
        return self.facts(spire={"ids": [str(self.agent)]})

    @property
    def process(self):
        return self.facts(process=self.process_values)

    def policy(self, *texts, schema=SCHEMA):
        return compile_policy({"p.cedar": "\n".join(texts)}, {"p.cedarschema": schema})

    def decide(self, *texts, principal=None, action=None, facts=None, now=None, not_after=None, schema=SCHEMA):
        return decide(
            self.policy(*texts, schema=schema),
            principal or self.agent,
            action or self.refund,
            self.spire if facts is None else facts,
            now or NOW,
            not_after=not_after or self.not_after,
        )


@pytest.fixture
def world():
    return World()
