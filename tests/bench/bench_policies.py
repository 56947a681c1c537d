"""Does a decision take longer because the folder holds more policies? At most 1.2 times (DESIGN, section 8).

A folder of ten policies for one action, and one of ten policies for each of a thousand. The same decision is taken over
each in turn; over the large one each action has its turn, so the processor's caches hold nothing of it. To compare like
with like, a thousand copies of the small folder take turns too. What the caches alone are worth is told beside it: the
large folder against a single small one that stays in them.
"""

import statistics
import time
from datetime import UTC, datetime, timedelta
from typing import Any

from attestors.contract import FactKey, Facts
from broker.action import Action
from broker.decision.decide import decide
from broker.decision.policy import Policy, compile_policy
from broker.identity.spiffe_id import SpiffeId

BOUND = 1.2
NOW = datetime(2026, 11, 22, tzinfo=UTC)
PRINCIPAL = SpiffeId.parse("spiffe://acme.test/support/w7")
FACTS = {
    "spire": Facts(
        attestor="spire", key=FactKey("spire:1"), values={"ids": [str(PRINCIPAL)]}, attested_at=NOW, expires_at=None
    ),
    "process": Facts(
        attestor="process",
        key=FactKey("process:1"),
        values={"uid": 1600, "gid": 1600, "exe": "/usr/bin/agent", "exe_sha256": "ab" * 32, "cgroup": "/system"},
        attested_at=NOW,
    ),
}
SCHEMA = """action "orders.a{n}" appliesTo {{ principal: [Workload], resource: [Resource],
  context: {{ spire: Spire, process: Process, parameters: {{ amount: Long }} }} }};
"""
POLICY = """@id("p{n}-{k}") @max_ttl("60s") permit (
  principal == Workload::"spiffe://acme.test/support/w{k}", action == Action::"orders.a{n}",
  resource in Resource::"https://orders.acme.test/v1"
) when {{ context.spire.ids.contains("spiffe://acme.test/support/w{k}") && context.process.uid == 1600
  && context.parameters.amount < 100 }};
"""


def _policy(actions: int, per_action: int) -> Policy:
    texts = {f"f{n}.cedar": "".join(POLICY.format(n=n, k=k) for k in range(per_action)) for n in range(actions)}
    return compile_policy(texts, {"actions.cedarschema": "".join(SCHEMA.format(n=n) for n in range(actions))})


def _action(number: int) -> Action:
    name = f"orders.a{number}"
    return Action(name, "https://orders.acme.test/v1/orders/17", "spiffe://acme.test/orders", {"amount": 30})


def _time(policy: Policy, action: Action) -> float:
    started = time.perf_counter()
    decide(policy, PRINCIPAL, action, FACTS, NOW, not_after=NOW + timedelta(hours=1))
    return (time.perf_counter() - started) * 1e6


def measure(size: str) -> list[dict[str, Any]]:
    """size: "small" (a hundred actions) or "full" (a thousand). Rows of {name, value, unit, bound, holds}."""
    actions, turns = (100, 300) if size == "small" else (1000, 4000)
    large, twenty, copies = _policy(actions, 10), _policy(1, 20), [_policy(1, 10) for _ in range(actions)]
    asked = [_action(number) for number in range(actions)]
    times: dict[str, list[float]] = {"few": [], "many": [], "warm": [], "twenty": []}
    for turn in range(turns):
        number = turn * 7 % actions
        times["few"].append(_time(copies[number], asked[0]))
        times["many"].append(_time(large, asked[number]))
    for _ in range(turns):
        times["warm"].append(_time(copies[0], asked[0]))
        times["twenty"].append(_time(twenty, asked[0]))
    median = {
        name: statistics.median(values[turns // 10 :]) for name, values in times.items()
    }  # the first tenth warms up
    ratio = median["many"] / median["few"]
    told = {
        "policies_10000_vs_10_in_cache": (median["many"] / median["warm"], "ratio"),
        "decide_10_policies": (median["warm"], "us"),
        "decide_20_policies": (median["twenty"], "us"),
    }
    return [
        {"name": "policies_10000_vs_10", "value": ratio, "unit": "ratio", "bound": BOUND, "holds": ratio <= BOUND},
        *(
            {"name": name, "value": value, "unit": unit, "bound": None, "holds": True}
            for name, (value, unit) in told.items()
        ),
    ]
