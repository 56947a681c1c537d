"""The embedded trust domain on its sockets."""

import asyncio
import contextlib
import fcntl
import os
from collections.abc import Callable, Collection
from datetime import datetime
from pathlib import Path
from typing import Self

import grpc
import structlog
from spiffe._proto import workload_pb2_grpc

from broker._proto.actionbroker.v1 import dev_pb2_grpc
from broker._proto.spiffe_broker import brokerapi_pb2_grpc
from broker.dev.broker_api import DevBrokerApi
from broker.dev.domain import Domain, Lifetimes
from broker.dev.registration import Registration
from broker.dev.workload_api import DevWorkloadApi
from broker.identity.server_tls import ServerTls
from broker.identity.spiffe_id import SpiffeId, TrustDomain
from broker.identity.unix_front import UnixFront

_log = structlog.get_logger(__name__)


class DevTrustDomain:
    """An embedded trust domain while it is entered (`async with`), or from `start()` to `close()`.

    folder: for its sockets; made if missing. workload_socket: the Workload API, for every user. broker_socket: the
    Broker API, which only `broker` may use, over mutual TLS. entries_socket: DevEntries, for our own user.
    domain: for who is in the same process: entries, rotation, federation.

    Raises: Invalid when the trust domain's name could be a real one.
    """

    def __init__(
        self,
        folder: str | Path,
        clock: Callable[[], datetime],
        *,
        trust_domain: str = "dev.test",
        broker_path: str = "/action-broker",
        lifetimes: Lifetimes | None = None,
    ) -> None:
        self._folder = Path(folder)
        self._private = self._folder / "private"
        self.workload_socket = self._folder / "workload.sock"
        self.broker_socket = self._folder / "broker.sock"
        self.entries_socket = self._folder / "entries.sock"
        self.domain = Domain(TrustDomain.parse(trust_domain), clock, lifetimes or Lifetimes())
        self.broker = SpiffeId(trust_domain=self.domain.trust_domain, path=broker_path)
        self.agent = SpiffeId(trust_domain=self.domain.trust_domain, path="/spire/agent/dev")
        self._running: contextlib.AsyncExitStack | None = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def start(self) -> None:
        """Opens the sockets. Raises: OSError when another one runs in this folder; Unavailable as UnixFront does."""
        async with contextlib.AsyncExitStack() as stack:
            self._take_folder(stack)
            await self._serve_workload_api(stack)
            await self._serve_registration(stack)
            await self._serve_broker_api(stack)
            self._running = stack.pop_all()
        _log.warning(
            "EMBEDDED TRUST DOMAIN: for development only. Its keys live in this process, and whoever runs it can be "
            "anyone. Use SPIRE for anything that matters.",
            trust_domain=str(self.domain.trust_domain),
            workload_api=str(self.workload_socket),
            broker_api=str(self.broker_socket),
            entries=str(self.entries_socket),
        )

    async def close(self) -> None:
        """Ends all calls and removes the sockets. May be called twice."""
        running, self._running = self._running, None
        if running is not None:
            await running.aclose()

    def create_entry(self, spiffe_id: str, selectors: Collection[str]) -> str:
        """Gives processes an ID; returns the entry's own. Raises: Invalid."""
        return self.domain.entries.create(spiffe_id, selectors).entry_id

    def delete_entry(self, entry_id: str) -> bool:
        """Takes it away again; whether there was one."""
        return self.domain.entries.delete(entry_id)

    def set_federated_bundle(self, trust_domain: str, x509: bytes, jwks: bytes) -> None:
        """Trusts another domain: concatenated DER and a JWK Set (`domain.authority` of that one). Raises: Invalid."""
        self.domain.federate(TrustDomain.parse(trust_domain), x509, jwks)

    def _take_folder(self, stack: contextlib.AsyncExitStack) -> None:
        """Holds the folder: gRPC replaces sockets without asking, so two of us in one would cut each other off."""
        self._folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        self._private.mkdir(mode=0o700, exist_ok=True)
        held = os.open(self._private, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, held)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            message = "another embedded trust domain runs in this folder: stop it, or choose another folder"
            raise OSError(error.errno, message, str(self._folder)) from error

    async def _serve_workload_api(self, stack: contextlib.AsyncExitStack) -> None:
        front = UnixFront(self.workload_socket, self._private / "workload.sock")
        server = grpc.aio.server()
        servicer = DevWorkloadApi(self.domain, front.peer)
        workload_pb2_grpc.add_SpiffeWorkloadAPIServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]
        await self._serve(stack, server, front)

    async def _serve_registration(self, stack: contextlib.AsyncExitStack) -> None:
        front = UnixFront(self.entries_socket, self._private / "entries.sock", mode=0o600)
        server = grpc.aio.server()
        dev_pb2_grpc.add_DevEntriesServicer_to_server(Registration(self.domain, front.peer), server)
        await self._serve(stack, server, front)

    async def _serve(self, stack: contextlib.AsyncExitStack, server: grpc.aio.Server, front: UnixFront) -> None:
        server.add_insecure_port(f"unix:{self._private / front.path.name}")
        await server.start()
        stack.push_async_callback(server.stop, None)
        await front.start()
        stack.push_async_callback(front.close)

    async def _serve_broker_api(self, stack: contextlib.AsyncExitStack) -> None:
        tls = ServerTls(self.domain.snapshot(self.domain.x509_svid(self.agent)))
        server = grpc.aio.server()
        brokerapi_pb2_grpc.add_APIServicer_to_server(DevBrokerApi(self.domain, self.broker), server)
        server.add_secure_port(f"unix:{self.broker_socket}", tls.grpc_credentials())
        await server.start()
        stack.push_async_callback(server.stop, None)
        self.broker_socket.chmod(0o666)  # mutual TLS says who may ask
        renewing = asyncio.create_task(self._renew_agent(tls), name="dev-agent-svid")
        stack.push_async_callback(_end, renewing)

    async def _renew_agent(self, tls: ServerTls) -> None:
        while True:
            mark = self.domain.mark()
            tls.offer(self.domain.snapshot(self.domain.x509_svid(self.agent)))
            await self.domain.wait(mark, [self.agent])


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
