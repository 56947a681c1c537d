"""What was used already, for as long as it could be used again: bounded memory that forgets by time alone."""

import hashlib
import threading
from collections import Counter
from typing import Final

from broker.errors import Reason, Refused

_BUCKET: Final = 2  # seconds; entries are forgotten together, up to this much later than they could be
CAPACITY: Final = 1_000_000  # about 150 MB when full: 14,000 a second that count for the usual 60 s and leeway
PER_PRINCIPAL: Final = 250_000  # so that one caller cannot fill it for all


class OnceMemory:
    """Takes each key once until its time has passed. Safe to use from several threads.

    Nothing is ever dropped to make room: a full memory refuses.
    """

    def __init__(self, capacity: int = CAPACITY, per_principal: int = PER_PRINCIPAL) -> None:
        self._capacity, self._per_principal = capacity, per_principal
        self._seen: set[bytes] = set()
        self._counts: Counter[str] = Counter()
        self._buckets: dict[int, tuple[list[bytes], Counter[str]]] = {}
        self._forgotten = 0  # every bucket below it is gone
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._seen)

    def take(self, key: str, *, until: float, principal: str, now: float, again: Reason) -> None:
        """Takes `key`, which counts until `until`; both times in seconds since 1970.

        Raises: Refused(`again`) when it was taken before; Refused(EXPIRED) when its time is one already forgotten, so
        that a clock that jumped ahead and back cannot make it new; Refused(QUOTA) when there is no room.
        """
        entry = hashlib.blake2b(key.encode(), digest_size=16).digest()  # a proof's jti may be long
        with self._lock:
            self._forget(int(now) // _BUCKET)
            if entry in self._seen:
                raise Refused(again, "used before in this process")
            bucket = int(until) // _BUCKET
            if bucket < self._forgotten:
                raise Refused(Reason.EXPIRED, "what was used in its time is forgotten already")
            if len(self._seen) >= self._capacity or self._counts[principal] >= self._per_principal:
                raise Refused(Reason.QUOTA, "too many uses are remembered", retry_after_ms=_BUCKET * 1000)
            entries, counts = self._buckets.setdefault(bucket, ([], Counter()))
            self._seen.add(entry)
            self._counts[principal] += 1
            entries.append(entry)
            counts[principal] += 1

    def _forget(self, bucket: int) -> None:
        if bucket <= self._forgotten:
            return
        self._forgotten = bucket
        for old in [b for b in self._buckets if b < bucket]:
            entries, counts = self._buckets.pop(old)
            self._seen.difference_update(entries)
            self._counts -= counts  # drops those at zero


class Memory:
    """The two things a guard process remembers: tokens that count once, and DPoP proofs (RFC 9449 section 11.1).

    Apart, so that many proofs leave room for tokens.
    """

    def __init__(self, capacity: int = CAPACITY, per_principal: int = PER_PRINCIPAL) -> None:
        self.tokens: Final = OnceMemory(capacity, per_principal)
        self.proofs: Final = OnceMemory(capacity, per_principal)


PROCESS: Final = Memory()
"""Shared by all guards of this process: a token that counts once does so over gRPC and HTTP together."""
