"""A process that SPIRE knows nothing of, which holds or asks what it can on the broker's Unix socket.

Says "begun" on stdout; kinds that ask then say {reason or code: count}. Stays until its stdin ends.
usage: python -m support.strangers SOCKET stream|unary|health|watch|reflection|ask|garbage COUNT
"""

import asyncio
import json
import sys
from collections import Counter
from typing import Any

import grpc
from support.whole_broker import SERVICE, Wire, request

EMPTY = b""
HOLD = {
    "stream": f"/{SERVICE}/StreamActionTokens",
    "unary": f"/{SERVICE}/RequestActionToken",
    "health": "/grpc.health.v1.Health/Check",
    "watch": "/grpc.health.v1.Health/Watch",
    "reflection": "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
}
CALLS_OF_CONNECTION = 100


async def hold(socket: str, kind: str, count: int) -> list[Any]:
    """Begins the calls; all but `watch` say nothing on them."""
    kept: list[Any] = []
    for _ in range(0, count, CALLS_OF_CONNECTION):
        wire = Wire(f"unix:{socket}")
        kept.append(wire)
        for _ in range(CALLS_OF_CONNECTION):
            call = wire.channel.stream_stream(HOLD[kind])()
            kept.append(call)
            if kind == "watch":
                kept.append(asyncio.ensure_future(call.write(EMPTY)))
            else:
                kept.append(asyncio.ensure_future(call.initial_metadata()))
    await asyncio.sleep(1)  # for them to arrive; nothing tells of those that are held
    return kept


async def ask(socket: str, count: int) -> dict[str, int]:
    async with Wire(f"unix:{socket}") as wire:
        said = await asyncio.gather(
            *(wire.send("RequestActionToken", request(), [wire.proof("RequestActionToken")]) for _ in range(count))
        )
    return Counter(one.reason or one.code.name for one in said)


async def garbage(socket: str, count: int) -> dict[str, int]:
    """Bytes that are no message, on calls and on streams."""
    codes: Counter[str] = Counter()
    async with Wire(f"unix:{socket}") as wire:
        for method in ("RequestActionToken", "StreamActionTokens"):
            for _ in range(count):
                call = wire.channel.stream_stream(f"/{SERVICE}/{method}")()
                await call.write(b"\xff\xff\xff")
                codes[(await call.code()).name] += 1
    return codes


async def main(socket: str, kind: str, count: int) -> None:
    kept: list[Any] = [] if kind in {"ask", "garbage"} else await hold(socket, kind, count)
    print("begun", flush=True)
    if kind in {"ask", "garbage"}:
        print(json.dumps(await (ask if kind == "ask" else garbage)(socket, count)), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    for one in kept:
        if isinstance(one, grpc.aio.Call):
            one.cancel()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
