"""Who is asking, on every request: an X.509-SVID, a JWT-SVID beside a key proof, the process behind a Unix socket.

People, who have no SVID, come with an ID token (id_token.py), and only to approve what others ask for.

Whatever the transport, the answer is the same kind of value. That a caller holds the key it names is checked where the
proof is (exchange.py); over mutual TLS the handshake was the proof.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Literal, Protocol

from attestors.contract import AttestationFailed, AttestationUnavailable, Facts, Process
from broker.errors import Reason, Refused, Unavailable
from broker.identity import jwt_svid, x509_svid
from broker.identity.jwt_svid import verify_jwt_svid
from broker.identity.peer import look
from broker.identity.person import PersonId, Principal
from broker.identity.spiffe_id import SpiffeId
from broker.identity.strict import require_client_assertion
from broker.identity.trust import TrustBundle, TrustSnapshot
from broker.identity.x509_svid import verify_x509_svid

Transport = Literal["mtls", "unix", "jwt-svid", "id-token"]


class UnixPeer(Protocol):
    """What identification needs of broker/identity/peer.py."""

    @property
    def process(self) -> Process:
        """The process as it was when it connected."""

    def unchanged(self) -> None:
        """Raises: Refused(NOT_ATTESTED) when it exited, or runs another program or as another user."""


Entitlements = Callable[[Process, datetime], Awaitable[Facts]]
"""SPIRE's word, now, on the SPIFFE IDs of a process: facts of the attestor `spire`, with `ids` among the values."""


def entitlements(look: Entitlements) -> Entitlements:
    """`look` of the `spire` attestor with this side's errors. Raises from what it returns: Refused, Unavailable."""

    async def ask(process: Process, now: datetime) -> Facts:
        try:
            return await look(process, now)
        except AttestationFailed as error:
            raise Refused(Reason.NOT_ATTESTED, str(error)) from error
        except AttestationUnavailable as error:
            raise Unavailable(Reason.ATTESTATION_UNAVAILABLE, str(error)) from error

    return ask


@dataclass(frozen=True, slots=True, kw_only=True)
class Identified:
    """A verified identity, for this request only.

    principal: the workload, or the person (id-token). expires_at: of the SVID or ID token, or of what SPIRE said of the
    process. leaf_sha256: of the client certificate (mtls). assertion_sha256, issued_at: of the JWT-SVID (jwt-svid) or
    ID token. process: of the caller (unix). known: what was just learned of the process or person.
    authority_sha256: of the authority that vouched for the SVID (mtls, jwt-svid). confirmation: thumbprint of the key
    that was proved (`jkt` or `x5t#S256`), "" where none was. heard: how many changes the broker had heard of when it
    identified this; None where what is known is not its own, such as of a credential that is decided again.
    """

    principal: Principal
    transport: Transport
    expires_at: datetime
    leaf_sha256: bytes | None = None
    assertion_sha256: bytes | None = None
    issued_at: datetime | None = None
    process: Process | None = None
    known: Mapping[str, Facts] = field(default_factory=dict)
    authority_sha256: bytes | None = None
    confirmation: str = ""
    heard: int | None = None

    @property
    def spiffe_id(self) -> SpiffeId:
        """The workload's. Raises: Refused for a person, who has none."""
        if isinstance(self.principal, PersonId):
            raise Refused(Reason.UNAUTHENTICATED, "a person has no SPIFFE ID: this is for workloads alone")
        return self.principal


def by_certificate(chain: Sequence[bytes], snapshot: TrustSnapshot, now: datetime) -> Identified:
    """The holder of an X.509-SVID. chain: DER, leaf first, as the handshake gave it.

    The handshake trusts all domains' roots at once, so this is the check: the bundle of the SVID's own domain, again on
    every request, which also ends a connection's identity when its SVID expires. Raises: Refused.
    """
    svid = verify_x509_svid(chain, snapshot, now, peer="client")
    return Identified(
        principal=svid.spiffe_id,
        transport="mtls",
        expires_at=svid.not_after,
        leaf_sha256=svid.leaf_sha256,
        authority_sha256=svid.authority_sha256,
    )


