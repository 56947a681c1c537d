"""How a signing grant is spent: everything is looked at again, then one thing is done, once.

    verify the grant → its own caller → decide again → spend it and record the intent → act → store the answer → answer

Whoever asks again with the same idempotency id gets the stored answer; nobody gets a second signature. A refusal on
the second look spends the grant as well: what was granted does not come back when the reasons do.
"""

import asyncio
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Final, TypeVar

from attestors.contract import Facts
from broker.action import Action, check_random_id
from broker.artifacts import SigningRequest, signing_request
from broker.callers import Caller
from broker.credentials import signing_grant
from broker.credentials.action_token import VerifiedClaims
from broker.decision.decide import Grant
from broker.errors import BrokerError, Invalid, Reason, Refused
from broker.exchange import Exchange, evidence_of
from broker.in_time import InTime
from broker.intents import intent_of, presented_by, process_reference
from broker.ledger.operations import CredentialRow
from broker.ledger.records import Intent, Outcome
from broker.ledger.spending import Spent
from broker.provenance import decide_by_provenance
from broker.scope.live import Live
from broker.spending import Act, Decided, Prepared, Presenter, Spending

_T_co = TypeVar("_T_co", covariant=True)
_NO_LONGER_KNOWN: Final = {Reason.NOT_ATTESTED, Reason.UNAUTHENTICATED, Reason.EXPIRED}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asking:
    """One presentation of a grant, once grant and caller fit. content: SHA-256 of what is asked with it."""

    caller: Caller
    spending: Spending
    claims: VerifiedClaims
    action: Action
    content: bytes
    now: datetime
    correlation_id: str


