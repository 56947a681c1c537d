"""What can go wrong, by who has to act.

    BrokerError
    ├── Refused               we looked, and the answer is no
    │   ├── ApprovalRequired  no, until somebody approves it
    │   └── Invalid           no, because what was sent is malformed
    └── Unavailable           we could not look, so also no

Each carries a `Reason`, which the caller sees together with a correlation id, and a `detail`, which only the ledger
and the log see: policy and facts are nobody else's business. status.py maps reasons to gRPC and HTTP.
"""

from enum import StrEnum


class Reason(StrEnum):
    """Reason codes on the wire. New ones may come; none changes its meaning."""

    MALFORMED = "malformed"
    UNAUTHENTICATED = "unauthenticated"
    KEY_MISMATCH = "key_mismatch"
    INVALID_PROOF = "invalid_dpop_proof"
    NONCE_REQUIRED = "use_dpop_nonce"
    PROOF_REPLAYED = "proof_replayed"
    NOT_ATTESTED = "not_attested"
    EVIDENCE_MISMATCH = "evidence_mismatch"
    DENIED = "denied"
    OUT_OF_SCOPE = "out_of_scope"
    WRONG_AUDIENCE = "wrong_audience"
    EXPIRED = "expired"
    ALREADY_USED = "already_used"
    REVOKED = "revoked"
    SUPERSEDED = "superseded"
    PARENT_REFUSED = "parent_refused"
    SESSION_RISK = "session_risk"
    TICKET_CLOSED = "ticket_closed"
    UNKNOWN_ACTION = "unknown_action"
    QUOTA = "quota"
    PROVENANCE_MISSING = "provenance_missing"
    PROVENANCE_REJECTED = "provenance_rejected"
    APPROVAL_REQUIRED = "approval_required"
    SIGNER_UNAVAILABLE = "signer_unavailable"
    TIMESTAMP_UNAVAILABLE = "timestamp_unavailable"
    ATTESTATION_UNAVAILABLE = "attestation_unavailable"
    LEDGER_UNAVAILABLE = "ledger_unavailable"
    SCOPE_STALE = "scope_stale"
    SUSPENDED = "suspended"
    IDENTITY_UNAVAILABLE = "identity_unavailable"
    BROKER_UNREACHABLE = "broker_unreachable"  # said by clients, to themselves


class BrokerError(Exception):
    """An answer that is not yes. `detail` never reaches a caller and never holds a secret."""

    def __init__(self, reason: Reason, detail: str = "", *, retry_after_ms: int | None = None) -> None:
        super().__init__(f"{reason}: {detail}" if detail else str(reason))
        self.reason = reason
        self.detail = detail
        self.retry_after_ms = retry_after_ms


class Refused(BrokerError):
    """We looked, and the answer is no."""


class ApprovalRequired(Refused):
    """No, until somebody approves. request_digest: hex, what to approve. text: what an approver is shown."""

    def __init__(self, request_digest: str, text: str, detail: str = "") -> None:
        super().__init__(Reason.APPROVAL_REQUIRED, detail)
        self.request_digest = request_digest
        self.text = text


class Invalid(Refused):
    """What was sent is malformed; it was refused before its meaning was looked at."""

    def __init__(self, detail: str, reason: Reason = Reason.MALFORMED) -> None:
        super().__init__(reason, detail)


class Unavailable(BrokerError):
    """We could not look: an attestor, the ledger or our own identity is out of reach. Deny by default makes it a no."""
