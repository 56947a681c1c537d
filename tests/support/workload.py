"""A workload in a process of its own, as another user: caller over both transports, or a guarded service.

usage: python -m support.workload UID SOCKET GRPC_PORT HTTP_PORT WORKLOAD_API. It starts as root, loads all its code and
gives its rights up for good, since that user may not be able to read the interpreter. Commands and answers are JSON,
one a line: {"do": NAME, …}.
"""

import asyncio
import functools
import json
import os
import sys
from contextlib import AsyncExitStack
from typing import Any

import grpc
from support.grpc_orders import SERVICE, Orders, resource
from support.whole_broker import BROKER, ISSUER, utc_now

from broker.action import Action
from broker.cli.log import configure_log
from broker.client import ActionToken, Client
from broker.errors import BrokerError
from broker.guard import Guard, GuardInterceptor, KeyCache, Rule, Table, spiffe_fetch
from broker.identity.server_tls import ServerTls
from broker.identity.spiffe_id import SpiffeId
from broker.identity.workload_api import WorkloadApi

AUTHORITY = "orders.acme.test"
TABLE = Table(
    [
        Rule(method=f"/{SERVICE}/Refund", action="orders.once", resource=resource),
        Rule(method=f"/{SERVICE}/Failing", action="orders.charge", resource=resource),
        Rule(method=f"/{SERVICE}/Upload", action="orders.long", resource=resource, check=True),
    ]
)


class Workload:
    """What the commands do. service: the identity that a service has, for its audience."""

    def __init__(self, socket: str, grpc_port: int, http_port: int, workload_api: str) -> None:
        self._socket, self._workload_api = socket, workload_api
        self._grpc, self._http_port = f"127.0.0.1:{grpc_port}", http_port
        self._stack = AsyncExitStack()
        self._clients: dict[str, Client] = {}
        self._held: ActionToken | None = None
        self._shown: str | None = None
        self._load: list[asyncio.Task[str]] = []
        self._stop = asyncio.Event()

    async def close(self) -> None:
        """Ends everything."""
        await self._stack.aclose()

    async def _client(self, transport: str) -> Client:
        """One for each transport, opened when first needed."""
        if transport not in self._clients:
            self._clients[transport] = await self._stack.enter_async_context(self._new_client(transport, ""))
        return self._clients[transport]

    def _new_client(self, transport: str, spiffe_id: str) -> Client:
        if transport == "unix":
            return Client.unix(self._socket, issuer=ISSUER, spiffe_id=spiffe_id or None)
        return Client.mtls(self._grpc, broker_id=BROKER, workload_api=self._workload_api)

    async def token(self, transport: str, action: str, resource: str, audience: str, spiffe_id: str = "") -> str:
        """Empty when there was one, else the reason why not. It is kept, for `call`."""
        asked = Action(action, resource, audience, {})
        try:
            if spiffe_id:
                async with self._new_client(transport, spiffe_id) as client:
                    self._held = await client.request_action(asked)
            else:
                self._held = await (await self._client(transport)).request_action(asked)
        except BrokerError as error:
            return str(error.reason)
        self._shown = self._held.access_token
        return ""

    async def show(self) -> str | None:
        """The kept token: for a thief."""
        return self._shown

    async def steal(self, token: str | None) -> bool:
        """From now on shows this one, over the connection that its own last token is for."""
        self._shown = token
        return True

    async def call(self, port: int, method: str, message: str) -> str:
        """Shows the kept token to a service, over mutual TLS. Empty when it was done, else what the service said."""
        client, metadata = await self._client("mtls"), []
        assert self._held is not None, "get a token first: it says who the service is"
        if self._shown is not None:
            metadata.append(("authorization", f"Bearer {self._shown}"))
        async with client.service_channel(self._held, f"127.0.0.1:{port}") as channel:
            path = f"/{SERVICE}/{method}"
            under_way: Any
            if method == "Upload":
                under_way = channel.stream_unary(path)(iter([message.encode()]), metadata=metadata, timeout=15)
            else:
                under_way = channel.unary_unary(path)(message.encode(), metadata=metadata, timeout=15)
            try:
                await under_way
            except grpc.aio.AioRpcError as error:
                return error.details() or error.code().name
            return ""

    async def load(self, action: str, resource: str, audience: str) -> bool:
        """Asks without end over both transports, two tasks each, until `stop`."""
        asked = Action(action, resource, audience, {})
        for transport in ("unix", "mtls"):
            client = await self._client(transport)
            self._load += [asyncio.create_task(self._ask(transport, client, asked)) for _ in range(2)]
        return True

    async def _ask(self, transport: str, client: Client, asked: Action) -> str:
        count = 0
        while not self._stop.is_set():
            try:
                await client.request_action(asked)
            except BrokerError as error:
                return f"{transport}: {error.reason} after {count}: {error.detail}"
            count += 1
        return "" if count > 10 else f"{transport}: only {count}"

    async def stop(self) -> list[str]:
        """Ends the load. What failed."""
        self._stop.set()
        return [failed for failed in await asyncio.gather(*self._load) if failed]

    async def replace(self, program: str = "/bin/sh") -> None:
        """Another shell takes its place in the same process. It says so, and waits."""
        os.execv(program, ["sh", "-c", "echo '\"replaced\"'; read -r _"])  # noqa: S606

    async def serve(self, audience: str) -> int:
        """A guarded service over mutual TLS, its key set fetched from the broker alone. Its port."""
        api = await self._stack.enter_async_context(WorkloadApi(self._workload_api))
        tls = ServerTls(await api.ready())
        api.subscribe(tls.offer)
        url = f"https://127.0.0.1:{self._http_port}/.well-known/jwks.json"
        keys = KeyCache(spiffe_fetch(url, SpiffeId.parse(BROKER), api.snapshot))
        guard = Guard(issuer=ISSUER, audience=audience, keys=keys, broker=await self._client("unix"), clock=utc_now)
        server = grpc.aio.server(interceptors=[GuardInterceptor(guard, TABLE, authorities=[AUTHORITY])])
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, Orders().handlers()),))
        port = server.add_secure_port("127.0.0.1:0", tls.grpc_credentials())
        await server.start()
        self._stack.push_async_callback(server.stop, None)
        self._stack.push_async_callback(keys.close)
        return port


def become(uid: int) -> None:
    """For good: real, effective and saved user and group, and no other groups."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def tell(answer: object) -> None:
    """One line."""
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


async def main(socket: str, grpc_port: int, http_port: int, workload_api: str) -> None:
    """Follows commands until there are no more."""
    workload = Workload(socket, grpc_port, http_port, workload_api)
    tell("ready")
    while line := await asyncio.to_thread(sys.stdin.readline):
        command = json.loads(line)
        tell(await functools.partial(getattr(workload, command.pop("do")), **command)())
    await workload.close()


if __name__ == "__main__":
    configure_log("error", as_json=True)
    become(int(sys.argv[1]))
    asyncio.run(main(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]))
