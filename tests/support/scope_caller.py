"""One more client of a measured broker, in a process of its own: asks for tokens at a steady rate, and times each.

Commands, one a line: "begin", which is answered at once; "end", with the seconds that each request took.
usage: python -m support.scope_caller FOLDER PORT ACTION AUDIENCE
"""

import asyncio
import json
import sys
import time
from pathlib import Path

import grpc

from broker._proto.actionbroker.v1 import action_pb2, broker_pb2, broker_pb2_grpc

RATE = 100  # a second, whatever becomes of the others: what is measured is whether they wait


async def main(folder: Path, port: str, action: str, audience: str) -> None:
    credentials = grpc.ssl_channel_credentials(
        *((folder / name).read_bytes() for name in ("root.pem", "client.key", "client.pem"))
    )
    options = [("grpc.ssl_target_name_override", "broker.acme.test")]
    asked = action_pb2.Action(name=action, resource="https://orders.acme.test/orders/17", audience=audience)
    request = broker_pb2.RequestActionTokenRequest(action=asked)
    async with grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials, options) as channel:
        stub = broker_pb2_grpc.ActionBrokerStub(channel)
        await stub.RequestActionToken(request)
        print(json.dumps({"port": int(port)}), flush=True)
        took: list[float] = []

        async def one() -> None:
            started = time.perf_counter()
            await stub.RequestActionToken(request)
            took.append(time.perf_counter() - started)

        async def steadily() -> None:
            async with asyncio.TaskGroup() as group:
                while True:
                    group.create_task(one())
                    await asyncio.sleep(1 / RATE)

        while line := await asyncio.to_thread(sys.stdin.readline):
            if line.strip() == "begin":
                took.clear()
                asking = asyncio.create_task(steadily())
                print(json.dumps({}), flush=True)
            else:
                asking.cancel()
                await asyncio.wait([asking])
                print(json.dumps({"took": took}), flush=True)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), *sys.argv[2:]))
