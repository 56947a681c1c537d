"""A signing grant that is refused, or being decided again, gives no signature; and its children end with it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import AttributeOID
from support.exchanging import CORRELATION
from support.processes import until
from support.redeciding import follow_nothing
from support.signing import OWN_KEY_AGENT
from support.signing_exchange import SigningExchange, signing_exchange

from attestors.contract import FactKey
from broker.cli.serve_scope import ScopeParts, open_scope, watching
from broker.credentials.signing_grant import csr_nonce
from broker.errors import BrokerError, Reason, Refused
from broker.ledger.records import Intent, Outcome, Redemption, ScopeRefused
from broker.scope.live import Live
from broker.spending import Spending


@dataclass
class Signing:
    """Grants, and scope as `serve` wires it."""

    found: SigningExchange
    scope: ScopeParts

    async def granted(self, **changes: object) -> tuple[str, Live]:
        """A grant, and what is live of it."""
        before = set(self.live())
        grant = await self.found.grant(**changes)
        (jti,) = set(self.live()) - before
        return grant, self.live()[jti]

    def live(self) -> dict[str, Live]:
        return {one.jti: one for one in self.found.parts.exchange.scope.live}

    async def reason(self, grant: str, **options: object) -> str:
        """Why it gives no signature; "" where it does."""
        try:
            await self.found.sign(grant, **options)
        except BrokerError as error:
            return error.reason
        return ""

    async def certify(self, grant: str) -> bytes:
        """The certificate that the grant gives for a key of the caller's."""
        made = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
        made = made.add_attribute(AttributeOID.CHALLENGE_PASSWORD, csr_nonce(grant).encode())
        csr = made.sign(ec.generate_private_key(ec.SECP256R1()), hashes.SHA256()).public_bytes(Encoding.DER)
        spending = Spending(grant=grant, idempotency_id="i" * 20, provenance=[self.found.envelopes[grant]])
        found = self.found
        chain = await found.signing.certify(found.caller, spending, csr, found.parts.now(), CORRELATION)
        return chain[0]

    async def refuse(self, live: Live, reason: Reason = Reason.SESSION_RISK) -> None:
        await self.scope.deciding.refuse([live], reason, "test")


@pytest.fixture
async def signing(tmp_path: Path) -> AsyncIterator[Signing]:
    async with made(tmp_path) as found:
        yield found


@asynccontextmanager
async def made(folder: Path) -> AsyncIterator[Signing]:
    async with signing_exchange(folder) as found:
        exchange = found.parts.exchange
        scope = await open_scope(exchange, {}, follow_nothing, found.parts.now)
        async with watching(scope, exchange, found.parts.now):
            yield Signing(found, scope)


async def test_a_grant_that_is_refused_cannot_be_spent_and_is_spent_by_the_try(signing: Signing) -> None:
    """Invariant 4. What was granted does not come back when the reasons do."""
    refused, live = await signing.granted()
    good, _ = await signing.granted()
    await signing.refuse(live)
    assert await signing.reason(refused) == Reason.SESSION_RISK
    assert await signing.reason(refused) == Reason.ALREADY_USED
    assert await signing.reason(good) == ""
    records = await signing.found.parts.records()
    (spent,) = [one for one in records if isinstance(one, Redemption) and one.jti == live.jti]
    assert spent.result == "refused"
    assert [one.parent for one in records if isinstance(one, Intent) and one.parent] != [live.jti]


async def test_a_grant_that_is_being_decided_again_waits_and_is_not_spent(signing: Signing) -> None:
    grant, live = await signing.granted()
    suspending = signing.scope.deciding.suspending
    suspension = suspending.begin("test", [live], None)
    assert await signing.reason(grant) == Reason.SUSPENDED
    suspending.release(suspension, [live])
    suspending.end(suspension)
    assert await signing.reason(grant) == ""


async def test_a_certificate_ends_with_the_grant_that_gave_it(signing: Signing) -> None:
    """Invariant 4: when the parent is refused, so is the child."""
    exchange = signing.found.parts.exchange
    signing.found.caller = signing.found.parts.caller(OWN_KEY_AGENT)
    pairs = []
    for _ in range(2):
        grant, parent = await signing.granted(signer="agent-key")
        before = set(signing.live())
        assert await signing.certify(grant)
        (child,) = set(signing.live()) - before
        pairs.append((parent, signing.live()[child]))
    (parent, child), (other, spared) = pairs
    assert child.parent == parent.jti
    await signing.refuse(parent)
    await until(lambda: exchange.scope.is_refused(child.jti), "the child is refused")
    await until(lambda: signing.scope.deciding.idle, "nothing is left to decide")
    assert not exchange.scope.is_refused(spared.jti)
    assert not exchange.scope.is_refused(other.jti)
    refusals = [one for one in await signing.found.parts.records() if isinstance(one, ScopeRefused)]
    assert [(one.jtis, one.reason, one.cause) for one in refusals] == [
        ((parent.jti,), Reason.SESSION_RISK, "test"),
        ((child.jti,), Reason.PARENT_REFUSED, f"parent:{parent.jti}"),
    ]


async def test_a_policy_that_changes_ends_grants_and_what_they_gave(signing: Signing) -> None:
    exchange = signing.found.parts.exchange
    grant, parent = await signing.granted()
    signing.found.caller = signing.found.parts.caller(OWN_KEY_AGENT)
    own, own_parent = await signing.granted(signer="agent-key")
    await signing.certify(own)
    (child,) = [one for one in signing.live().values() if one.parent == own_parent.jti]
    forbids = '@id("no") forbid (principal, action == Action::"nightly.sign", resource) '
    narrowed = f'{forbids}when {{ context.provenance.source == "{parent.facts["provenance"].values["source"]}" }};'
    signing.found.parts.write_policy(narrowed)
    await exchange.policies.reload()
    for one in (parent, own_parent, child):
        await until(lambda jti=one.jti: exchange.scope.is_refused(jti), "it is refused")
    with pytest.raises(Refused):
        await signing.found.sign(grant)


@pytest.mark.parametrize("change", ["the grant is refused", "its policy may have changed", "its caller's bundle"])
async def test_a_change_between_the_second_look_and_the_key_gives_no_signature(signing: Signing, change: str) -> None:
    exchange = signing.found.parts.exchange
    grant, live = await signing.granted()
    good, _ = await signing.granted()
    spend = exchange.ledger.spend

    async def spending(*args: object, **named: object) -> object:
        exchange.ledger.spend = spend
        if change == "the grant is refused":
            await signing.refuse(live)
        else:
            exchange.scope.tell(FactKey("action:nightly.sign" if "policy" in change else "bundle:acme.test"))
        return await spend(*args, **named)

    exchange.ledger.spend = spending
    reason = await signing.reason(grant)
    assert reason in ({Reason.SESSION_RISK} if "refused" in change else {"", Reason.SUPERSEDED})
    assert await signing.reason(good) == ""
    records = await signing.found.parts.records()
    issued = {one.intent for one in records if isinstance(one, Outcome) and one.result == "issued"}
    signatures = [
        (seq in issued, one.parent)
        for seq, one in enumerate(records, 1)
        if isinstance(one, Intent) and one.credential == "signature"
    ]
    assert [parent for _, parent in signatures].count(live.jti) <= 1
    if "refused" in change:
        assert live.jti not in [parent for given, parent in signatures if given]
