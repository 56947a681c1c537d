"""Fuzzes what operators write: policy and schema texts, and the JSON in a request to a loaded policy.

    python tests/fuzz/fuzz_policy.py -max_total_time=60

Whatever is given, compiling ends in a Policy or a PolicyError, and deciding in a Grant or a Refused; nothing else, and
never the end of the process.
"""

import re
import sys
from datetime import UTC, datetime, timedelta

import atheris

with atheris.instrument_imports(include=["broker"]):
    from attestors.contract import FactKey, Facts
    from broker.action import Action
    from broker.decision.decide import decide
    from broker.decision.findings import PolicyError
    from broker.decision.policy import compile_policy
    from broker.errors import Refused
    from broker.identity.spiffe_id import SpiffeId

NOW = datetime(2026, 11, 22, tzinfo=UTC)
AGENT = SpiffeId.parse("spiffe://acme.test/support/agent")
SCHEMA = """action "money"; action "orders.refund" in ["money"] appliesTo { principal: [Workload], resource: [Resource],
  context: { spire: Spire, process?: Process, parameters?: { amount: Long, note?: String, to?: Workload } } };"""
POLICY = 'permit (principal, action == Action::"orders.refund", resource) when { context has parameters };'
WORDS = [
    *'(){}[];,.:?!"\\\n\r 1',
    *re.findall(
        r"\S+", "permit forbid principal action resource context has spire process parameters ids amount uid when"
    ),
    *re.findall(
        r"\S+", 'unless in is if then else == && || // Action:: "orders.refund" "money" Workload Resource ?principal'
    ),
    *re.findall(r"\S+", '@id @max_ttl ("90s") @single_use @reuse like contains true entity type appliesTo Set< > Long'),
]
LOADED = compile_policy({"a.cedar": POLICY}, {"a.cedarschema": SCHEMA})
FACTS = {"spire": Facts(attestor="spire", key=FactKey("spire"), values={"ids": [str(AGENT)]}, attested_at=NOW)}


def _text(data: "atheris.FuzzedDataProvider") -> str:
    if data.ConsumeBool():
        return data.ConsumeUnicode(data.ConsumeIntInRange(0, 400))
    words = [data.PickValueInList(WORDS) for _ in range(data.ConsumeIntInRange(0, 80))]
    return ("" if data.ConsumeBool() else " ").join(words)


def _compile(policy: str, schema: str) -> None:
    try:
        compile_policy({"a.cedar": policy}, {"a.cedarschema": schema})
    except PolicyError as error:
        if not error.findings:
            raise


def _decide(parameters: str, resource: str) -> None:
    try:
        action = Action.parse("orders.refund", resource, "spiffe://acme.test/orders", parameters)
        grant = decide(LOADED, AGENT, action, FACTS, NOW, not_after=NOW + timedelta(hours=1))
    except Refused:
        return
    if type(grant.action.parameters.get("amount")) is not int:
        raise AssertionError("granted what the schema does not allow")


def fuzz_one(data: bytes) -> None:
    """One input."""
    provider = atheris.FuzzedDataProvider(data)
    match provider.ConsumeIntInRange(0, 3):
        case 0:
            _compile(_text(provider), SCHEMA)
        case 1:
            _compile(POLICY, _text(provider))
        case 2:
            _compile(f"{POLICY}\n{_text(provider)}", f"{SCHEMA}\n{_text(provider)}")
        case _:
            amount = '{"amount": 3, "note": ' + provider.ConsumeUnicodeNoSurrogates(200)
            _decide(amount + "}", "https://orders.acme.test/" + provider.ConsumeUnicodeNoSurrogates(60))


if __name__ == "__main__":
    atheris.Setup(sys.argv, fuzz_one)
    atheris.Fuzz()
