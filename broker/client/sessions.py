"""Sessions: to say how risky one is."""

from typing import Final

from broker._proto.actionbroker.v1 import scope_pb2
from broker.client.link import SCOPE, Link, Method
from broker.identity.spiffe_id import SpiffeId

_SCORE: Final = Method(name="ScoreSession", of=lambda stubs: stubs.scope.ScoreSession, service=SCOPE)


class SessionCalls:
    """`Client.sessions`. Each call raises Refused, Invalid or Unavailable, as the client's others do."""

    def __init__(self, link: Link, *, spiffe_id: str, seconds: float) -> None:
        self._link, self._spiffe_id, self._seconds = link, spiffe_id, seconds

    async def score(self, session: str, *, principal: str | SpiffeId, level: str, reason: str = "") -> str:
        """Says how risky a session is, and makes it where it is unknown: the correlation id of the record.

        principal: whose session it is, which never changes. level: LOW, MEDIUM or HIGH. Durable when it returns, and
        then HIGH refuses whatever is asked in the session.
        """
        message = scope_pb2.ScoreSessionRequest(
            session=session,
            principal=str(SpiffeId.parse(str(principal))),
            level=level,
            reason=reason,
            spiffe_id=self._spiffe_id,
        )
        answer = await self._link.call(_SCORE, message, self._seconds)
        return str(answer.correlation_id)
