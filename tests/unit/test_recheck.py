"""Check and Redeem: the same decision as at minting, on the facts of now."""

from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from support.exchanging import CORRELATION, OWN_PID, Exchanging, act, exchanging
from support.pki import CA, JwtAuthority, snapshot
from support.processes import script
from support.scope import ScopeAround
from support.whole_broker import AGENT, ORDERS, POLICY

from broker.action import Action
from broker.errors import BrokerError, Invalid, Reason, Refused, Unavailable
from broker.identity.jwt_svid import authority_digest
from broker.identity.spiffe_id import TrustDomain
from broker.ledger.records import Redemption, Refusal, ScopeRefused
from broker.recheck import Recheck

SHARED = "https://orders.acme.test"
FORBID_ALL = f'{POLICY}\n@id("no") forbid (principal, action, resource) unless {{ principal == resource }};'
WAITS = "tell('ready'); hear()"
ID = "idempotency-id-1"


@pytest.fixture
async def found(tmp_path: Path) -> AsyncIterator[Exchanging]:
    async with exchanging(tmp_path) as made:
        yield made


def recheck(found: Exchanging) -> Recheck:
    return ScopeAround(found.exchange, found.now).recheck({SHARED: frozenset({ORDERS, AGENT})})


async def check(
    found: Exchanging, token: str, action: Action, asker: str = ORDERS, *, by: Recheck | None = None
) -> str:
    """The reason why not; empty for yes."""
    try:
        await (by or recheck(found)).check(found.caller(asker), token, lambda: action, found.now(), CORRELATION)
    except BrokerError as error:
        return error.reason
    return ""


async def redeem(found: Exchanging, token: str, action: Action, idempotency_id: str = ID, asker: str = ORDERS) -> str:
    """The reason why not; empty for yes."""
    try:
        await recheck(found).redeem(
            found.caller(asker), token, lambda: action, idempotency_id, found.now(), CORRELATION
        )
    except BrokerError as error:
        return error.reason
    return ""


async def test_a_process_is_looked_at_before_and_after_spire_is_asked(found: Exchanging) -> None:
    with script(WAITS) as child, script(WAITS) as other:
        assert [await child.line(), await other.line()] == ["ready", "ready"]
        token = (await found.token(act(), found.caller(pid=child.pid))).token
        kept = (await found.token(act(), found.caller(pid=other.pid))).token
        assert await check(found, token, act()) == ""
        found.asked.append(child.end)  # it exits while SPIRE says that all is well
        assert await check(found, token, act()) == Reason.NOT_ATTESTED
        found.asked.clear()
        assert await check(found, token, act()) == Reason.NOT_ATTESTED
        assert await check(found, kept, act()) == ""


async def test_what_spire_says_now_counts_and_a_no_is_final(found: Exchanging) -> None:
    """DESIGN section 2: refused is final; that nobody could be asked is not."""
    around = recheck(found)
    for said, expected, after in (
        ([ORDERS], Reason.NOT_ATTESTED, Reason.NOT_ATTESTED),
        ([ORDERS, AGENT], "", ""),
        (Refused(Reason.NOT_ATTESTED, "no entry"), Reason.NOT_ATTESTED, Reason.NOT_ATTESTED),
        (Unavailable(Reason.ATTESTATION_UNAVAILABLE, "away"), Reason.ATTESTATION_UNAVAILABLE, ""),
    ):
        found.ids = [AGENT]
        token = (await found.token(act(), found.caller(pid=OWN_PID))).token
        assert await check(found, token, act(), by=around) == ""
        found.ids = said
        assert await check(found, token, act(), by=around) == expected
        found.ids = [AGENT]
        assert await check(found, token, act(), by=around) == after


