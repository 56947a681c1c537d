"""Approvals: others say yes to one request before it is granted, and can take it back.

A request is laid down when approvals are all that it lacks (`needed`). Who may approve it is an action like any other,
"broker.approve" on the request's own resource: decided by policy, recorded. Never by the caller itself, whatever the
policy says: that is looked at first. To take one's own approval back needs nobody's leave.

Approvals are used up when their credential is recorded, before its caller has it: where that answer is lost they are
lost with it, and the caller asks anew under another id. A credential is kept nowhere that it could be sent again from.
"""

import asyncio
import contextlib
import itertools
import re
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Final, Protocol

import msgspec

from attestors.approval import request_digest
from attestors.contract import AttestationRequest
from broker.action import Action
from broker.approval_records import APPROVE, RecordedApprovals, Shown, rules_digest
from broker.approval_text import Request, Texts
from broker.decision.decide import Grant
from broker.errors import ApprovalRequired, BrokerError, Invalid, Reason, Refused
from broker.exchange import Exchange
from broker.identity.identify import Identified
from broker.in_time import InTime
from broker.ledger.approvals import ApprovalSeen
from broker.ledger.records import MAX_DETAIL, ApprovalAsked, ApprovalWithdrawn, Approved, Operated
from broker.presented import Presented

MAX_REASON: Final = MAX_DETAIL
MAX_SHOWN: Final = 64  # requests in one answer
MAX_DECISIONS: Final = 256  # for one answer
DEFAULT_VALIDITY_S: Final = 600
MAX_VALIDITY_S: Final = 86400
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")


class People(Protocol):
    """Who verifies ID tokens (identity/id_token.py)."""

    async def identify(self, token: str, nonce: str, now: datetime) -> Identified:
        """The person whose token it is, made for this nonce. Raises: BrokerError."""


@dataclass(slots=True)
class _Attempt:
    """What is known of it when it ends."""

    action: Action | None = None


