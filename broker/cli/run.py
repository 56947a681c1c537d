"""Running a service in the foreground until it is told to stop."""

import asyncio
import sys
from collections.abc import Coroutine
from typing import Any

import click
import uvloop

from broker.cli.log import configure_log
from broker.cli.output import UNAVAILABLE, USAGE, Output
from broker.cli.serve import BrokerIdentityError
from broker.cli.serve_signing import SetupError
from broker.decision.findings import PolicyError
from broker.errors import BrokerError, Unavailable


def run_service(output: Output, service: Coroutine[Any, Any, None]) -> None:
    """Runs it to its end; what keeps it from starting ends the command with a sentence instead of a traceback."""
    level = click.get_current_context().find_root().params.get("log_level")
    configure_log(level or "info", as_json=not sys.stderr.isatty())
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(service)
    except PolicyError as error:
        output.fail(f"the policy folder is not taken:\n{error}", USAGE)
    except SetupError as error:
        output.fail(f"the configuration is not taken:\n{error}", USAGE)
    except BrokerIdentityError as error:
        output.fail(str(error), USAGE)
    except BrokerError as error:
        output.fail(str(error), UNAVAILABLE if isinstance(error, Unavailable) else USAGE)
    except OSError as error:
        output.fail(f"cannot start: {error}", UNAVAILABLE)
