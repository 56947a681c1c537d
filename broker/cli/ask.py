"""`request`, `check`, `explain`: what a caller, a receiving service and an operator ask a running broker."""

import asyncio
import dataclasses
import json
import secrets
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.markup import escape

from broker.action import Action, check_random_id, parse_parameters
from broker.cli.output import REFUSED, USAGE, Output, pass_output
from broker.client import ActionToken, Client, Explanation
from broker.errors import BrokerError, Invalid

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """How to reach the broker: its Unix socket, or host:port with its SPIFFE ID."""

    issuer: str
    socket: str
    address: str | None
    broker_id: str | None
    workload_api: str
    spiffe_id: str | None
    server_uids: tuple[int, ...] = ()

    def client(self) -> AbstractAsyncContextManager[Client]:
        """Raises: click.UsageError when the options do not fit."""
        if self.address is None:
            uids = self.server_uids or None
            return Client.unix(self.socket, issuer=self.issuer, spiffe_id=self.spiffe_id, server_uids=uids)
        if self.broker_id is None:
            raise click.UsageError("--address needs --broker-id: the SPIFFE ID that the broker must have")
        return Client.mtls(self.address, broker_id=self.broker_id, workload_api=self.workload_api)


def reach_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say where the broker is; what they leave out comes from the configuration file."""
    for option in reversed(
        [
            click.option(
                "--config", "config_file", type=click.Path(path_type=Path), help="The broker's TOML, for defaults."
            ),
            click.option("--issuer", envvar="ACTION_BROKER_ISSUER", help="The broker's issuer, https://…"),
            click.option("--socket", envvar="ACTION_BROKER_UNIX__SOCKET", help="The broker's Unix socket."),
            click.option(
                "--server-uid",
                type=click.IntRange(0),
                multiple=True,
                help="With the socket: a user that the broker may run as; default: root, or ours.",
            ),
            click.option("--address", help="HOST:PORT for mutual TLS instead of the socket."),
            click.option("--broker-id", help="With --address: the broker's SPIFFE ID."),
            click.option("--workload-api", envvar="SPIFFE_ENDPOINT_SOCKET", help="With --address: our SPIRE agent."),
            click.option(
                "--as", "spiffe_id", help="Which SPIFFE ID to act as, where SPIRE gives this process several."
            ),
        ]
    ):
        command = option(command)
    return command


def reach_from(output: Output, options: dict[str, Any]) -> Reach:
    """Takes the options of `reach_options` out of `options`."""
    file, issuer, address = options.pop("config_file"), options.pop("issuer"), options.pop("address")
    socket, workload_api = options.pop("socket"), options.pop("workload_api")
    missing = [name for name, value in (("--issuer", issuer), ("--socket", socket)) if value is None]
    if file is not None or (missing and address is None):
        from broker.cli import config as configuration  # noqa: PLC0415 - takes as long as all else; seldom needed

        try:
            found = configuration.load(file)
        except configuration.ConfigError as error:
            without = f"without {' and '.join(missing)} " if missing else ""
            output.fail(f"{without}the configuration is needed, and it has {error}", USAGE)
        issuer = issuer or found.issuer
        socket = socket or str(found.unix.socket or "")
        workload_api = workload_api or found.spire.workload_api
    return Reach(
        issuer=issuer or "",
        socket=(socket or "").removeprefix("unix://").removeprefix("unix:"),
        address=address,
        broker_id=options.pop("broker_id"),
        workload_api=workload_api or "unix:///run/spire/agent/public/api.sock",
        spiffe_id=options.pop("spiffe_id"),
        server_uids=options.pop("server_uid"),
    )


def ask(output: Output, reach: Reach, question: Callable[[Client], Awaitable[_T]], **fields: Any) -> _T:
    """The answer to one question; a refusal ends the command with it. fields: what a script is then told beside it."""

    async def run() -> _T:
        async with client as broker:
            return await question(broker)

    try:
        client = reach.client()
    except Invalid as error:
        output.fail(error.detail, USAGE)
    try:
        return asyncio.run(run())
    except BrokerError as error:
        output.refuse(error, **fields)


def _request_id(_: click.Context, __: click.Parameter, value: str | None) -> str:
    try:
        return secrets.token_urlsafe(24) if value is None else check_random_id(value, "it")
    except Invalid as error:
        raise click.BadParameter(error.detail) from error


request_id_option = click.option(
    "--request-id", callback=_request_id, help="To go on with a request that waited for approval; else a new one."
)


def _action(output: Output, name: str, resource: str, audience: str, parameters: str) -> Action:
    try:
        return Action(name, resource, audience, parse_parameters(parameters))
    except BrokerError as error:
        output.fail(error.detail, USAGE)


def action_arguments(command: Callable[..., Any]) -> Callable[..., Any]:
    """ACTION RESOURCE AUDIENCE [--parameters JSON]."""
    command = click.option("--parameters", default="{}", help="A JSON object: part of what is approved.")(command)
    for name in ("audience", "resource", "action"):
        command = click.argument(name)(command)
    return command


@click.command()
@action_arguments
@click.option("--http", nargs=2, metavar="METHOD URL", help="Print the two headers for this one HTTP request.")
@click.option("--grpc", nargs=2, metavar="/PKG.SVC/METHOD AUTHORITY", help="Print the metadata for this one gRPC call.")
@click.option("--ticket", default="", metavar="SYSTEM:ID", help="The ticket it is done for, where policy wants one.")
@click.option("--session", default="", help="The session it is done in, where policy wants one.")
@request_id_option
@reach_options
@pass_output
def request(
    output: Output,
    /,
    action: str,
    resource: str,
    audience: str,
    parameters: str,
    http: tuple[str, str] | None,
    grpc: tuple[str, str] | None,
    ticket: str,
    session: str,
    request_id: str,
    **options: Any,
) -> None:
    """Ask for one action token, and show it or use it for one request.

    The token is bound to a key that this process makes and forgets: with --http or --grpc the proof for the one request
    is printed beside it; without them the token is shown as what it is, and cannot be used.
    """
    asked, reach = _action(output, action, resource, audience, parameters), reach_from(output, options)
    token = ask(
        output,
        reach,
        lambda broker: broker.request_action(asked, request_id=request_id, ticket=ticket, session=session),
        request_id=request_id,
    )
    headers = _headers(output, token, http, grpc)
    output.value({**_shown(token), "headers": headers})
    if output.as_json:
        return
    if headers:
        for name, value in headers.items():
            click.echo(f"{name}: {value}")
        return
    output.say(f"[green]allowed[/] {escape(action)} on {escape(resource)} at {escape(audience)}")
    output.say(f"{token.token_type} token, use {token.use}, until {token.expires_at:%H:%M:%S} UTC")
    output.say("with --http METHOD URL, its two headers for that one request are printed instead")


def _headers(
    output: Output, token: ActionToken, http: tuple[str, str] | None, grpc: tuple[str, str] | None
) -> dict[str, str]:
    try:
        if http:
            return dict(token.http_headers(*http))
        if grpc:
            return {name: str(value) for name, value in token.grpc_metadata(grpc[0], authority=grpc[1])}
    except (BrokerError, ValueError) as error:
        output.fail(str(error), USAGE)
    return {}


def _shown(token: ActionToken) -> dict[str, Any]:
    return {
        "allowed": True,
        "token_type": token.token_type,
        "use": token.use,
        "expires_at": token.expires_at.isoformat(),
        "access_token": token.access_token,
        "action_digest": token.action.digest.hex(),
        "correlation_id": token.correlation_id,
    }


@click.command()
@action_arguments
@click.option("--token-file", type=click.File(), default="-", help="Where the token is; default: standard input.")
@reach_options
@pass_output
def check(output: Output, /, action: str, resource: str, audience: str, parameters: str, **options: Any) -> None:
    """Ask whether a token would be minted again now. For the token's own audience.

    The token is read from standard input, never from the command line, which other processes can read.
    """
    token = options.pop("token_file").read().strip()
    asked, reach = _action(output, action, resource, audience, parameters), reach_from(output, options)
    ask(output, reach, lambda broker: broker.check(token, asked))
    output.value({"allowed": True})
    output.say("[green]allowed[/]: it would be minted again now")


@click.command()
@click.argument("principal")
@action_arguments
@click.option("--facts", default="{}", help='Facts to assume: {"spire": {"ids": […]}}.')
@click.option("--pid", type=int, help="A process on the broker's node to look at now.")
@reach_options
@pass_output
def explain(
    output: Output,
    /,
    principal: str,
    action: str,
    resource: str,
    audience: str,
    parameters: str,
    facts: str,
    pid: int | None,
    **options: Any,
) -> None:
    """For operators: how would the broker decide for PRINCIPAL, and which condition fails? Nothing is minted."""
    asked, reach = _action(output, action, resource, audience, parameters), reach_from(output, options)
    try:
        assumed = parse_parameters(facts)
    except BrokerError as error:
        output.fail(f"--facts: {error.detail}", USAGE)
    found = ask(output, reach, lambda broker: broker.explain(principal, asked, facts=assumed, pid=pid))
    output.value(json.loads(json.dumps(dataclasses.asdict(found))))
    _say_explanation(output, found)
    if not found.allowed:
        raise SystemExit(REFUSED)


def _say_explanation(output: Output, found: Explanation) -> None:
    verdict = "[green]allowed[/]" if found.allowed else f"[red]refused[/]: {found.reason}"
    output.say(f"{verdict} by policy {found.policy_revision}")
    rows = [
        (one.effect, one.id, "holds" if one.satisfied else "does not hold", "; ".join(one.failed))
        for one in found.policies
    ]
    if rows:
        output.table(("", "policy", "", "what fails"), [tuple(map(escape, row)) for row in rows])
    if found.missing:
        output.say(f"no facts from: {', '.join(found.missing)}")
    for error in found.errors:
        output.say(f"[red]error[/]: {escape(error)}")
