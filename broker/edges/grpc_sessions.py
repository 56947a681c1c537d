"""ScoreSession of actionbroker.v1.Scope: messages to values and back. grpc_scope.py ends the call."""

from datetime import datetime
from typing import Final

from broker._proto.actionbroker.v1 import scope_pb2
from broker.edges.grpc_peer import Context, Identifier
from broker.scoring import Scoring

SERVICE: Final = "actionbroker.v1.Scope"


class SessionCalls:
    """Identifies, hands to `Scoring`, and writes the answer. Raises what they raise."""

    def __init__(self, scoring: Scoring, identifier: Identifier) -> None:
        self._scoring, self._identifier = scoring, identifier

    async def score(
        self, request: scope_pb2.ScoreSessionRequest, context: Context, now: datetime, correlation: str
    ) -> scope_pb2.ScoreSessionResponse:
        """Scores one session."""
        caller = await self._identifier.identify_call(
            context, "ScoreSession", request.spiffe_id, now, correlation, SERVICE
        )
        await self._scoring.score(
            caller, request.session, request.principal, request.level, request.reason, now, correlation
        )
        return scope_pb2.ScoreSessionResponse(correlation_id=correlation)
