"""The client's channel, and what becomes of the one before it."""

import asyncio
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from support.processes import until

from broker.client.link import Link


class Way:
    """The way to a server's own socket."""

    last_error = None

    def __init__(self, path: Path) -> None:
        self._path = path

    async def start(self) -> str:
        return f"unix:{self._path}"

    async def close(self) -> None:
        """Nothing was opened."""


async def test_calls_on_an_earlier_connection_have_their_grace_and_then_it_is_closed(tmp_path: Path) -> None:
    server = grpc.aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)
    server.add_insecure_port(f"unix:{tmp_path}/s")
    await server.start()
    link = Link(Way(tmp_path / "s"), where="there", authority="localhost", key=None)
    await link.open()
    try:
        await renewed(link)
    finally:
        await link.close()
        await server.stop(0)


async def renewed(link: Link) -> None:
    (earlier,) = link._channels
    streams = [health_pb2_grpc.HealthStub(earlier).Watch(health_pb2.HealthCheckRequest()) for _ in range(2)]
    assert [(await stream.read()).status for stream in streams] == [health_pb2.HealthCheckResponse.SERVING] * 2
    loop = asyncio.get_running_loop()
    started = loop.time()
    link.renew(0.2)
    assert link.generation == 2
    assert link._channels[0] is earlier, "it lives on"
    await until(lambda: earlier not in link._channels, "it is closed")
    assert loop.time() - started >= 0.2
    assert all(stream.done() for stream in streams)
    assert len(link._channels) == 1
