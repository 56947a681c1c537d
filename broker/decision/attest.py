"""Runs the attestors that the policies of an action need, at once, each with a deadline."""

import asyncio
from collections.abc import Mapping
from datetime import datetime

from attestors.contract import AttestationFailed, AttestationRequest, AttestationUnavailable, Attestor, Facts
from broker.decision.policy import Slice
from broker.decision.question import PROVENANCE, SESSION, TICKET
from broker.decision.rules import ASKED, IDENTIFIED
from broker.errors import BrokerError, Reason, Refused, Unavailable

# What a caller hears of evidence that is wrong or too old, where it is not about the caller: it may have better.
_FAILED = {
    PROVENANCE: Reason.PROVENANCE_REJECTED,
    SESSION: Reason.SESSION_RISK,
    TICKET: Reason.TICKET_CLOSED,
}


class Attestation:
    """The attestors of this broker, by the attribute of Cedar's context that each fills.

    deadline_s: for each attestor, in seconds; they run side by side.
    """

    def __init__(self, attestors: Mapping[str, Attestor], deadline_s: float) -> None:
        for name, attestor in attestors.items():
            if name in ASKED | IDENTIFIED or name != attestor.name:
                raise ValueError(f"attestor {attestor.name} cannot fill context.{name}")
        self._attestors = dict(attestors)
        self._deadline_s = deadline_s

    @property
    def names(self) -> frozenset[str]:
        """The attestors that are configured."""
        return frozenset(self._attestors)

    async def gather(
        self, part: Slice, request: AttestationRequest, now: datetime, also: frozenset[str] = frozenset()
    ) -> Mapping[str, Facts]:
        """The facts that the slice needs, by attestor; an attestor with nothing to say is left out.

        Facts that identification gathered for this very request are taken as they are. also: attestors that have to say
        yes although no policy of the slice names them.

        Raises: Refused(NOT_ATTESTED) when one looked and the caller is not what it claims, Refused(PROVENANCE_REJECTED)
        when it was the artifacts' provenance; Refused(EXPIRED); Unavailable when one could not look, failed, took too
        long or is not configured. A refusal outweighs those.
        """
        wanted = part.attestors | also
        found = {name: request.known[name] for name in wanted & request.known.keys()}
        waiting = sorted(wanted - found.keys() - IDENTIFIED)
        if waiting:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._attest(name, request, now)) for name in waiting]
            answers = [task.result() for task in tasks]
            errors = [answer for answer in answers if isinstance(answer, BrokerError)]
            if errors:
                raise min(errors, key=lambda error: isinstance(error, Unavailable))
            found |= {facts.attestor: facts for facts in answers if isinstance(facts, Facts)}
        for name, facts in found.items():
            if facts.expires_at is not None and facts.expires_at <= now:
                raise Refused(_FAILED.get(name, Reason.EXPIRED), f"{name} facts had expired when they were gathered")
        return found

    async def look(self, name: str, request: AttestationRequest, now: datetime) -> Facts | None:
        """What one attestor says now; None also where it is not configured and nobody asked it before.

        Raises: Refused, Unavailable.
        """
        if name not in self._attestors:
            return None
        answer = await self._attest(name, request, now)
        if isinstance(answer, BrokerError):
            raise answer
        return answer

    async def _attest(self, name: str, request: AttestationRequest, now: datetime) -> Facts | BrokerError | None:
        """One attestor's answer; never raises but when cancelled, so that no task of the group ends another."""
        attestor = self._attestors.get(name)
        if attestor is None:
            return _unavailable(f"a policy needs the {name} attestor, which is not configured")
        try:
            async with asyncio.timeout(self._deadline_s):
                facts = await attestor.attest(request, now)
        except AttestationFailed as error:
            return Refused(_FAILED.get(name, Reason.NOT_ATTESTED), f"{name}: {error}")
        except AttestationUnavailable as error:
            problem = str(error)
        except TimeoutError:
            problem = f"no answer within {self._deadline_s} s"
        except Exception as error:  # noqa: BLE001 -- the edge to attestors: whatever fails in one is a no (invariant 6)
            problem = f"failed with {type(error).__name__}"
        else:
            if facts is None or facts.attestor == name:
                return facts
            problem = f"answered with facts of {facts.attestor}"
        return _unavailable(f"{name}: {problem}")


def _unavailable(detail: str) -> Unavailable:
    return Unavailable(Reason.ATTESTATION_UNAVAILABLE, detail)
