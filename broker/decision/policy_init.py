"""Writes a policy folder to begin with: the first operator, and one example action with its test.

The first operator exists by policy, not by a switch: `operators.cedar` permits `broker.operate` to one SPIFFE ID.
"""

from pathlib import Path

from broker.decision.findings import Defect, Finding, PolicyError
from broker.identity.spiffe_id import SpiffeId

_OPERATORS = """\
// Who operates this broker. What operators do (explain, for one) is an action like any other: decided here, recorded.
@id("operators")
permit (
  principal == Workload::"{operator}",
  action == Action::"broker.operate",
  resource
);
"""

_EXAMPLE_SCHEMA = """\
// Each action says what evidence it needs (spire, process; "?" where it may be missing), whether its policies see the
// audience (the service that the credential is for), and what parameters it takes.
action "orders.refund" appliesTo {{
  principal: [Workload],
  resource: [Resource],
  context: {{ spire: Spire, process?: Process, audience: String, parameters: {{ amount: Long }} }}
}};
"""

_EXAMPLE = """\
// An example. It permits nothing until a workload of that name exists.
// @max_ttl("90s"), @single_use and @reuse("ttl") say how long and how often a credential counts.
@id("small-refunds")
@max_ttl("60s")
permit (
  principal == Workload::"{support}",
  action == Action::"orders.refund",
  resource in Resource::"https://orders.{domain}/orders"
) when {{
  context.spire.ids.contains("{support}") &&
  context.audience == "spiffe://{domain}/service/orders" &&
  context.parameters.amount > 0 &&
  context.parameters.amount <= 100
}};

// Evidence that may be missing: a forbid says `unless` what must hold, so that leaving it out forbids.
@id("refunds-not-as-root")
forbid (
  principal,
  action == Action::"orders.refund",
  resource
) unless {{
  context has process && context.process.uid != 0
}};
"""

_EXAMPLE_TESTS = """\
# Run by `action-broker policy test`.
[[case]]
name = "support refunds small amounts"
principal = "{support}"
action = "orders.refund"
resource = "https://orders.{domain}/orders/17"
audience = "spiffe://{domain}/service/orders"
parameters = {{ amount = 30 }}
facts.spire = {{ ids = ["{support}"] }}
facts.process = {{ uid = 1600, gid = 1600, exe = "/usr/bin/agent", exe_sha256 = "", cgroup = "/" }}
expect = "allow"
max_ttl = "60s"
use = "once"
policies = ["example.cedar#small-refunds"]

[[case]]
name = "nobody refunds large amounts"
principal = "{support}"
action = "orders.refund"
resource = "https://orders.{domain}/orders/17"
audience = "spiffe://{domain}/service/orders"
parameters = {{ amount = 101 }}
facts.spire = {{ ids = ["{support}"] }}
facts.process = {{ uid = 1600, gid = 1600, exe = "/usr/bin/agent", exe_sha256 = "", cgroup = "/" }}
expect = "deny"

[[case]]
name = "a refund is no charge"
principal = "{support}"
action = "orders.refund"
resource = "https://orders.{domain}/orders/17"
audience = "spiffe://{domain}/service/orders"
parameters = {{ amount = -30 }}
facts.spire = {{ ids = ["{support}"] }}
facts.process = {{ uid = 1600, gid = 1600, exe = "/usr/bin/agent", exe_sha256 = "", cgroup = "/" }}
expect = "deny"

[[case]]
name = "no credential for another service than orders"
principal = "{support}"
action = "orders.refund"
resource = "https://orders.{domain}/orders/17"
audience = "{support}"
parameters = {{ amount = 30 }}
facts.spire = {{ ids = ["{support}"] }}
facts.process = {{ uid = 1600, gid = 1600, exe = "/usr/bin/agent", exe_sha256 = "", cgroup = "/" }}
expect = "deny"

[[case]]
name = "without knowing the process, no refund"
principal = "{support}"
action = "orders.refund"
resource = "https://orders.{domain}/orders/17"
audience = "spiffe://{domain}/service/orders"
parameters = {{ amount = 30 }}
facts.spire = {{ ids = ["{support}"] }}
expect = "deny"
"""

_FILES = {
    "operators.cedar": _OPERATORS,
    "example.cedarschema": _EXAMPLE_SCHEMA,
    "example.cedar": _EXAMPLE,
    "tests/example.toml": _EXAMPLE_TESTS,
}


def policy_init(folder: Path, operator: SpiffeId) -> tuple[Path, ...]:
    """Writes a folder that `PolicyDocuments.load` takes. operator: who may do what operators do.

    Returns the files. Raises: PolicyError when the folder already has documents, or cannot be written, or the
    operator has no path.
    """
    if not operator.path:
        problem = f"{operator} names a trust domain, not a workload"
        raise PolicyError([_finding(problem, f"Name the operator's workload, such as {operator}/operator.")])
    domain = operator.trust_domain
    words = {"operator": operator, "domain": domain.name, "support": f"{domain}/support/agent"}
    paths = {folder / name: text.format(**words) for name, text in _FILES.items()}
    try:
        present = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
        if present:
            raise PolicyError([_finding(f"{folder} is not empty ({present[0]})", "Choose a new folder.")])
        for path, text in paths.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    except OSError as error:
        problem = f"{folder} cannot be written: {error.strerror}"
        raise PolicyError([_finding(problem, "Choose a folder that you may write.")]) from error
    return tuple(paths)


def _finding(problem: str, fix: str) -> Finding:
    return Finding(defect=Defect.FOLDER, file="", problem=problem, fix=fix)
