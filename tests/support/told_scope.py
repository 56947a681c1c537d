"""A source of scope for guards that says what a test tells it, as the broker's feed would."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime

from google.protobuf.timestamp_pb2 import Timestamp
from support.issuer import Issuer

from broker._proto.actionbroker.v1 import scope_pb2


class ToldScope:
    """Tells everything anew to who comes, then each change once. It has no heartbeat: silence is a test's to make."""

    def __init__(self, issuer: Issuer) -> None:
        self._issuer = issuer
        self._changes: asyncio.Queue[scope_pb2.WatchResponse] = asyncio.Queue()
        self._position = 0

    async def watch_scope(
        self,
        audiences: Sequence[str],  # noqa: ARG002 - it says the same to all, from the start
        *,
        feed: str = "",  # noqa: ARG002 - likewise
        after: int = 0,  # noqa: ARG002 - likewise
    ) -> AsyncIterator[scope_pb2.WatchResponse]:
        snapshot = scope_pb2.Snapshot(first=True, last=True)
        yield self._message(snapshot=snapshot, key_set=self._issuer.jwks())
        while True:
            change = await self._changes.get()
            change.MergeFrom(self._message(**{"from": self._position}))
            self._position = change.to = self._position + 1
            yield change

    def refuse(self, jti: str, reason: str) -> None:
        refused = scope_pb2.RefusedCredential(jti=jti, reason=reason, until=int(datetime.now(UTC).timestamp()) + 400)
        self._changes.put_nowait(scope_pb2.WatchResponse(refused=[refused]))

    def suspend(self, jti: str) -> None:
        self._changes.put_nowait(scope_pb2.WatchResponse(suspended=[scope_pb2.Suspension(id=1, jtis=[jti])]))

    def _message(self, **fields: object) -> scope_pb2.WatchResponse:
        now = Timestamp()
        now.FromDatetime(datetime.now(UTC))
        return scope_pb2.WatchResponse(feed="told", to=self._position, as_of=now, sent_at=now, **fields)
