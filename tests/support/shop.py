"""A receiving service for scenarios: orders behind the guard, over gRPC on loopback, and how an agent calls it."""

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from support.receiving import guard_of
from support.whole_broker import Whole

from broker import guard
from broker.client import ActionToken
from broker.guard import GuardInterceptor, Rule, Table

AUTHORITY = "orders.acme.test"
REFUND, CHARGE = "/acme.Orders/Refund", "/acme.Orders/Charge"


def order_of(message: bytes) -> str:
    return f"https://{AUTHORITY}/orders/{message.decode().split()[0]}"


TABLE = Table(
    [
        Rule(
            method=REFUND,
            action="orders.refund",
            resource=order_of,
            parameters=lambda message: {"amount": int(message.split()[1])},
        ),
        Rule(method=CHARGE, action="orders.charge", resource=order_of),
    ]
)


def say(text: str) -> None:
    """A line of the story, shown by `make example`."""
    sys.stdout.write(f"  {text}\n")


@dataclass
class Shop:
    """A running service. done: what it did, and for whom."""

    target: str
    done: list[tuple[str, str]] = field(default_factory=list)

    async def ask(self, method: str, message: str, token: ActionToken) -> str:
        """One call with a token. "done", or why not."""
        metadata = token.grpc_metadata(method, authority=AUTHORITY)
        async with grpc.aio.insecure_channel(self.target) as channel:
            try:
                answer = await channel.unary_unary(method)(message.encode(), metadata=metadata, timeout=15)
            except grpc.aio.AioRpcError as error:
                return error.details() or error.code().name
        return answer.decode()


@asynccontextmanager
async def shop(whole: Whole, **guard_options: Any) -> AsyncIterator[Shop]:
    """One replica of the service, with a guard and a memory of its own."""
    async with guard_of(whole, **guard_options) as its_guard:
        found = Shop("")

        async def handle(request: bytes, _: Any) -> bytes:
            found.done.append((guard.current().principal, request.decode()))
            return b"done"

        server = grpc.aio.server(interceptors=[GuardInterceptor(its_guard, TABLE, authorities=[AUTHORITY])])
        handlers = {path.rpartition("/")[2]: grpc.unary_unary_rpc_method_handler(handle) for path in (REFUND, CHARGE)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("acme.Orders", handlers),))
        found.target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        try:
            yield found
        finally:
            await server.stop(None)
