"""The relay under both dialers: nothing of it outlives its closing."""

import asyncio

from support.processes import on_both_loops, until

from broker.identity.hop import End, Hop


async def _never() -> End:
    await asyncio.Event().wait()
    raise AssertionError("nothing sets it")


@on_both_loops
async def test_a_connection_whose_turn_has_not_come_is_cut_when_the_hop_closes() -> None:
    hop = Hop(_never, rejected=lambda: "rejected")
    path = (await hop.start()).removeprefix("unix:")
    reader, writer = await asyncio.open_unix_connection(path)
    await until(lambda: hop._near, "it is accepted")  # its task may not have begun
    await hop.close()
    assert not hop._near
    assert await reader.read() == b""
    writer.close()
    await writer.wait_closed()
