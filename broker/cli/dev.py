"""`dev`, `dev exec`, `dev entry`: a whole broker on one machine without SPIRE, to try it and to develop against it."""

import json
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any, Final

import click
from rich.markup import escape

from broker.cli.dev_folder import TRUST_DOMAIN, DevFolder, default_folder
from broker.cli.output import UNAVAILABLE, USAGE, Output, pass_output
from broker.cli.starter_policy import CALLER, ORDERS, SERVICE
from broker.errors import BrokerError, Invalid, Unavailable

_FOLDER: Final = click.option(
    "--folder",
    type=click.Path(path_type=Path, file_okay=False),
    help="Default: action-broker-dev-<uid> in XDG_RUNTIME_DIR or the temporary folder.",
)


@click.group(invoke_without_command=True)
@_FOLDER
@click.option("--policy", type=click.Path(path_type=Path, file_okay=False), help="Default: one in the folder.")
@click.option("--grpc-listen", default="127.0.0.1:0", show_default=True, help="HOST:PORT for mutual TLS.")
@click.option("--http-listen", default="127.0.0.1:0", show_default=True, help="HOST:PORT for HTTPS and the key set.")
@pass_output
@click.pass_context
def dev(
    context: click.Context,
    output: Output,
    /,
    folder: Path | None,
    policy: Path | None,
    grpc_listen: str,
    http_listen: str,
) -> None:
    """For development: an embedded trust domain and a broker, in one process, until it is told to stop.

    It speaks SPIRE's protocols, and whoever may run `dev exec` can be anyone in it. Its keys, and its ledger's folder,
    are new at each start.
    """
    chosen = _chosen(folder)
    if context.invoked_subcommand is not None:
        context.meta[__name__] = chosen
        return
    from broker.cli.dev_run import run_dev  # noqa: PLC0415 - `dev exec` has no use for a broker
    from broker.cli.run import run_service  # noqa: PLC0415

    def told(found: dict[str, Any]) -> None:
        output.value(found)
        _say_how_to(output, chosen, found)

    run_service(output, run_dev(chosen, policy=policy, grpc_listen=grpc_listen, http_listen=http_listen, told=told))


def _chosen(folder: Path | None) -> DevFolder:
    return DevFolder(path=Path(os.path.abspath(folder or default_folder())))  # noqa: PTH100 - links stay, to be refused


def _amount(value: int) -> str:
    return json.dumps({"amount": value})


def _say_how_to(output: Output, folder: DevFolder, found: dict[str, Any]) -> None:
    ourselves = "action-broker" if shutil.which("action-broker") else f"{shlex.quote(sys.executable)} -m broker.cli"
    named = "" if folder.path == default_folder() else f" --folder {shlex.quote(str(folder.path))}"
    ask, facts = f"orders.refund {ORDERS}/17 {SERVICE}", json.dumps({"spire": {"ids": [CALLER]}})
    lines = [
        "[bold yellow]For development only.[/] Whoever runs `dev exec` can be anyone here. Use SPIRE for what matters.",
        "",
        f"trust domain {TRUST_DOMAIN}, broker {found['broker_id']}",
        f"policy       {escape(found['policy'])}",
        f"ledger       {escape(found['ledger'])}",
        f"keys         {found['key_set']}",
        "",
        "[bold]For your own programs[/]",
        *(f"  export {name}={shlex.quote(value)}" for name, value in folder.environment.items()),
        "",
        "[bold]Try it, in another terminal[/]",
        f"  {ourselves} dev exec{named} --id /support/agent -- \\",
        f"    {ourselves} request {ask} --parameters '{escape(_amount(30))}'",
        f"  {ourselves} dev exec{named} --id /operator -- \\",
        f"    {ourselves} explain {CALLER} {ask} \\",
        f"      --parameters '{escape(_amount(130))}' --facts '{escape(facts)}'",
        f"  {ourselves} ledger show --file {escape(shlex.quote(found['ledger']))}",
        "",
        "Ctrl-C ends it.",
    ]
    output.say("\n".join(lines))
    sys.stdout.flush()


@dev.command("exec", context_settings={"allow_interspersed_args": False})
@_FOLDER
@click.option("--id", "spiffe_id", required=True, help="/support/agent, or the whole SPIFFE ID.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@pass_output
@click.pass_context
def run_command(
    context: click.Context, output: Output, /, folder: Path | None, spiffe_id: str, command: tuple[str, ...]
) -> None:
    """Give this process a SPIFFE ID, then become COMMAND. The ID ends with the process."""
    from broker.dev.run_as import run_as  # noqa: PLC0415 - `--help` need not load gRPC

    found = _running(context, output, folder)
    os.environ.update(found.environment)
    try:
        run_as(str(found.entries), _full(spiffe_id), command)
    except BrokerError as error:
        output.fail(error.detail, UNAVAILABLE if isinstance(error, Unavailable) else USAGE)
    except OSError as error:
        output.fail(f"{command[0]}: {error.strerror}", USAGE)


@dev.group()
def entry() -> None:
    """Say which process has which SPIFFE ID, as `spire-server entry` does."""


@entry.command()
@_FOLDER
@click.option("--id", "spiffe_id", required=True, help="/support/agent, or the whole SPIFFE ID.")
@click.option("--pid", type=click.IntRange(min=1), help="One process, while it lives.")
@click.option("--selector", "selectors", multiple=True, help="unix:uid:N, unix:gid:N, unix:path:/P: all must hold.")
@pass_output
@click.pass_context
def create(
    context: click.Context,
    output: Output,
    /,
    folder: Path | None,
    spiffe_id: str,
    pid: int | None,
    selectors: tuple[str, ...],
) -> None:
    """Create an entry, and print its id."""
    from broker.cli import dev_entries  # noqa: PLC0415

    found = _running(context, output, folder)
    if (pid is None) == (not selectors):
        output.fail("name either --pid or one --selector or more", USAGE)
    try:
        if pid is not None:
            selectors = (dev_entries.selector(pid),)
        entry_id = dev_entries.create(found.entries, _full(spiffe_id), selectors)
    except ProcessLookupError:
        output.fail(f"there is no process {pid}", USAGE)
    except BrokerError as error:
        output.fail(error.detail, UNAVAILABLE if isinstance(error, Unavailable) else USAGE)
    output.value({"entry_id": entry_id})
    output.say(entry_id)


@entry.command()
@_FOLDER
@click.argument("entry_id")
@pass_output
@click.pass_context
def delete(context: click.Context, output: Output, /, folder: Path | None, entry_id: str) -> None:
    """Delete an entry: who had its SPIFFE ID by it is refused from the next request on."""
    from broker.cli import dev_entries  # noqa: PLC0415

    found = _running(context, output, folder)
    try:
        dev_entries.delete(found.entries, entry_id)
    except BrokerError as error:
        output.fail(error.detail, UNAVAILABLE if isinstance(error, Unavailable) else USAGE)
    output.value({"deleted": entry_id})
    output.say("deleted")


def _running(context: click.Context, output: Output, folder: Path | None) -> DevFolder:
    """The folder that was named here, or before the subcommand, or the default one."""
    above = context.meta.get(__name__)
    found = _chosen(folder) if folder is not None or not isinstance(above, DevFolder) else above
    try:
        found.check()
    except Invalid as error:
        output.fail(error.detail, UNAVAILABLE if not found.path.exists() else USAGE)
    return found


def _full(spiffe_id: str) -> str:
    return f"spiffe://{TRUST_DOMAIN}{spiffe_id}" if spiffe_id.startswith("/") else spiffe_id
