"""`provenance`: what the artifacts of a signing request were built from, by whom and how, and who vouches for that.

Evidence: one DSSE envelope or Sigstore bundle with an in-toto Statement v1 that is SLSA Provenance v1. In this order:

1. it is read, within its size                                        attestors.provenance_evidence
2. a signature verifies by a key, SVID or identity that is trusted    attestors.provenance_signers
3. only then the payload is read; it is a statement                   attestors.statement
4. one subject gives every digest of an artifact, none conflicts      digests, never names
5. it is SLSA provenance                                              attestors.slsa
6. those who signed it sign for the builder that it names             attestors.provenance_trust
7. it is not too old and not of the future

Not checked: what the provenance says of source, parameters and dependencies. That is for policy.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from attestors.contract import (
    AttestationFailed,
    AttestationRequest,
    AttestationUnavailable,
    FactKey,
    Facts,
    JsonValue,
)
from attestors.dsse import STATEMENT_TYPE, EnvelopeError
from attestors.in_threads import Busy, InThreads
from attestors.provenance_evidence import parse_evidence
from attestors.provenance_signers import SignerChecks, Signers, find_signers
from attestors.provenance_trust import BuilderTrust, ProvenanceTrust
from attestors.slsa import UNKNOWN_TIME, Provenance, read_provenance
from attestors.statement import STRONG, Statement, StatementError, parse_statement, require_vouched

LEEWAY: Final = timedelta(seconds=60)  # builders' clocks are other machines' clocks
POLL_S: Final = 1.0
"""Between two looks at whether the trust has changed."""
AT_ONCE: Final = 2
WAITING: Final = 64
"""Pieces of evidence that are appraised in threads, and that wait for that; the worst takes 0.3 s."""


class ProvenanceAttestor:
    """Fills `context.provenance`; a caller that presents none has none.

    trust: whom we trust now. It is asked at each request, so a builder that is taken out is refused at the next look.
    checks: how SVIDs and Sigstore identities are verified.
    """

    name = "provenance"

    def __init__(self, trust: Callable[[], ProvenanceTrust], checks: SignerChecks | None = None) -> None:
        self._trust = trust
        self._checks = checks or SignerChecks()
        self._threads = InThreads(at_once=AT_ONCE, waiting=WAITING)

    async def attest(self, request: AttestationRequest, now: datetime) -> Facts | None:
        """Appraises the evidence, if there is any.

        Raises: AttestationFailed when it is wrong, or about other artifacts than `parameters` asks to sign;
        AttestationUnavailable when whose SVID signed it cannot be said now, or when too many wait for the same.
        """
        raw = request.evidence.get(self.name)
        if raw is None:
            return None
        artifacts = _artifacts(request.parameters)
        # In a thread: half a mebibyte of JSON and eight signatures by many keys would hold all other requests up.
        try:
            return await self._threads.run(lambda: appraise(raw, artifacts, self._trust(), self._checks, now))
        except Busy as error:
            raise AttestationUnavailable(str(error)) from error

    async def watch(self) -> AsyncIterator[FactKey]:
        """Yields the key of each builder whose signers, or anything that all depend on, changed. For one reader.

        Not seen: a bundle of a trust domain, which is watched where identities are.
        """
        before = self._trust()
        while True:
            await asyncio.sleep(POLL_S)
            after = self._trust()
            for builder in sorted(_changed(before, after)):
                yield _key(builder)
            before = after

    def blind(self) -> Mapping[str, float]:
        """See attestors.contract.Attestor: a trust that cannot be read anew stays, and is logged where it is read."""
        return {}


def appraise(
    raw: bytes, artifacts: Sequence[Mapping[str, str]], trust: ProvenanceTrust, checks: SignerChecks, now: datetime
) -> Facts:
    """The facts on these artifacts. Raises: AttestationFailed, AttestationUnavailable."""
    try:
        evidence = parse_evidence(raw)
        signers = find_signers(evidence, trust, checks, now)
        if not signers:
            raise AttestationFailed("; ".join(["no signature of anybody trusted", *signers.doubts]))
        if evidence.envelope.payload_type != STATEMENT_TYPE:
            raise AttestationFailed(f"the payload is no {STATEMENT_TYPE}")
        statement = parse_statement(evidence.envelope.payload)
        require_vouched(statement, artifacts)
        provenance = read_provenance(statement)
    except (EnvelopeError, StatementError) as error:
        raise AttestationFailed(str(error)) from error
    builder = trust.builders.get(provenance.builder)
    if builder is None:
        raise AttestationFailed(f"the builder {provenance.builder[:256]} is not trusted")
    signer = _require_signer(provenance, signers, builder)
    expires_at = _require_recent(provenance, signers.not_before(builder), trust.max_age, now)
    return Facts(
        attestor=ProvenanceAttestor.name,
        key=_key(provenance.builder),
        values=_values(provenance, statement, signer),
        attested_at=now,
        expires_at=expires_at,
    )


def _artifacts(parameters: Mapping[str, Any]) -> Sequence[Mapping[str, str]]:
    """What is asked to be signed. Whoever made the action has checked its form. Raises: AttestationFailed for none."""
    signing = parameters.get("signing")
    artifacts = signing.get("artifacts") if isinstance(signing, Mapping) else None
    if not isinstance(artifacts, list | tuple) or not artifacts or not all(isinstance(a, Mapping) for a in artifacts):
        raise AttestationFailed("provenance is about artifacts, and the action names none to sign")
    return artifacts


def _require_signer(provenance: Provenance, signers: Signers, builder: BuilderTrust) -> str:
    """Who vouches for the builder, as many as are wanted, separated by spaces. Raises: AttestationFailed."""
    names = signers.names(builder)
    if len(names) < builder.threshold:
        wanted = f"{len(names)} of {builder.threshold} signers needed for the builder {provenance.builder[:256]} signed"
        raise AttestationFailed("; ".join([wanted, *signers.doubts]))
    return " ".join(names[: builder.threshold])


def _require_recent(provenance: Provenance, not_before: datetime | None, max_age: timedelta, now: datetime) -> datetime:
    """Until when it counts: `max_age` after the build finished, started, or can have been signed, the first known.

    Raises: AttestationFailed when that is past, unknown or in the future.
    """
    told = max(provenance.finished_at, provenance.started_at)  # finished is never before started
    try:
        made_at = not_before if told == UNKNOWN_TIME else datetime.fromtimestamp(told, UTC)
    except (ValueError, OverflowError, OSError) as error:
        raise AttestationFailed("the provenance is of no time that there is") from error
    if made_at is None:
        raise AttestationFailed(
            "the provenance does not say when it was made, nor does a certificate: its age cannot be bounded"
        )
    if made_at > now + LEEWAY:
        raise AttestationFailed("the provenance is of the future: compare the clocks")
    if made_at + max_age <= now:
        raise AttestationFailed(f"the provenance is older than {max_age}: build again")
    return made_at + max_age


def _values(provenance: Provenance, statement: Statement, signer: str) -> dict[str, JsonValue]:
    """As `type Provenance` of the base Cedar schema has them: all of them, always."""
    strong = {
        f"{algorithm}:{digest}"
        for subject in statement.subjects
        for algorithm, digest in subject.items()
        if algorithm in STRONG
    }
    source = provenance.source
    dependencies: list[JsonValue] = [*provenance.dependencies]
    subjects: list[JsonValue] = [*sorted(strong)]
    return {
        "builder": provenance.builder,
        "build_type": provenance.build_type,
        "source": source.repository,
        "source_digest": source.commit,
        "source_ref": source.ref,
        "config_uri": source.config,
        "config_digest": source.commit if source.config else "",
        "runner": provenance.runner,
        "invocation": provenance.invocation,
        "signer": signer,
        "started_at": provenance.started_at,
        "finished_at": provenance.finished_at,
        "external_parameters": provenance.external_parameters,
        "dependencies": dependencies,
        "subjects": subjects,
    }


def _key(builder: str) -> FactKey:
    """Names what provenance of this builder rests on."""
    return FactKey(f"provenance:{hashlib.sha256(builder.encode()).hexdigest()}")


def _changed(before: ProvenanceTrust, after: ProvenanceTrust) -> set[str]:
    if before is after:
        return set()
    builders = before.builders.keys() | after.builders.keys()
    if (before.max_age, before.timestamp_roots) != (after.max_age, after.timestamp_roots):
        return set(builders)
    return {one for one in builders if before.builders.get(one) != after.builders.get(one)}
