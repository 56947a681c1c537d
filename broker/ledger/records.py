"""What is written down: one Struct for each kind of event, and the one way it becomes bytes.

A record is JSON, tagged by `kind`, its fields in the order below; those bytes are what the chain hashes and what the
store keeps, so they are never encoded twice. `at` is RFC 3339 text in UTC rather than an integer: who reads a ledger
after an incident reads it beside other systems' logs, and needs no tool of ours to do so.

Hashes only: no credential, proof, key or evidence is ever a field here (DESIGN invariant 10). What is not checked
here: that principal, action and digests belong together; the caller has verified values for them.
"""

from datetime import timedelta
from typing import Any, Literal

import msgspec
from msgspec import Raw, Struct

from broker.action import Action
from broker.errors import Reason
from broker.ledger.event import MAX_DETAIL, Bounded, Event, Method, Time, cut
from broker.ledger.scope_records import (
    BreakGlass,
    ScopeRefused,
    SecurityEvent,
    SessionBound,
    SessionScored,
    StandingDenial,
    StandingLifted,
    Suspended,
    SuspensionEnded,
)

MAX_APPROVAL = timedelta(days=1)
"""How long an approval, or a request for some, may count."""


class ProcessReference(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, gc=False):
    """The process that asked, as in attestors.contract.Process."""

    pid: int
    start_time: int
    uid: int
    gid: int
    exe_device: int
    exe_inode: int


class Intent(Event, frozen=True, kw_only=True, tag="intent", gc=False):
    """About to mint, or to sign. Durable before a key is used (DESIGN invariant 1).

    credential: action_token, signing_grant, signing_certificate, or signature (which is no credential: see `is_live`).
    action: the bytes of `Action.canonical`, so that SHA-256 over them is `action_digest` (hex).
    cnf: the confirmation the credential will carry, for example {"jkt": …}: a thumbprint, so a hash. Of a certificate
    or signature {"spki_sha256": hex}, of the key that is certified or signs.
    facts: attestor name -> "sha256:…" of the facts' values. epoch: the ledger's, when decided.
    process: None where the caller is not a process on this node. key_id: of the signing key.
    authority_sha256: hex, of the authority that vouched for the caller's SVID; empty where it showed none (unix).
    approval: the digest (hex) of the request whose approvals it uses up, or that its parent used up; empty where none
    counted for it. approvers: who gave those that counted; each of them still had to count when this was recorded.
    request_id: the caller's own id of the request; empty where it gave none.
    parent: the `jti` of the signing grant that it spends; empty for what is granted itself.
    artifacts: "sha256:<hex>" of each artifact that is signed or may be.
    ticket, session: as the caller named them; empty where it named none.
    """

    jti: str
    credential: str = "action_token"
    principal: str
    action: Raw
    action_digest: str
    cnf: dict[str, str]
    use: Literal["once", "single", "ttl"]
    expires_at: Time
    epoch: int
    policies: tuple[str, ...]
    policy_revision: str
    facts: dict[str, str]
    process: ProcessReference | None = None
    method: Method
    key_id: str
    authority_sha256: str = ""
    approval: str = ""
    approvers: tuple[str, ...] = ()
    request_id: str = ""
    parent: str = ""
    artifacts: tuple[str, ...] = ()
    ticket: str = ""
    session: str = ""

    @property
    def is_live(self) -> bool:
        """Whether its `jti` names a credential that can be found and used up; a signature is neither."""
        return self.credential != "signature"

    def to_action(self) -> Action:
        """The action as decided. Raises: broker.errors.Invalid when the record was changed and names none."""
        return action_of(self.action)


class _ActionJson(Struct, frozen=True, forbid_unknown_fields=True):
    action: str
    audience: str
    parameters: Raw
    resource: str


def action_of(canonical: bytes | Raw) -> Action:
    """The action whose `Action.canonical` these bytes are. Raises: broker.errors.Invalid, msgspec.DecodeError."""
    found = msgspec.json.decode(canonical, type=_ActionJson)
    return Action.parse(found.action, found.resource, found.audience, bytes(found.parameters))


class Outcome(Event, frozen=True, kw_only=True, tag="outcome", gc=False):
    """What became of the intent with sequence number `intent`.

    result: "unknown" where the broker ended, or the record was lost, before it could say.
    credential_sha256: hex, of the credential's bytes; empty unless issued.
    answer_sha256: hex, of the answer that is kept beside the ledger (`Ledger.store_answer`); empty where none is.
    """

    intent: int
    result: Literal["issued", "failed", "unknown"]
    credential_sha256: str = ""
    answer_sha256: str = ""


class Refusal(Bounded, frozen=True, kw_only=True, tag="refusal", gc=False):
    """An answer that was no, to a caller that is known. Strangers are counted instead (`CountedRefusals`).

    action, resource, audience, action_digest: empty where the request never became an action. Parameters are left
    out: refused requests cost the caller nothing, and 4 KiB each would fill the disk.
    edge: how the caller was identified, as `Method`. stage: which call it was, such as request, check, watch, revoke.
    """

    reason: Reason
    principal: str
    action: str = ""
    resource: str = ""
    audience: str = ""
    action_digest: str = ""
    edge: str
    stage: str


class CountedRefusals(Event, frozen=True, kw_only=True, tag="counted_refusals", gc=False):
    """Refusals before anybody was identified, since `since`, by reason."""

    since: Time
    counts: dict[Reason, int]


class Redemption(Event, frozen=True, kw_only=True, tag="redemption", gc=False):
    """A single-use credential was used up.

    idempotency_sha256: hex, of the caller's idempotency id. content_sha256: hex, of what it asked to redeem.
    result: "refused" where it was decided again, and the answer was no: then it is used up all the same.
    """

    jti: str
    by: str
    idempotency_sha256: str
    content_sha256: str = ""
    result: Literal["used", "refused"] = "used"


