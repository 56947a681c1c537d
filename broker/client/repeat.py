"""Makes a call again when its transport failed, at most twice and within its deadline.

Safe for every call of this API: what a lost answer may have minted is bound to our key and expires within minutes, a
redemption carries its idempotency id, the rest only asks. An answer of the broker, whatever it says, is never repeated.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from broker.client.faults import Unreachable

_T = TypeVar("_T")

# Seconds before the second and the third try. Longer than gRPC's own first pauses between connections (100 ms, 160 ms),
# during which it would only repeat the last failure.
_PAUSES: Final = ((0.15, 0.25), (0.3, 0.6))


async def repeat(attempt: Callable[[float], Awaitable[_T]], seconds: float) -> _T:
    """The result of `attempt`, which gets the seconds that are left. Raises: whatever the last attempt raised."""
    clock = asyncio.get_running_loop().time
    deadline = clock() + seconds
    for shortest, longest in _PAUSES:
        pause = random.uniform(shortest, longest)  # noqa: S311 - spreads load, hides nothing
        try:
            return await attempt(deadline - clock())
        except Unreachable as error:
            if not error.may_retry or clock() + pause >= deadline:
                raise
        await asyncio.sleep(pause)
    return await attempt(deadline - clock())
