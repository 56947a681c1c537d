"""What Prometheus sees of a guard: how requests end, and whether it can believe what it knows. Never an identity."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge

from broker.errors import BrokerError


class _Feed(Protocol):
    @property
    def is_fresh(self) -> bool:
        """Whether what it knows can be believed now."""


class GuardMetrics:
    """One for each registry; guards of one process share it."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._requests = Counter(
            "action_broker_guard_requests_total",
            "Requests by outcome: allowed, or the reason of the refusal",
            ("outcome",),
            registry=registry,
        )
        self._ended = Counter(
            "action_broker_guard_streams_ended_total",
            "Streams that were ended because their credential died, by reason",
            ("reason",),
            registry=registry,
        )
        self._fresh = Gauge(
            "action_broker_guard_scope_fresh", "1 while the scope feed can be believed", registry=registry
        )

    def watch(self, feed: _Feed) -> None:
        """Tells of this feed."""
        self._fresh.set_function(lambda: float(feed.is_fresh))

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Counts one request by how it ends."""
        try:
            yield
        except BrokerError as error:
            self._requests.labels(error.reason).inc()
            raise
        self._requests.labels("allowed").inc()

    def ended(self, error: BrokerError) -> None:
        """A stream was ended."""
        self._ended.labels(error.reason).inc()
