"""Facts from approvers: who, other than the caller, said yes to this very request.

A request is an action, its caller and the caller's own id of it, named together by one digest. Change a parameter, the
caller or the id and it is another request, to which nobody said yes.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Protocol

import rfc8785

from attestors.contract import AttestationRequest, FactKey, Facts

_WORKLOAD: Final = "spiffe://"  # SPIFFE-ID section 2; a person's name begins with an issuer's https://


def request_digest(action_digest: str, principal: str, request_id: str) -> str:
    """SHA-256 (hex) over RFC 8785 JSON of the three: what an approval is about.

    action_digest: hex. Everybody who names a request computes it with this function, or as it says.
    """
    named = {"action_digest": action_digest, "principal": principal, "request_id": request_id}
    return hashlib.sha256(rfc8785.dumps(named)).hexdigest()


def is_workload(approver: str) -> bool:
    """Whether it is a workload's name; otherwise a person's."""
    return approver.startswith(_WORKLOAD)


@dataclass(frozen=True, slots=True, kw_only=True)
class ApprovalSeen:
    """One approval that was given. by: a SPIFFE ID, or <issuer>/subject/<base64url of sub>."""

    by: str
    expires_at: datetime


class ApprovalSource(Protocol):
    """Where approvals are written down."""

    async def current(self, request_digest: str, now: datetime, credential: str) -> Sequence[ApprovalSeen]:
        """Those of this request that are neither withdrawn nor expired.

        None where another credential than `credential` used them up: they are good for one mint.

        Raises: AttestationUnavailable when it cannot be read.
        """

    def subscribe(self, changed: Callable[[str], None]) -> Callable[[], None]:
        """Calls `changed` with the digest of each request to which one was given or withdrawn, in the event loop.

        Returns what ends it.
        """


class ApprovalAttestor:
    """Fills `context.approval` with who approved this request, and how many of them are people and workloads.

    `{"count": 2, "by": [names, sorted], "people": 1, "workloads": 1}`. There are always facts, so that a policy can ask
    for two approvals before there is one.
    """

    name = "approval"

    def __init__(self, source: ApprovalSource) -> None:
        self._source = source

    async def attest(self, request: AttestationRequest, now: datetime) -> Facts:
        """Looks now. The caller's own approval never counts, and an approver counts once.

        Without a request id nothing can have been approved. Raises: AttestationUnavailable.
        Not checked: that who approved may; that was decided and recorded when they did.
        """
        if not request.request_id:
            return _facts("", (), now)
        digest = request_digest(request.action_digest.hex(), request.principal, request.request_id)
        seen = await self._source.current(digest, now, request.credential)
        return _facts(digest, [one for one in seen if one.by != request.principal and one.expires_at > now], now)

    async def watch(self) -> AsyncIterator[FactKey]:
        """Yields the key of each request whose approvals were given or withdrawn.

        That time passes is not told: facts say when they end. What changes twice before it is taken is told once.
        """
        changed: dict[str, None] = {}  # digests, in order
        some = asyncio.Event()

        def note(digest: str) -> None:
            changed[digest] = None
            some.set()

        end = self._source.subscribe(note)
        try:
            while True:
                await some.wait()
                some.clear()
                told = [*changed]
                changed.clear()
                for digest in told:
                    yield _key(digest)
        finally:
            end()

    def blind(self) -> Mapping[str, float]:
        """See attestors.contract.Attestor: what is recorded here is told here."""
        return {}


def _facts(digest: str, seen: Sequence[ApprovalSeen], now: datetime) -> Facts:
    by = sorted({one.by for one in seen})
    workloads = sum(map(is_workload, by))
    return Facts(
        attestor=ApprovalAttestor.name,
        key=_key(digest),
        values={"count": len(by), "by": [*by], "people": len(by) - workloads, "workloads": workloads},
        attested_at=now,
        expires_at=min((one.expires_at for one in seen), default=None),
    )


def _key(digest: str) -> FactKey:
    return FactKey(f"{ApprovalAttestor.name}:{digest}")
