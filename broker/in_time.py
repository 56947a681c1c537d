"""How long one request may take, whatever it waits for: invariant 6 makes a timeout a no."""

import asyncio
from types import TracebackType
from typing import Final, Self

from broker.errors import Reason, Unavailable

REQUEST_TIMEOUT_S: Final = 10.0  # for attestation, decision and recording of one request


class InTime:
    """Bounds a block to `REQUEST_TIMEOUT_S`. Raises: Unavailable with `reason`, which the block keeps up to date."""

    def __init__(self, reason: Reason = Reason.ATTESTATION_UNAVAILABLE) -> None:
        self.reason = reason
        self._timeout = asyncio.timeout(REQUEST_TIMEOUT_S)

    async def __aenter__(self) -> Self:
        await self._timeout.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        try:
            await self._timeout.__aexit__(kind, error, where)
        except TimeoutError as late:
            raise Unavailable(self.reason, "out of time") from late
        if isinstance(error, TimeoutError):  # somebody's own, inside
            raise Unavailable(self.reason, "out of time") from error
