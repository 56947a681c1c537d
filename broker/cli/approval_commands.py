"""`pending`, `show`, `approve`, `withdraw`: what somebody who may say yes to others' requests does.

That is a workload, with its SVID over gRPC, or a person, with a login over HTTPS.
"""

import asyncio
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeVar

import click
from rich.markup import escape

from broker.cli.ask import Reach, ask, reach_from, reach_options
from broker.cli.output import USAGE, Output, pass_output, printable
from broker.cli.person_options import Person, person_from, person_options
from broker.cli.signing_options import Duration
from broker.client.approvals import Approval, PendingRequest
from broker.errors import BrokerError

_T = TypeVar("_T")
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")


class Desk(ABC):
    """One request for approval, as its approver sees it. Each call ends the command where the answer is no."""

    @abstractmethod
    def show(self) -> PendingRequest:
        """It, as it stands."""

    @abstractmethod
    def approve(self, request: PendingRequest, reason: str, valid_for_s: int) -> Approval:
        """Says yes to what was shown."""

    @abstractmethod
    def withdraw(self, reason: str) -> None:
        """Takes that back."""


class WorkloadDesk(Desk):
    """With an SVID, or as the process that we are."""

    def __init__(self, output: Output, reach: Reach, digest: str) -> None:
        self._output, self._reach, self._digest = output, reach, digest

    def show(self) -> PendingRequest:
        """See Desk."""
        return ask(self._output, self._reach, lambda broker: broker.approvals.show(self._digest))

    def approve(self, request: PendingRequest, reason: str, valid_for_s: int) -> Approval:
        """See Desk."""
        return ask(
            self._output,
            self._reach,
            lambda broker: broker.approvals.approve(request, reason=reason, valid_for_s=valid_for_s),
        )

    def withdraw(self, reason: str) -> None:
        """See Desk."""
        ask(self._output, self._reach, lambda broker: broker.approvals.withdraw(self._digest, reason=reason))


class PersonDesk(Desk):
    """With a login, which is asked for once."""

    def __init__(self, output: Output, person: Person, digest: str) -> None:
        self._output, self._client, self._digest = output, person.client, digest
        self._token = person.token(digest)

    def show(self) -> PendingRequest:
        """See Desk."""
        return self._answer(self._client.show(self._digest, self._token))

    def approve(self, request: PendingRequest, reason: str, valid_for_s: int) -> Approval:
        """See Desk."""
        return self._answer(self._client.approve(request, self._token, reason=reason, valid_for_s=valid_for_s))

    def withdraw(self, reason: str) -> None:
        """See Desk."""
        self._answer(self._client.withdraw(self._digest, self._token, reason=reason))

    def _answer(self, call: Coroutine[Any, Any, _T]) -> _T:
        try:
            return asyncio.run(call)
        except BrokerError as error:
            self._output.refuse(error)


def _digest(_: click.Context, __: click.Parameter, value: str) -> str:
    if not _DIGEST.fullmatch(value):
        raise click.BadParameter("a request digest is 64 lower-case hexadecimal digits, as `pending` shows them")
    return value


def _desk_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """DIGEST, and who comes to see it."""
    command = person_options(reach_options(command))
    return click.argument("digest", metavar="DIGEST", callback=_digest)(command)


def _desk(output: Output, options: dict[str, Any]) -> Desk:
    """Takes the options of `_desk_options` out of `options`."""
    digest, person = options.pop("digest"), person_from(output, options)
    if person is not None:
        return PersonDesk(output, person, digest)
    return WorkloadDesk(output, reach_from(output, options), digest)


_reason_option = click.option("--reason", default="", help="Why, for the ledger.")


@click.command()
@reach_options
@pass_output
def pending(output: Output, /, **options: Any) -> None:
    """The requests that wait and that you may approve."""
    found = ask(output, reach_from(output, options), lambda broker: broker.approvals.pending())
    output.value([shown(one) for one in found])
    if not found:
        output.say("nothing waits that you may approve")
    for one in found:
        say_request(output, one)


@click.command()
@_desk_options
@pass_output
def show(output: Output, /, **options: Any) -> None:
    """Look at one request that waits for approval, by its DIGEST."""
    request = _desk(output, options).show()
    output.value(shown(request))
    say_request(output, request)


@click.command()
@click.option("--valid-for", type=Duration(), default="10m", show_default=True, help="How long it counts.")
@click.option("--yes", is_flag=True, help="Do not ask back; scripts need it.")
@_reason_option
@_desk_options
@pass_output
def approve(output: Output, /, valid_for: int, reason: str, *, yes: bool, **options: Any) -> None:
    """Look at a request, and say yes to it.

    What is shown is what is approved: its digest is computed here again, from the fields that are shown.
    """
    desk = _desk(output, options)
    request = desk.show()
    say_request(output, request)
    if not yes and not _confirmed(output):
        output.fail("not approved: say --yes where nobody can be asked", USAGE)
    given = desk.approve(request, reason, valid_for)
    output.value({"approved": request.request_digest, "by": given.by, "expires_at": given.expires_at.isoformat()})
    output.say(f"[green]approved[/] as {escape(printable(given.by))}, until {given.expires_at:%Y-%m-%d %H:%M:%S} UTC")


@click.command()
@_reason_option
@_desk_options
@pass_output
def withdraw(output: Output, /, reason: str, **options: Any) -> None:
    """Take your yes back: what hangs on it ends."""
    digest = options["digest"]
    _desk(output, options).withdraw(reason)
    output.value({"withdrawn": digest})
    output.say("[green]withdrawn[/]")


def _confirmed(output: Output) -> bool:
    try:
        return not output.as_json and click.confirm("Approve it?", default=False)
    except click.Abort:  # nobody is there
        return False


def shown(request: PendingRequest) -> dict[str, Any]:
    """A request for scripts."""
    return {
        "request_digest": request.request_digest,
        "state": "used" if request.is_used else "waiting",
        "action": request.action.name,
        "resource": request.action.resource,
        "audience": request.action.audience,
        "parameters": dict(request.action.parameters),
        "principal": request.principal,
        "request_id": request.request_id,
        "text": request.text,
        "asked_at": request.asked_at.isoformat(),
        "expires_at": request.expires_at.isoformat(),
        "approvals": [
            {"by": one.by, "reason": one.reason, "expires_at": one.expires_at.isoformat()} for one in request.approvals
        ],
    }


def say_request(output: Output, request: PendingRequest) -> None:
    """A request for people. The fields are those that the digest was computed of; the text is the broker's."""

    def say(text: str) -> None:
        output.say(escape(printable(text)))

    action = request.action
    say(request.request_digest)
    say(f"  {request.principal} asks for {action.name} on {action.resource} at {action.audience}")
    say(f"  with {json.dumps(dict(action.parameters), sort_keys=True)}")
    for line in request.text.splitlines():
        say(f"  │ {line}")
    for one in request.approvals:
        say(f"  approved by {one.by} until {one.expires_at:%H:%M:%S} UTC {one.reason}".rstrip())
    if request.is_used:
        say("  used: it gave a credential, and gives no other")
