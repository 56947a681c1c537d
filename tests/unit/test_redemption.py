"""Spending a signing grant while approvals are withdrawn, the store does not answer, or the caller goes."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import apsw
import pytest
from support.approving import REPOSITORY, WORKLOADS, Approving, approving, digest_of
from support.exchanging import CNF, CORRELATION
from support.ledger_records import checkpointer
from support.processes import until
from support.whole_broker import AGENT, ISSUER

from broker import in_time
from broker.action import Action
from broker.artifacts import SigningRequest, signing_request
from broker.credentials import mint
from broker.credentials.action_token import Confirmation
from broker.credentials.jose import b64url
from broker.errors import ApprovalRequired, BrokerError, Reason, Refused, Unavailable
from broker.exchange import Caller, Presented
from broker.ledger import schema
from broker.ledger.reading import read
from broker.ledger.records import Intent, Outcome, PolicyChanged, Record, Redemption
from broker.ledger.store import Ledger
from broker.provenance import decide_by_provenance
from broker.redemption import Redemption as Spender
from broker.spending import Decided, Prepared, Presenter, Spending

ACTION = Action(
    "release.sign",
    REPOSITORY,
    ISSUER,
    {"signing": {"artifacts": [{"sha256": "44" * 32}], "purpose": "release", "signer": "keyless"}},
)
REQUEST_ID = "a-request-to-sign"
DIGEST = digest_of(ACTION, AGENT, REQUEST_ID)
ANSWER = b"the one signature"
LEAF = b"a certificate"


async def nothing() -> None:
    """Nothing happens meanwhile."""


@dataclass
class Signs:
    """An act. before: what happens between the second look and the spending; during: while it is done."""

    before: Callable[[], object] = lambda: None
    during: Callable[[], Awaitable[None]] = nothing
    content: bytes = b"what is asked"
    done: int = 0

    async def check(self, signing: SigningRequest) -> None:
        assert signing.purpose == "release"

    def answer(self, made: bytes, signing: SigningRequest) -> bytes:
        assert signing.purpose == "release"
        return made

    def prepare(self, decided: Decided) -> Prepared:
        self.before()
        return Prepared(
            jti=mint.new_id(decided.now),
            credential="signature",
            cnf={"spki_sha256": "33" * 32},
            key_id="key:k",
            perform=self._perform,
        )

    async def _perform(self) -> tuple[bytes, str]:
        await self.during()
        self.done += 1
        return ANSWER, hashlib.sha256(ANSWER).hexdigest()


@dataclass
class Held:
    """A grant that two approved, and who spends it."""

    parts: Approving
    caller: Caller
    grant: str
    spender: Spender
    folder: Path
    started: list[asyncio.Task[None]] = field(default_factory=list)

    async def spend(self, act: Signs, idempotency_id: str = "id-of-16-or-more") -> bytes:
        spending = Spending(grant=self.grant, idempotency_id=idempotency_id, provenance=())
        return await self.spender.redeem(self.caller, spending, act, self.parts.now(), CORRELATION, "sign")

    async def reason(self, act: Signs, idempotency_id: str = "id-of-16-or-more") -> Reason:
        with pytest.raises(BrokerError) as error:
            await self.spend(act, idempotency_id)
        return error.value.reason

    async def forsake(self, presenter: Presenter) -> None:
        gone = Refused(Reason.NOT_ATTESTED, "its entry was deleted")
        await self.spender.forsake(presenter, self.grant, gone, self.parts.now(), CORRELATION)

    def withdraws(self, name: str) -> None:
        """Starts it: it comes before whatever is asked next."""
        self.started.append(asyncio.ensure_future(self.parts.withdraw(name, DIGEST)))

    def records(self, *kinds: type[Record]) -> list[Record]:
        found = [row.record() for row in read(self.folder / "ledger.db")]
        return [one for one in found if isinstance(one, kinds)]

    @property
    def spent(self) -> list[str]:
        return [one.result for one in self.records(Redemption)]

    @property
    def outcomes(self) -> list[str]:
        """Of what the grant was spent on."""
        children = {row.seq for row in read(self.folder / "ledger.db") if getattr(row.record(), "parent", "")}
        return [one.result for one in self.records(Outcome) if one.intent in children]

    @contextmanager
    def unwritable(self) -> Iterator[None]:
        """The store refuses what is written."""
        connection = apsw.Connection(str(self.folder / "ledger.db"))
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield
        finally:
            connection.close()

    @asynccontextmanager
    async def hanging(self) -> AsyncIterator[None]:
        """The store answers nothing, and goes on afterwards: it waits for somebody's lock, for two seconds at most."""
        ledger = self.parts.parts.exchange.ledger
        with self.unwritable():
            waiting = asyncio.ensure_future(ledger.append(PolicyChanged(at=self.parts.now(), revision="r")))
            await until(lambda: ledger._groups._busy, "its thread is busy")
            yield
        await waiting


