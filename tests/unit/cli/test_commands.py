"""The command's table: what `--help` promises is there, at once, and takes `--json` on either side."""

import subprocess
import sys

import click
import pytest

from broker.cli.main import _COMMANDS, main

# What a reader of `--help` should not wait for.
SLOW = {"grpc", "aiohttp", "cedarpy", "cryptography", "pydantic", "structlog", "rich", "uvloop"}


def leaves(command: click.Command, name: str) -> list[tuple[str, click.Command]]:
    if not isinstance(command, click.Group):
        return [(name, command)]
    context = click.Context(command)
    found = [(name, command)] if command.invoke_without_command else []
    for inner in command.list_commands(context):
        found += leaves(command.get_command(context, inner), f"{name} {inner}".strip())
    return found


LEAVES = dict(leaves(main, ""))


def test_help_loads_no_command() -> None:
    code = (
        "import sys; from broker.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: print('loaded', *sorted({name.partition('.')[0] for name in sys.modules}))\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(ended.stdout.rpartition("loaded")[2].split())
    assert "click" in loaded
    assert loaded & SLOW == set()
    for name in _COMMANDS:
        assert f"\n  {name} " in ended.stdout


def test_every_command_of_the_table_is_where_it_says_and_does_what_its_line_says() -> None:
    context = click.Context(main)
    for name, (_, line) in _COMMANDS.items():
        command = main.get_command(context, name)
        assert command.name == name
        first = (command.help or "").split("\n\n")[0].replace("\n", " ")
        assert line.split()[0] == first.split()[0], (line, first)
    assert main.get_command(context, "nonsense") is None


@pytest.mark.parametrize("name", LEAVES)
def test_every_command_has_help_and_takes_json(name: str) -> None:
    command = LEAVES[name]
    assert command.help
    assert [parameter.name for parameter in command.params].count("as_json") == 1
    for parameter in command.params:
        if isinstance(parameter, click.Option) and parameter.name != "as_json":
            assert parameter.help, f"{name} {parameter.name} has no help"


def test_the_commands_are_those_that_the_documents_name() -> None:
    assert set(LEAVES) == {
        *("serve", "dev", "dev exec", "dev entry create", "dev entry delete", "demo", "request", "check", "explain"),
        *("policy init", "policy validate", "policy test", "policy show", "doctor", "guard"),
        *("ledger verify", "ledger show", "ledger tail", "ledger export", "session score"),
        *("sign", "grant request", "grant sign", "grant csr", "grant certify", "verify"),
        *("revoke", "standing", "break-glass"),
        *("pending", "show", "approve", "withdraw", "ca init", "ca rotate", "ca show", "ca trusted-root"),
    }
