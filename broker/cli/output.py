"""How commands speak: people get rich text, scripts get one JSON value on stdout; what went wrong goes to stderr.

Exit codes: 0 allowed or done · 2 usage or configuration · 3 refused · 4 unavailable · 130 interrupted.
"""

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, NoReturn

import click

from broker.errors import ApprovalRequired, BrokerError, Unavailable

if TYPE_CHECKING:
    from rich.console import Console

OK: Final = 0
USAGE: Final = 2
REFUSED: Final = 3
UNAVAILABLE: Final = 4
INTERRUPTED: Final = 130  # as a shell tells it of a command that ended on SIGINT


class Output:
    """One command's output. as_json: whether stdout is for a script."""

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json

    @cached_property
    def console(self) -> "Console":
        """Where people read."""
        from rich.console import Console  # noqa: PLC0415 - scripts and `--help` need no rich text

        return Console(highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """For people only. Markup is rich's; escape what comes from outside."""
        if not self.as_json:
            self.console.print(text)

    def notice(self, text: str) -> None:
        """What somebody has to do while the command goes on: where a script has stdout, on stderr. No markup."""
        click.echo(text, err=self.as_json)

    @contextlib.contextmanager
    def working(self, text: str) -> Iterator[None]:
        """Shows in a terminal that the command waits for something. Markup as in `say`."""
        if self.as_json or not self.console.is_terminal:
            yield
            return
        with self.console.status(text):
            yield

    def value(self, found: Mapping[str, Any] | list[Any]) -> None:
        """For scripts only."""
        if self.as_json:
            sys.stdout.write(json.dumps(found, default=str) + "\n")
            sys.stdout.flush()  # a service says where it is and goes on

    def table(self, columns: tuple[str, ...], rows: list[tuple[str, ...]], title: str | None = None) -> None:
        """For people only."""
        if self.as_json:
            return
        from rich.table import Table  # noqa: PLC0415

        table = Table(title=title, title_justify="left", box=None, pad_edge=False)
        for name in columns:
            table.add_column(name, overflow="fold")  # what is cut off would be what was looked for
        for row in rows:
            table.add_row(*row)
        self.console.print(table)

    def fail(self, text: str, code: int, /, **fields: Any) -> NoReturn:
        """Ends the command: one line for people, `{"error": …}` for scripts."""
        if self.as_json:
            self.value({"error": text, **fields})
        else:
            click.secho(text, fg="red", err=True)
        raise SystemExit(code)

    def refuse(self, error: BrokerError, /, **fields: Any) -> NoReturn:
        """Ends the command with what the broker answered. fields: what a script is told beside it."""
        correlation = getattr(error, "correlation_id", None)
        code, what = (UNAVAILABLE, "unavailable") if isinstance(error, Unavailable) else (REFUSED, "refused")
        detail = error.detail.replace(f" (correlation id {correlation})", "")
        text = f"{what}: {error.reason}" + (f": {detail}" if detail else "")
        if correlation and not self.as_json:
            text += f"\nthe record: action-broker ledger show --correlation {correlation}"
        if isinstance(error, ApprovalRequired):
            fields = {"request_digest": error.request_digest, "text": error.text, **fields}
            text = f"{text}\n\n{printable_lines(error.text)}"
        self.fail(text, code, reason=str(error.reason), correlation_id=correlation, **fields)


def printable(text: str) -> str:
    """`text` with each control, direction or other invisible character escaped: what callers sent moves no cursor."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def printable_lines(text: str) -> str:
    """The same for a text of several lines."""
    return "\n".join(map(printable, text.splitlines()))


pass_output = click.make_pass_decorator(Output)
