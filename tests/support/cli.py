"""The command as users have it: a process of its own, with an environment of its own."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

COMMAND = (sys.executable, "-m", "broker.cli")
LIMIT_S = 60.0


@dataclass(frozen=True)
class Ran:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def value(self) -> Any:
        """The one JSON value on stdout."""
        return json.loads(self.out)

    @property
    def lines(self) -> list[Any]:
        """JSON lines on stdout."""
        return [json.loads(line) for line in self.out.splitlines()]


def clean_environment(**environment: str) -> dict[str, str]:
    """Ours without what would configure a broker."""
    ours = {k: v for k, v in os.environ.items() if not k.startswith(("ACTION_BROKER_", "SPIFFE_"))}
    return {**ours, **environment}


def cli(*arguments: object, told: str = "", **environment: str) -> Ran:
    """Runs `action-broker ARGUMENTS`. told: its standard input."""
    return run(*COMMAND, *arguments, told=told, **environment)


def run(*command: object, told: str = "", **environment: str) -> Ran:
    """Runs a command to its end."""
    ended = subprocess.run(
        [str(one) for one in command],
        input=told,
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT_S,
        env=clean_environment(**environment),
    )
    return Ran(ended.returncode, ended.stdout, ended.stderr)
