"""A broker among the workloads of a real SPIRE, and workloads that are processes of other users."""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import Any

import pytest
from support.broker import RunningBroker, folder_for, start, write_config
from support.processes import PATIENCE_S, Child, running
from support.spire import Spire
from support.trust_domain import TESTS
from support.whole_broker import ORDERS, POLICIES, RESOURCE

NOTICED_S = 15.0
"""How long SPIRE may take until a changed entry reaches its agent."""
LIMITS = {"requests_per_second": 10_000, "burst": 10_000}


class Workload:
    """Talks to a process of support/workload.py."""

    def __init__(self, child: Child) -> None:
        self.child = child

    async def do(self, what: str, **arguments: Any) -> Any:
        self.child.tell(json.dumps({"do": what, **arguments}))
        return json.loads(await self.child.line())

    async def token(self, action: str = "orders.read", *, transport: str = "unix", **changes: str) -> str:
        """Empty when there was one, else the reason why not."""
        asked = {"resource": RESOURCE, "audience": ORDERS} | changes
        return await self.do("token", transport=transport, action=action, **asked)

    async def until_token(self, wanted: str = "", within_s: float = PATIENCE_S, **how: str) -> None:
        """Asks until the answer is `wanted`: what changes at the server takes a moment to reach the agent."""
        answer = None
        try:
            async with asyncio.timeout(within_s):
                while (answer := await self.token(**how)) != wanted:  # noqa: ASYNC110 - SPIRE brings it about
                    await asyncio.sleep(0.05)
        except TimeoutError:
            pytest.fail(f"still {answer!r} after {within_s} s, not {wanted!r}")


@contextmanager
def broker_in(spire: Spire) -> Iterator[RunningBroker]:
    """A broker as a workload of this SPIRE: root's, like this process."""
    with folder_for(POLICIES) as folder:
        config = write_config(
            folder, spire.workload_api, spire.broker_api, limits=LIMITS, grpc={"max_connection_age_s": 600}
        )
        with start(config) as broker:
            yield broker


@contextmanager
def workload_of(uid: int, broker: RunningBroker, spire: Spire) -> Iterator[Workload]:
    command = ["-m", "support.workload", uid, broker.socket, broker.grpc_port, broker.http_port, spire.workload_api]
    environment = {**os.environ, "PYTHONPATH": f"{TESTS}:{TESTS.parent}"}
    with running(sys.executable, *map(str, command), env=environment) as child:
        yield Workload(child)


@asynccontextmanager
async def workloads_of(broker: RunningBroker, spire: Spire, *uids: int) -> AsyncIterator[list[Workload]]:
    async with AsyncExitStack() as stack:
        found = [stack.enter_context(workload_of(uid, broker, spire)) for uid in uids]
        for one in found:
            assert json.loads(await one.child.line()) == "ready"
        yield found
