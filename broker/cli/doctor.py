"""`doctor`: looks at each thing that operators get wrong, and says how to mend it.

Run it as the user and on the node that the broker runs as. It starts nothing, writes nothing and asks nobody but the
SPIRE agent, a running broker (for its socket), and those that the configuration names: tokens, which it logs in to,
the timestamp authority, the issuers of ID tokens, the ticket systems and the transmitters of security events.
"""

import asyncio
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import click
from rich.markup import escape

from broker.cli import config as configuration
from broker.cli.config import Config
from broker.cli.doctor_evidence import approvals, provenance
from broker.cli.doctor_finding import Finding, broken, ok, warning
from broker.cli.doctor_identity import identity, kernel, look_at_socket
from broker.cli.doctor_session import transmitters
from broker.cli.doctor_signing import signing
from broker.cli.doctor_store import policy, store
from broker.cli.doctor_ticket import tickets
from broker.cli.log import configure_log
from broker.cli.output import REFUSED, Output, pass_output


def _front(config: Config) -> Finding:
    if config.unix.socket is None:
        return ok("broker socket", "not configured")
    found = look_at_socket("broker socket", str(config.unix.socket), "Start the broker: action-broker serve")
    return found if found.verdict == "ok" else warning(found.what, found.detail, found.fix)


async def examine(config: Config, now: datetime) -> list[Finding]:
    """All findings, in the order in which to mend them."""
    return [
        kernel(),
        *[finding async for finding in identity(config, now)],
        policy(config),
        *store(config, now),
        *[finding async for finding in signing(config, now)],
        *provenance(config),
        *[finding async for finding in approvals(config)],
        *[finding async for finding in tickets(config)],
        *[finding async for finding in transmitters(config)],
        _front(config),
    ]


@click.command()
@click.option("--config", "file", type=click.Path(path_type=Path), help="TOML; default /etc/action-broker/broker.toml.")
@pass_output
def doctor(output: Output, file: Path | None) -> None:
    """Look at each thing that is easily got wrong, and say how to mend it. Exit code 3 when something is broken."""
    try:
        config = configuration.load(file)
        configure_log("error", as_json=False)  # what the streams would warn of is among the findings
        found = asyncio.run(examine(config, datetime.now(UTC)))
    except configuration.ConfigError as error:
        found = [broken("configuration", str(error), "Mend the file; docs/api.md lists all keys.")]
    output.value({"findings": [asdict(finding) for finding in found]})
    marks = {"ok": "[green]ok[/]     ", "warning": "[yellow]warning[/]", "broken": "[red]broken[/] "}
    for finding in found:
        output.say(f"{marks[finding.verdict]} {finding.what}: {escape(finding.detail)}")
        if finding.fix:
            output.say(f"        → {escape(finding.fix)}")
    if any(finding.verdict == "broken" for finding in found):
        raise SystemExit(REFUSED)
