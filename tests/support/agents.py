"""Scripted stand-ins for a SPIRE agent: real gRPC servers that say what a test wants said."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import grpc
from spiffe._proto import workload_pb2 as wl
from spiffe._proto import workload_pb2_grpc
from support.pki import CA, Svid, der, snapshot

from broker._proto.spiffe_broker import brokerapi_pb2, brokerapi_pb2_grpc
from broker.identity.server_tls import ServerTls
from broker.identity.trust import TrustSnapshot


def clock() -> datetime:
    return datetime.now(UTC)


def x509_update(svid: Svid, ca: CA, **federated: bytes) -> wl.X509SVIDResponse:
    """As the agent says it. federated: DER by trust domain, with `_` for the dot in its name."""
    first = wl.X509SVID(
        spiffe_id=str(svid.own().spiffe_id),
        x509_svid=b"".join(svid.chain),
        x509_svid_key=svid.key_pkcs8,
        bundle=der(ca.root.certificate),
    )
    bundles = {f"spiffe://{name.replace('_', '.')}": found for name, found in federated.items()}
    return wl.X509SVIDResponse(svids=[first], federated_bundles=bundles)


def jwt_update(**bundles: bytes) -> wl.JWTBundlesResponse:
    """JWKS by trust domain, with `_` for the dot in its name."""
    return wl.JWTBundlesResponse(
        bundles={f"spiffe://{name.replace('_', '.')}": found for name, found in bundles.items()}
    )


class WorkloadServer(workload_pb2_grpc.SpiffeWorkloadAPIServicer):
    """A Workload API at `target`. Set `x509`, `jwt_bundles` (a message, or a code to refuse with) and call `say()`."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.x509: Any = grpc.StatusCode.PERMISSION_DENIED
        self.jwt_bundles: Any = grpc.StatusCode.PERMISSION_DENIED
        self.jwt_svid: Any = grpc.StatusCode.PERMISSION_DENIED
        self.streams = 0
        self._said = asyncio.Event()
        self._server: grpc.aio.Server | None = None

    async def start(self) -> None:
        self._server = grpc.aio.server()
        workload_pb2_grpc.add_SpiffeWorkloadAPIServicer_to_server(self, self._server)
        self._server.add_insecure_port(self.target)
        await self._server.start()

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(None)
            self._server = None

    def say(self) -> None:
        """Sends what is set now on every open stream."""
        self._said.set()
        self._said = asyncio.Event()

    async def _stream(self, context: grpc.aio.ServicerContext, what: str) -> AsyncIterator[Any]:
        self.streams += 1
        while True:
            said = self._said
            yield await _checked(context, "workload.spiffe.io", getattr(self, what))
            await said.wait()

    async def FetchX509SVID(self, _request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802 - gRPC's name
        async for message in self._stream(context, "x509"):
            yield message

    async def FetchJWTBundles(self, _request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        async for message in self._stream(context, "jwt_bundles"):
            yield message

    async def FetchJWTSVID(self, _request: Any, context: Any) -> Any:  # noqa: N802
        return await _checked(context, "workload.spiffe.io", self.jwt_svid)


async def _checked(context: grpc.aio.ServicerContext, header: str, answer: Any) -> Any:
    """The answer, to those that send the header that SPIFFE wants."""
    if (header, "true") not in {(key, value) for key, value in context.invocation_metadata()}:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "security header missing from request")
    if isinstance(answer, grpc.StatusCode):
        await context.abort(answer, "as the test wants it")
    return answer


class BrokerApiServer(brokerapi_pb2_grpc.APIServicer):
    """A Broker API. `answer(pid, audience)` gives a message, or a code to refuse with."""

    def __init__(self) -> None:
        self.answer: Callable[[int, list[str]], Any] = lambda _pid, _audience: grpc.StatusCode.PERMISSION_DENIED
        self.asked: list[int] = []
        self.hold = asyncio.Event()
        self.hold.set()

    async def FetchJWTSVID(self, request: Any, context: Any) -> Any:  # noqa: N802
        reference = brokerapi_pb2.WorkloadPIDReference()
        assert request.reference.reference.Unpack(reference)
        self.asked.append(reference.pid)
        await self.hold.wait()
        return await _checked(context, "broker.spiffe.io", self.answer(reference.pid, list(request.audience)))


@asynccontextmanager
async def serving(
    svid: Svid, trusted: TrustSnapshot, register: Callable[[grpc.aio.Server], object], address: str = "127.0.0.1:0"
) -> AsyncIterator[str]:
    """A gRPC server over mutual TLS with this SVID, which lets in whom `trusted` trusts. Its target."""
    tls = ServerTls(snapshot(*trusted.bundles.values(), own=svid.own()))
    server = grpc.aio.server()
    register(server)
    port = server.add_secure_port(address, tls.grpc_credentials())
    await server.start()
    yield address if address.startswith("unix:") else f"127.0.0.1:{port}"
    await server.stop(None)
