"""`sign`: from files to bundles that verify, in one command."""

import asyncio
import contextlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Final, NoReturn

import click
from cryptography import x509
from rich.markup import escape

from broker.action import Action
from broker.cli.ask import Reach, reach_from, reach_options
from broker.cli.files import INPUT, TARGET, read_bounded, require_writable, write_whole
from broker.cli.output import INTERRUPTED, REFUSED, USAGE, Output, pass_output, printable_lines
from broker.cli.signing_options import MAX_EVIDENCE, Asking, Duration, asking_options, signer_of
from broker.client import Client
from broker.client.faults import Unreachable
from broker.client.signing import Signature, SigningGrant
from broker.errors import ApprovalRequired, BrokerError, Invalid

SUFFIX: Final = ".sigstore.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """One signature: over which files, and where its bundle goes."""

    files: tuple[Path, ...]
    target: Path
    action: Action

    @property
    def names(self) -> str:
        """For people, escaped."""
        return escape(", ".join(map(str, self.files)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one command does. done and waiting grow as it goes, and are told however it ends."""

    output: Output
    wanted: tuple[Wanted, ...]
    provenance: tuple[bytes, ...]
    statement: bytes
    request_id: str
    wait_s: int
    done: list[dict[str, Any]] = field(default_factory=list)
    waiting: dict[str, tuple[Wanted, ApprovalRequired]] = field(default_factory=dict)

    async def run(self, client: contextlib.AbstractAsyncContextManager[Client]) -> None:
        """Raises: BrokerError; ApprovalRequired with `waiting` filled."""
        async with client as broker:
            for one in self.wanted:
                self.output.say(one.names)
                try:
                    grant = await self._grant(broker, one)
                except ApprovalRequired as error:  # the others are asked for before anybody waits
                    self._waits(one, error)
                else:
                    await self._finish(broker, one, grant)
            if self.waiting and self.wait_s:
                await self._wait(broker)
        for _, lacking in self.waiting.values():
            raise lacking

    async def _grant(self, broker: Client, one: Wanted) -> SigningGrant:
        return await broker.signing.grant(one.action, self.provenance, request_id=self.request_id)

    def _waits(self, one: Wanted, error: ApprovalRequired) -> None:
        if error.request_digest not in self.waiting and self.wait_s:
            self.output.say("  waits for approval of")
            self.output.say(f"[dim]{escape(printable_lines(error.text))}[/]")
            self.output.notice(f"  action-broker approve {error.request_digest}")
        self.waiting[error.request_digest] = one, error

    async def _wait(self, broker: Client) -> None:
        until = asyncio.get_running_loop().time() + self.wait_s
        for digest, (one, _) in list(self.waiting.items()):
            left = until - asyncio.get_running_loop().time()
            with self.output.working(f"{one.names} waits for approval, Ctrl-C to go on later"):
                grant = await self._granted(broker, one, digest, left) if left > 0 else None
            if grant is not None:
                del self.waiting[digest]
                await self._finish(broker, one, grant)

    async def _granted(self, broker: Client, one: Wanted, digest: str, seconds: float) -> SigningGrant | None:
        """A grant as soon as enough have approved; None when that was not in time."""
        seen: frozenset[str] = frozenset()
        async with contextlib.aclosing(broker.approvals.wait(digest, seconds)) as states:
            async for state in states:
                found = frozenset(one.by for one in state.approvals)
                somebody_new, seen = found - seen, found
                if not somebody_new and not state.is_used:
                    continue
                if somebody_new:
                    self.output.say(f"  approved by {escape(', '.join(sorted(somebody_new)))}")
                try:
                    return await self._grant(broker, one)
                except ApprovalRequired as error:
                    self._waits(one, error)
        return None

    async def _finish(self, broker: Client, one: Wanted, grant: SigningGrant) -> None:
        self.output.say(f"  granted until {grant.expires_at:%H:%M:%S} UTC: {grant.grant_id}")
        signature = await self._sign(broker, grant)
        try:
            write_whole(one.target, signature.bundle.encode() + b"\n")
        except OSError as error:
            self.output.notice(signature.bundle)  # it was approved and made once, and never will be again
            self.fail(f"{one.target} cannot be written: {error.strerror}; the bundle is above", USAGE)
        self.done.append(_told(self.output, one, grant, signature))

    async def _sign(self, broker: Client, grant: SigningGrant) -> Signature:
        """The one signature; where its answer was lost it is fetched again, by its idempotency id."""
        idempotency_id = secrets.token_urlsafe(24)
        try:
            return await broker.signing.sign(grant, statement=self.statement, idempotency_id=idempotency_id)
        except Unreachable:
            self.output.say("  no answer; it is asked for again")
            return await broker.signing.sign(grant, statement=self.statement, idempotency_id=idempotency_id)

    # -- how it ends -------------------------------------------------------------------------------------------------

    def fields(self) -> dict[str, Any]:
        """What a script is told however it ends."""
        waiting = [
            {"files": [str(file) for file in one.files], "request_digest": digest, "text": error.text}
            for digest, (one, error) in self.waiting.items()
        ]
        return {"signed": self.done, "waiting": waiting, "request_id": self.request_id}

    def fail(self, text: str, code: int, **fields: Any) -> NoReturn:
        """Ends the command, and tells what was signed before that."""
        self.output.fail(text, code, **fields, **self.fields())

    def lacks(self, error: ApprovalRequired) -> NoReturn:
        """Ends the command with what is to be approved, and how to go on."""
        texts = [f"{printable_lines(one.text)}\n" for _, one in self.waiting.values()]
        approve = [f"approve:  action-broker approve {digest}" for digest in self.waiting]
        self.fail("\n".join((f"refused: {error.reason}", *texts, *approve, self.again())), REFUSED, reason=error.reason)

    def again(self) -> str:
        """How to go on."""
        files = " ".join(str(file) for one, _ in self.waiting.values() for file in one.files)
        what = "the same command" if not self.done else f"the same command for {files}"
        return f"then:     {what} with --request-id {self.request_id} (or wait: --approval-wait 10m)"


