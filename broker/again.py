"""The decision that gave a credential, made again on facts of now: for Check and Redeem, and whenever facts change.

A credential is in scope exactly while minting it again would succeed. What can be attested again is: the process,
SPIRE's word on it, every attestor that the policy names. Approvals that the credential used up itself count for it;
evidence that its caller would have to show again is judged by the facts that were kept of it, and by their expiry.
"""

import functools
from collections.abc import Mapping
from datetime import datetime
from typing import Final

from attestors.contract import AttestationRequest, Facts
from broker.action import Action
from broker.decision.decide import Grant
from broker.decision.question import PROVENANCE, SESSION, TICKET
from broker.errors import Reason, Refused
from broker.exchange import Exchange
from broker.identity import identify
from broker.identity.identify import Identified, Transport
from broker.identity.peer import look
from broker.identity.spiffe_id import SpiffeId
from broker.identity.trust import TrustSnapshot
from broker.in_time import InTime
from broker.presented import Presented
from broker.scope.deciding import Redecided
from broker.scope.live import Live

_KEPT: Final = {"spire", PROVENANCE}  # facts that count whether or not policy asks for them: who it is, what was shown
_principal = functools.lru_cache(maxsize=4096)(SpiffeId.parse)  # pure; callers repeat


class Again:
    """See broker.scope.deciding.Again. One for each broker process."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._believed: tuple[TrustSnapshot | None, set[tuple[str, str]]] = None, set()

    async def decide(self, live: Live, known: Mapping[str, Facts], now: datetime) -> Redecided:
        """See there. Raises: BrokerError."""
        action = live.to_action()
        if self.is_at_hand(live, known):
            grant, identity = await self.grant(live, action, known, now)
        else:
            async with InTime():
                grant, identity = await self.grant(live, action, known, now)
        kept = {name: facts for name, facts in identity.known.items() if name in _KEPT}
        return Redecided(facts={**kept, **grant.facts} if kept else grant.facts, permit=grant.permit)

    def is_at_hand(self, live: Live, known: Mapping[str, Facts]) -> bool:
        """See there."""
        return (
            (live.process is None or "spire" in known)
            and (not live.ticket or TICKET in known)
            and (not live.session or SESSION in known)
            and self._exchange.knows_all(live.action, known)
        )

    async def grant(
        self, live: Live, action: Action, known: Mapping[str, Facts], now: datetime
    ) -> tuple[Grant, Identified]:
        """Leave to mint it again, which nobody spends, and its caller as it is now. Raises: BrokerError."""
        principal = _principal(live.principal)
        self._require_trust(principal, live, now)
        transport: Transport = live.method  # type: ignore[assignment]  # as it was recorded
        identity = Identified(
            principal=principal,
            transport=transport,
            expires_at=live.ends,
            process=live.process,
            known=known,
            confirmation=live.confirmation,
        )
        if "spire" not in known:  # with it the process is looked at as well; else it is watched, and did not change
            identity = await identify.again(identity, self._exchange.entitlements, now)
        elif live.process is not None and live.principal not in _strings(known["spire"]):
            raise Refused(Reason.NOT_ATTESTED, "SPIRE no longer gives the process this identity")
        presented = Presented(
            request_id=live.request_id, ticket=live.ticket, session=live.session, credential=_used_by(live)
        )
        return await self._exchange.decide(identity, action, now, presented), identity

    async def look(self, name: str, live: Live, now: datetime) -> Facts | None:
        """See broker.scope.deciding.Again. Raises: BrokerError."""
        if name == "process" and live.process is not None and look(live.process.pid) != live.process:
            raise Refused(Reason.NOT_ATTESTED, "the process that got it exited or was replaced")
        if name == "process" and name not in live.facts:
            return None
        if name == "spire" and live.process is not None:
            return await self._exchange.entitlements(live.process, now)
        if name == PROVENANCE:  # its signers are known by what the envelope shows, which is not here
            raise Refused(Reason.PROVENANCE_REJECTED, "whom its builder trusts changed: present the provenance again")
        action = live.to_action()
        request = AttestationRequest(
            principal=live.principal,
            process=live.process,
            parameters=action.parameters,
            action_digest=action.digest,
            request_id=live.request_id,
            ticket=live.ticket,
            session=live.session,
            confirmation=live.confirmation,
            credential=_used_by(live),
        )
        return await self._exchange.attestation.look(name, request, now)

    def _require_trust(self, principal: SpiffeId, live: Live, now: datetime) -> None:
        """Federation may have been withdrawn since, or the authority that vouched for its SVID be gone."""
        trust = self._exchange.trust(now)
        if self._believed[0] is not trust:
            self._believed = trust, set()
        which = (principal.trust_domain.name, live.authority_sha256 if live.process is None else "")
        if which in self._believed[1]:
            return
        trust.bundle_for(principal.trust_domain)
        if live.process is None:
            identify.require_authority(bytes.fromhex(live.authority_sha256), principal, trust)
        self._believed[1].add(which)


def _used_by(live: Live) -> str:
    """The credential that used up what it rests on, such as an approval: itself, or the one that it came from."""
    return live.parent or live.jti


def _strings(facts: Facts) -> list[str]:
    ids = facts.values["ids"]
    return [item for item in ids if isinstance(item, str)] if isinstance(ids, list) else []
