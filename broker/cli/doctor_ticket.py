"""`doctor` on ticket systems: what we show them, what their webhooks show us, and whether they answer."""

from collections.abc import AsyncIterator
from typing import Final

from attestors.contract import AttestationUnavailable
from attestors.ticket_reads import SystemAway
from broker.cli.config import Config
from broker.cli.config_ticket import System as SystemTable
from broker.cli.doctor_finding import Finding, broken, ok, warning
from broker.cli.serve_evidence import http_tickets
from broker.cli.ticket_secrets import HookSecrets

PROBE: Final = "0"  # a ticket that hardly anybody has; that there is none says that the system answers, and knows us
_STAYS: Final = "The broker does not start before this is mended."
_LONG_POLL_MS: Final = 10_000


async def tickets(config: Config) -> AsyncIterator[Finding]:
    """Each ticket system. Asks it for one ticket."""
    for name, table in config.ticket.systems.items():
        yield await _system(name, table)
        if table.webhook is not None:
            what = f"webhook of {name}"
            try:
                count = len(HookSecrets(table.webhook.secret_file)())
            except ValueError as error:
                yield broken(what, str(error), _STAYS)
            else:
                yield ok(what, f"POST {config.issuer}/hooks/tickets/{name}, with one of {count} secrets")
            if config.http.listen is None:
                yield broken(what, "http.listen is empty: nobody can call it", "Set http.listen.")
        elif table.poll_ms > _LONG_POLL_MS:
            yield warning(
                f"ticket system {name}",
                f"a closed ticket is noticed after {table.poll_ms / 1000:g} s",
                "Give it a webhook, or a shorter poll_ms.",
            )


async def _system(name: str, table: SystemTable) -> Finding:
    what = f"ticket system {name}"
    try:
        source = http_tickets(table)
    except ValueError as error:
        return broken(what, str(error), _STAYS)
    async with source:
        try:
            found = await source.get(PROBE)
        except SystemAway as error:
            fix = "Is it reachable from here, does it know these credentials, and may they read tickets?"
            return broken(what, f"{source.url(PROBE)}: {error}", f"{fix} A private CA goes into ca_file.")
        except AttestationUnavailable as error:
            return warning(what, f"{source.url(PROBE)}: {error}", "Look at what it answers there.")
    return ok(what, f"answers; {'there is' if found else 'there is no'} ticket {PROBE}")
