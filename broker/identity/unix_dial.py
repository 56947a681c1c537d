"""Dialling a Unix socket, knowing which user is behind it.

Whoever may write into the socket's folder can put a socket of his own there. A caller that sends its request to that
one proves its key to a stranger, so it looks first (DESIGN section 5).
"""

import asyncio
from collections.abc import Set as AbstractSet

from broker.errors import Reason, Refused
from broker.identity.hop import End, Hop
from broker.identity.peer import peer_uid


class UnixDialer:
    """A hop to the Unix socket at `path`, whose server must run as one of the users in `allowed`.

    The bytes are written by this very process, which is what the broker attests.
    """

    def __init__(self, path: str, *, allowed: AbstractSet[int]) -> None:
        self._path = path
        self._allowed = frozenset(allowed)
        self._hop = Hop(self._connect, rejected=lambda: f"{path} ended the connection unanswered")

    @property
    def last_error(self) -> str | None:
        """Why the newest connection failed."""
        return self._hop.last_error

    async def start(self) -> str:
        """The target for an insecure gRPC channel."""
        return await self._hop.start()

    async def close(self) -> None:
        """Close the channel first."""
        await self._hop.close()

    async def _connect(self) -> End:
        transport, end = await asyncio.get_running_loop().create_unix_connection(End, self._path)
        # SO_PEERCRED of a listening socket's side: the user that called listen(2), not whoever holds it now.
        uid = peer_uid(transport.get_extra_info("socket"))
        if uid not in self._allowed:
            transport.abort()
            allowed = ", ".join(map(str, sorted(self._allowed)))
            raise Refused(
                Reason.UNAUTHENTICATED,
                f"{self._path} is served by user {uid}, not by {allowed}: "
                "name the broker's user in the client's configuration if that is right",
            )
        return end
