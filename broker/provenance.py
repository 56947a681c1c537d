"""Decides on several envelopes of provenance, each for itself: facts of two are never mixed into one picture."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Final

from broker.action import Action
from broker.decision.decide import Grant
from broker.errors import BrokerError, Invalid, Reason, Refused, Unavailable
from broker.exchange import Exchange, Presented
from broker.identity.identify import Identified

MAX_ENVELOPES: Final = 8
# Of several refusals the caller is told the one that came furthest: what it lacks there is all that it lacks.
_FURTHEST: Final = {Reason.APPROVAL_REQUIRED: 0, Reason.DENIED: 1, Reason.EXPIRED: 2, Reason.EVIDENCE_MISMATCH: 3}


async def decide_by_provenance(
    exchange: Exchange,
    identity: Identified,
    action: Action,
    envelopes: Sequence[bytes],
    presented: Presented,
    now: datetime,
    require: Callable[[Grant], None] = lambda _: None,
) -> Grant:
    """The grant that the first envelope gives which satisfies policy and `require`; without any, what policy gives.

    Raises: BrokerError. Where one envelope could not be looked at, and no other will do, Unavailable.
    """
    if len(envelopes) > MAX_ENVELOPES:
        raise Invalid(f"at most {MAX_ENVELOPES} envelopes of provenance are looked at")
    errors: list[BrokerError] = []
    for envelope in envelopes or (None,):
        evidence = {} if envelope is None else {"provenance": envelope}
        try:
            grant = await exchange.decide(identity, action, now, replace(presented, evidence=evidence))
            require(grant)
        except Invalid:
            raise
        except (Refused, Unavailable) as error:
            errors.append(error)
        else:
            return grant
    raise min(errors, key=_rank)


def _rank(error: BrokerError) -> int:
    return -1 if isinstance(error, Unavailable) else _FURTHEST.get(error.reason, len(_FURTHEST))
