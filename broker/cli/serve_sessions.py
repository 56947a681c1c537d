"""What agents' sessions need of a broker process: where they are kept, and who may move them, as configured."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from aiohttp import web

from attestors.session import SessionAttestor
from broker.cli.config import Config
from broker.cli.config_session import Transmitter as TransmitterTable
from broker.cli.file_watch import FileWatch
from broker.cli.serve_signing import Mistakes, Watches
from broker.cli.ticket_secrets import HookSecrets
from broker.edges.http_events import EventEndpoint
from broker.edges.metrics import Metrics
from broker.exchange import Exchange
from broker.identity.event_keys import FileKeys, discovered_keys, keys_at
from broker.identity.security_event import KeySource, SecurityEvents, Transmitter, TransmitterSettings
from broker.ledger.session_store import Sessions
from broker.ledger.store import Ledger
from broker.scoring import Scoring
from broker.session_events import EventReceiver
from broker.session_records import RecordedSessions


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionParts:
    """attestor: of `session`. transmitters: whose security events are taken."""

    sessions: Sessions
    attestor: SessionAttestor
    transmitters: tuple[Transmitter, ...]

    def scoring(self, exchange: Exchange) -> Scoring:
        """For who scores by calling us."""
        return Scoring(exchange, self.sessions)

    def add_to(self, app: web.Application, exchange: Exchange, metrics: Metrics, clock: Callable[[], datetime]) -> None:
        """Serves what transmitters call, where there is one. Before the application is started."""
        if self.transmitters:
            events = SecurityEvents(self.transmitters, exchange.issuer)
            receiver = EventReceiver(exchange, self.sessions, events)
            EventEndpoint(receiver, exchange, metrics, clock).add_to(app)


def open_sessions(config: Config, ledger: Ledger, watches: Watches) -> SessionParts:
    """Raises: SetupError with all that cannot be used."""
    sessions = Sessions(ledger.submit)
    transmitters: list[Transmitter] = []
    with Mistakes() as mistakes:
        for issuer, table in config.session.transmitters.items():
            with mistakes.of(f"session.transmitters.{issuer}"):
                transmitters.append(open_transmitter(issuer, table, config.issuer, watches))
    attestor = SessionAttestor(RecordedSessions(sessions))
    return SessionParts(sessions=sessions, attestor=attestor, transmitters=tuple(transmitters))


def open_transmitter(
    issuer: str, table: TransmitterTable, our_issuer: str, watches: Watches | None = None
) -> Transmitter:
    """watches: whose reloads take its files again. Raises: Invalid, ValueError, OSError."""
    settings = TransmitterSettings(
        issuer=issuer, audience=table.audience or our_issuer, principals=table.principals, lowers=table.lowers
    )
    keys = _keys(issuer, table, watches)
    if table.bearer_file is None:
        return Transmitter(settings=settings, keys=keys)
    file, secrets = table.bearer_file, HookSecrets(table.bearer_file)
    if watches is not None:
        watches.files.append(FileWatch(f"secret of {issuer}", lambda: (file,), secrets.reload))
    return Transmitter(settings=settings, keys=keys, secrets=secrets)


def _keys(issuer: str, table: TransmitterTable, watches: Watches | None) -> KeySource:
    ca_file = None if table.ca_file is None else str(table.ca_file)
    if table.jwks_url is not None:
        return keys_at(table.jwks_url, issuer, ca_file)
    if table.jwks_file is None:
        return discovered_keys(issuer, ca_file)
    file, keys = table.jwks_file, FileKeys(table.jwks_file)
    if watches is not None:
        watches.files.append(FileWatch(f"keys of {issuer}", lambda: (file,), keys.reload))
    return keys
