"""`guard`: the guard as a process of its own, for Envoy in front of a service."""

from pathlib import Path

import click

from broker.cli.config import ConfigError
from broker.cli.output import USAGE, Output, pass_output


@click.command()
@click.option("--config", "file", type=click.Path(path_type=Path), help="TOML; default /etc/action-broker/guard.toml.")
@click.option("--check", is_flag=True, help="Only say whether the configuration holds.")
@pass_output
def guard(output: Output, file: Path | None, *, check: bool) -> None:
    """Answer Envoy (ext_authz) for one service until told to stop: is each request good for exactly its act?

    It runs as the service that it guards: that identity is who hears of its own audience's scope.
    """
    from broker.cli.guard_config import load  # noqa: PLC0415 - `--help` need not load gRPC
    from broker.cli.guard_serve import serve  # noqa: PLC0415
    from broker.cli.run import run_service  # noqa: PLC0415

    try:
        config = load(file)
    except ConfigError as error:
        output.fail(str(error), USAGE)
    if check:
        output.value({"rules": len(config.rules), "public": len(config.public)})
        output.say(f"the configuration holds: {len(config.rules)} rules, {len(config.public)} public methods")
        return
    run_service(output, serve(config, told=output.value))