@asynccontextmanager
async def held(folder: Path, confirmation: Confirmation = CNF) -> AsyncIterator[Held]:
    async with approving(folder) as parts:
        with suppress(ApprovalRequired):
            await parts.ask(ACTION, request_id=REQUEST_ID)
        for name in ("ann", "bob"):
            await parts.approve(name, DIGEST)
        exchange, now, presented = parts.parts.exchange, parts.now(), Presented(request_id=REQUEST_ID)
        caller = replace(parts.parts.caller(), confirmation=confirmation)
        grant = await decide_by_provenance(exchange, caller.identity, ACTION, (), presented, now)
        signing = signing_request(ACTION, issuer=ISSUER)
        kind = mint.SIGNING_GRANT
        issued = await exchange.issue(caller, grant, now, CORRELATION, presented=presented, kind=kind, signing=signing)
        yield Held(parts, caller, issued.token, Spender(exchange), folder)


# -- approvals that are withdrawn ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ann", "bob"])
async def test_a_withdrawal_between_the_second_look_and_the_signature_stops_it(name: str, tmp_path: Path) -> None:
    """And the grant is spent by it, as by a second look that refuses."""
    async with held(tmp_path) as found:
        act = Signs(before=lambda: found.withdraws(name))
        assert await found.reason(act) is Reason.APPROVAL_REQUIRED
        await asyncio.gather(*found.started)
        assert not act.done
        assert found.spent == ["refused"]
        assert [one.credential for one in found.records(Intent)] == ["signing_grant"]
        assert await found.reason(Signs()) is Reason.ALREADY_USED


async def test_a_withdrawal_of_who_approved_nothing_stops_nothing(tmp_path: Path) -> None:
    async with held(tmp_path) as found:
        assert await found.spend(Signs(before=lambda: found.withdraws("carol"))) == ANSWER
        with pytest.raises(Refused):
            await found.started[0]
        assert found.spent == ["used"]


async def test_a_withdrawal_while_the_key_is_used_is_too_late(tmp_path: Path) -> None:
    """The control: of a signature and a withdrawal, what the ledger has first came first."""
    async with held(tmp_path) as found:
        assert await found.spend(Signs(during=lambda: found.parts.withdraw("ann", DIGEST))) == ANSWER
        kinds = [type(one).__name__ for one in found.records(Record)]
    assert kinds.index("Redemption") < kinds.index("ApprovalWithdrawn")


async def test_the_intent_of_a_signature_names_the_request_and_its_approvers(tmp_path: Path) -> None:
    async with held(tmp_path) as found:
        await found.spend(Signs())
        grant, signature = found.records(Intent)
    approvers = tuple(sorted(WORKLOADS[name] for name in ("ann", "bob")))
    for one in (grant, signature):
        assert (one.approval, one.approvers, one.request_id) == (DIGEST, approvers, REQUEST_ID)
    assert signature.parent == grant.jti


# -- a store that does not answer ------------------------------------------------------------------------------------


