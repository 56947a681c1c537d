"""`revoke`, `standing`: what operators refuse beside policy, and how they end that."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import click
from rich.markup import escape

from broker.cli.ask import Reach, ask, reach_from, reach_options
from broker.cli.output import USAGE, Output, pass_output, printable
from broker.cli.signing_options import Duration
from broker.client.scope import Hit, Revoked, StandingEntry
from broker.errors import Invalid
from broker.operator_orders import Order, Selection

SHOWN: Final = 20  # rows of the table that somebody is asked about; scripts get all that the broker lists


class Until(click.ParamType[datetime]):
    """An ISO 8601 time with its zone, or from now on `30m`, `2h`: an aware time in UTC, to the second."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        """Raises: click.BadParameter."""
        now = datetime.now(UTC).replace(microsecond=0)
        try:
            found = datetime.fromisoformat(str(value))
        except ValueError:
            try:
                return now + timedelta(seconds=Duration().convert(value, param, ctx))
            except click.BadParameter:
                self.fail("write a time such as 2026-11-22T23:30:00Z, or 30m or 2h from now on", param, ctx)
        if found.tzinfo is None:
            self.fail("say which time zone it is in: 2026-11-22T23:30:00Z is in UTC", param, ctx)
        if found <= now:
            self.fail("that is over already", param, ctx)
        return found.astimezone(UTC)


reason_option = click.option("--reason", default="", help="Why, for the ledger.")


@click.command()
@click.option("--jti", default="", help="One credential, by its id.")
@click.option("--workload", default="", metavar="SPIFFE_ID", help="All of a workload, or below a path that ends in /.")
@click.option("--action", default="", help="All that are for this action.")
@click.option("--trust-domain", default="", help="All whose caller is of this trust domain.")
@click.option("--standing", is_flag=True, help="Refuse new ones as well, until it is lifted.")
@click.option("--until", type=Until(), help="Refuse new ones as well until then: a time, or 30m, 2h from now on.")
@click.option("--lift", metavar="ID", help="End a standing denial or a break-glass permit, as `standing` lists them.")
@click.option("--dry-run", is_flag=True, help="Only show what it would hit.")
@click.option("--yes", is_flag=True, help="Do not ask back; scripts need it.")
@reason_option
@reach_options
@pass_output
def revoke(
    output: Output,
    /,
    jti: str,
    workload: str,
    action: str,
    trust_domain: str,
    until: datetime | None,
    lift: str | None,
    reason: str,
    *,
    standing: bool,
    dry_run: bool,
    yes: bool,
    **options: Any,
) -> None:
    """Refuse live credentials at every guard, at once and for good; shows first which.

    What is given has to fit all of --jti, --workload, --action and --trust-domain that are said. Without --standing or
    --until a workload may have the next credential in a millisecond, if policy still permits it.
    """
    chosen = {"jti": jti, "principal": workload, "action": action, "trust_domain": trust_domain}
    if lift is not None:
        if any(chosen.values()) or standing or until or dry_run:
            output.fail("--lift ends what stands; it goes with --reason alone", USAGE)
        _lift(output, lift, reason, reach_from(output, options))
        return
    wanted = Wanted(chosen=chosen, standing=standing or until is not None, until=until, reason=reason)
    wanted.require(output)
    _revoke(output, wanted, reach_from(output, options), dry_run=dry_run, yes=yes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What was asked for, as the client takes it."""

    chosen: Mapping[str, str]
    standing: bool
    until: datetime | None
    reason: str

    def require(self, output: Output) -> None:
        """Ends the command where it cannot be asked for."""
        try:
            Order(selection=Selection(**self.chosen), standing=self.standing, until=self.until, reason=self.reason)
        except Invalid as error:
            output.fail(error.detail, USAGE)

    def ask(self, output: Output, reach: Reach, *, dry_run: bool) -> Revoked:
        """The broker's answer; a refusal ends the command."""
        return ask(
            output,
            reach,
            lambda broker: broker.scope.revoke(
                **self.chosen, standing=self.standing, until=self.until, reason=self.reason, dry_run=dry_run
            ),
        )

    @property
    def after(self) -> str:
        """What becomes of new ones."""
        if not self.standing:
            return "new ones may be given at once, if policy permits them" if not self.chosen["jti"] else ""
        return f"new ones are refused {f'until {_time(self.until)}' if self.until else 'until that is lifted'}"


