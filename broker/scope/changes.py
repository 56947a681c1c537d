"""Which facts changed lately. No I/O.

Between a look at the facts and the moment at which an intent is durable they may change again. So each change gets a
number, a decision remembers the last number before its first look, and what is about to be recorded is compared.
"""

from collections import OrderedDict
from collections.abc import Iterable
from typing import Final

from attestors.contract import FactKey
from broker.in_time import REQUEST_TIMEOUT_S

KEPT_S: Final = 3 * REQUEST_TIMEOUT_S  # no decision takes longer than one request may
MAX_KEPT: Final = 100_000  # keys; over it the oldest goes, and every decision from before it is too old


class Changes:
    """The changes of the last seconds, by number.

    heard: how many there were. Times are the event loop's seconds.
    """

    def __init__(self, *, max_kept: int = MAX_KEPT) -> None:
        self.heard = 0
        self._last: OrderedDict[FactKey, tuple[int, float]] = OrderedDict()
        self._max_kept = max_kept
        self._floor = 0  # of changes up to this number the keys are forgotten

    def note(self, key: FactKey, monotonic: float) -> None:
        """Counts one more."""
        self.heard += 1
        self._last.pop(key, None)
        self._last[key] = (self.heard, monotonic)
        while self._last:
            number, when = next(iter(self._last.values()))
            if when >= monotonic - KEPT_S and len(self._last) <= self._max_kept:
                return
            self._last.popitem(last=False)
            self._floor = number

    def any_since(self, heard: int, keys: Iterable[FactKey]) -> bool:
        """Whether one of these changed after the first `heard` changes, or may have: too much came since to know."""
        if heard == self.heard:
            return False
        return heard < self._floor or any(self._last.get(key, (0, 0.0))[0] > heard for key in keys)
