"""Records of what became of credentials after they were given, and of what else decides about them.

As in records.py: one Struct for each kind of event, hashes only.
"""

from typing import Literal

from broker.errors import Reason
from broker.ledger.event import Bounded, Event, Time

MAX_REFUSED = 1_000
"""Credentials in one record."""

FEWEST_APPROVERS = 2
"""Of a break-glass permit, whatever policy says."""

Level = Literal["LOW", "MEDIUM", "HIGH"]
"""CAEP 1.0 section 3.8: https://openid.net/specs/openid-caep-1_0-final.html"""


class ScopeRefused(Bounded, frozen=True, kw_only=True, tag="scope_refused", gc=False):
    """These credentials count no more, although they have not expired. Final.

    jtis: at most `MAX_REFUSED`. reason: what a guard says. cause: what changed, as a fact key ("process:4711:99"), or
    "policy:<revision>", "bundle:<trust domain>", "standing:<id>", "parent:<jti>", "holder", "operator".
    by: the SPIFFE ID of who wanted it; empty where the broker found out.
    """

    jtis: tuple[str, ...]
    reason: Reason
    cause: str
    by: str = ""


class Suspended(Event, frozen=True, kw_only=True, tag="suspended", gc=False):
    """So many credentials are refused until they have been decided again.

    suspension: the count of this process. cause: as in `ScopeRefused`, the first.
    """

    suspension: int
    cause: str
    count: int


class SuspensionEnded(Event, frozen=True, kw_only=True, tag="suspension_ended", gc=False):
    """All of the suspension that this process counted so have been decided; `refused` of them are refused."""

    suspension: int
    refused: int


class StandingDenial(Bounded, frozen=True, kw_only=True, tag="standing_denial", gc=False):
    """Nothing is minted for whom, or what, all of these fit that are set, until then or until it is lifted.

    id: random. principal: a SPIFFE ID, or with a slash at its end all below a path. by: who said so, by `policies`.
    detail: its own words. before: see standing.py; filled in as it is recorded, here and below.
    """

    id: str
    principal: str = ""
    action: str = ""
    trust_domain: str = ""
    until: Time | None = None
    by: str
    policies: tuple[str, ...]
    policy_revision: str
    before: int = 0


class StandingLifted(Bounded, frozen=True, kw_only=True, tag="standing_lifted", gc=False):
    """A standing denial, or a break-glass permit, was ended before its time.

    by: who lifted it, by `policies`; or an approver who took its approval back, which needs nobody's leave.
    """

    id: str
    by: str
    policies: tuple[str, ...] = ()
    policy_revision: str = ""
    before: int = 0


class BreakGlass(Bounded, frozen=True, kw_only=True, tag="break_glass", gc=False):
    """Until then this workload may do this action on this resource, although no policy permits it.

    by: who asked for it, by `policies`. approval: the digest (hex) of the request that was approved, which it used up;
    approvers: who did, at least `FEWEST_APPROVERS`. detail: why. epoch: in which it counts, filled in like `before`.
    """

    id: str
    principal: str
    action: str
    resource: str
    until: Time
    by: str
    approval: str
    approvers: tuple[str, ...]
    policies: tuple[str, ...]
    policy_revision: str
    epoch: int = 0
    before: int = 0


class SessionScored(Bounded, frozen=True, kw_only=True, tag="session_scored", gc=False):
    """Somebody else than its holder said how risky a session is. The first time makes the session.

    principal: whose session it is; empty where it was revoked before anybody said that. by: a SPIFFE ID, or "<issuer>"
    of a security event. event: the hash of that event's `jti` as in `SecurityEvent`; empty for an operator's word.
    policies: empty for an event. key: that the session is bound to by then, as in `SessionBound`; empty while it is
    not. said_at: as of when an event says so; None for an operator's word, which is of `at`. detail: why, in words.
    """

    session: str
    principal: str
    level: Level
    by: str
    event: str = ""
    policies: tuple[str, ...] = ()
    key: str = ""
    said_at: Time | None = None


class SessionBound(Event, frozen=True, kw_only=True, tag="session_bound", gc=False):
    """The first key that named the session; nobody else's counts. key: its thumbprint."""

    session: str
    principal: str
    key: str


class SecurityEvent(Bounded, frozen=True, kw_only=True, tag="security_event", gc=False):
    """A security event token was taken (RFC 8417), once.

    issuer: its `iss`. event: hex SHA-256 over "<iss> <jti>". type: the event's URI. effect: what came of it, in a word.
    token_sha256: hex.
    """

    issuer: str
    event: str
    type: str
    effect: str
    token_sha256: str