async def test_a_token_of_a_domain_that_is_no_longer_trusted_is_refused(found: Exchanging) -> None:
    other, theirs = CA("other.test", now=found.now()), "spiffe://other.test/build/agent"
    ours = found.trust.bundles[TrustDomain.parse("acme.test")]
    found.trust = snapshot(ours, other.bundle(), own=found.trust.own)
    token = (await found.token(act(), found.caller(theirs))).token
    our_own = (await found.token(act())).token
    assert await check(found, token, act()) == ""
    found.trust = snapshot(ours, own=found.trust.own, revision=2)
    assert await check(found, token, act()) == Reason.UNAUTHENTICATED
    assert await check(found, our_own, act()) == ""


@pytest.mark.parametrize("transport", ["mtls", "jwt-svid"])
async def test_a_token_whose_callers_authority_left_the_bundle_is_refused(found: Exchanging, transport: str) -> None:
    """Check and Redeem never see the SVID again: the authority that vouched for it must still be trusted."""
    caller, charge = found.caller(transport=transport), act("orders.charge")
    if transport == "jwt-svid":
        [[key]] = found.trust.bundles[TrustDomain.parse("acme.test")].jwt_authorities.values()
        identity = replace(caller.identity, authority_sha256=authority_digest(key))
        caller = replace(caller, identity=identity)
    token, single = (await found.token(act(), caller)).token, (await found.token(charge, caller)).token
    ours = found.trust
    assert await check(found, token, act()) == ""
    successor = CA("acme.test", seed="the next root", now=found.now()).bundle(JwtAuthority(kid="the next key"))
    found.trust = snapshot(successor, own=ours.own, revision=2)
    assert await check(found, token, act()) == Reason.UNAUTHENTICATED
    assert await redeem(found, single, charge) == Reason.UNAUTHENTICATED
    found.trust = replace(ours, revision=3)
    assert await check(found, token, act()) == Reason.UNAUTHENTICATED, "what was refused does not come back"
    assert await check(found, (await found.token(act(), caller)).token, act()) == ""
    assert await redeem(found, (await found.token(charge, caller)).token, charge) == ""


async def test_a_token_of_nobody_knows_whose_authority_is_refused(found: Exchanging) -> None:
    caller = found.caller()
    unknown = replace(caller, identity=replace(caller.identity, authority_sha256=None))
    assert await check(found, (await found.token(act(), unknown)).token, act()) == Reason.UNAUTHENTICATED
    assert await check(found, (await found.token(act(), caller)).token, act()) == ""


async def test_without_an_identity_of_our_own_nothing_is_confirmed(found: Exchanging) -> None:
    token, single = (await found.token(act())).token, (await found.token(act("orders.charge"))).token
    assert await check(found, token, act()) == ""
    trust = found.trust
    found.trust = replace(trust, own=None)
    assert await check(found, token, act()) == Reason.IDENTITY_UNAVAILABLE
    assert await redeem(found, single, act("orders.charge")) == Reason.IDENTITY_UNAVAILABLE
    found.trust = trust
    assert await redeem(found, single, act("orders.charge")) == "", "it was not used up"


async def test_a_redemption_that_is_not_decided_uses_nothing_up_and_one_that_is_refused_ends_the_token(
    found: Exchanging,
) -> None:
    charge = act("orders.charge")
    token = (await found.token(charge, found.caller(pid=OWN_PID))).token
    ended = (await found.token(charge, found.caller(pid=OWN_PID))).token
    found.ids = Unavailable(Reason.ATTESTATION_UNAVAILABLE, "away")
    assert await redeem(found, token, charge) == Reason.ATTESTATION_UNAVAILABLE
    found.ids = [AGENT]
    found.write_policy(FORBID_ALL)
    await found.exchange.policies.reload()
    assert await redeem(found, ended, charge) == Reason.DENIED
    found.write_policy(POLICY)
    await found.exchange.policies.reload()
    assert await redeem(found, token, charge, asker=AGENT) == Reason.WRONG_AUDIENCE
    assert await redeem(found, token, act("orders.charge", audience=SHARED)) == Reason.OUT_OF_SCOPE
    assert await redeem(found, token, charge) == ""
    assert await redeem(found, ended, charge) == Reason.DENIED
    records = await found.records()
    assert len([one for one in records if isinstance(one, Redemption)]) == 1
    assert [one.stage for one in records if isinstance(one, Refusal)] == ["redeem"] * 5
    assert [one.cause for one in records if isinstance(one, ScopeRefused)] == ["check"]


