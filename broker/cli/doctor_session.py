"""`doctor` on transmitters of security events: their keys, the secrets that they show us, and whether they reach us."""

import asyncio
from collections.abc import AsyncIterator
from typing import Final

from broker.cli.config import Config
from broker.cli.config_session import Transmitter as TransmitterTable
from broker.cli.doctor_finding import Finding, broken, ok, warning
from broker.cli.serve_sessions import open_transmitter
from broker.edges.http_events import PATH
from broker.errors import BrokerError
from broker.identity.event_keys import fetch_at, fetch_discovered
from broker.identity.oidc_issuer import FETCH_TIMEOUT_S, parse_keys

_STAYS: Final = "The broker does not start before this is mended."


async def transmitters(config: Config) -> AsyncIterator[Finding]:
    """Each transmitter. Asks for its keys where they are fetched."""
    for issuer, table in config.session.transmitters.items():
        what = f"transmitter {issuer}"
        try:
            open_transmitter(issuer, table, config.issuer)
        except BrokerError as error:
            yield broken(what, error.detail, _STAYS)
        except (ValueError, OSError) as error:
            yield broken(what, str(error), _STAYS)
        else:
            yield await _keys(issuer, table, what)
            if config.http.listen is None:
                yield broken(what, "http.listen is empty: nobody can push events", "Set http.listen.")
            elif table.bearer_file is None:
                yield warning(
                    what,
                    f"POST {config.issuer}{PATH} asks for no secret: its signature alone tells it from strangers",
                    "Have it send an authorization header, and set bearer_file.",
                )
            else:
                yield ok(what, f"POST {config.issuer}{PATH}, with one of its secrets")


async def _keys(issuer: str, table: TransmitterTable, what: str) -> Finding:
    if table.jwks_file is not None:
        return ok(what, f"its keys are in {table.jwks_file}")
    ca_file = None if table.ca_file is None else str(table.ca_file)
    fetch = fetch_discovered(issuer, ca_file) if table.jwks_url is None else fetch_at(table.jwks_url, ca_file)
    fix = "Is it reachable from here? A private CA goes into ca_file; where it describes nothing, set jwks_url."
    try:
        async with asyncio.timeout(FETCH_TIMEOUT_S):
            found = parse_keys(await fetch())
    except TimeoutError:
        return broken(what, f"no answer within {FETCH_TIMEOUT_S:g} s", fix)
    except BrokerError as error:
        return broken(what, error.detail, fix)
    count = sum(map(len, found.values()))
    if not count:
        return broken(what, "it has no key that signs here", "Look at its key set.")
    return ok(what, f"answers; {count} keys")
