"""What evidence from other systems needs of a broker process: ticket systems and their webhooks, as configured."""

import contextlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime

from aiohttp import web

from attestors.contract import Attestor
from attestors.json_pointer import Pointer
from attestors.ticket import TicketAttestor
from attestors.ticket_http import HttpTickets
from attestors.ticket_mapping import TicketMapping
from attestors.ticket_reads import TicketReads, TicketSystem
from broker.cli.config import Config
from broker.cli.config_ticket import AUTHORIZATION, BEARER, SIGNATURE_HEADER
from broker.cli.config_ticket import System as SystemTable
from broker.cli.config_ticket import Webhook as WebhookTable
from broker.cli.file_watch import FileWatch
from broker.cli.serve_signing import Mistakes, Watches
from broker.cli.ticket_secrets import Credential, HookSecrets
from broker.edges.http_hooks import Proof, TicketHook, TicketHooks
from broker.edges.metrics import Metrics
from broker.exchange import Exchange
from broker.identity.turns import Turns


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """attestors: by the attribute that each fills. hooks: of the ticket systems that have webhooks."""

    attestors: dict[str, Attestor] = field(default_factory=dict)
    hooks: tuple[TicketHook, ...] = ()

    def add_to(self, app: web.Application, exchange: Exchange, metrics: Metrics, clock: Callable[[], datetime]) -> None:
        """Serves what other systems call. Before the application is started."""
        TicketHooks(self.hooks, exchange, metrics, clock).add_to(app)


async def open_evidence(stack: contextlib.AsyncExitStack, config: Config, watches: Watches) -> Evidence:
    """`ticket`, where a ticket system is configured. Raises: SetupError with all that cannot be used."""
    systems: dict[str, TicketSystem] = {}
    secrets: dict[str, HookSecrets] = {}
    with Mistakes() as mistakes:
        for name, table in config.ticket.systems.items():
            with mistakes.of(f"ticket.systems.{name}"):
                source = http_tickets(table, name, watches)
                systems[name] = ticket_system(table, await stack.enter_async_context(source))
            if table.webhook is not None:
                with mistakes.of(f"ticket.systems.{name}.webhook"):
                    secrets[name] = _secrets(table.webhook, name, watches)
    if not systems:
        return Evidence()
    turns = Turns(TicketReads(systems).look)
    stack.push_async_callback(turns.close)
    attestor = TicketAttestor(systems, turns.ask)
    hooks = tuple(
        ticket_hook(name, table.webhook, secrets[name], attestor)
        for name, table in config.ticket.systems.items()
        if table.webhook is not None
    )
    return Evidence(attestors={attestor.name: attestor}, hooks=hooks)


def _nobody() -> str:
    """What is shown to a system that wants no credentials."""
    return ""


def http_tickets(table: SystemTable, name: str = "", watches: Watches | None = None) -> HttpTickets:
    """Not opened. watches: whose reloads take the credentials again. Raises: ValueError."""
    ca_file = None if table.ca_file is None else str(table.ca_file)
    authorization: Callable[[], str] = _nobody
    if table.credentials is not None and table.credentials_file is not None:
        file, credential = table.credentials_file, Credential(table.credentials_file, table.credentials)
        authorization = credential
        if watches is not None:
            watches.files.append(FileWatch(f"credentials for {name}", lambda: (file,), credential.reload))
    try:
        return HttpTickets(
            table.url, authorization, headers=table.headers, ca_file=ca_file, timeout_s=table.timeout_ms / 1000
        )
    except OSError as error:
        raise ValueError(f"ca_file {ca_file}: {error.strerror or error}") from error


def ticket_system(table: SystemTable, source: HttpTickets) -> TicketSystem:
    """As it is configured, asked by `source`."""
    mapping = TicketMapping(
        state=Pointer.parse(table.state),
        open_states=frozenset(table.open_states),
        authorises=Pointer.parse(table.authorises),
        each=_pointer(table.authorises_each),
        authorised_by=_pointer(table.authorised_by),
        id=_pointer(table.id),
    )
    return TicketSystem(
        source=source,
        mapping=mapping,
        poll_s=table.poll_ms / 1000,
        ids=None if table.id_pattern is None else re.compile(table.id_pattern),
    )


def _pointer(text: str | None) -> Pointer | None:
    return None if text is None else Pointer.parse(text)


def _secrets(table: WebhookTable, name: str, watches: Watches) -> HookSecrets:
    """Raises: ValueError."""
    file, found = table.secret_file, HookSecrets(table.secret_file)
    watches.files.append(FileWatch(f"webhook secret of {name}", lambda: (file,), found.reload))
    return found


def ticket_hook(name: str, table: WebhookTable, secrets: HookSecrets, attestor: TicketAttestor) -> TicketHook:
    """As it is configured."""
    proof = Proof(
        secrets=secrets,
        scheme=table.scheme,
        header=table.header or (AUTHORIZATION if table.scheme == BEARER else SIGNATURE_HEADER),
        delivery_header=table.delivery_header or "",
        timestamp_header=table.timestamp_header or "",
    )
    return TicketHook(
        system=name, proof=proof, id=Pointer.parse(table.id), tell=lambda ticket_id: attestor.tell(name, ticket_id)
    )
