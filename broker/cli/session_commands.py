"""`session score`: what an operator or a guardrail says of the risk of an agent's session."""

from typing import Any

import click
from rich.markup import escape

from attestors.session import HIGH, LEVELS, is_session_id
from broker.cli.ask import ask, reach_from, reach_options
from broker.cli.output import Output, pass_output, printable
from broker.errors import Invalid
from broker.identity.spiffe_id import SpiffeId


def _session(_: click.Context, __: click.Parameter, value: str) -> str:
    if not is_session_id(value):
        raise click.BadParameter("a session is named by 1 to 128 characters of A-Z a-z 0-9 . _ ~ -")
    return value


def _spiffe_id(_: click.Context, __: click.Parameter, value: str) -> str:
    try:
        return str(SpiffeId.parse(value))
    except Invalid as error:
        raise click.BadParameter(error.detail) from error


@click.group()
def session() -> None:
    """Score agents' sessions: how risky others say that they are."""


@session.command()
@click.argument("name", metavar="SESSION", callback=_session)
@click.option("--principal", required=True, callback=_spiffe_id, help="Whose session it is; it never changes hands.")
@click.option("--level", required=True, type=click.Choice(LEVELS, case_sensitive=False), help="HIGH refuses at once.")
@click.option("--reason", default="", help="Why, for the ledger.")
@reach_options
@pass_output
def score(output: Output, /, name: str, principal: str, level: str, reason: str, **options: Any) -> None:
    """Say how risky SESSION is. The first score makes it; it is forgotten 24 hours after the last.

    HIGH refuses what was given in the session, for good, and whatever is asked in it until it is scored anew.
    """
    correlation = ask(
        output,
        reach_from(output, options),
        lambda broker: broker.sessions.score(name, principal=principal, level=level, reason=reason),
    )
    output.value({"session": name, "principal": principal, "level": level, "correlation_id": correlation})
    said = f"session {escape(printable(name))} of {escape(principal)} is {level}"
    output.say(f"[green]scored[/]: {said}" + (": nothing is given in it any more" if level == HIGH else ""))