async def test_an_answer_that_is_stored_late_is_the_only_outcome_and_is_there_for_who_asks_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody waits for it any more: that it failed is not known, and not said."""
    async with held(tmp_path) as found:
        async with AsyncExitStack() as stack:

            async def during() -> None:
                await stack.enter_async_context(found.hanging())

            patched = stack.enter_context(monkeypatch.context())
            patched.setattr(in_time, "REQUEST_TIMEOUT_S", 1.0)
            act = Signs(during=during)
            with pytest.raises(Unavailable):
                await found.spend(act)
            await found.spender.close()
        assert await found.spend(act) == ANSWER
        assert act.done == 1
        await found.parts.parts.exchange.ledger.close()
        assert found.outcomes == ["issued"]


async def test_a_grant_that_is_spent_when_nobody_waits_for_it_any_more_has_come_to_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ledger says so at once, not when it is next opened."""
    async with held(tmp_path) as found:
        with ExitStack() as stack:
            patched = stack.enter_context(monkeypatch.context())
            patched.setattr(in_time, "REQUEST_TIMEOUT_S", 1.0)
            ledger = found.parts.parts.exchange.ledger

            def before() -> None:
                stack.enter_context(found.unwritable())
                ledger.append_later(PolicyChanged(at=found.parts.now(), revision="r"))
                ledger._groups._hand_over()  # its thread waits for the lock, two seconds at most

            act = Signs(before=before)
            with pytest.raises(Unavailable):
                await found.spend(act)
            await found.spender.close()
            assert not found.spent
        await until(lambda: found.outcomes == ["failed"], "the store goes on")
        assert (found.spent, act.done) == (["used"], 0)


async def test_an_answer_that_could_not_be_stored_has_an_unknown_outcome(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema, "BUSY_MS", 50)
    async with held(tmp_path) as found:
        with ExitStack() as stack:

            async def during() -> None:
                stack.enter_context(found.unwritable())

            act = Signs(during=during)
            assert await found.reason(act) is Reason.LEDGER_UNAVAILABLE
        assert await found.reason(act) is Reason.ALREADY_USED
        assert act.done == 1, "no second signature comes of it"
    async with await Ledger.open(tmp_path / "ledger.db", checkpoint=checkpointer(tmp_path), clock=found.parts.now):
        assert found.outcomes == ["unknown"]


async def test_an_act_that_fails_is_recorded_as_failed_and_spends_the_grant(tmp_path: Path) -> None:
    async def fails() -> None:
        raise Unavailable(Reason.SIGNER_UNAVAILABLE, "the token was pulled out")

    async with held(tmp_path) as found:
        assert await found.reason(Signs(during=fails)) is Reason.SIGNER_UNAVAILABLE
        assert await found.reason(Signs()) is Reason.ALREADY_USED
        await found.parts.parts.exchange.ledger.close()
        assert (found.outcomes, found.spent) == (["failed"], ["used"])


# -- callers that are no longer known --------------------------------------------------------------------------------

X5T = Confirmation(x5t_s256=b64url(hashlib.sha256(LEAF).digest()))


async def test_who_holds_the_certificate_of_a_grant_and_is_known_no_more_has_spent_it(tmp_path: Path) -> None:
    async with held(tmp_path, X5T) as found:
        misspelt = Presenter(named="spiffe://acme.test/build/agnet", leaf=LEAF)
        for stranger in (Presenter(leaf=b"another"), Presenter(), misspelt):
            await found.forsake(stranger)
        assert not found.spent
        await found.forsake(Presenter(leaf=LEAF))
        assert found.spent == ["refused"]
        assert await found.reason(Signs()) is Reason.ALREADY_USED


async def test_nobody_spends_a_grant_of_a_key_that_nobody_proved(tmp_path: Path) -> None:
    """Over mutual TLS with DPoP: whatever certificate is shown, it is not what the grant is bound to."""
    async with held(tmp_path) as found:
        await found.forsake(Presenter(leaf=LEAF))
        assert not found.spent
        assert await found.spend(Signs()) == ANSWER


async def test_a_caller_that_is_known_no_more_waits_no_longer_than_anybody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with held(tmp_path, X5T) as found, found.hanging():
        with monkeypatch.context() as patched:
            patched.setattr(in_time, "REQUEST_TIMEOUT_S", 0.1)
            with pytest.raises(Unavailable) as late:
                await found.forsake(Presenter(leaf=LEAF))
        assert (late.value.reason, late.value.detail) == (Reason.LEDGER_UNAVAILABLE, "out of time")
