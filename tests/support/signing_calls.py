"""Signing as a caller on the wire: whatever message it likes, each answer with its reason and its record."""

import secrets
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import grpc
import msgspec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from support.processes import Child, running
from support.signing import AGENT, SigningBroker
from support.trust_domain import TESTS
from support.whole_broker import Said, Whole, Wire

from broker._proto.actionbroker.v1 import action_pb2, signing_pb2
from broker.action import Action
from broker.client.signing import SigningGrant
from broker.credentials import jose
from broker.credentials.action_token import Claims
from broker.credentials.dpop import ProofKey
from broker.errors import Reason
from broker.ledger.records import Intent, Outcome, Redemption, Refusal
from broker.status import STATUS

NIGHTLY = {
    # Without approvals and SPIRE's word, so that a refusal has one reason, and that it works over mutual TLS, too.
    "nightly.cedarschema": """
action "nightly.sign" appliesTo {
  principal: [Workload], resource: [Resource], context: { provenance: Provenance, parameters: { signing: Signing } }
};
""",
    "nightly.cedar": """
@id("nightly") @max_ttl("300s")
permit (principal == Workload::"spiffe://acme.test/build/agent", action == Action::"nightly.sign", resource);
@id("nightly-by-named-keys") @max_ttl("300s")
@key("p256 p384 ed25519 rsa p256-statements p384-statements rsa-statements")
permit (principal == Workload::"spiffe://acme.test/build/agent", action == Action::"nightly.sign", resource);
@id("nightly-with-the-agents-own-key") @agent_key @max_ttl("300s")
permit (principal == Workload::"spiffe://acme.test/build/own-key-agent", action == Action::"nightly.sign", resource);
""",
}
_claims = msgspec.json.Decoder(Claims)

UNLIMITED = {
    "requests_per_second": 100_000,
    "burst": 100_000,
    "attestations_per_second_per_uid": 100_000,
    "attestation_burst_per_uid": 100_000,
}


def wire_action(action: Action) -> action_pb2.Action:
    """As it is sent."""
    parameters = msgspec.json.encode(action.parameters).decode()
    return action_pb2.Action(
        name=action.name, resource=action.resource, audience=action.audience, parameters=parameters
    )


async def ask_grant(
    wire: Wire,
    action: Action | action_pb2.Action,
    provenance: Sequence[bytes] = (),
    *,
    request_id: str = "",
    spiffe_id: str = AGENT,
) -> Said:
    """One call of RequestSigningGrant."""
    sent = wire_action(action) if isinstance(action, Action) else action
    message = signing_pb2.RequestSigningGrantRequest(
        action=sent, provenance=provenance, request_id=request_id, spiffe_id=spiffe_id
    )
    return await wire.ask("RequestSigningGrant", message)


async def get_grant(wire: Wire, action: Action, provenance: Sequence[bytes] = (), **options: str) -> Any:
    """The SigningGrant message of a request that is allowed."""
    said = await ask_grant(wire, action, provenance, **options)
    assert said.code is grpc.StatusCode.OK, (said.details, said.reason)
    return said.message.grant


async def ask_sign(
    wire: Wire,
    grant: str,
    provenance: Sequence[bytes] = (),
    *,
    idempotency_id: str | None = None,
    statement: bytes = b"",
    spiffe_id: str = AGENT,
) -> Said:
    """One call of Sign."""
    made = secrets.token_urlsafe(24) if idempotency_id is None else idempotency_id
    message = signing_pb2.SignRequest(
        grant=grant, idempotency_id=made, statement=statement, provenance=provenance, spiffe_id=spiffe_id
    )
    return await wire.ask("Sign", message)


async def ask_certificate(
    wire: Wire,
    grant: str,
    csr: bytes,
    provenance: Sequence[bytes] = (),
    *,
    idempotency_id: str | None = None,
    spiffe_id: str,
) -> Said:
    """One call of IssueSigningCertificate."""
    made = secrets.token_urlsafe(24) if idempotency_id is None else idempotency_id
    message = signing_pb2.IssueSigningCertificateRequest(
        grant=grant, idempotency_id=made, csr=csr, provenance=provenance, spiffe_id=spiffe_id
    )
    return await wire.ask("IssueSigningCertificate", message)


async def refused(broker: SigningBroker, said: Said, reason: Reason) -> Refusal:
    """That nothing came but this reason, and what the ledger has of it."""
    assert said.message is None
    assert (said.reason, said.code) == (reason, STATUS[reason].grpc)
    record = await broker.whole.recorded(said.correlation_id, Refusal)
    assert record.reason == reason
    return record


def acts(whole: Whole) -> list[Intent]:
    """Every signature and certificate that anybody was about to make."""
    made = {"signature", "signing_certificate"}
    return [one for one in whole.records() if isinstance(one, Intent) and one.credential in made]


def results(whole: Whole, correlation_id: str) -> list[str]:
    """What became of the intents of one request."""
    found = [one for one in whole.records() if isinstance(one, Outcome) and one.correlation_id == correlation_id]
    return [one.result for one in found]


@contextmanager
def nothing_signed(whole: Whole) -> Iterator[None]:
    """No key is used in the block, nor is any about to be."""
    before = len(acts(whole))
    yield
    assert len(acts(whole)) == before


def spent(whole: Whole, grant: str | SigningGrant) -> str:
    """Whether and how a grant is used up: "used", "refused", or "" where it is not."""
    jti = grant.grant_id if isinstance(grant, SigningGrant) else claims_of(grant).jti
    found = [one.result for one in whole.records() if isinstance(one, Redemption) and one.jti == jti]
    assert len(found) <= 1, "a grant is used up once"
    return found[0] if found else ""


def claims_of(grant: str) -> Claims:
    """What a grant says, read and not verified."""
    return jose.decode_unique(jose.parse(grant, typ="signing-grant+jwt").payload, _claims, "the grant")


@contextmanager
def build_agent(broker: SigningBroker, key: ProofKey, *paths: str) -> Iterator[Child]:
    """Another process that acts as AGENT, with this very key; see support/build_agent.py. paths: its SPIFFE IDs."""
    file = broker.whole.broker.folder / "proof.pem"
    file.write_bytes(key._private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    packages = sysconfig.get_paths()["purelib"]  # for an interpreter that is another file
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": f"{TESTS}:{TESTS.parent}:{packages}"}
    command = (sys.executable, "-m", "support.build_agent", broker.whole.broker.socket, str(file), AGENT)
    with running(*command, env=environment) as child:
        entries = [broker.whole.domain.entry(path, child.pid) for path in paths]
        yield child
    for entry in entries:
        broker.whole.domain.delete(entry)


async def told(child: Child, *words: object) -> str:
    """What it answers to a command."""
    child.tell(" ".join(map(str, words)))
    return await child.line()
