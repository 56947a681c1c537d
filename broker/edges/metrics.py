"""What Prometheus sees. Labels are method names and reason codes: never an identity, a resource or a credential."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from broker.errors import BrokerError

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """One registry for each broker process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "action_broker_requests_total",
            "Requests by outcome: issued, allowed, or the reason of the refusal",
            ("method", "outcome"),
            registry=self.registry,
        )
        self.seconds = Histogram(
            "action_broker_request_seconds",
            "Time from request to answer",
            ("method",),
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
            registry=self.registry,
        )
        self.ready = Gauge("action_broker_ready", "1 when the broker can mint", registry=self.registry)
        self.svid_seconds = Gauge(
            "action_broker_svid_remaining_seconds",
            "Until our own SVID ends; SPIRE renews at half",
            registry=self.registry,
        )
        self.ledger_size = Gauge("action_broker_ledger_records", "Records in the ledger", registry=self.registry)
        self.policy_failed = Gauge(
            "action_broker_policy_reload_failed", "1 while the policy folder does not load", registry=self.registry
        )
        self.scope_live = Gauge("action_broker_scope_live", "Credentials that have not expired", registry=self.registry)
        self.scope_watchers = Gauge(
            "action_broker_scope_watchers", "Guards that listen to the scope feed", registry=self.registry
        )
        self.break_glass = Gauge(
            "action_broker_break_glass_permits", "Break-glass permits that are open", registry=self.registry
        )
        self.standing_denials = Gauge(
            "action_broker_standing_denials", "Standing denials in force", registry=self.registry
        )
        self.unix_connections = Gauge(
            "action_broker_unix_connections", "Open connections on the Unix socket", registry=self.registry
        )

    @contextmanager
    def observe(self, method: str, success: str) -> Iterator[None]:
        """Counts and times one request by how it ends."""
        started = time.perf_counter()
        outcome = "error"
        try:
            yield
            outcome = success
        except BrokerError as error:
            outcome = error.reason
            raise
        finally:
            self.requests.labels(method, outcome).inc()
            self.seconds.labels(method).observe(time.perf_counter() - started)

    def render(self) -> bytes:
        """The exposition text."""
        return generate_latest(self.registry)
