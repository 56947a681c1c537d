"""DevEntries: who may have which SPIFFE ID. For the user who runs the embedded trust domain, and root."""

import os

import grpc

from broker._proto.actionbroker.v1 import dev_pb2, dev_pb2_grpc
from broker.dev.domain import Domain
from broker.dev.workload_api import Context, PeerOf
from broker.errors import BrokerError, Invalid


class Registration(dev_pb2_grpc.DevEntriesServicer):
    """peer_of: who is behind gRPC's `context.peer()`. The socket's mode keeps others out; this looks again."""

    def __init__(self, domain: Domain, peer_of: PeerOf) -> None:
        self._domain = domain
        self._peer_of = peer_of

    async def CreateEntry(  # noqa: N802
        self, request: dev_pb2.CreateEntryRequest, context: Context
    ) -> dev_pb2.CreateEntryResponse:
        """INVALID_ARGUMENT says what is wrong with the entry."""
        await self._require_owner(context)
        try:
            entry = self._domain.entries.create(request.spiffe_id, list(request.selectors))
        except Invalid as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, error.detail)
        return dev_pb2.CreateEntryResponse(entry_id=entry.entry_id)

    async def DeleteEntry(  # noqa: N802
        self, request: dev_pb2.DeleteEntryRequest, context: Context
    ) -> dev_pb2.DeleteEntryResponse:
        """NOT_FOUND when there is no such entry."""
        await self._require_owner(context)
        if not self._domain.entries.delete(request.entry_id):
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such entry")
        return dev_pb2.DeleteEntryResponse()

    async def _require_owner(self, context: Context) -> None:
        peer = self._peer_of(context.peer())
        try:
            if peer is not None:
                peer.unchanged()
        except BrokerError:
            peer = None
        if peer is None or peer.process.uid not in {0, os.geteuid()}:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "only for the user who runs this trust domain")