def _revoke(output: Output, wanted: Wanted, reach: Reach, *, dry_run: bool, yes: bool) -> None:
    if dry_run or not yes:
        found = wanted.ask(output, reach, dry_run=True)
        _say_hits(output, found)
        if wanted.after:
            output.say(wanted.after)
        if dry_run:
            output.value(_told(found))
            return
        if not found.hits and not wanted.standing:
            output.value(_told(found))
            output.say("nothing to revoke")
            return
        if not _confirmed(output):
            output.fail("not revoked: say --yes where nobody can be asked", USAGE)
    found = wanted.ask(output, reach, dry_run=False)
    output.value(_told(found))
    output.say(f"[green]revoked[/]: {_count(found.hits)}")
    if found.standing_id:
        output.say(f"{wanted.after}\nto end that: action-broker revoke --lift {found.standing_id}")


def _confirmed(output: Output) -> bool:
    try:
        return not output.as_json and click.confirm("Revoke?", default=False)
    except click.Abort:  # nobody is there
        return False


def _say_hits(output: Output, found: Revoked) -> None:
    rows: list[tuple[str, ...]] = [
        (one.jti, escape(printable(f"{one.principal} {one.action} {one.resource} at {one.audience}")), _clock(one))
        for one in found.credentials[:SHOWN]
    ]
    if rows:
        output.table(("credential", "for", "until"), rows)
    if found.hits > len(rows):
        output.say(f"and {found.hits - len(rows)} more")
    output.say(f"hits {_count(found.hits)}")


def _clock(hit: Hit) -> str:
    return f"{hit.expires_at:%H:%M:%S}"


def _count(hits: int) -> str:
    return "1 live credential" if hits == 1 else f"{hits} live credentials"


def _told(found: Revoked) -> dict[str, Any]:
    return {
        "hits": found.hits,
        "credentials": [{**asdict(one), "expires_at": one.expires_at.isoformat()} for one in found.credentials],
        "standing_id": found.standing_id,
        "correlation_id": found.correlation_id,
    }


def _lift(output: Output, entry_id: str, reason: str, reach: Reach) -> None:
    ask(output, reach, lambda broker: broker.scope.lift(entry_id, reason=reason))
    output.value({"lifted": entry_id})
    output.say(f"[green]lifted[/] {escape(printable(entry_id))}")


@click.command()
@reach_options
@pass_output
def standing(output: Output, /, **options: Any) -> None:
    """The standing denials and break-glass permits in force."""
    found = ask(output, reach_from(output, options), lambda broker: broker.scope.standing())
    output.value([_shown(one) for one in found])
    if not found:
        output.say("nothing stands")
        return
    rows: list[tuple[str, ...]] = [
        (one.id, "denied" if one.kind == "denial" else "[red]permitted[/]", escape(printable(_what(one))))
        for one in found
    ]
    output.table(("id", "", "what"), rows)


def _what(entry: StandingEntry) -> str:
    parts = [part for part in (entry.principal, entry.action, entry.resource, entry.trust_domain) if part]
    ends = f"until {_time(entry.until)}" if entry.until else "until it is lifted"
    return f"{' '.join(parts)} {ends}, by {entry.by}: {entry.reason or 'no reason given'}"


def _shown(entry: StandingEntry) -> dict[str, Any]:
    return {
        **asdict(entry),
        "since": entry.since.isoformat(),
        "until": entry.until.isoformat() if entry.until else None,
    }


def _time(moment: datetime | None) -> str:
    return "" if moment is None else f"{moment:%Y-%m-%d %H:%M:%S} UTC"
