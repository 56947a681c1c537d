"""A time to forget by: a clock that goes ahead, and perhaps back again, must not make us forget what is still good."""

from datetime import datetime, timedelta


class Steady:
    """Follows the time, but never faster than a clock that does not jump.

    patience_s: a time that stays ahead for so long is the time. Times are aware UTC, and the event loop's seconds.
    """

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._last: tuple[datetime, float] | None = None
        self._ahead_since: float | None = None

    def at(self, now: datetime, monotonic: float) -> datetime:
        """The time to forget by."""
        steady = now
        if self._last is not None:
            before, when = self._last
            steady = min(now, before + timedelta(seconds=monotonic - when))
        if now - steady < timedelta(seconds=1):
            self._ahead_since = None
        elif self._ahead_since is None:
            self._ahead_since = monotonic
        elif monotonic - self._ahead_since > self._patience_s:
            steady, self._ahead_since = now, None
        self._last = steady, monotonic
        return steady