@click.command()
@click.argument("files", nargs=-1, required=True, type=INPUT)
@asking_options
@click.option("--key", help="Sign with the broker's key of this name; without it, by a key made for this signature.")
@click.option(
    "--statement",
    type=INPUT,
    help="An in-toto Statement whose subjects are the files: it is signed instead, as DSSE, with one grant for all.",
)
@click.option("--approval-wait", type=Duration(), default=None, help="How long to wait for approvals, such as 10m.")
@click.option(
    "--bundle",
    required=True,
    type=TARGET,
    help="Where the Sigstore bundle goes; for several files without --statement, a folder.",
)
@reach_options
@pass_output
def sign(output: Output, /, files: tuple[Path, ...], bundle: Path, **options: Any) -> None:
    """Sign FILES, each with a grant of its own: provenance, approvals and this process are looked at each time."""
    statement, wait_s = options.pop("statement"), options.pop("approval_wait") or 0
    signer, asking = signer_of(options.pop("key")), Asking.taken(options)
    reach = reach_from(output, options)
    groups = [files] if statement or len(files) == 1 else [(file,) for file in files]
    targets = [bundle] if len(groups) == 1 else [bundle / f"{file.name}{SUFFIX}" for file in files]
    if len(set(targets)) < len(targets):
        output.fail("two of the files have the same name, and so would their bundles: sign them one by one", USAGE)
    for target in targets:
        require_writable(output, target)
    work = Work(
        output=output,
        wanted=tuple(
            Wanted(files=group, target=target, action=asking.about(output, group, issuer=reach.issuer, signer=signer))
            for group, target in zip(groups, targets, strict=True)
        ),
        provenance=asking.evidence(output),
        statement=read_bounded(output, statement, MAX_EVIDENCE) if statement else b"",
        request_id=asking.request_id,
        wait_s=wait_s,
    )
    _run(work, reach)
    output.value({"signed": work.done})


def _run(work: Work, reach: Reach) -> None:
    """Ends the command where it is not done."""
    try:
        client = reach.client()
    except Invalid as error:
        work.output.fail(error.detail, USAGE)
    try:
        asyncio.run(work.run(client))
    except ApprovalRequired as error:
        work.lacks(error)
    except BrokerError as error:
        work.output.refuse(error, **work.fields())
    except KeyboardInterrupt:
        left = f"; what waits can be gone on with\n{work.again()}" if work.waiting else ""
        work.fail(f"interrupted: {len(work.done)} of {len(work.wanted)} signed{left}", INTERRUPTED)


def _told(output: Output, one: Wanted, grant: SigningGrant, signature: Signature) -> dict[str, Any]:
    output.say(f"[green]signed[/] {one.names} → {escape(str(one.target))}")
    ends = _ends(signature.certificate_chain)
    if ends is not None and not signature.timestamp:
        output.say(
            f"  [yellow]without a timestamp this bundle stops verifying at {ends:%H:%M:%S} UTC[/], when its certificate"
            " ends: \\[signing.timestamp] in the broker's configuration names an authority"
        )
    return {
        "files": [str(file) for file in one.files],
        "bundle": str(one.target),
        "grant_id": grant.grant_id,
        "timestamp": bool(signature.timestamp),
        "certificate_ends": ends.isoformat() if ends else None,
        "correlation_id": signature.correlation_id,
    }


def _ends(chain: Sequence[bytes]) -> datetime | None:
    return x509.load_der_x509_certificate(chain[0]).not_valid_after_utc if chain else None
