"""What an attestor is: something that looks at a caller, now, and says what it saw.

An attestor appraises evidence or looks for itself (RFC 9334). It knows nothing of policies, keys or stores, so that it
can later run on another node than the broker. Whatever it needs from outside is a Protocol in its own file.
"""

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NewType, Protocol

JsonValue = bool | int | float | str | list["JsonValue"] | dict[str, "JsonValue"]

FactKey = NewType("FactKey", str)
"""Names one watchable fact, for example `process:4711:99120`: when it changes, what depends on it is decided again."""


class AttestationFailed(Exception):
    """This evidence is mine to judge, and it is wrong. The request is refused."""


class AttestationUnavailable(Exception):
    """I could not look. The request is refused; trying again later may help."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """One process, told apart from a later one with the same PID by its start time.

    pid: in the broker's own PID namespace, never 0.
    start_time: clock ticks since boot, field 22 of /proc/PID/stat.
    uid: the effective one. exe_device, exe_inode: of the file that /proc/PID/exe leads to.
    """

    pid: int
    start_time: int
    uid: int
    gid: int
    exe_device: int
    exe_inode: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """An attestation result.

    values: JSON values; they become `context.<attestor>` in Cedar and are hashed into the credential.
    expires_at: no credential outlives it; None where the facts hold until they change.
    """

    attestor: str
    key: FactKey
    values: Mapping[str, JsonValue]
    attested_at: datetime
    expires_at: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AttestationRequest:
    """Who is to be attested, for one request.

    principal: the SPIFFE ID, verified. process: None where the caller is not a process on this node.
    known: facts that identification already gathered for this very request, by attestor name.
    parameters: of the action, as the caller sent them. action_digest: SHA-256, 32 bytes; empty where nothing is asked
    for yet. request_id: the caller's own id of this request, "" for none. ticket, session: names of a ticket and of a
    session that the caller says it acts for, "" for none; whether they are its own is the attestor's to find out.
    confirmation: thumbprint of the key that the caller proved (`jkt` or `x5t#S256`), "" where none was.
    evidence: what the caller presents, not verified, by attestor name. credential: the id of the credential that is
    decided again, "" at its first decision; what it has used up itself, such as an approval, counts as still there.
    """

    principal: str
    process: Process | None = None
    known: Mapping[str, Facts] = field(default_factory=dict)
    parameters: Mapping[str, Any] = field(default_factory=dict)
    action_digest: bytes = b""
    request_id: str = ""
    ticket: str = ""
    session: str = ""
    confirmation: str = ""
    evidence: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    credential: str = ""


class Attestor(Protocol):
    """One source of facts. `name` is the attribute of Cedar's context that it fills."""

    @property
    def name(self) -> str:
        """The attribute of Cedar's context that it fills."""

    async def attest(self, request: AttestationRequest, now: datetime) -> Facts | None:
        """Looks now. None: nothing to say about this caller.

        Raises: AttestationFailed when it looked and the caller is not what it claims;
        AttestationUnavailable when it could not look.
        """

    def watch(self) -> AsyncIterator[FactKey]:
        """Yields the key of each fact that changed or may have changed since it was attested."""

    def blind(self) -> Mapping[str, float]:
        """What it may miss changes of: prefixes of fact keys, and since when, in the event loop's seconds.

        Empty while it sees everything that it watches. Who depends on what is not seen is not this side's to say.
        """
