"""A receiving service over gRPC, with each form of handler. Its messages are bytes: "<order>" or "<order>/<rest>"."""

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc

from broker import guard

SERVICE = "acme.Orders"


def resource(message: bytes) -> str:
    return f"https://orders.acme.test/v1/orders/{message.decode().split('/')[0]}"


class Orders:
    """A service on bytes; `seen` is what its handlers were given."""

    def __init__(self) -> None:
        self.seen: list[bytes] = []

    async def refund(self, request: bytes, _: Any) -> bytes:
        self.seen.append(request)
        return guard.current().principal.encode()

    async def list_lines(self, request: bytes, _: Any) -> AsyncIterator[bytes]:
        for number in range(3):
            self.seen.append(request)
            yield f"{guard.current().action.name} {number}".encode()

    async def write_lines(self, request: bytes, context: Any) -> None:
        for number in range(3):
            self.seen.append(request)
            await context.write(f"{guard.current().action.name} {number}".encode())

    async def upload(self, requests: AsyncIterator[bytes], _: Any) -> bytes:
        async for message in requests:
            self.seen.append(message)
        return b",".join(self.seen)

    async def read_upload(self, _: Any, context: Any) -> bytes:
        while (message := await context.read()) is not grpc.aio.EOF:
            self.seen.append(message)
        return b",".join(self.seen)

    async def talk(self, requests: AsyncIterator[bytes], _: Any) -> AsyncIterator[bytes]:
        async for message in requests:
            self.seen.append(message)
            yield message.upper()

    @guard.action("orders.declared", resource=resource)
    async def declared(self, request: bytes, _: Any) -> bytes:
        self.seen.append(request)
        return b"declared"

    @guard.action("orders.declared", resource=resource)
    async def declared_lines(self, request: bytes, _: Any) -> AsyncIterator[bytes]:
        self.seen.append(request)
        yield b"declared"

    async def health(self, request: bytes, _: Any) -> bytes:
        self.seen.append(request)
        with contextlib.suppress(LookupError):
            guard.current()
            return b"somebody"
        return b"nobody"

    def blocking(self, request: bytes, _: Any) -> bytes:
        self.seen.append(request)
        return b"done"

    def handlers(self) -> dict[str, Any]:
        kinds = {
            "Refund": (self.refund, "unary_unary"),
            "Lines": (self.list_lines, "unary_stream"),
            "WriteLines": (self.write_lines, "unary_stream"),
            "Upload": (self.upload, "stream_unary"),
            "ReadUpload": (self.read_upload, "stream_unary"),
            "Talk": (self.talk, "stream_stream"),
            "Declared": (self.declared, "unary_unary"),
            "DeclaredLines": (self.declared_lines, "unary_stream"),
            "Health": (self.health, "unary_unary"),
            "Unmapped": (self.refund, "unary_unary"),
            "UnmappedStream": (self.talk, "stream_stream"),
            "Blocking": (self.blocking, "unary_unary"),
            "Failing": (self.refund, "unary_unary"),
        }
        return {
            name: getattr(grpc, f"{kind}_rpc_method_handler")(behaviour) for name, (behaviour, kind) in kinds.items()
        }
