"""The policy that `dev` and `demo` begin with: one action, one rule, one operator, and tests of them.

Not `policy init`'s: that one's example refuses refunds as root, and a first run often is root's.
"""

from pathlib import Path
from typing import Final

from broker.cli.dev_folder import TRUST_DOMAIN

CALLER: Final = f"spiffe://{TRUST_DOMAIN}/support/agent"
SERVICE: Final = f"spiffe://{TRUST_DOMAIN}/service/orders"
OPERATOR: Final = f"spiffe://{TRUST_DOMAIN}/operator"
ORDERS: Final = f"https://orders.{TRUST_DOMAIN}/orders"
LIMIT: Final = 100

_SCHEMA: Final = """\
// What the action needs to know before it is decided, and what belongs to the approval: the service and the amount.
action "orders.refund" appliesTo {
  principal: [Workload],
  resource: [Resource],
  context: { spire: Spire, audience: String, parameters: { amount: Long } }
};
"""

_RULES: Final = f"""\
@id("small-refunds")
@max_ttl("60s")
permit (
  principal == Workload::"{CALLER}",
  action == Action::"orders.refund",
  resource in Resource::"{ORDERS}"
) when {{
  context.spire.ids.contains("{CALLER}") &&
  context.audience == "{SERVICE}" &&
  context.parameters.amount > 0 &&
  context.parameters.amount <= {LIMIT}
}};

// What operators do (explain, for one) is an action like any other: decided here, recorded.
@id("operators")
permit (
  principal == Workload::"{OPERATOR}",
  action == Action::"broker.operate",
  resource
);
"""

_CASE: Final = f"""\
[[case]]
name = "{{name}}"
principal = "{{principal}}"
action = "orders.refund"
resource = "{ORDERS}/17"
audience = "{{audience}}"
parameters = {{{{ amount = {{amount}} }}}}
facts.spire = {{{{ ids = ["{{principal}}"] }}}}
expect = "{{expect}}"
"""

_CASES: Final = (
    ("support refunds small amounts", CALLER, SERVICE, LIMIT, "allow"),
    ("nobody refunds large amounts", CALLER, SERVICE, LIMIT + 1, "deny"),
    ("a refund is no charge", CALLER, SERVICE, -30, "deny"),
    ("no credential for another service than orders", CALLER, CALLER, 30, "deny"),
    ("operators refund nothing", OPERATOR, SERVICE, 30, "deny"),
)
_COLUMNS: Final = ("name", "principal", "audience", "amount", "expect")


def write_starter_policy(folder: Path) -> None:
    """Writes it. Raises: OSError."""
    files = {
        "orders.cedarschema": _SCHEMA,
        "orders.cedar": _RULES,
        "tests/orders.toml": "# Run by `action-broker policy test`.\n"
        + "\n".join(_CASE.format_map(dict(zip(_COLUMNS, case, strict=True))) for case in _CASES),
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
