"""What the ledger says before a key is used: who, what, on which facts, under which policy."""

from collections.abc import Mapping
from datetime import datetime
from typing import Literal

import msgspec

from attestors.approval import request_digest
from attestors.contract import Facts, Process
from broker.artifacts import SigningRequest
from broker.decision.decide import Grant, facts_digest
from broker.decision.question import PROVENANCE
from broker.identity.identify import Identified
from broker.ledger.records import Intent, ProcessReference
from broker.presented import Presented


def intent_of(  # noqa: PLR0913 -- one record, of which each part comes from another stage of the flow
    identity: Identified,
    grant: Grant,
    now: datetime,
    correlation_id: str,
    *,
    jti: str,
    cnf: Mapping[str, str],
    use: Literal["once", "single", "ttl"],
    expires_at: datetime,
    key_id: str,
    credential: str,
    epoch: int,
    presented: Presented,
    parent: str = "",
    signing: SigningRequest | None = None,
) -> Intent:
    """The intent to mint one credential from `grant`. parent: the credential that is spent on it, "" for none.

    presented: by the caller, also for the request that gave the parent. The approvals that the decision was shown
    are used up with it, so that they are good for one mint and what hangs on it, and each still has to count then.
    """
    approval, approvers = used_approvals(grant, presented.request_id)
    return Intent(
        at=now,
        correlation_id=correlation_id,
        jti=jti,
        credential=credential,
        principal=str(grant.principal),
        action=msgspec.Raw(grant.action.canonical),
        action_digest=grant.action.digest.hex(),
        cnf=dict(cnf),
        use=use,
        expires_at=expires_at,
        epoch=epoch,
        policies=grant.policies,
        policy_revision=grant.policy_revision,
        facts={name: f"sha256:{_digest(grant, name, found).hex()}" for name, found in grant.facts.items()},
        process=process_reference(identity.process),
        method=identity.transport,
        key_id=key_id,
        authority_sha256=(identity.authority_sha256 or b"").hex(),
        request_id=presented.request_id,
        ticket=presented.ticket,
        session=presented.session,
        approval=approval,
        approvers=approvers,
        parent=parent,
        artifacts=() if signing is None else tuple(f"sha256:{found['sha256']}" for found in signing.artifacts),
    )


def _digest(grant: Grant, name: str, found: Facts) -> bytes:
    """Of one attestor's facts; of provenance, the largest, the decision has it already."""
    if name == PROVENANCE and grant.provenance_digest is not None:
        return grant.provenance_digest
    return facts_digest(found)


def used_approvals(grant: Grant, request_id: str) -> tuple[str, tuple[str, ...]]:
    """The digest of the request that was approved, and who were counted; "" and none where nobody was.

    Whether or not each was needed: nobody can say which one was not.
    """
    approval = grant.facts.get("approval")
    by = [] if approval is None else approval.values["by"]
    if not isinstance(by, list) or not by:
        return "", ()
    digest = request_digest(grant.action.digest.hex(), str(grant.principal), request_id)
    return digest, tuple(str(one) for one in by)


def process_reference(process: Process | None) -> ProcessReference | None:
    """The process as records name it."""
    if process is None:
        return None
    return ProcessReference(**{name: getattr(process, name) for name in Process.__slots__})


def presented_by(intent: Intent, credential: str) -> Presented:
    """What its caller named then, for deciding again about the credential with this id; evidence is not among it."""
    return Presented(request_id=intent.request_id, ticket=intent.ticket, session=intent.session, credential=credential)
