"""`action-broker`: the group that all commands hang from."""

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import click

from broker.cli.output import USAGE, Output, pass_output

# Where each command is, and its line in `--help`, which thus loads none of them and is there at once.
_COMMANDS: Final[Mapping[str, tuple[str, str]]] = {
    "request": ("broker.cli.ask:request", "Ask for one action token, and show it or use it for one request."),
    "check": ("broker.cli.ask:check", "Ask whether a token would be minted again now."),
    "explain": ("broker.cli.ask:explain", "For operators: how would the broker decide, and which condition fails?"),
    "sign": ("broker.cli.sign_command:sign", "Sign files: provenance, approvals and this process are looked at."),
    "grant": ("broker.cli.grant_commands:grant", "The steps of signing one by one."),
    "verify": ("broker.cli.verify_command:verify", "Verify a signature: who, from which source, under which decision."),
    "pending": ("broker.cli.approval_commands:pending", "The requests that wait and that you may approve."),
    "show": ("broker.cli.approval_commands:show", "Look at one request that waits for approval."),
    "approve": ("broker.cli.approval_commands:approve", "Look at a request, and say yes to it."),
    "withdraw": ("broker.cli.approval_commands:withdraw", "Take your yes back: what hangs on it ends."),
    "revoke": ("broker.cli.revoke_command:revoke", "Refuse live credentials at every guard, at once and for good."),
    "standing": ("broker.cli.revoke_command:standing", "The denials and permits that stand beside policy."),
    "break-glass": ("broker.cli.break_glass_command:break_glass", "In an emergency: permit what no policy permits."),
    "session": ("broker.cli.session_commands:session", "Score agents' sessions, for operators and guardrails."),
    "guard": ("broker.cli.guard_command:guard", "Answer Envoy for a service: the guard as a process of its own."),
    "policy": ("broker.cli.policy_commands:policy", "Write, check and look at a policy folder (Cedar)."),
    "ledger": ("broker.cli.ledger_commands:ledger", "Verify and read what happened."),
    "ca": ("broker.cli.ca_commands:ca", "Make and look after the CA of signing certificates."),
    "doctor": ("broker.cli.doctor:doctor", "Look at each thing that is easily got wrong, and say how to mend it."),
    "dev": ("broker.cli.dev:dev", "For development: an embedded trust domain and a broker, in one process."),
    "demo": ("broker.cli.demo:demo", "The main job step by step, with real processes, in seconds."),
}


class _Commands(click.Group):
    """Loads a command when it is used, and takes `--json` behind it as well as before it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *_COMMANDS})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        command = super().get_command(ctx, cmd_name)
        if cmd_name in _COMMANDS:
            module, _, name = _COMMANDS[cmd_name][0].partition(":")
            command = getattr(importlib.import_module(module), name)
        if command is not None:
            _take_json(command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002 - click's
        own = {name: command.get_short_help_str(80) for name, command in self.commands.items()}
        lines = own | {name: line for name, (_, line) in _COMMANDS.items()}
        with formatter.section("Commands"):
            formatter.write_dl(sorted(lines.items()))


def _take_json(command: click.Command) -> None:
    """Gives `command`, and what hangs from it, a `--json` of its own."""
    if not any(parameter.name == "as_json" for parameter in command.params):
        option = click.Option(
            ["--json", "as_json"], is_flag=True, expose_value=False, callback=_set_json, help="As before the command."
        )
        command.params.append(option)
    if isinstance(command, click.Group):
        for inner in command.commands.values():
            _take_json(inner)


def _set_json(context: click.Context, _: click.Parameter, value: Any) -> None:
    output = context.find_object(Output)
    if value and output is not None:
        output.as_json = True


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="action-broker", prog_name="action-broker")
@click.option("--json", "as_json", is_flag=True, help="One JSON value on stdout, for scripts.")
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    help="Default: warning; info for serve and dev.",
)
@click.pass_context
def main(context: click.Context, *, as_json: bool, log_level: str | None) -> None:
    """One short-lived credential for every act, refused the moment its reasons end.

    Exit codes: 0 allowed or done, 2 usage or configuration, 3 refused, 4 unavailable, 130 interrupted.
    """
    from broker.cli.log import configure_log  # noqa: PLC0415 - `--help` needs no log

    context.obj = Output(as_json=as_json)
    configure_log(log_level or "warning", as_json=not sys.stderr.isatty())


@main.command()
@click.option("--config", "file", type=click.Path(path_type=Path), help="TOML; default /etc/action-broker/broker.toml.")
@pass_output
def serve(output: Output, file: Path | None) -> None:
    """Run the broker until it is told to stop. SIGHUP reloads policies, trusted builders and the signing CA."""
    from broker.cli import config as configuration  # noqa: PLC0415 - `--help` need not load gRPC
    from broker.cli.run import run_service  # noqa: PLC0415
    from broker.cli.serve import serve as serving  # noqa: PLC0415

    try:
        config = configuration.load(file)
    except configuration.ConfigError as error:
        output.fail(str(error), USAGE)
    run_service(output, serving(config))
