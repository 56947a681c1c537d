"""What the signing commands share: how they ask for an action, and how they read what it needs."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import click

from broker.action import Action, parse_parameters
from broker.artifacts import AGENT_KEY, KEYLESS, NAMED_KEY
from broker.cli.ask import request_id_option
from broker.cli.files import INPUT, read_bounded
from broker.cli.output import USAGE, Output
from broker.client.signing import digests_of, signing_action
from broker.errors import BrokerError

MAX_EVIDENCE: Final = 512 * 1024  # bytes; the broker takes no more, so no more is read
MOST_EVIDENCE: Final = 8
DAY_S: Final = 86400  # longer the broker lets nothing wait, and no approval count
_DURATION: Final = re.compile(r"([1-9][0-9]{0,5})([smh])")
_SECONDS: Final = {"s": 1, "m": 60, "h": 3600}


class Duration(click.ParamType[int]):
    """`90s`, `10m` or `2h`: seconds, at most a day of them."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Raises: click.BadParameter."""
        found = _DURATION.fullmatch(str(value))
        if not found:
            self.fail("write seconds, minutes or hours, such as 90s, 10m or 1h", param, ctx)
        seconds = int(found[1]) * _SECONDS[found[2]]
        if seconds > DAY_S:
            self.fail("at most 24h", param, ctx)
        return seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Asking:
    """What `asking_options` took. digests: by which the files are named, beside sha256. parameters: JSON."""

    action: str
    resource: str
    purpose: str
    parameters: str
    digests: tuple[str, ...]
    provenance: tuple[Path, ...]
    request_id: str

    @classmethod
    def taken(cls, options: dict[str, Any]) -> Self:
        """Out of `options`."""
        return cls(**{name: options.pop(name) for name in cls.__dataclass_fields__})

    def evidence(self, output: Output) -> tuple[bytes, ...]:
        """The provenance. Ends the command where it cannot be sent."""
        return read_evidence(output, self.provenance)

    def about(self, output: Output, files: Sequence[Path], *, issuer: str, signer: str) -> Action:
        """The action that asks for a signature over these files. Ends the command where it cannot be."""
        if not issuer:
            output.fail("--issuer is needed, or --config: it is the audience of a signing action", USAGE)
        try:
            return signing_action(
                self.action,
                self.resource,
                issuer=issuer,
                artifacts=[digests_of(file, ("sha256", *self.digests)) for file in files],
                purpose=self.purpose,
                signer=signer,
                parameters=parse_parameters(self.parameters),
            )
        except BrokerError as error:
            output.fail(error.detail, USAGE)
        except OSError as error:
            output.fail(f"{error.filename}: {error.strerror}", USAGE)


provenance_option = click.option(
    "--provenance",
    multiple=True,
    type=INPUT,
    help="A DSSE envelope or Sigstore bundle; may be given 8 times, each is looked at for itself.",
)


def asking_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say what is asked for."""
    for option in reversed(
        [
            click.option("--action", default="release.sign", show_default=True, help="The action that policy knows."),
            click.option("--resource", required=True, help="What is signed for: a URI, such as the product's."),
            click.option("--purpose", default="release", show_default=True, help="A word that policy knows."),
            click.option("--parameters", default="{}", help="A JSON object of the operator's own parameters."),
            click.option(
                "--digest",
                "digests",
                multiple=True,
                type=click.Choice(["sha384", "sha512"]),
                help="Name the files by this one, too: provenance has to give it, and a P-384 key signs the sha384.",
            ),
            provenance_option,
            request_id_option,
        ]
    ):
        command = option(command)
    return command


def signer_of(key: str | None, *, agent_key: bool = False) -> str:
    """How a request names the signer. Raises: click.UsageError."""
    if agent_key and key is not None:
        raise click.UsageError("--key is a key of the broker's, --agent-key one of yours: choose one")
    if agent_key:
        return AGENT_KEY
    return KEYLESS if key is None else f"{NAMED_KEY}{key}"


def read_evidence(output: Output, files: Sequence[Path]) -> tuple[bytes, ...]:
    """Their bytes. Ends the command for too many, and for one that is too large."""
    if len(files) > MOST_EVIDENCE:
        output.fail(f"--provenance may be given {MOST_EVIDENCE} times, not {len(files)}", USAGE)
    return tuple(read_bounded(output, file, MAX_EVIDENCE) for file in files)
