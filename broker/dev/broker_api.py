"""The SPIFFE Broker API of the embedded trust domain, by PID: codes and messages are those that SPIRE 1.15 gives.

They are not the standard's: a dead PID is INTERNAL, and a process without an entry PERMISSION_DENIED. As SPIRE does, it
answers with all IDs whatever `spiffe_id` asks for. One difference: SPIRE cuts off a caller that is not a broker in the
TLS handshake, and this in its answer.
"""

import ssl
from typing import Any

import grpc

from broker._proto.spiffe_broker import brokerapi_pb2, brokerapi_pb2_grpc
from broker.dev.domain import Domain
from broker.dev.workload_api import Context, require_header
from broker.errors import BrokerError
from broker.identity.peer import read_process
from broker.identity.spiffe_id import SpiffeId
from broker.identity.x509_svid import verify_x509_svid

_HEADER = ("broker.spiffe.io", "true")


class DevBrokerApi(brokerapi_pb2_grpc.APIServicer):
    """broker: the one SPIFFE ID that may ask."""

    def __init__(self, domain: Domain, broker: SpiffeId) -> None:
        self._domain = domain
        self._broker = broker

    async def FetchJWTSVID(  # noqa: N802
        self, request: brokerapi_pb2.FetchJWTSVIDRequest, context: Context
    ) -> brokerapi_pb2.FetchJWTSVIDResponse:
        """A JWT-SVID for each ID that the process may have now."""
        await require_header(context, _HEADER)
        if not request.audience:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "audience must be specified")
        await self._require_broker(context)
        spiffe_ids = await self._attest(await _pid(request, context), context)
        return brokerapi_pb2.FetchJWTSVIDResponse(
            svids=[
                brokerapi_pb2.JWTSVID(spiffe_id=str(one), svid=self._domain.jwt_svid(one, request.audience))
                for one in spiffe_ids
            ]
        )

    async def _require_broker(self, context: Context) -> None:
        auth: Any = context.auth_context()
        try:
            (leaf,) = auth["x509_pem_cert"]
            chain = [ssl.PEM_cert_to_DER_cert(leaf.decode())]  # no intermediates: our authority signs leaves itself
            caller = verify_x509_svid(chain, self._domain.snapshot(), self._domain.clock(), peer="client").spiffe_id
        except (BrokerError, KeyError, ValueError):
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "unable to determine caller identity")
        if caller != self._broker:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, f"{caller} is not an authorised broker")

    async def _attest(self, pid: int, context: Context) -> tuple[SpiffeId, ...]:
        try:
            spiffe_ids = self._domain.entries.ids_of(read_process(pid))
        except OSError:
            await context.abort(grpc.StatusCode.INTERNAL, f"workload attestation failed for process {pid}")
        if not spiffe_ids:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "no identity issued")
        return spiffe_ids


async def _pid(request: brokerapi_pb2.FetchJWTSVIDRequest, context: Context) -> int:
    reference = request.reference.reference
    if not reference.type_url:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "workload reference must be provided")
    found = brokerapi_pb2.WorkloadPIDReference()
    if not reference.Unpack(found):
        await context.abort(
            grpc.StatusCode.PERMISSION_DENIED, f"broker is not allowed to use reference type {reference.type_url!r}"
        )
    return found.pid