def by_assertion(assertion: str, snapshot: TrustSnapshot, now: datetime, *, issuer: str) -> Identified:
    """The subject of a JWT-SVID meant for us alone (draft-ietf-oauth-spiffe-client-auth, `jwt-spiffe`).

    A bearer token: it counts only beside a key proof, which exchange.py checks. Raises: Refused.
    """
    svid = verify_jwt_svid(assertion, snapshot, now, audience=issuer)
    require_client_assertion(svid, issuer, now)
    return Identified(
        principal=svid.spiffe_id,
        transport="jwt-svid",
        expires_at=svid.expires_at,
        assertion_sha256=svid.token_sha256,
        issued_at=svid.issued_at,
        authority_sha256=svid.authority_sha256,
    )


def authorities(bundle: TrustBundle) -> frozenset[bytes]:
    """The digests of all authorities of a bundle that may vouch for an SVID."""
    x509 = {x509_svid.authority_digest(one) for one in bundle.x509_authorities}
    jwt = {jwt_svid.authority_digest(key) for keys in bundle.jwt_authorities.values() for key in keys}
    return frozenset(x509 | jwt)


def require_authority(authority_sha256: bytes, spiffe_id: SpiffeId, snapshot: TrustSnapshot) -> None:
    """That the authority which vouched for an SVID of `spiffe_id` still may. Raises: Refused(UNAUTHENTICATED)."""
    bundle = snapshot.bundle_for(spiffe_id.trust_domain)
    if authority_sha256 not in authorities(bundle):
        raise Refused(
            Reason.UNAUTHENTICATED,
            f"the authority of {bundle.trust_domain} that vouched for the caller is gone from it",
        )


async def by_process(peer: UnixPeer, entitlements: Entitlements, now: datetime, *, wanted: str) -> Identified:
    """The process behind a Unix socket, by asking SPIRE about its PID now.

    Attest first, look after (DESIGN section 5): had the PID passed to another process in between, its pidfd would have
    told. wanted: which SPIFFE ID, where the process has more than one; empty where it has one.

    Raises: Refused(NOT_ATTESTED, MALFORMED), Unavailable(ATTESTATION_UNAVAILABLE).
    """
    facts = await entitlements(peer.process, now)
    peer.unchanged()
    ids = facts.values["ids"]
    if not isinstance(ids, list) or not ids or facts.expires_at is None:
        raise Refused(Reason.NOT_ATTESTED, "SPIRE knows no SPIFFE ID of this process")
    if not wanted and len(ids) > 1:
        raise Refused(Reason.NOT_ATTESTED, f"the process has {len(ids)} SPIFFE IDs: name the one to use (spiffe_id)")
    if wanted and wanted not in ids:
        raise Refused(Reason.NOT_ATTESTED, "the process is not entitled to the SPIFFE ID that it named")
    return Identified(
        principal=SpiffeId.parse(wanted or str(ids[0])),
        transport="unix",
        expires_at=facts.expires_at,
        process=peer.process,
        known={"spire": facts},
    )


async def again(identity: Identified, entitlements: Entitlements, now: datetime) -> Identified:
    """The same caller as it is now: SPIRE's word on its process, and the process itself, before and after.

    Who showed an SVID does not show it again; its end bounds everything already. Raises: Refused(NOT_ATTESTED),
    Unavailable. Not checked: that the authority that vouched for an SVID still may (`require_authority`).
    """
    process = identity.process
    if process is None:
        return identity
    if look(process.pid) != process:
        raise Refused(Reason.NOT_ATTESTED, "the process exited or was replaced")
    facts = await entitlements(process, now)
    ids = facts.values["ids"]
    if look(process.pid) != process or not isinstance(ids, list) or str(identity.principal) not in ids:
        raise Refused(Reason.NOT_ATTESTED, "SPIRE no longer gives the process this identity")
    return replace(identity, known={**identity.known, "spire": facts})
