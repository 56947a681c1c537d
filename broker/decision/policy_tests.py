"""Tests that operators keep beside their policies: `tests/*.toml` in the policy folder, run by `policy test`.

[[case]]
name = "support refunds small amounts"
principal = "spiffe://acme.test/support/agent"    # or a person: <issuer>/subject/<base64url of sub>
action = "orders.refund"
resource = "https://orders.acme.test/orders/17"
audience = "spiffe://acme.test/service/orders"
parameters = { amount = 30 }
facts.spire = { ids = ["spiffe://acme.test/support/agent"] }
expect = "allow"              # or "deny"
# optional, and only with "allow":
max_ttl = "60s"
use = "once"                  # once, single or ttl
policies = ["refunds.cedar#small-refunds"]
# optional, and only with "deny": denied, unknown_action, provenance_missing, or approval_required, where other
# approvals than those in facts.approval could allow it
reason = "approval_required"

Optional, for all cases of a file, so that each says only in what it differs: tables are laid over these name by name.

[common]
facts.spire = { ids = ["spiffe://acme.test/support/agent"] }

`without = ["spire"]` in a case leaves evidence out.
"""

import json
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from attestors.contract import FactKey, Facts
from broker.action import Action
from broker.decision.decide import Grant, decide
from broker.decision.explain import explain
from broker.decision.findings import Defect, Finding, PolicyError
from broker.decision.lacking import lacks_approval
from broker.decision.obligations import LONGEST_TTL, Use, parse_ttl
from broker.decision.policy import Policy
from broker.errors import Invalid, Reason, Refused
from broker.identity.person import Principal, parse_principal

# Cases have no clock of their own: they are all decided at one moment, by a caller whose identity lasts long enough.
_NOW = datetime(2000, 1, 1, tzinfo=UTC)
_NOT_AFTER = _NOW + 2 * LONGEST_TTL


class Case(BaseModel):
    """One question and the answer that is expected."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: Annotated[str, Field(min_length=1)]
    principal: str
    action: str
    resource: str
    audience: str
    parameters: dict[str, Any] = {}
    facts: dict[str, dict[str, Any]] = {}
    without: list[str] = []
    expect: Literal["allow", "deny"]
    max_ttl: str | None = None
    use: Use | None = None
    policies: list[str] | None = None
    reason: str | None = None

    @model_validator(mode="after")
    def _expects_one_thing(self) -> Self:
        if self.expect == "allow" and self.reason is not None:
            raise ValueError("a case that expects allow has no reason")
        if self.expect == "deny" and any(one is not None for one in (self.max_ttl, self.use, self.policies)):
            raise ValueError("a case that expects deny has no max_ttl, use or policies")
        if self.reason is not None and self.reason not in frozenset(Reason):
            raise ValueError(f"no refusal has the reason {self.reason}")
        unknown = set(self.without) - self.facts.keys()
        if unknown:
            raise ValueError(f"without names no evidence of this case: {', '.join(sorted(unknown))}")
        return self


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    case: Annotated[list[Case], Field(min_length=1)]

    @model_validator(mode="before")
    @classmethod
    def _lay_over_common(cls, found: Any) -> Any:
        """Each case over what is common to all."""
        if not isinstance(found, dict):
            return found
        rest = {name: value for name, value in found.items() if name != "common"}
        cases = rest.get("case")
        if isinstance(cases, list):
            rest["case"] = [_laid_over(found.get("common", {}), case) for case in cases]
        return rest


def _laid_over(common: Any, own: Any) -> Any:
    if not isinstance(common, dict) or not isinstance(own, dict):
        return own
    return {**common, **{name: _laid_over(common.get(name), value) for name, value in own.items()}}


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseResult:
    """What came of one case. problem: "" where it came as expected, else what was otherwise, for operators."""

    file: str
    name: str
    problem: str

    @property
    def passed(self) -> bool:
        """Whether it came as expected."""
        return not self.problem


def run_policy_tests(folder: Path, policy: Policy) -> tuple[CaseResult, ...]:
    """Runs every case of `folder`/tests/*.toml (or *.json of the same shape) against `policy`.

    Raises: PolicyError with every file that cannot be read as cases.
    """
    results: list[CaseResult] = []
    findings: list[Finding] = []
    for path in sorted((folder / "tests").glob("*")):
        if path.suffix not in {".toml", ".json"}:
            continue
        try:
            cases = _read(path)
        except (OSError, ValueError) as error:  # of pydantic, TOML, JSON and UTF-8 alike
            findings.append(_unreadable(path, error))
            continue
        results += [CaseResult(file=path.name, name=case.name, problem=_run(policy, case)) for case in cases]
    if findings:
        raise PolicyError(findings)
    return tuple(results)


def _read(path: Path) -> list[Case]:
    text = path.read_text(encoding="utf-8")
    return _File.model_validate(json.loads(text) if path.suffix == ".json" else tomllib.loads(text)).case


def _unreadable(path: Path, error: Exception) -> Finding:
    problem = str(error)
    if isinstance(error, ValidationError):
        problem = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
    fix = 'Write [[case]] tables with name, principal, action, resource, audience and expect = "allow" or "deny".'
    return Finding(defect=Defect.SYNTAX, file=f"tests/{path.name}", problem=problem, fix=fix)


def _run(policy: Policy, case: Case) -> str:
    facts = {
        name: Facts(attestor=name, key=FactKey(f"{name}:test"), values=values, attested_at=_NOW)
        for name, values in case.facts.items()
        if name not in case.without
    }
    try:
        principal = parse_principal(case.principal)
        action = Action(case.action, case.resource, case.audience, case.parameters)
    except Invalid as error:
        return f"the case is malformed: {error.detail}"
    try:
        grant = decide(policy, principal, action, facts, _NOW, not_after=_NOT_AFTER)
    except Invalid as error:
        return f"the case is malformed: {error.detail}"
    except Refused as refused:
        return _refused(policy, case, principal, action, facts, refused)
    if case.expect == "deny":
        return f"expected deny, but it is allowed by {', '.join(grant.policies)}"
    return "; ".join(_differences(case, grant))


def _refused(
    policy: Policy, case: Case, principal: Principal, action: Action, facts: Mapping[str, Facts], refused: Refused
) -> str:
    reason = refused.reason
    if reason is Reason.DENIED and lacks_approval(policy, principal, action, facts):
        reason = Reason.APPROVAL_REQUIRED
    if case.expect == "deny" and case.reason in {None, reason}:
        return ""
    wanted = "allow" if case.expect == "allow" else case.reason
    failures = _failures(policy, principal, action, facts)
    return "; ".join([f"expected {wanted}, got {reason}: {refused.detail}", *failures])


def _failures(policy: Policy, principal: Principal, action: Action, facts: Mapping[str, Facts]) -> Iterator[str]:
    for one in explain(policy, principal, action, facts).policies:
        if one.failed and one.effect == "permit":
            yield f"{one.id} fails at: {' and '.join(one.failed)}"


def _differences(case: Case, grant: Grant) -> Iterator[str]:
    ttl: timedelta = grant.expires_at - _NOW
    if case.max_ttl is not None and parse_ttl(case.max_ttl) != ttl:
        yield f"expected a life of {case.max_ttl}, got {ttl.total_seconds():g}s"
    if case.use is not None and case.use != grant.use:
        yield f"expected use {case.use}, got {grant.use}"
    if case.policies is not None and sorted(case.policies) != list(grant.policies):
        yield f"expected {', '.join(case.policies)} to permit it, got {', '.join(grant.policies)}"