class Approvals:
    """The desk where requests wait. One for each broker process.

    people: None where no issuer of ID tokens is configured. remembered: how long a request waits unless asked again.
    """

    def __init__(
        self,
        exchange: Exchange,
        texts: Texts,
        people: People | None = None,
        *,
        remembered: timedelta = timedelta(hours=1),
    ) -> None:
        self._exchange, self._texts, self._people, self._remembered = exchange, texts, people, remembered
        self._records = RecordedApprovals(exchange.ledger, exchange.policies)

    # -- the caller of a request -------------------------------------------------------------------------------------

    async def needed(
        self, caller: Identified, action: Action, request_id: str, now: datetime, correlation_id: str
    ) -> ApprovalRequired:
        """Lays a request down. What to raise: it says what is to be approved, and what approvers will read.

        Raises: Invalid where it has no id, or more in it than anybody should have to read; Refused QUOTA where too many
        of this caller's wait, ALREADY_USED where its approvals gave a credential; Unavailable.
        Not checked: that approvals are what it lacks.
        """
        Presented(request_id=request_id).require_readable()
        if not request_id:
            raise Invalid("a request that needs approvals has a request id: 16 to 64 random characters")
        principal = str(caller.principal)
        digest = request_digest(action.digest.hex(), principal, request_id)
        text = self._texts.render(Request(digest=digest, action=action, principal=principal, request_id=request_id))
        asked = ApprovalAsked(
            at=now,
            correlation_id=correlation_id,
            request_digest=digest,
            principal=principal,
            action=msgspec.Raw(action.canonical),
            action_digest=action.digest.hex(),
            request_id=request_id,
            text=text,
            expires_at=now + self._remembered,
        )
        async with InTime(Reason.LEDGER_UNAVAILABLE):
            await self._exchange.ledger.ask_approval(asked)
        return ApprovalRequired(digest, text, f"request {digest} waits for approval")

    async def wait(
        self, caller: Identified, digest: str, clock: Callable[[], datetime], correlation_id: str
    ) -> AsyncGenerator[Shown]:
        """The caller's own request as it is, and again whenever that changed. Nothing is polled.

        Ends by itself once the request is used, and when the caller's identity has ended: it may come and wait again.
        What changed while nobody took what was yielded is told as one; policies that changed, with the next change.
        clock: read at each look.

        Raises: Refused EXPIRED once it is forgotten, DENIED for another's and for what was never asked; Unavailable.
        """
        changed, told = asyncio.Event(), None
        end = self._exchange.ledger.subscribe_approvals(lambda which: changed.set() if which == digest else None)
        try:
            while True:
                changed.clear()  # before the look, so that what happens meanwhile is looked at next
                now = clock()
                with self._refusing(caller, "wait", now, correlation_id):
                    found = await self._own(caller, digest, now)
                if found != told:
                    told = found
                    yield found
                if found.state == "used" or caller.expires_at <= now:
                    return
                ends = min(caller.expires_at, found.expires_at, *(one.expires_at for one in found.approvals))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout((ends - clock()).total_seconds()):
                        await changed.wait()
        finally:
            end()

    async def _own(self, caller: Identified, digest: str, now: datetime) -> Shown:
        async with InTime(Reason.LEDGER_UNAVAILABLE):
            found = await self._find(digest, now)
        if found.request.principal != str(caller.principal):
            raise Refused(Reason.DENIED, f"request {digest} is another's: who approves it asks with Show")
        if found.expires_at <= now and found.state == "waiting":
            raise Refused(Reason.EXPIRED, f"request {digest} is forgotten: ask it again")
        return found

    # -- those who approve -------------------------------------------------------------------------------------------

    async def person(self, id_token: str, digest: str, now: datetime) -> Identified:
        """Who shows an ID token about this request. Raises: BrokerError, which is counted: nobody is known yet."""
        with self._exchange.counted():
            _require_digest(digest)
            if self._people is None:
                raise Refused(Reason.UNAUTHENTICATED, "no issuer of ID tokens is configured: see [approval.issuers]")
            async with InTime(Reason.IDENTITY_UNAVAILABLE):
                found = await self._people.identify(id_token, digest, now)
            self._exchange.quota.take(str(found.principal), asyncio.get_running_loop().time())
        return found

    async def show(self, asker: Identified, digest: str, now: datetime, correlation_id: str) -> Shown:
        """One request, to who may approve it. Recorded. Raises: BrokerError."""
        with self._refusing(asker, "show", now, correlation_id) as attempt:
            async with InTime() as bound:
                found, grant = await self._authorise(asker, digest, attempt, now, bound)
                await self._operated(asker, grant.action.resource, (grant,), now, correlation_id)
        return found

    async def approve(
        self,
        approver: Identified,
        digest: str,
        reason: str,
        valid_for_s: int,
        now: datetime,
        correlation_id: str,
    ) -> ApprovalSeen:
        """Says yes. Durable when it returns; it ends with its request at the latest. Said again it is renewed.

        It counts while the policies that gave it stand unchanged (approval_records.py).

        valid_for_s: 0 for `DEFAULT_VALIDITY_S`, at most `MAX_VALIDITY_S`.

        Raises: Invalid; Refused DENIED for the caller's own request, for who may not and for what was never asked,
        EXPIRED, ALREADY_USED; Unavailable.
        """
        with self._refusing(approver, "approve", now, correlation_id) as attempt:
            _require_reason(reason)
            if not 0 <= valid_for_s <= MAX_VALIDITY_S:
                raise Invalid(f"an approval counts for 1 to {MAX_VALIDITY_S} seconds")
            async with InTime() as bound:
                found, grant = await self._authorise(approver, digest, attempt, now, bound)
                approved = Approved(
                    at=now,
                    correlation_id=correlation_id,
                    request_digest=digest,
                    by=str(approver.principal),
                    reason=reason,
                    method=approver.transport,
                    evidence_sha256=_evidence(approver),
                    policies=grant.policies,
                    policy_revision=grant.policy_revision,
                    rules_sha256=rules_digest(self._exchange.policies.current, grant.policies),
                    expires_at=min(now + timedelta(seconds=valid_for_s or DEFAULT_VALIDITY_S), found.expires_at),
                )
                return await self._exchange.ledger.approve(approved)

    async def withdraw(
        self, approver: Identified, digest: str, reason: str, now: datetime, correlation_id: str
    ) -> None:
        """Takes one's own approval back, also after it gave a credential: that is refused when it is decided again.

        No policy is asked: who may approve no more may still say that it should not have.

        Raises: Invalid; Refused DENIED where the ledger counts no approval of theirs; Unavailable.
        """
        with self._refusing(approver, "withdraw", now, correlation_id):
            _require_digest(digest)
            _require_reason(reason)
            async with InTime(Reason.LEDGER_UNAVAILABLE):
                withdrawn = ApprovalWithdrawn(
                    at=now,
                    correlation_id=correlation_id,
                    request_digest=digest,
                    by=str(approver.principal),
                    reason=reason,
                    method=approver.transport,
                    evidence_sha256=_evidence(approver),
                )
                if not await asyncio.shield(asyncio.ensure_future(self._withdraw(withdrawn))):
                    raise Refused(Reason.DENIED, f"no approval of theirs counts for request {digest}")

    async def _withdraw(self, withdrawn: ApprovalWithdrawn) -> bool:
        """Whether it counted. Goes on to its end where who asked goes away: what it permitted ends with it."""
        counted = True
        try:
            counted = await self._exchange.ledger.withdraw(withdrawn)
        finally:  # also where the store does not say: it may have taken it
            if counted:
                self._exchange.scope.withdrawn(withdrawn.request_digest, withdrawn.by)
        return counted

    async def pending(self, asker: Identified, now: datetime, correlation_id: str) -> Sequence[Shown]:
        """The requests that wait and that the asker may approve: `MAX_SHOWN` of them at most.

        Each is decided for itself and counts against the asker's quota as a request does: `MAX_DECISIONS` at most, or
        as many as are left; their callers in turns, so that who asks for much hides nobody else's. Recorded.

        Raises: BrokerError.
        """
        exchange = self._exchange
        with self._refusing(asker, "pending", now, correlation_id):
            async with InTime(Reason.LEDGER_UNAVAILABLE) as bound:
                waiting = [one for one in await self._records.waiting(now) if not _is_own(asker, one)]
                bound.reason = Reason.ATTESTATION_UNAVAILABLE
                allowed = await self._allowed(await self._looked_at(asker, now), waiting, now)
                bound.reason = Reason.LEDGER_UNAVAILABLE
                if waiting and not allowed:
                    error = Refused(Reason.DENIED, f"may approve none of the {len(waiting)} requests that wait")
                    exchange.refused(asker, None, error, now, correlation_id, "pending")
                    return []
                grants = [grant for _, grant in allowed]
                await self._operated(asker, f"{exchange.issuer}/approvals", grants, now, correlation_id)
                found = [await self._records.find(one.request.digest, now) for one, _ in allowed]
                return [one for one in found if one is not None and one.state == "waiting"]

    async def _looked_at(self, asker: Identified, now: datetime) -> Identified:
        """The same with all facts that deciding about approvals needs, so that they are gathered once an answer."""
        exchange = self._exchange
        piece = exchange.policies.current.slice(APPROVE)
        if piece is None:
            raise Refused(Reason.UNKNOWN_ACTION, f"no schema declares {APPROVE}")
        request = AttestationRequest(principal=str(asker.principal), process=asker.process, known=asker.known)
        return replace(asker, known={**asker.known, **await exchange.attestation.gather(piece, request, now)})

    async def _allowed(
        self, asker: Identified, waiting: Sequence[Shown], now: datetime
    ) -> Sequence[tuple[Shown, Grant]]:
        allowed: list[tuple[Shown, Grant]] = []
        for number, one in enumerate(_in_turns(waiting)[:MAX_DECISIONS]):
            if number and not self._may_ask_more(asker):  # the first was paid for when the asker was identified
                break
            await asyncio.sleep(0)  # others have their turn between two decisions
            try:
                allowed.append((one, await self._exchange.decide(asker, self._act_on(one.request), now)))
            except Refused as error:
                if error.reason is not Reason.DENIED:
                    raise
            if len(allowed) == MAX_SHOWN:
                break
        return allowed

    def _may_ask_more(self, asker: Identified) -> bool:
        """Counts one more decision against its quota, where that leaves one."""
        try:
            self._exchange.quota.take(str(asker.principal), asyncio.get_running_loop().time())
        except Refused:
            return False
        return True

    # -- all of them -------------------------------------------------------------------------------------------------

    async def _authorise(
        self, asker: Identified, digest: str, attempt: _Attempt, now: datetime, bound: InTime
    ) -> tuple[Shown, Grant]:
        """The request and leave to approve it. `bound` is left where the ledger is waited for. Raises: BrokerError."""
        _require_digest(digest)
        bound.reason = Reason.LEDGER_UNAVAILABLE
        found = await self._find(digest, now)
        attempt.action = self._act_on(found.request)
        if _is_own(asker, found):
            raise Refused(Reason.DENIED, f"nobody approves a request of their own: {digest}")
        bound.reason = Reason.ATTESTATION_UNAVAILABLE
        grant = await self._exchange.decide(asker, attempt.action, now)
        grant.spend()
        bound.reason = Reason.LEDGER_UNAVAILABLE
        return found, grant

    def _act_on(self, request: Request) -> Action:
        """What is decided about who approves it."""
        parameters = {"action": request.action.name, "principal": request.principal}
        return Action(APPROVE, request.action.resource, self._exchange.issuer, parameters)

    async def _find(self, digest: str, now: datetime) -> Shown:
        _require_digest(digest)
        found = await self._records.find(digest, now)
        if found is None:
            raise Refused(Reason.DENIED, f"nobody asked for {digest}, or it is long forgotten")
        return found

    async def _operated(
        self, asker: Identified, resource: str, grants: Sequence[Grant], now: datetime, correlation_id: str
    ) -> None:
        """Writes down that the asker was shown something."""
        operated = Operated(
            at=now,
            correlation_id=correlation_id,
            principal=str(asker.principal),
            action=APPROVE,
            resource=resource,
            policies=tuple(sorted({name for grant in grants for name in grant.policies})),
            policy_revision=self._exchange.policies.current.revision,
        )
        await self._exchange.ledger.append(operated)

    @contextlib.contextmanager
    def _refusing(self, asker: Identified, stage: str, now: datetime, correlation_id: str) -> Iterator[_Attempt]:
        """Writes down how the block ends where that is a refusal."""
        attempt = _Attempt()
        try:
            yield attempt
        except BrokerError as error:
            self._exchange.refused(asker, attempt.action, error, now, correlation_id, stage)
            raise


