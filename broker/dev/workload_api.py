"""The SPIFFE Workload API of the embedded trust domain: codes and messages are those of SPIRE's agent."""

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import grpc
from google.protobuf import struct_pb2
from spiffe._proto import workload_pb2, workload_pb2_grpc

from broker.dev.domain import Domain
from broker.errors import BrokerError
from broker.identity.jwt_svid import verify_jwt_svid
from broker.identity.peer import Peer
from broker.identity.spiffe_id import SpiffeId

_HEADER = ("workload.spiffe.io", "true")

Context = grpc.aio.ServicerContext[Any, Any]
PeerOf = Callable[[str], Peer | None]


class DevWorkloadApi(workload_pb2_grpc.SpiffeWorkloadAPIServicer):
    """peer_of: who is behind gRPC's `context.peer()`."""

    def __init__(self, domain: Domain, peer_of: PeerOf) -> None:
        self._domain = domain
        self._peer_of = peer_of

    async def FetchX509SVID(self, _request: Any, context: Context) -> AsyncIterator[Any]:  # noqa: N802
        """Streams all SVIDs of the caller: at once, at each change, and when one is renewed."""
        async for spiffe_ids in self._changes(context, renewals=True):
            yield workload_pb2.X509SVIDResponse(
                svids=[self._x509_svid(spiffe_id) for spiffe_id in spiffe_ids],
                federated_bundles=self._domain.federated_x509(),
            )

    async def FetchX509Bundles(self, _request: Any, context: Context) -> AsyncIterator[Any]:  # noqa: N802
        """Streams our own and the federated X.509 bundles."""
        previous = None
        async for _ in self._changes(context, renewals=False):
            if (bundles := self._domain.x509_bundles()) != previous:
                previous = bundles
                yield workload_pb2.X509BundlesResponse(bundles=bundles)

    async def FetchJWTBundles(self, _request: Any, context: Context) -> AsyncIterator[Any]:  # noqa: N802
        """Streams our own and the federated JWT bundles."""
        previous = None
        async for _ in self._changes(context, renewals=False):
            if (bundles := self._domain.jwt_bundles()) != previous:
                previous = bundles
                yield workload_pb2.JWTBundlesResponse(bundles=bundles)

    async def FetchJWTSVID(self, request: Any, context: Context) -> Any:  # noqa: N802
        """A JWT-SVID for each of the caller's IDs, or for the one it names."""
        await require_header(context, _HEADER)
        if not request.audience:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "audience must be specified")
        asked = [one for one in await self._entitled(context) if request.spiffe_id in {"", str(one)}]
        if not asked:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "no identity issued")
        return workload_pb2.JWTSVIDResponse(
            svids=[
                workload_pb2.JWTSVID(spiffe_id=str(one), svid=self._domain.jwt_svid(one, request.audience))
                for one in asked
            ]
        )

    async def ValidateJWTSVID(self, request: Any, context: Context) -> Any:  # noqa: N802
        """Whether a JWT-SVID of ours or of a federated domain is good for an audience."""
        await require_header(context, _HEADER)
        await self._entitled(context)
        try:
            verified = verify_jwt_svid(
                request.svid, self._domain.snapshot(), self._domain.clock(), audience=request.audience
            )
        except BrokerError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        claims = struct_pb2.Struct()
        claims.update(
            {
                "sub": str(verified.spiffe_id),
                "aud": list(verified.audience),
                "exp": int(verified.expires_at.timestamp()),
            }
        )
        return workload_pb2.ValidateJWTSVIDResponse(spiffe_id=str(verified.spiffe_id), claims=claims)

    async def _changes(self, context: Context, *, renewals: bool) -> AsyncIterator[Sequence[SpiffeId]]:
        """The caller's IDs, now and after each change; with `renewals` also when one of its SVIDs is due."""
        await require_header(context, _HEADER)
        while True:
            mark = self._domain.mark()
            spiffe_ids = await self._entitled(context)
            yield spiffe_ids
            await self._domain.wait(mark, spiffe_ids if renewals else ())

    async def _entitled(self, context: Context) -> Sequence[SpiffeId]:
        """The caller's IDs, at least one; else the call is aborted."""
        peer = self._peer_of(context.peer())
        try:
            if peer is None:
                raise ProcessLookupError("the connection has ended")
            spiffe_ids = self._domain.entries.ids_of(peer.process)
            peer.unchanged()
        except (OSError, BrokerError):
            await context.abort(grpc.StatusCode.UNAVAILABLE, "workload attestation failed")
        if not spiffe_ids:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "no identity issued")
        return spiffe_ids

    def _x509_svid(self, spiffe_id: SpiffeId) -> Any:
        svid = self._domain.x509_svid(spiffe_id)
        return workload_pb2.X509SVID(
            spiffe_id=str(spiffe_id),
            x509_svid=b"".join(svid.chain),
            x509_svid_key=svid.private_key_pkcs8,
            bundle=self._domain.authority.x509_bundle,
        )


async def require_header(context: Context, header: tuple[str, str]) -> None:
    """Aborts the call without it: a request forged through a server in between cannot set it."""
    if header not in {(name, value) for name, value in context.invocation_metadata() or ()}:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "security header missing from request")
