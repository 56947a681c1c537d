"""Records to fill a ledger with, and a ledger to fill, for tests and benches."""

import hashlib
import secrets
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec

from broker.action import Action
from broker.ledger import records
from broker.ledger.checkpoint import Checkpointer
from broker.ledger.group import Limits
from broker.ledger.store import Ledger

NOW = datetime(2026, 11, 22, 23, 7, 0, tzinfo=UTC)
PRINCIPAL = "spiffe://acme.test/build/agent"
ACTION = Action("orders.refund", "https://orders.acme.test/orders/17", "https://orders.acme.test", {"amount": 12})
NAME = "broker.acme.test/ledger"
QUICK = Limits(maintain_s=0.02, counts_s=0.02)
"""Limits under which what happens each second happens at once; waiting on the result is still bounded by it."""


class Clock:
    """A clock that stands until it is set."""

    def __init__(self, now: datetime = NOW) -> None:
        self.now = now

    def __call__(self) -> datetime:
        return self.now


def intent(jti: str = "", *, epoch: int = 1, now: datetime = NOW, ttl_s: int = 60, **changes: object) -> records.Intent:
    """A realistic intent; `jti` is random unless given. One that uses approvals names ann unless others are given."""
    if changes.get("approval"):
        changes.setdefault("approvers", (APPROVER,))
    made = records.Intent(
        at=now,
        correlation_id="0f6a3c6e5d9b4a1f",
        jti=jti or secrets.token_hex(16),
        principal=PRINCIPAL,
        action=msgspec.Raw(ACTION.canonical),
        action_digest=ACTION.digest.hex(),
        cnf={"jkt": "0ZcOCORZNYy-DWpqq30jZyJGHTN0d2HglBV3uiguA4I"},
        use="single",
        expires_at=now + timedelta(seconds=ttl_s),
        epoch=epoch,
        policies=("refunds-by-build-agents",),
        policy_revision="sha256:5df6e0e2761359d3",
        facts={"spire": "sha256:" + "11" * 32, "process": "sha256:" + "22" * 32},
        process=records.ProcessReference(
            pid=4711, start_time=99120, uid=1600, gid=1600, exe_device=2049, exe_inode=131074
        ),
        method="unix",
        key_id="NzbLsXh8uDCcd-6MNwXF4W_7noWXFZAfHkxZsRGC9Xs",
    )
    return msgspec.structs.replace(made, **changes)


def outcome(seq: int, now: datetime = NOW) -> records.Outcome:
    """The intent `seq` led to a credential."""
    digest = hashlib.sha256(seq.to_bytes(8)).hexdigest()
    return records.Outcome(
        at=now, correlation_id="0f6a3c6e5d9b4a1f", intent=seq, result="issued", credential_sha256=digest
    )


APPROVER = "spiffe://acme.test/people/ann"


def request_digest(request_id: str = "r") -> str:
    """The digest of a request for approval, or what looks like one: the ledger does not compute it."""
    return hashlib.sha256(request_id.encode()).hexdigest()


def asked(
    request_id: str = "r", *, now: datetime = NOW, lives_s: int = 3600, principal: str = PRINCIPAL
) -> records.ApprovalAsked:
    """The request that waits for approval."""
    return records.ApprovalAsked(
        at=now,
        correlation_id="0f6a3c6e5d9b4a1f",
        request_digest=request_digest(request_id),
        principal=principal,
        action=msgspec.Raw(ACTION.canonical),
        action_digest=ACTION.digest.hex(),
        request_id=request_id,
        text="Refund 12 for order 17",
        expires_at=now + timedelta(seconds=lives_s),
    )


def approved(
    request_id: str = "r", by: str = APPROVER, *, now: datetime = NOW, lives_s: int = 600, reason: str = "looked at it"
) -> records.Approved:
    """Somebody said yes to it."""
    return records.Approved(
        at=now,
        request_digest=request_digest(request_id),
        by=by,
        reason=reason,
        method="mtls",
        policies=("release-managers",),
        policy_revision="sha256:5df6e0e2761359d3",
        rules_sha256="55" * 32,
        expires_at=now + timedelta(seconds=lives_s),
    )


def withdrawn(request_id: str = "r", by: str = APPROVER, *, now: datetime = NOW) -> records.ApprovalWithdrawn:
    """Somebody took it back."""
    return records.ApprovalWithdrawn(
        at=now,
        request_digest=request_digest(request_id),
        by=by,
        reason="a mistake",
        method="mtls",
    )


def signature(grant: str, **changes: object) -> records.Intent:
    """The intent of the signature that the grant with this `jti` is spent on."""
    defaults: dict[str, object] = {
        "credential": "signature",
        "parent": grant,
        "cnf": {"spki_sha256": "33" * 32},
        "artifacts": ("sha256:" + "44" * 32,),
    }
    return intent(**{**defaults, **changes})  # type: ignore[arg-type] - what intent takes


def checkpointer(folder: Path) -> Checkpointer:
    """The checkpointer of the ledger in `folder`."""
    return Checkpointer(folder / "checkpoint.key", folder / "checkpoint", NAME)


async def open_ledger(
    folder: Path, clock: Callable[[], datetime] | None = None, limits: Limits | None = None
) -> Ledger:
    """The ledger in `folder`."""
    return await Ledger.open(
        folder / "ledger.db",
        checkpoint=checkpointer(folder),
        clock=clock or Clock(),
        limits=limits or Limits(),
    )
