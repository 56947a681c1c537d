"""Whoever tells of changes may fail, end, flap or go blind: nothing that it missed is believed on."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from support.pki import CA, JwtAuthority, snapshot
from support.processes import until
from support.redeciding import POLICIES, POLICY, SHORT, Redeciding, Source, redeciding

from attestors.contract import AttestationUnavailable
from broker.exchange import Caller
from broker.identity import jwt_svid, x509_svid
from broker.identity.spiffe_id import TrustDomain
from broker.identity.trust import TrustBundle, TrustSnapshot
from broker.scope.case import Bounds

OURS = TrustDomain.parse("acme.test")
AWAY = AttestationUnavailable("away")


@contextmanager
def unwatched(desk: Source) -> Iterator[None]:
    """Its watch does not begin again while the block lasts."""
    desk.refuses_to_watch = RuntimeError("not now")
    yield
    desk.refuses_to_watch = None


@pytest.mark.parametrize("end", [RuntimeError("whatever"), AttestationUnavailable("gone"), None], ids=repr)
async def test_a_watch_that_fails_or_ends_is_begun_anew_and_what_it_missed_is_decided(
    tmp_path: Path, end: Exception | None
) -> None:
    desk = Source()
    async with redeciding(tmp_path, desk) as found:
        missed = await found.token("orders.ticketed", ticket="T-1")
        spared = await found.token("orders.ticketed", ticket="T-2")
        desk.tell(end)
        with unwatched(desk):
            await until(lambda: desk.watched == 2, "it was tried again")
            desk.said["T-1"] = {"state": "closed"}  # nobody hears of it
        await found.becomes(missed, "ticket_closed")
        await found.settled()
        assert found.says(spared) == ""
        desk.closes("T-2")
        await found.becomes(spared, "ticket_closed")


async def test_a_watch_that_fails_takes_no_other_with_it(tmp_path: Path) -> None:
    desk, scores = Source(), Source("session")
    async with redeciding(tmp_path, desk, scores) as found:
        one = await found.token("orders.also", session="s")
        with unwatched(desk):
            desk.tell(RuntimeError("whatever"))
            await until(lambda: desk.watched == 2, "it was tried again")
            scores.closes("s")
            await found.becomes(one, "session_risk")


async def test_a_flapping_watch_misses_nothing_for_good(tmp_path: Path) -> None:
    """It fails whenever it is begun: then everything is looked at again each time, which is a poll."""
    desk = Source()
    async with redeciding(tmp_path, desk, bounds=Bounds(blind_s=20)) as found:
        kept, lost = [await found.token("orders.ticketed", ticket=ticket) for ticket in ("T-1", "T-2")]
        with unwatched(desk):
            desk.tell(None)
            await until(lambda: desk.watched >= 2, "it was tried again")
            desk.said["T-2"] = {"state": "closed"}
            await found.becomes(lost, "ticket_closed")
            await until(lambda: desk.watched >= 4, "and again")
            await found.settled()
            assert found.says(kept) == ""


async def test_a_watch_that_is_away_and_a_source_that_cannot_be_asked_end_what_rests_on_it(tmp_path: Path) -> None:
    desk = Source()
    async with redeciding(tmp_path, desk, bounds=SHORT) as found:
        one, other = await found.token("orders.ticketed", ticket="T-1"), await found.token()
        desk.fails["T-1"] = AWAY
        with unwatched(desk):
            desk.tell(None)
            await found.becomes(one, "attestation_unavailable")
        assert found.says(other) == ""


# -- blind -------------------------------------------------------------------------------------------------------------


async def test_what_a_source_cannot_see_for_the_bound_is_refused_with_all_that_rests_on_it(tmp_path: Path) -> None:
    """By prefixes of fact keys, in one record however many they are."""
    desk = Source()
    async with redeciding(tmp_path, desk, bounds=SHORT) as found:
        blind = [await found.token("orders.ticketed", ticket=f"A-{number}") for number in range(20)]
        seen, plain = await found.token("orders.ticketed", ticket="B-1"), await found.token()
        lost = desk.lost["ticket:A-"] = asyncio.get_running_loop().time()
        await found.becomes(blind[0], "attestation_unavailable")
        assert asyncio.get_running_loop().time() - lost >= found.scope.deciding.bounds.blind_s
        assert {found.says(one) for one in blind} == {"attestation_unavailable"}
        assert (found.says(seen), found.says(plain)) == ("", "")
        (record,) = await found.refusals()
    assert len(record.jtis) == 20
    assert record.cause == "blind:ticket:A-"


async def test_what_is_seen_again_in_time_stays(tmp_path: Path) -> None:
    desk = Source()
    async with redeciding(tmp_path, desk, bounds=Bounds(blind_s=20)) as found:
        one = await found.token("orders.ticketed", ticket="T-1")
        now = asyncio.get_running_loop().time()
        desk.lost["ticket:"] = now
        assert found.scope.watch.blind(now - 20) == []
        assert found.scope.watch.blind(now) == ["ticket:"]
        desk.lost.clear()
        assert found.scope.watch.blind(now) == []
        assert found.says(one) == ""


async def test_what_is_minted_while_nobody_sees_does_not_last(tmp_path: Path) -> None:
    """It could be looked at, and was: but what changes next nobody would hear of."""
    desk = Source()
    async with redeciding(tmp_path, desk, bounds=SHORT) as found:
        desk.lost["ticket:"] = asyncio.get_running_loop().time() - 1
        one = await found.token("orders.ticketed", ticket="T-1")
        await found.becomes(one, "attestation_unavailable")
        desk.lost.clear()
        assert found.says(await found.token("orders.ticketed", ticket="T-1")) == ""


async def test_being_blind_for_long_decides_nothing_over_and_over(tmp_path: Path) -> None:
    desk = Source()
    async with redeciding(tmp_path, desk, bounds=SHORT) as found:
        one = await found.token("orders.ticketed", ticket="T-1")
        desk.lost["ticket:"] = asyncio.get_running_loop().time() - 1
        await found.becomes(one, "attestation_unavailable")
        heard, looks = found.parts.exchange.scope.heard, desk.looks["T-1"]
        desk.lost["session:"] = 0.0  # of which nothing is live
        loop = asyncio.get_running_loop()
        until_then = loop.time() + 0.6  # two more looks at who is blind
        await until(lambda: loop.time() > until_then, "it goes on being blind")
        assert (found.parts.exchange.scope.heard, desk.looks["T-1"]) == (heard, looks)


# -- policy ------------------------------------------------------------------------------------------------------------


async def test_a_policy_that_changes_touches_only_the_actions_that_it_decides_otherwise(tmp_path: Path) -> None:
    async with redeciding(tmp_path) as found:
        reads, once = await found.token(), await found.token("orders.once")
        also = await found.token("orders.also")
        decided = found.scope.deciding.decided
        await found.policy(f"// a comment\n{POLICY}")
        await found.settled()
        assert found.scope.deciding.decided == decided, "it says the same"
        await found.policy(POLICY.replace('@id("also") @reuse("ttl") @max_ttl("300s")', '@id("also") @reuse("ttl")'))
        await found.settled()
        assert found.scope.deciding.decided == decided + 1
        assert [found.says(one) for one in (reads, once, also)] == ["", "", ""]


async def test_an_action_that_no_policy_folder_declares_any_more_takes_its_credentials_with_it(tmp_path: Path) -> None:
    async with redeciding(tmp_path) as found:
        hit, spared = await found.token("orders.once"), await found.token()
        schema = tmp_path / "policy" / "orders.cedarschema"
        schema.write_text(schema.read_text().replace('"orders.once", ', ""))
        await found.policy(POLICY.replace(', Action::"orders.once"', ""))
        await found.becomes(hit, "unknown_action")
        await found.settled()
        assert found.says(spared) == ""


async def test_two_policies_in_a_row_end_with_what_the_last_one_says(tmp_path: Path) -> None:
    async with redeciding(tmp_path) as found:
        lives = [await found.token() for _ in range(100)]
        kept = [await found.token("orders.once") for _ in range(100)]
        for ttl in ("200s", "100s", "50s"):
            await found.policy(POLICY.replace('"300s"', f'"{ttl}"'))
        await found.policy(POLICY.replace('Action::"orders.read", ', ""))
        await found.settled()
        assert {found.says(one) for one in lives} == {"denied"}
        assert {found.says(one) for one in kept} == {""}


# -- trust -------------------------------------------------------------------------------------------------------------


def federated(found: Redeciding) -> TrustSnapshot:
    """Ours, and another domain."""
    other = CA("other.test", now=found.parts.now())
    return snapshot(found.parts.trust.bundles[OURS], other.bundle(), own=found.parts.trust.own)


def trusts(found: Redeciding, trust: TrustSnapshot) -> None:
    """From now on, as the Workload API tells it."""
    found.parts.trust = trust
    found.scope.watch.offer_trust(trust)


async def test_a_domain_that_is_trusted_no_more_takes_its_callers_credentials_with_it(tmp_path: Path) -> None:
    """Invariant 5."""
    async with redeciding(tmp_path) as found:
        trusts(found, federated(found))
        theirs = await found.token(caller=found.caller(spiffe_id="spiffe://other.test/build/agent"))
        ours = await found.token()
        assert (found.says(theirs), found.says(ours)) == ("", "")
        trusts(found, snapshot(found.parts.trust.bundles[OURS], own=found.parts.trust.own, revision=2))
        await found.becomes(theirs, "unauthenticated")
        await found.settled()
        assert found.says(ours) == ""


@pytest.mark.parametrize("how", ["x509", "jwt"])
async def test_an_authority_that_leaves_its_bundle_takes_along_whom_it_vouched_for(tmp_path: Path, how: str) -> None:
    async with redeciding(tmp_path) as found:
        bundle = found.parts.trust.bundles[OURS]
        successor = CA("acme.test", seed="the next root", now=found.parts.now()).bundle(JwtAuthority(kid="next"))
        both = replace(
            bundle,
            x509_authorities=(*bundle.x509_authorities, *successor.x509_authorities),
            jwt_authorities={**bundle.jwt_authorities, **successor.jwt_authorities},
        )
        trusts(found, snapshot(both, own=found.parts.trust.own, revision=2))
        old, new = [await found.token(caller=vouched(found, one, how)) for one in (bundle, successor)]
        assert (found.says(old), found.says(new)) == ("", "")
        trusts(found, snapshot(successor, own=found.parts.trust.own, revision=3))
        await found.becomes(old, "unauthenticated")
        await found.settled()
        assert found.says(new) == ""


def vouched(found: Redeciding, bundle: TrustBundle, how: str) -> Caller:
    """A caller whose SVID an authority of this bundle signed."""
    caller = found.caller()
    if how == "x509":
        digest = x509_svid.authority_digest(bundle.x509_authorities[0])
    else:
        [[key]] = bundle.jwt_authorities.values()
        digest = jwt_svid.authority_digest(key)
    return replace(caller, identity=replace(caller.identity, authority_sha256=digest))


async def test_an_authority_that_joins_a_bundle_takes_nothing_away(tmp_path: Path) -> None:
    async with redeciding(tmp_path) as found:
        one = await found.token()
        heard = found.parts.exchange.scope.heard
        trusts(found, federated(found))
        ours, theirs = found.parts.trust.bundles.values()
        more = CA("acme.test", seed="the next root", now=found.parts.now()).bundle()
        both = replace(ours, x509_authorities=(*ours.x509_authorities, *more.x509_authorities))
        trusts(found, snapshot(both, theirs, own=found.parts.trust.own, revision=3))
        assert (found.parts.exchange.scope.heard, found.says(one)) == (heard, "")


async def test_our_own_identity_that_has_ended_is_no_yes(tmp_path: Path) -> None:
    """Bundles are no fresher than our own SVID: while it is gone nothing can be decided, and then nothing counts."""
    async with redeciding(tmp_path, bounds=SHORT) as found:
        one = await found.token()
        found.parts.trust = replace(found.parts.trust, own=None)
        await found.policy(POLICY.replace('"300s"', '"200s"'))
        await found.becomes(one, "identity_unavailable")


# -- forgetting --------------------------------------------------------------------------------------------------------


async def test_what_has_ended_is_forgotten_with_all_that_it_rested_on(tmp_path: Path) -> None:
    desk, brief = Source(), POLICIES | {"orders.cedar": POLICY.replace('"300s"', '"1s"')}
    async with redeciding(tmp_path, desk, policies=brief) as found:
        live_set = found.parts.exchange.scope.live
        await found.token("orders.ticketed", ticket="T-1")
        assert (len(live_set), live_set.keys("ticket:")) == (1, ["ticket:T-1"])
        await until(lambda: len(live_set) == 0, "it is forgotten")
        assert live_set.keys("") == []
