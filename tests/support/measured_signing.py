"""What is asked of signing_server.py: a grant for an artifact that nobody has named before, and its signature."""

import secrets

from support.releases import ISSUER

from broker._proto.actionbroker.v1 import signing_pb2
from broker.client.signing import signing_action
from broker.client.wire import to_wire

ENVELOPE = secrets.token_bytes(1536)
"""As large as provenance is. Attestors that answer from memory do not look at it."""


def grant_request(signer: str = "keyless", environment: str = "nightly") -> signing_pb2.RequestSigningGrantRequest:
    """signer: "keyless" or "key:<name>"."""
    artifact = {"sha256": secrets.token_hex(32), "sha384": secrets.token_hex(48), "sha512": secrets.token_hex(64)}
    action = signing_action(
        "release.sign",
        "https://releases.acme.test/app",
        issuer=ISSUER,
        artifacts=[artifact],
        purpose="release",
        signer=signer,
        parameters={"environment": environment},
    )
    return signing_pb2.RequestSigningGrantRequest(
        action=to_wire(action), provenance=[ENVELOPE], request_id=secrets.token_urlsafe(24)
    )


def sign_request(grant: str) -> signing_pb2.SignRequest:
    """With an idempotency id of its own."""
    return signing_pb2.SignRequest(grant=grant, idempotency_id=secrets.token_urlsafe(24), provenance=[ENVELOPE])
