"""How often one caller may ask: a token bucket for each, in bounded memory."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import NoReturn

from broker.errors import Invalid, Reason, Refused


@dataclass(slots=True)
class _Bucket:
    tokens: float
    seen: float  # monotonic seconds of the last take


class Quota:
    """Admits `burst` requests of a caller at once, and `rate_per_s` of them a second in the long run.

    max_callers: how many callers are remembered. A caller is forgotten only once its bucket would be full again, so
    that coming with many names wins nothing; while all remembered ones are active, a stranger is refused.
    """

    def __init__(self, rate_per_s: float, burst: int, max_callers: int) -> None:
        if rate_per_s <= 0 or burst < 1 or max_callers < 1:
            raise ValueError("a quota needs a rate above 0, and a burst and a number of callers of at least 1")
        self._rate = rate_per_s
        self._burst = float(burst)
        self._max_callers = max_callers
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()  # least recently seen first

    @property
    def burst(self) -> int:
        """How many are admitted at once."""
        return int(self._burst)

    def __len__(self) -> int:
        return len(self._buckets)

    def take(self, caller: str, monotonic_now: float, n: int = 1, *, ahead: int = 0) -> None:
        """Counts `n` requests, all or none. monotonic_now: seconds of a clock that never goes back.

        ahead: what asking again takes before it comes here.

        Raises: Refused(QUOTA) with the time after which `n` are admitted; Invalid where they never are.
        """
        if n > self._burst:
            raise Invalid(f"at most {self._burst:.0f} requests are admitted at once, and these are {n}")
        bucket = self._buckets.get(caller)
        if bucket is None:
            bucket = self._admit(caller, monotonic_now)
        tokens = min(self._burst, bucket.tokens + max(0.0, monotonic_now - bucket.seen) * self._rate)
        bucket.seen = monotonic_now
        self._buckets.move_to_end(caller)
        if tokens < n:
            bucket.tokens = tokens
            self._refuse("this caller asks too often", (n + ahead - tokens) / self._rate)
        bucket.tokens = tokens - n

    def _admit(self, caller: str, monotonic_now: float) -> _Bucket:
        if len(self._buckets) >= self._max_callers:
            oldest, bucket = next(iter(self._buckets.items()))
            full_in = (self._burst - bucket.tokens) / self._rate - (monotonic_now - bucket.seen)
            if full_in > 0:
                self._refuse(f"more than {self._max_callers} callers are active", full_in)
            del self._buckets[oldest]
        return self._buckets.setdefault(caller, _Bucket(tokens=self._burst, seen=monotonic_now))

    @staticmethod
    def _refuse(detail: str, wait_s: float) -> NoReturn:
        raise Refused(Reason.QUOTA, detail, retry_after_ms=max(1, int(wait_s * 1000) + 1))