async def test_a_lost_answer_is_given_again_whatever_has_changed_since(found: Exchanging) -> None:
    charge, ask = act("orders.charge"), recheck(found).redeem
    token = (await found.token(charge)).token
    caller = found.caller(ORDERS)
    first = await ask(caller, token, lambda: charge, ID, found.now(), CORRELATION)
    found.write_policy(FORBID_ALL)
    await found.exchange.policies.reload()
    found.ids = Refused(Reason.NOT_ATTESTED, "gone")
    found.ahead = timedelta(seconds=10)
    assert await ask(caller, token, lambda: charge, ID, found.now(), CORRELATION) == first
    assert await redeem(found, token, charge, "idempotency-id-2") == Reason.ALREADY_USED
    assert await check(found, token, charge) == Reason.ALREADY_USED
    found.ahead = timedelta(seconds=310)
    assert await redeem(found, token, charge) == Reason.EXPIRED, "until it expires"


async def test_who_else_speaks_for_an_audience_may_ask_and_gets_no_second_use(found: Exchanging) -> None:
    charge = act("orders.charge", audience=SHARED)
    token = (await found.token(charge)).token
    assert await check(found, token, charge, ORDERS) == ""
    assert await check(found, token, charge, AGENT) == ""
    assert await check(found, token, charge, "spiffe://acme.test/somebody/else") == Reason.WRONG_AUDIENCE
    assert await redeem(found, token, charge, asker=ORDERS) == ""
    assert await redeem(found, token, charge, asker=AGENT) == Reason.ALREADY_USED


async def test_a_token_that_the_ledger_does_not_know_is_revoked(found: Exchanging, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    async with exchanging(elsewhere) as other:
        foreign = await other.token(act("orders.charge"))
        other.exchange.keyring, ours = found.exchange.keyring, other.exchange.keyring
        same_key = await other.token(act("orders.charge"))
        other.exchange.keyring = ours
    assert await check(found, foreign.token, act("orders.charge")) == Reason.UNAUTHENTICATED
    assert await check(found, same_key.token, act("orders.charge")) == Reason.REVOKED
    assert await redeem(found, same_key.token, act("orders.charge")) == Reason.REVOKED
    assert await check(found, (await found.token(act())).token, act()) == ""


@pytest.mark.parametrize("idempotency_id", ["", "x" * 15, "x" * 65, "x" * 16 + "\n", "é" * 16])
async def test_an_idempotency_id_is_long_and_plain(found: Exchanging, idempotency_id: str) -> None:
    token = (await found.token(act("orders.charge"))).token
    assert await redeem(found, token, act("orders.charge"), idempotency_id) == Reason.MALFORMED
    assert await redeem(found, token, act("orders.charge"), "x" * 16) == ""


async def test_what_cannot_be_read_is_refused_and_recorded(found: Exchanging) -> None:
    token = (await found.token(act())).token

    def unreadable() -> Action:
        raise Invalid("no action at all")

    with pytest.raises(Invalid):
        await recheck(found).check(found.caller(ORDERS), token, unreadable, found.now(), CORRELATION)
    with pytest.raises(Invalid):
        await recheck(found).redeem(found.caller(ORDERS), token, unreadable, ID, found.now(), CORRELATION)
    refusals = [one for one in await found.records() if isinstance(one, Refusal)]
    assert [(one.stage, one.principal) for one in refusals] == [("check", ORDERS), ("redeem", ORDERS)]
