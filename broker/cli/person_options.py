"""How a person, who has no SVID, comes to a request for approval: with an ID token, over HTTPS."""

import asyncio
import webbrowser
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click

from broker.cli.files import INPUT, read_bounded
from broker.cli.output import USAGE, Output
from broker.client.login import SCOPES, LoginSettings, login
from broker.client.person import PersonClient, trust_of_file
from broker.errors import BrokerError, Invalid
from broker.identity.spiffe_id import SpiffeId

MAX_TOKEN: Final = 16 * 1024  # bytes; the broker takes no longer one


@dataclass(frozen=True, slots=True, kw_only=True)
class Person:
    """Somebody at a keyboard. token: gives the ID token about a request, by its digest."""

    client: PersonClient
    token: Callable[[str], str]


def person_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of those who log in."""
    for option in reversed(
        [
            click.option("--login", help="As a person: the OIDC issuer where you log in, https://…"),
            click.option("--client-id", help="With --login: our client id there, the broker's `audience`."),
            click.option("--scope", multiple=True, help="With --login: asked for beside openid and email."),
            click.option("--login-ca", type=INPUT, help="With --login: PEM, who vouches for the issuer's server."),
            click.option("--no-browser", is_flag=True, help="With --login: print the URL, and open nothing."),
            click.option("--id-token-file", type=INPUT, help="As a person: an ID token whose nonce is the digest."),
            click.option("--url", help="As a person: where the broker serves HTTPS; default: its issuer."),
            click.option(
                "--trust-bundle",
                type=INPUT,
                help="As a person: PEM of the broker's trust domain (`spire-server bundle show`).",
            ),
        ]
    ):
        command = option(command)
    return command


def person_from(output: Output, options: dict[str, Any]) -> Person | None:
    """Takes the options of `person_options` out of `options`; None where there is nobody who logs in.

    Looks at `issuer` and `broker_id` of the others, and ends the command where something is lacking.
    """
    names = ("login", "client_id", "scope", "login_ca", "no_browser", "id_token_file", "url", "trust_bundle")
    given = {name: options.pop(name) for name in names}
    if given["login"] is None and given["id_token_file"] is None:
        if any(given.values()):
            output.fail("who is it? A person says --login ISSUER or --id-token-file FILE", USAGE)
        return None
    if given["login"] is not None and given["id_token_file"] is not None:
        output.fail("--login makes an ID token, --id-token-file has one: choose one", USAGE)
    try:
        token = _token(output, given)
        return Person(client=_client(output, given, options), token=token)
    except Invalid as error:
        output.fail(error.detail, USAGE)


def _client(output: Output, given: dict[str, Any], options: dict[str, Any]) -> PersonClient:
    """Raises: Invalid."""
    url, broker_id, bundle = given["url"] or options["issuer"], options["broker_id"], given["trust_bundle"]
    for name, found in (("--url", url), ("--broker-id", broker_id), ("--trust-bundle", bundle)):
        if not found:
            output.fail(
                f"a person needs {name}: the broker is known by its SPIFFE ID, before it is shown a token", USAGE
            )
    expected = SpiffeId.parse(broker_id)
    try:
        trust = trust_of_file(bundle, expected)
    except OSError as error:
        output.fail(f"{bundle}: {error.strerror}", USAGE)
    return PersonClient(url, broker_id=expected, snapshot=lambda: trust)


def _token(output: Output, given: dict[str, Any]) -> Callable[[str], str]:
    """Raises: Invalid."""
    file: Path | None = given["id_token_file"]
    if file is not None:
        token = read_bounded(output, file, MAX_TOKEN).decode(errors="replace").strip()
        return lambda _: token
    if given["client_id"] is None:
        output.fail("--login needs --client-id: the `audience` of the issuer in the broker's configuration", USAGE)
    settings = LoginSettings(
        issuer=given["login"],
        client_id=given["client_id"],
        ca_file=None if given["login_ca"] is None else str(given["login_ca"]),
        scopes=(*SCOPES, *(one for one in given["scope"] if one not in SCOPES)),
    )

    def log_in(digest: str) -> str:
        def tell(url: str) -> None:
            output.notice(f"log in at\n{url}")

        browser = None if given["no_browser"] else webbrowser.open
        try:
            with output.working("waiting for the login in the browser"):
                return asyncio.run(login(settings, digest, tell=tell, browser=browser))
        except BrokerError as error:
            output.refuse(error)
        except OSError as error:
            output.fail(f"--login-ca cannot be used: {error}", USAGE)

    return log_in