def _is_own(asker: Identified, found: Shown) -> bool:
    """Whether the asker is the request's caller: by its name, or a process that SPIRE entitles to that name, too.

    Of who is known by a certificate alone, over mutual TLS, only the name is known: one process may hold the SVIDs of
    both. A policy that wants to be sure asks for `context has spire`, which processes on this node alone have.
    """
    spire = asker.known.get("spire")
    ids = spire.values["ids"] if spire is not None else []
    others = ids if isinstance(ids, list) else []
    return found.request.principal in (str(asker.principal), *others)


def _in_turns(waiting: Sequence[Shown]) -> list[Shown]:
    """The oldest of each caller, then the second of each, and so on."""
    by_caller: dict[str, list[Shown]] = {}
    for one in waiting:
        by_caller.setdefault(one.request.principal, []).append(one)
    return [one for turn in itertools.zip_longest(*by_caller.values()) for one in turn if one is not None]


def _require_digest(digest: str) -> None:
    if not _DIGEST.fullmatch(digest):
        raise Invalid("a request digest is 64 lower-case hexadecimal digits")


def _require_reason(reason: str) -> None:
    if len(reason) > MAX_REASON or not reason.isprintable():
        raise Invalid(f"a reason is at most {MAX_REASON} printable characters, on one line")


def _evidence(approver: Identified) -> str:
    """The hash of what a person showed."""
    return (approver.assertion_sha256 or b"").hex()
