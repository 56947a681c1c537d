"""`break-glass`: permits one thing to one workload for a while, beside policy, once two others approved it."""

import asyncio
import contextlib
from datetime import datetime
from typing import Any

import click
from rich.markup import escape

from broker.cli.ask import reach_from, reach_options, request_id_option
from broker.cli.output import INTERRUPTED, USAGE, Output, pass_output, printable_lines
from broker.cli.revoke_command import Until
from broker.cli.signing_options import Duration
from broker.client import Client
from broker.errors import ApprovalRequired, BrokerError, Invalid
from broker.operator_orders import Emergency


class Asking:
    """One request for a permit, until it is approved or the wait is over."""

    def __init__(self, output: Output, wanted: Emergency, request_id: str, wait_s: int) -> None:
        self._output, self._wanted, self._request_id, self._wait_s = output, wanted, request_id, wait_s

    async def run(self, client: contextlib.AbstractAsyncContextManager[Client]) -> str:
        """The permit's id. Raises: BrokerError; ApprovalRequired where approvals lack."""
        async with client as broker:
            try:
                return await self._ask(broker)
            except ApprovalRequired as lacking:
                found = await self._wait(broker, lacking) if self._wait_s else None
                if found is None:
                    raise
                return found

    async def _ask(self, broker: Client) -> str:
        wanted = self._wanted
        return await broker.scope.break_glass(
            wanted.principal,
            wanted.action,
            wanted.resource,
            until=wanted.until,
            reason=wanted.reason,
            request_id=self._request_id,
        )

    async def _wait(self, broker: Client, lacking: ApprovalRequired) -> str | None:
        """Asks again whenever somebody approved; None when that was not in time."""
        output = self._output
        output.say("waits for the approval of two others")
        output.say(f"[dim]{escape(printable_lines(lacking.text))}[/]")
        output.notice(f"  action-broker approve {lacking.request_digest}")
        seen: frozenset[str] = frozenset()
        waiting = broker.approvals.wait(lacking.request_digest, self._wait_s)
        with output.working("waits for approval, Ctrl-C to go on later"):
            async with contextlib.aclosing(waiting) as states:
                async for state in states:
                    found = frozenset(one.by for one in state.approvals)
                    somebody_new, seen = found - seen, found
                    if somebody_new:
                        output.say(f"  approved by {escape(', '.join(sorted(somebody_new)))}")
                        with contextlib.suppress(ApprovalRequired):
                            return await self._ask(broker)
        return None

    def again(self) -> dict[str, str]:
        """How to go on: what is approved names the very second."""
        return {"request_id": self._request_id, "until": self._wanted.until.isoformat()}


@click.command("break-glass")
@click.argument("workload", metavar="SPIFFE_ID")
@click.argument("action")
@click.argument("resource")
@click.option("--until", type=Until(), required=True, help="A time within 24 hours, or 30m, 2h from now on.")
@click.option("--reason", required=True, help="Why: approvers read it, and the ledger keeps it.")
@click.option("--approval-wait", type=Duration(), default=None, help="How long to wait for approvals, such as 10m.")
@request_id_option
@reach_options
@pass_output
def break_glass(
    output: Output,
    /,
    workload: str,
    action: str,
    resource: str,
    until: datetime,
    reason: str,
    approval_wait: int | None,
    request_id: str,
    **options: Any,
) -> None:
    """In an emergency: permit SPIFFE_ID to do ACTION on RESOURCE for a while, although no policy permits it.

    Two others have to approve it. It outweighs no forbid and no standing denial, and skips no evidence. `standing`
    lists it, `revoke --lift` ends it.
    """
    try:
        wanted = Emergency(
            principal=workload, action=action, resource=resource, until=until.replace(microsecond=0), reason=reason
        )
        client = reach_from(output, options).client()
    except Invalid as error:
        output.fail(error.detail, USAGE)
    asking = Asking(output, wanted, request_id, approval_wait or 0)
    again = asking.again()
    try:
        permit = asyncio.run(asking.run(client))
    except ApprovalRequired as error:
        output.notice(_how(error.request_digest, again))
        output.refuse(error, **again)
    except BrokerError as error:
        output.refuse(error, **again)
    except KeyboardInterrupt:
        output.fail("interrupted: nothing was permitted", INTERRUPTED, **again)
    output.value({"permit": permit, **again})
    output.say(f"[red]permitted[/] {escape(workload)} {escape(action)} on {escape(resource)}")
    output.say(f"until {wanted.until:%Y-%m-%d %H:%M:%S} UTC; to end it: action-broker revoke --lift {permit}")


def _how(digest: str, again: dict[str, str]) -> str:
    return (
        f"approve:  action-broker approve {digest}\n"
        f"then:     the same command with --until {again['until']} --request-id {again['request_id']}"
        " (or wait: --approval-wait 10m)"
    )