class ApprovalAsked(Event, frozen=True, kw_only=True, tag="approval_asked", gc=False):
    """A request that others must approve first.

    request_digest: hex, SHA-256 over RFC 8785 JSON of {action_digest, principal, request_id}. action: the bytes of
    `Action.canonical`. request_id: the caller's own. text: what the broker shows to approvers.
    expires_at: when it is forgotten unless it is asked again; at most `MAX_APPROVAL` after `at`.
    """

    request_digest: str
    principal: str
    action: Raw
    action_digest: str
    request_id: str
    text: str
    expires_at: Time

    def to_action(self) -> Action:
        """The action as asked. Raises: broker.errors.Invalid when the record was changed and names none."""
        return action_of(self.action)


class _Approver(Event, frozen=True, kw_only=True, gc=False):
    """What somebody said about the request with this digest.

    by: a SPIFFE ID or a person's id. reason: its own words, cut at `MAX_DETAIL` characters.
    evidence_sha256: hex, of the ID token that showed who a person is; empty for a workload.
    """

    request_digest: str
    by: str
    reason: str = ""
    method: Method
    evidence_sha256: str = ""

    def __post_init__(self) -> None:
        cut(self, "reason")


class Approved(_Approver, frozen=True, kw_only=True, tag="approved", gc=False):
    """Somebody said yes, by these policies, until `expires_at`: at most `MAX_APPROVAL` after `at`.

    rules_sha256: hex, over the texts of those policies (approval_records.py): it counts while they stand unchanged.
    """

    policies: tuple[str, ...]
    policy_revision: str
    rules_sha256: str
    expires_at: Time


class ApprovalWithdrawn(_Approver, frozen=True, kw_only=True, tag="approval_withdrawn", gc=False):
    """Somebody took its yes back, which needs nobody's leave."""


class KeyBound(Event, frozen=True, kw_only=True, tag="key_bound", gc=False):
    """The first key seen with an assertion.

    assertion_sha256: hex. jkt: the key's RFC 7638 thumbprint. expires_at: of the assertion.
    """

    assertion_sha256: str
    jkt: str
    expires_at: Time | None = None


class KeyPublished(Event, frozen=True, kw_only=True, tag="key_published", gc=False):
    """A signing key's public half is served from now, until `serve_until` at the latest.

    After its process ended (`Started`) it is served only until what it signed has expired.

    kid: its RFC 7638 thumbprint. record_sha256: hex, of the SVID-signed record as published.
    """

    kid: str
    record_sha256: str
    serve_until: Time


class PolicyChanged(Event, frozen=True, kw_only=True, tag="policy_changed", gc=False):
    """Another policy decides from now on."""

    revision: str


class Operated(Event, frozen=True, kw_only=True, tag="operated", gc=False):
    """An operator was allowed to operate the broker, by these policies. resource: what of it, as decided."""

    principal: str
    action: str
    resource: str
    policies: tuple[str, ...]
    policy_revision: str


class EpochStarted(Bounded, frozen=True, kw_only=True, tag="epoch_started", gc=False):
    """No credential of an earlier epoch counts from now on (DESIGN invariant 7).

    checkpoint: the outside checkpoint, a signed note, that this store was behind or beside; empty where none was.
    """

    epoch: int
    checkpoint: str = ""


class Checkpointed(Event, frozen=True, kw_only=True, tag="checkpointed", gc=False):
    """The chain up to and with record `size` is covered by a checkpoint outside the store.

    standing: the last record about what stands (standing.py), 0 for none; filled in as this is recorded.
    """

    size: int
    standing: int = 0


class Started(Event, frozen=True, kw_only=True, tag="started", gc=False):
    """The store was opened to write. ledger: hex of its random id. standing: as in `Checkpointed`."""

    ledger: str
    epoch: int
    standing: int = 0


class Stopped(Event, frozen=True, kw_only=True, tag="stopped", gc=False):
    """The store was closed in good order."""


Record = (
    Intent
    | Outcome
    | Refusal
    | CountedRefusals
    | Redemption
    | ApprovalAsked
    | Approved
    | ApprovalWithdrawn
    | KeyBound
    | KeyPublished
    | PolicyChanged
    | Operated
    | ScopeRefused
    | Suspended
    | SuspensionEnded
    | StandingDenial
    | StandingLifted
    | BreakGlass
    | SessionScored
    | SessionBound
    | SecurityEvent
    | EpochStarted
    | Checkpointed
    | Started
    | Stopped
)

__all__ = [  # of other files, beside what is defined here
    "MAX_DETAIL",
    "BreakGlass",
    "Event",
    "Method",
    "ScopeRefused",
    "SecurityEvent",
    "SessionBound",
    "SessionScored",
    "StandingDenial",
    "StandingLifted",
    "Suspended",
    "SuspensionEnded",
    "Time",
]

_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[Record] = msgspec.json.Decoder(Record)
_NO_OFFSET = timedelta(0)


def encode(record: Event) -> bytes:
    """The record's bytes. Raises: ValueError when `at` is not aware UTC (it would not read back as the same moment)."""
    if record.at.utcoffset() != _NO_OFFSET:
        raise ValueError("a record's time is aware UTC: pass datetime.now(UTC), read once at the entry point")
    return _encoder.encode(record)


def decode(body: bytes) -> Record:
    """The record in `body`. Raises: msgspec.ValidationError or msgspec.DecodeError for anything else."""
    return _decoder.decode(body)


def to_json(value: Any) -> str:
    """`value` as the ledger writes JSON, for printing."""
    return _encoder.encode(value).decode()
