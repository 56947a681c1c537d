"""Signing, as a build agent asks for it: a grant, then the one signature or certificate that it is good for."""

import hashlib
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, TypeVar

from google.protobuf.message import Message

from broker._proto.actionbroker.v1 import signing_pb2
from broker.action import Action
from broker.artifacts import KEYLESS, PARAMETER, parse_signing_request
from broker.client.faults import unintelligible
from broker.client.link import Link, Method
from broker.client.wire import to_wire
from broker.errors import Invalid

SIGNING_DEADLINE_S: Final = 15.0  # the broker's own bound, and the way there and back
MAX_MESSAGE: Final = 1024 * 1024 - 4096  # bytes; the broker's own bound, less what surrounds a message
_CHUNK: Final = 1024 * 1024

_Q = TypeVar("_Q", bound=Message)
_R = TypeVar("_R")

_GRANT: Final = Method(name="RequestSigningGrant", of=lambda stubs: stubs.broker.RequestSigningGrant)
_SIGN: Final = Method(name="Sign", of=lambda stubs: stubs.broker.Sign)
_CERTIFY: Final = Method(name="IssueSigningCertificate", of=lambda stubs: stubs.broker.IssueSigningCertificate)


@dataclass(frozen=True, slots=True, kw_only=True)
class SigningGrant:
    """Leave for one signature by this client. grant_id: names it in the ledger. provenance: what it was given on."""

    grant: str = field(repr=False)
    expires_at: datetime
    grant_id: str
    csr_nonce: str = field(repr=False)
    action: Action
    provenance: tuple[bytes, ...] = field(repr=False)
    correlation_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """What came of a grant. certificate_chain: DER, leaf first; empty for a named key. public_key: DER.

    timestamp: DER TimeStampResp; empty where the broker has no authority. bundle: Sigstore bundle v0.3, JSON.
    """

    signature: bytes
    certificate_chain: tuple[bytes, ...]
    public_key: bytes
    timestamp: bytes
    bundle: str
    correlation_id: str


def digests_of(file: Path, algorithms: Collection[str] = ("sha256",)) -> dict[str, str]:
    """An artifact's name: its digests in hex.

    algorithms: of `HEX_DIGITS`, sha256 always among those of a request. Where provenance is wanted it has to give each
    of them, and a P-384 key signs the sha384. Raises: OSError.
    """
    made = {name: hashlib.new(name) for name in algorithms}
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            for digest in made.values():
                digest.update(chunk)
    return {name: digest.hexdigest() for name, digest in made.items()}


def signing_action(
    name: str,
    resource: str,
    *,
    issuer: str,
    artifacts: Sequence[Mapping[str, str]],
    purpose: str,
    signer: str = KEYLESS,
    parameters: Mapping[str, Any] | None = None,
) -> Action:
    """The action that asks for a signature over `artifacts` (`digests_of` names each).

    issuer: the broker's. parameters: the operator's own, beside "signing". signer: "keyless", "key:<name>" or
    "agent-key". Raises: Invalid.
    """
    if parameters and PARAMETER in parameters:
        raise Invalid(f'the parameter "{PARAMETER}" is made from artifacts, purpose and signer')
    found = {"artifacts": [dict(artifact) for artifact in artifacts], "purpose": purpose, "signer": signer}
    signing = parse_signing_request(found).to_json()
    return Action(name, resource, issuer, {**(parameters or {}), PARAMETER: signing})


class SigningCalls:
    """`Client.signing`. Each call raises Refused, Invalid or Unavailable, as the client's others do."""

    def __init__(self, link: Link, *, spiffe_id: str, seconds: float) -> None:
        self._link, self._spiffe_id, self._seconds = link, spiffe_id, max(seconds, SIGNING_DEADLINE_S)

    async def grant(
        self,
        action: Action,
        provenance: Sequence[bytes] = (),
        *,
        request_id: str = "",
        ticket: str = "",
        session: str = "",
    ) -> SigningGrant:
        """Leave for one signature, after a fresh look at caller, provenance and approvals.

        action: of `signing_action`. provenance: DSSE envelopes or Sigstore bundles. Others: as in `Client.request`.
        Raises: ApprovalRequired (a Refused) with what to approve.
        """
        message = signing_pb2.RequestSigningGrantRequest(
            action=to_wire(action),
            provenance=provenance,
            request_id=request_id,
            spiffe_id=self._spiffe_id,
            ticket=ticket,
            session=session,
        )
        answer = await self._call(_GRANT, message, self._seconds)
        if not answer.grant.grant or answer.grant.expires_at.seconds <= 0:
            raise unintelligible("a grant without content")
        return SigningGrant(
            grant=answer.grant.grant,
            expires_at=answer.grant.expires_at.ToDatetime(tzinfo=UTC),
            grant_id=answer.grant.grant_id,
            csr_nonce=answer.grant.csr_nonce,
            action=action,
            provenance=tuple(provenance),
            correlation_id=answer.correlation_id,
        )

    async def sign(
        self, grant: SigningGrant, *, statement: bytes = b"", idempotency_id: str | None = None
    ) -> Signature:
        """The one signature of a grant: over its artifact's digest, or over `statement` as DSSE.

        idempotency_id: 16 to 64 of A-Z a-z 0-9 - _, of your own making, to be able to fetch the same signature again
        after a crash; else one is made, for the retries of this call.
        """
        message = signing_pb2.SignRequest(
            grant=grant.grant,
            idempotency_id=idempotency_id or secrets.token_urlsafe(24),
            statement=statement,
            provenance=grant.provenance,
            spiffe_id=self._spiffe_id,
        )
        answer = await self._call(_SIGN, message, self._seconds)
        if not answer.signature or not answer.bundle:
            raise unintelligible("a signature without content")
        return Signature(
            signature=answer.signature,
            certificate_chain=tuple(answer.certificate_chain),
            public_key=answer.public_key,
            timestamp=answer.timestamp,
            bundle=answer.bundle,
            correlation_id=answer.correlation_id,
        )

    async def certify(self, grant: SigningGrant, csr: bytes, *, idempotency_id: str | None = None) -> tuple[bytes, ...]:
        """A certificate for our own key, and the chain above it: DER, leaf first.

        csr: PKCS #10 (DER) with `grant.csr_nonce` as challengePassword. idempotency_id: as in `sign`.
        """
        message = signing_pb2.IssueSigningCertificateRequest(
            grant=grant.grant,
            idempotency_id=idempotency_id or secrets.token_urlsafe(24),
            csr=csr,
            provenance=grant.provenance,
            spiffe_id=self._spiffe_id,
        )
        answer = await self._call(_CERTIFY, message, self._seconds)
        if not answer.certificate_chain:
            raise unintelligible("a certificate without content")
        return tuple(answer.certificate_chain)

    async def _call(self, method: Method[_Q, _R], message: _Q, seconds: float) -> _R:
        if message.ByteSize() > MAX_MESSAGE:
            raise Invalid(
                f"provenance and statement are larger than {MAX_MESSAGE} bytes together: send fewer envelopes"
            )
        return await self._link.call(method, message, seconds)
