"""The broker's nonces, waiting to be put into proofs (RFC 9449 section 8). Each is good once, where it came."""

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import Final

USABLE_S: Final = 25.0  # the broker takes its nonces back for 30 s; the rest is for the way there
MAX_HELD: Final = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Nonce:
    """One nonce. received: on the event loop's clock, in seconds."""

    value: str
    received: float


class NoncePool:
    """Unused nonces of one channel, bounded in number and age.

    They belong to a connection, and a channel may replace its connection at any time: the broker then asks for another
    nonce, and what is older here than the refused one is forgotten with it.
    """

    def __init__(self) -> None:
        self._held: deque[Nonce] = deque(maxlen=MAX_HELD)

    def __len__(self) -> int:
        return len(self._held)

    def put(self, value: str) -> Nonce:
        """Keeps a nonce that just came."""
        nonce = Nonce(value=value, received=asyncio.get_running_loop().time())
        self._held.append(nonce)
        return nonce

    def take(self) -> Nonce | None:
        """The newest one, for one use; None when there is none young enough."""
        if not self._held:
            return None
        nonce = self._held.pop()
        if asyncio.get_running_loop().time() - nonce.received > USABLE_S:
            self._held.clear()  # all others are older
            return None
        return nonce

    def refused(self, nonce: Nonce | None) -> None:
        """Forgets what came no later than a nonce that the broker did not take."""
        while nonce is not None and self._held and self._held[0].received <= nonce.received:
            self._held.popleft()
