"""A small release policy's schema, its facts and its requests, for tests of decisions about signatures."""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from attestors.contract import FactKey, Facts
from broker.action import Action
from broker.decision.decide import Grant, decide
from broker.decision.policy import Policy, compile_policy
from broker.identity.person import PersonId
from broker.identity.spiffe_id import SpiffeId

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
ISSUER = "https://broker.acme.test"
AGENT = SpiffeId.parse("spiffe://acme.test/build/agent")
ALICE = PersonId(issuer="https://login.acme.test", subject="alice")
BUILDER = "https://ci.acme.test/builder"
ARTIFACT = {"sha256": "ab" * 32}
# spire and process are optional so that tests can leave them out; provenance is required, approval is not.
SCHEMA = """
action "release.sign" appliesTo {
  principal: [Workload], resource: [Resource],
  context: {
    process?: Process, provenance: Provenance, approval?: Approval,
    parameters: { environment: String, signing: Signing }
  }
};
"""
PERMIT = 'permit (principal, action == Action::"release.sign", resource)'
PROVENANCE = {
    "builder": BUILDER,
    "build_type": "https://ci.acme.test/build-types/container/v1",
    "source": "https://git.acme.test/acme/app",
    "source_digest": "5f3a",
    "source_ref": "refs/heads/main",
    "config_uri": "",
    "config_digest": "",
    "runner": "",
    "invocation": "",
    "signer": "key:ci",
    "started_at": -1,
    "finished_at": 1_795_000_000,
    "external_parameters": '{"name":"ä"}',
    "dependencies": ["git+https://git.acme.test/acme/app@gitCommit:5f3a"],
    "subjects": ["sha256:" + "ab" * 32],
}


def facts(*, expires_at: datetime | None = None, **values: Mapping[str, Any]) -> dict[str, Facts]:
    """Facts by attestor name."""
    return {
        name: Facts(attestor=name, key=FactKey(f"{name}:1"), values=dict(found), attested_at=NOW, expires_at=expires_at)
        for name, found in values.items()
    }


def approved(*by: str) -> dict[str, Facts]:
    """Approvals by these workloads, and of the artifact's provenance."""
    approval = {"count": len(by), "by": sorted(by), "people": 0, "workloads": len(by)}
    return facts(provenance=PROVENANCE, approval=approval)


def signing(signer: str = "keyless", environment: str = "production", **more: object) -> Action:
    """A request for a signature. more: members beside those of `signing`."""
    asked = {"artifacts": [ARTIFACT], "purpose": "release", "signer": signer, **more}
    return Action(
        "release.sign",
        "https://releases.acme.test/app/1",
        ISSUER,
        {"environment": environment, "signing": asked},
    )


def policy(*texts: str, schema: str = SCHEMA) -> Policy:
    """Compiled from these texts."""
    return compile_policy({"p.cedar": "\n".join(texts)}, {"p.cedarschema": schema})


def grant(*texts: str, action: Action | None = None, seen: Mapping[str, Facts] | None = None) -> Grant:
    """What `decide` gives. Raises: Refused."""
    found = approved() if seen is None else seen
    return decide(policy(*texts), AGENT, action or signing(), found, NOW, not_after=NOW + timedelta(hours=1))