class Redemption:
    """Spends signing grants. One for each broker process; close it to wait for what is under way."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._running: dict[str, asyncio.Task[bytes]] = {}

    async def close(self) -> None:
        """Waits for what is under way: each has a bound of its own."""
        if self._running:
            await asyncio.wait(list(self._running.values()))

    async def forsake(
        self, presenter: Presenter, grant: str, refusal: Refused, now: datetime, correlation_id: str
    ) -> None:
        """Spends a grant whose own caller is refused before it is known as such: its entry or its SVID is gone.

        Only what the kernel or the handshake says of the presenter counts: nobody can burn another's grant. So a grant
        that is bound to a DPoP key over mutual TLS stays as it is, since that key is proven by who is known. Its caller
        is refused all the same, and it ends by itself.

        Raises: Unavailable when that cannot be recorded in time.
        """
        if refusal.reason not in _NO_LONGER_KNOWN:
            return
        exchange = self._exchange
        try:
            claims = signing_grant.verify(grant, issuer=exchange.issuer, key_for=exchange.keyring.public, now=now)
            async with InTime(Reason.LEDGER_UNAVAILABLE):
                row = await exchange.ledger.credential(claims.jti)
                if row is None or not presenter.holds(claims, row.intent):
                    return
                await exchange.ledger.spend(
                    claims.jti,
                    correlation_id,  # nobody asks again for what a refusal gave
                    claims.sub,
                    b"",
                    intent=None,
                    now=now,
                    correlation_id=correlation_id,
                )
        except Refused:  # no grant, or spent already
            return

    async def redeem(
        self, caller: Caller, spending: Spending, act: Act[_T_co], now: datetime, correlation_id: str, stage: str
    ) -> _T_co:
        """The act's answer: of this call, or of the one before that had the same id. Raises: BrokerError."""
        action = None
        try:
            check_random_id(spending.idempotency_id, "an idempotency id")
            claims, action = self._verify(caller, spending.grant, now)
            signing = signing_request(action, issuer=self._exchange.issuer)
            async with InTime(Reason.SIGNER_UNAVAILABLE) as bound:
                await act.check(signing)
                content = hashlib.sha256(b"\n".join((stage.encode(), spending.grant.encode(), act.content))).digest()
                asking = _Asking(
                    caller=caller,
                    spending=spending,
                    claims=claims,
                    action=action,
                    content=content,
                    now=now,
                    correlation_id=correlation_id,
                )
                made = await self._exchange.while_it_holds(
                    caller, now, lambda who: self._made(replace(asking, caller=who), signing, act, bound)
                )
                return act.answer(made, signing)
        except BrokerError as error:
            self._exchange.refused(caller.identity, action, error, now, correlation_id, stage)
            raise

    async def _made(self, asking: _Asking, signing: SigningRequest, act: Act[_T_co], bound: InTime) -> bytes:
        """What is answered: kept from before, or made now."""
        bound.reason = Reason.LEDGER_UNAVAILABLE
        row, made = await self._found(asking)
        if made is not None:
            return made
        bound.reason = Reason.ATTESTATION_UNAVAILABLE
        grant = await self._decide_again(asking, row)
        bound.reason = Reason.SIGNER_UNAVAILABLE
        decided = Decided(
            grant=grant,
            claims=asking.claims,
            signing=signing,
            caller=asking.caller,
            now=asking.now,
            expires_at=min(grant.expires_at, asking.claims.expires_at),
            presented=presented_by(row.intent, asking.claims.jti),
        )
        prepared = act.prepare(decided)
        if asking.claims.jti in self._running:  # a moment earlier, on another connection
            _, made = await self._found(asking)
            if made is not None:
                return made
        return await self._carry_out(asking, decided, prepared)

    def _verify(self, caller: Caller, grant: str, now: datetime) -> tuple[VerifiedClaims, Action]:
        """A grant of ours, in the hands of the very caller that it was given to, and its action. Raises: Refused."""
        exchange = self._exchange
        claims = signing_grant.verify(grant, issuer=exchange.issuer, key_for=exchange.keyring.public, now=now)
        if claims.sub != str(caller.identity.principal) or claims.cnf != caller.confirmation:
            raise Refused(Reason.KEY_MISMATCH, "the grant was given to another identity or key")
        action = claims.action()
        if action.digest.hex() != claims.action_digest:
            raise Refused(Reason.UNAUTHENTICATED, "the grant contradicts itself")
        return claims, action

    async def _found(self, asking: _Asking) -> tuple[CredentialRow, bytes | None]:
        """What the ledger knows of the grant, and the answer where it was spent on this very request before."""
        jti, ledger = asking.claims.jti, self._exchange.ledger
        running = self._running.get(jti)
        if running is not None:
            await asyncio.wait((running,))  # then its answer is stored, or there is none
        row = await ledger.credential(jti)
        if row is None:
            raise Refused(Reason.REVOKED, "the ledger does not know the grant in this epoch")
        if row.redeemed_at is None:
            return row, None
        by = str(asking.caller.identity.principal)
        answer = await ledger.find_answer(jti, asking.spending.idempotency_id, by, asking.content, asking.now)
        if answer is None:
            raise Refused(Reason.ALREADY_USED, "the grant was spent, and nothing came of it: ask for a new one")
        return row, answer

    async def _decide_again(self, asking: _Asking, row: CredentialRow) -> Grant:
        """The same decision on fresh facts. Raises: BrokerError; a refusal has spent the grant by then."""
        try:
            _require_same_process(asking.caller, row)
            self._exchange.scope.require(asking.claims.jti)
            presented = presented_by(row.intent, asking.claims.jti)
            return await decide_by_provenance(
                self._exchange,
                asking.caller.identity,
                asking.action,
                asking.spending.provenance,
                presented,
                asking.now,
                require=lambda grant: _require_same_facts(grant, asking.claims),
            )
        except Invalid:
            raise  # nothing was looked at, so nothing is spent
        except Refused:
            await self._spend(asking, None)
            raise

    async def _spend(
        self,
        asking: _Asking,
        intent: Intent | None,
        *,
        current: Callable[[], bool] | None = None,
        evidence: tuple[Facts, ...] = (),
    ) -> Spent:
        """See Ledger.spend."""
        return await self._exchange.ledger.spend(
            asking.claims.jti,
            asking.spending.idempotency_id,
            str(asking.caller.identity.principal),
            asking.content,
            intent=intent,
            now=asking.now,
            correlation_id=asking.correlation_id,
            current=current,
            evidence=evidence,
        )

    async def _carry_out(self, asking: _Asking, decided: Decided, prepared: Prepared) -> bytes:
        """Spends the grant and acts, to the end, whether or not the caller waits: then it can ask again."""
        decided.grant.spend()
        jti = asking.claims.jti
        intent = intent_of(
            asking.caller.identity,
            decided.grant,
            asking.now,
            asking.correlation_id,
            jti=prepared.jti,
            cnf=prepared.cnf,
            use="once",
            expires_at=decided.expires_at,
            key_id=prepared.key_id,
            credential=prepared.credential,
            epoch=self._exchange.ledger.epoch,
            presented=decided.presented,
            parent=jti,
            signing=decided.signing,
        )
        live = self._exchange.enter(intent, asking.caller.identity, decided.grant, asking.now)
        task = asyncio.ensure_future(self._act(asking, prepared, intent, live, evidence_of(decided.grant)))
        self._running[jti] = task
        task.add_done_callback(lambda done: self._ended(jti, done))
        return await asyncio.shield(task)

    def _ended(self, jti: str, done: "asyncio.Task[bytes]") -> None:
        if self._running.get(jti) is done:
            del self._running[jti]
        if not done.cancelled():
            done.exception()  # seen: where the caller went away, nobody else asks for it

    async def _spend_on(self, asking: _Asking, intent: Intent, live: Live, evidence: tuple[Facts, ...]) -> Spent:
        """Where nobody waits for it any more, and the grant is spent all the same, the ledger says that it failed."""
        spend = asyncio.ensure_future(self._spend(asking, intent, current=live.is_current, evidence=evidence))

        def abandon(done: asyncio.Future[Spent]) -> None:
            if not done.cancelled() and done.exception() is None and (seq := done.result().intent_seq) is not None:
                self._exchange.ledger.append_later(_failed(asking, seq))

        try:
            return await asyncio.shield(spend)
        except asyncio.CancelledError:
            spend.add_done_callback(abandon)
            raise

    async def _act(
        self, asking: _Asking, prepared: Prepared, intent: Intent, live: Live, evidence: tuple[Facts, ...]
    ) -> bytes:
        """Spends the grant and acts. `live` stays in scope where it is a credential that came to be."""
        scope, done = self._exchange.scope, False
        try:
            answer = await self._spend_and_act(asking, prepared, intent, live, evidence)
            done = True
        finally:
            if not (done and live.seq and intent.is_live):
                scope.leave(live)
        return answer

    async def _spend_and_act(
        self, asking: _Asking, prepared: Prepared, intent: Intent, live: Live, evidence: tuple[Facts, ...]
    ) -> bytes:
        ledger = self._exchange.ledger
        async with InTime(Reason.LEDGER_UNAVAILABLE) as bound:
            try:
                spent = await self._spend_on(asking, intent, live, evidence)
            except Refused as error:
                if error.reason is Reason.APPROVAL_REQUIRED:  # withdrawn since the second look, which refuses the same
                    await self._spend(asking, None)
                raise
            if spent.intent_seq is None:  # the same request, a moment earlier, at another replica
                if spent.answer is None:
                    raise Refused(Reason.ALREADY_USED, "the grant is being spent by the same request: ask again")
                return spent.answer
            bound.reason = Reason.SIGNER_UNAVAILABLE
            try:
                self._exchange.scope.confirm(live, spent.intent_seq)
                answer, fingerprint = await prepared.perform()
            except BaseException:
                ledger.append_later(_failed(asking, spent.intent_seq))
                raise
            bound.reason = Reason.LEDGER_UNAVAILABLE
            issued = Outcome(
                at=asking.now,
                correlation_id=asking.correlation_id,
                intent=spent.intent_seq,
                result="issued",
                credential_sha256=fingerprint,
            )
            # Where this fails, or is waited for no longer, it may become durable all the same, and is the outcome then.
            # If it does not, there is none, and it becomes "unknown".
            await ledger.store_answer(asking.claims.jti, answer, issued)
        return answer


def _failed(asking: _Asking, intent: int) -> Outcome:
    return Outcome(at=asking.now, correlation_id=asking.correlation_id, intent=intent, result="failed")


def _require_same_process(caller: Caller, row: CredentialRow) -> None:
    """Raises: Refused unless it is the very process that got the grant, or now as then no process of this node."""
    if process_reference(caller.identity.process) != row.intent.process:
        raise Refused(Reason.NOT_ATTESTED, "another process asks than the one that got the grant")


def _require_same_facts(grant: Grant, claims: VerifiedClaims) -> None:
    """Raises: Refused unless environment and provenance are what the grant was given on."""
    if f"sha256:{grant.environment_digest.hex()}" != claims.attestation.environment:
        raise Refused(Reason.EVIDENCE_MISMATCH, "the caller's environment is another than at the grant")
    provenance = None if grant.provenance_digest is None else f"sha256:{grant.provenance_digest.hex()}"
    if provenance != claims.attestation.provenance:
        raise Refused(Reason.EVIDENCE_MISMATCH, "other provenance is shown than at the grant")
