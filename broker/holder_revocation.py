"""A holder gives a credential back before it ends (RFC 7009): it is refused for good, and guards hear of it at once."""

import asyncio
from datetime import datetime
from typing import Final

from broker.callers import Caller
from broker.credentials import credential
from broker.errors import BrokerError, Reason, Refused
from broker.exchange import Exchange
from broker.in_time import InTime
from broker.scope.deciding import Deciding
from broker.scope.live import Live, live_of

HOLDER: Final = "holder"
"""The cause that the ledger has for it."""


class GivingBack:
    """One for each broker process."""

    def __init__(self, exchange: Exchange, deciding: Deciding) -> None:
        self._exchange, self._deciding = exchange, deciding
        self._recording: dict[str, asyncio.Task[int]] = {}

    async def revoke(self, holder: Caller, shown: str, now: datetime, correlation_id: str) -> None:
        """From when this returns the credential counts no more, nor what came of it; said again it is the same.

        Nothing happens to one that has expired. Raises: Refused where it is none of ours, or somebody else's, which is
        recorded; OfAnotherType; Unavailable where it could not be recorded in time: then it may count no more, ask
        again.
        """
        exchange, asker, action = self._exchange, holder.identity, None
        try:
            found = credential.verify(shown, issuer=exchange.issuer, key_for=exchange.keyring.public, now=now)
            action = found.claims.action()
            if found.claims.client_id != str(asker.principal):
                raise Refused(Reason.DENIED, "only its holder gives a credential back")
            async with InTime(Reason.LEDGER_UNAVAILABLE):
                live = await self._live(found.claims.jti)
                await asyncio.shield(self._refuse(live, correlation_id))
        except BrokerError as error:
            if error.reason is not Reason.EXPIRED:
                exchange.refused(asker, action, error, now, correlation_id, "revoke")
                raise

    async def _live(self, jti: str) -> Live:
        live = self._exchange.scope.live.get(jti)
        if live is not None:
            return live
        row = await self._exchange.ledger.credential(jti)
        if row is None:
            raise Refused(Reason.REVOKED, "the ledger does not know the credential in this epoch")
        return live_of(row.intent, {}, seq=row.seq)

    def _refuse(self, live: Live, correlation_id: str) -> "asyncio.Task[int]":
        """Who comes while it is being recorded waits for the same: nobody is told of what may be forgotten."""
        task = self._recording.get(live.jti)
        if task is None:
            by = live.principal
            refusing = self._deciding.refuse([live], Reason.REVOKED, HOLDER, by=by, correlation_id=correlation_id)
            task = self._recording[live.jti] = asyncio.create_task(refusing, name="revocation")
            task.add_done_callback(lambda _: self._recording.pop(live.jti, None))
        return task
