"""What operators refuse: live credentials, and by standing denials those that would be given; attacks beside uses."""

from datetime import timedelta
from pathlib import Path

import pytest
from support.exchanging import CORRELATION
from support.lives import Reader
from support.operating import (
    FAR,
    OTHER,
    SECOND_OPERATOR,
    STRANGER,
    operating,
    why,
)
from support.whole_broker import AGENT, OPERATOR

from broker import operator_revocation
from broker.errors import Reason
from broker.ledger.records import Operated, Refusal, ScopeRefused
from broker.ledger.scope_records import StandingDenial, StandingLifted
from broker.operator_revocation import MAX_SHOWN
from broker.scope.case import AT_ONCE

DOMAIN = "acme.test"


async def test_a_revoked_workload_gets_nothing_until_it_is_lifted_and_others_are_spared(tmp_path: Path) -> None:
    async with operating(tmp_path) as found:
        dead, spared = await found.token(), await found.token(who=OTHER)
        done = await found.revoke(principal=AGENT, standing=True, reason="its node was broken into")
        assert (done.hits, [one.jti for one in done.first]) == (1, [dead.claims.jti])
        assert (found.dead(dead), found.dead(spared)) == (True, False)
        assert await found.reason() == await found.reason("orders.long") == Reason.REVOKED
        assert await found.reason(who=OTHER) == ""
        (denial,) = await found.standing()
        assert (denial.id, denial.principal, denial.until) == (done.standing_id, AGENT, None)

        await found.lift(denial.id, reason="built anew")
        assert await found.standing() == []
        assert await found.reason() == ""
        assert found.dead(dead), "refused is final"
        records = await found.parts.records()
    (kept,) = [one for one in records if isinstance(one, StandingDenial)]
    assert (kept.by, kept.detail, kept.policies) == (
        OPERATOR,
        "its node was broken into",
        ("orders.cedar#hidden-policy-name-operators",),
    )
    (refused,) = [one for one in records if isinstance(one, ScopeRefused)]
    assert (refused.jtis, refused.reason, refused.cause) == (
        (dead.claims.jti,),
        Reason.REVOKED,
        f"standing:{denial.id}",
    )
    assert (refused.by, refused.detail, refused.correlation_id) == (OPERATOR, kept.detail, CORRELATION)
    (lifted,) = [one for one in records if isinstance(one, StandingLifted)]
    assert (lifted.id, lifted.by, lifted.detail) == (denial.id, OPERATOR, "built anew")
    assert records.index(kept) < records.index(refused) < records.index(lifted)


@pytest.mark.parametrize("count", [AT_ONCE, AT_ONCE + 1])
async def test_many_that_are_revoked_are_suspended_by_what_names_them_before_it_is_recorded(
    tmp_path: Path, count: int
) -> None:
    """The store takes its time for so many; guards hear of it at once, in one message."""
    async with operating(tmp_path) as found:
        tokens, spared = [await found.token() for _ in range(count)], await found.token(who=OTHER)
        hit, other = (found.scope.live.get(one.claims.jti) for one in (tokens[-1], spared))
        assert hit is not None
        assert other is not None
        guard = Reader(found.opened.feed, hit.audience, now=found.now()).catch_up()
        assert guard.say([hit, other]) == {hit.jti: "", other.jti: ""}
        said, wake = [], found.opened.feed.wake

        def listen(audiences: frozenset[str] | None) -> None:
            said.append(guard.catch_up().says(hit))
            wake(audiences)

        found.opened.feed.wake = listen
        await found.revoke(principal=AGENT)
        found.opened.feed.wake = wake
        changes = [one for one, before in zip(said, ["", *said], strict=False) if one != before]
        assert changes == (["suspended", "revoked"] if count > AT_ONCE else ["revoked"])
        assert guard.says(other) == ""


async def test_without_a_denial_what_lives_is_refused_and_the_next_one_is_given(tmp_path: Path) -> None:
    async with operating(tmp_path) as found:
        dead = await found.token()
        done = await found.revoke(principal=AGENT)
        assert (done.hits, done.standing_id, found.dead(dead)) == (1, "", True)
        assert not found.dead(await found.token())
        assert (await found.revoke(jti=dead.claims.jti)).hits == 0, "it was refused before"
        records = await found.parts.records()
    (refused,) = [one for one in records if isinstance(one, ScopeRefused)]
    assert refused.cause == "operator"


@pytest.mark.parametrize(
    ("chosen", "hit"),
    [
        ({"principal": AGENT}, {"agent", "agent-long"}),
        ({"principal": "spiffe://acme.test/build/"}, {"agent", "agent-long", "other"}),
        ({"principal": "spiffe://acme.test/build/agent/"}, set()),
        ({"principal": "spiffe://acme.test/buil/"}, set()),
        ({"action": "orders.long"}, {"agent-long"}),
        ({"action": "orders.lon"}, set()),
        ({"trust_domain": DOMAIN}, {"agent", "agent-long", "other", "far"}),
        ({"trust_domain": "acme.tes"}, set()),
        ({"trust_domain": "acme.test.evil"}, set()),
        ({"action": "orders.read", "principal": AGENT}, {"agent"}),
        ({"action": "orders.read", "trust_domain": DOMAIN, "principal": FAR}, {"far"}),
        ({"jti": "agent"}, {"agent"}),
        ({"jti": "agent", "action": "orders.long"}, set()),
    ],
    ids=str,
)
async def test_what_is_selected_is_hit_and_nothing_else(tmp_path: Path, chosen: dict[str, str], hit: set[str]) -> None:
    async with operating(tmp_path) as found:
        tokens = {
            "agent": await found.token(),
            "agent-long": await found.token("orders.long"),
            "other": await found.token(who=OTHER),
            "far": await found.token(who=FAR),
        }
        if "jti" in chosen:
            chosen = {**chosen, "jti": tokens[chosen["jti"]].claims.jti}
        dry = await found.revoke(**chosen, dry_run=True)
        assert not any(map(found.dead, tokens.values()))
        done = await found.revoke(**chosen)
        assert (dry.hits, dry.first) == (done.hits, done.first)
        assert {name for name, token in tokens.items() if found.dead(token)} == hit
        assert {one.jti for one in done.first} == {tokens[name].claims.jti for name in hit}


@pytest.mark.parametrize(
    ("chosen", "denied"),
    [
        ({"principal": AGENT}, {"agent", "agent-long"}),
        ({"principal": "spiffe://acme.test/build/"}, {"agent", "agent-long", "other"}),
        ({"action": "orders.long"}, {"agent-long"}),
        ({"trust_domain": "partner.test"}, set()),
        ({"action": "orders.read", "principal": AGENT}, {"agent"}),
    ],
    ids=str,
)
async def test_a_denial_stands_against_what_was_selected_and_nothing_else(
    tmp_path: Path, chosen: dict[str, str], denied: set[str]
) -> None:
    async with operating(tmp_path) as found:
        await found.revoke(**chosen, standing=True)
        asked = {
            "agent": (),
            "agent-long": ("orders.long",),
            "other": ("orders.read", OTHER),
            "far": ("orders.read", FAR),
        }
        reasons = {name: await found.reason(*arguments) for name, arguments in asked.items()}
        assert reasons == {name: "revoked" if name in denied else "" for name in asked}


async def test_a_denial_ends_by_itself_and_what_it_refused_stays_refused(tmp_path: Path) -> None:
    async with operating(tmp_path) as found:
        dead = await found.token()
        await found.revoke(principal=AGENT, standing=True, until=found.now() + timedelta(minutes=30))
        assert await found.reason() == Reason.REVOKED
        found.parts.ahead = timedelta(minutes=31)
        assert await found.reason() == ""
        assert await found.standing() == []
        assert found.dead(dead)


async def test_a_dry_run_says_what_it_would_hit_changes_nothing_and_is_recorded(tmp_path: Path) -> None:
    async with operating(tmp_path) as found:
        for _ in range(MAX_SHOWN + 5):
            await found.token()
        tokens = [await found.token()]
        done = await found.revoke(principal=AGENT, standing=True, dry_run=True)
        assert (done.hits, len(done.first), done.standing_id) == (MAX_SHOWN + 6, MAX_SHOWN, "")
        assert not any(map(found.dead, tokens))
        assert await found.reason() == ""
        records = await found.parts.records()
    assert not [one for one in records if isinstance(one, ScopeRefused | StandingDenial)]
    (operated,) = [one for one in records if isinstance(one, Operated)]
    assert (operated.resource, operated.principal) == ("https://broker.acme.test/revoke", OPERATOR)


# -- who may -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["revoke", "dry-run", "standing", "lift"])
async def test_who_is_no_operator_changes_and_sees_nothing(tmp_path: Path, what: str) -> None:
    async with operating(tmp_path) as found:
        token, entry = await found.token(), (await found.revoke(principal=OTHER, standing=True)).standing_id
        calls = {
            "revoke": lambda by: found.revoke(by, principal=AGENT, standing=True),
            "dry-run": lambda by: found.revoke(by, principal=AGENT, dry_run=True),
            "standing": found.standing,
            "lift": lambda by: found.lift(entry, by),
        }
        assert await why(calls[what](STRANGER)) == Reason.DENIED
        assert not found.dead(token)
        assert [one.id for one in await found.standing()] == [entry]
        assert await why(calls[what](OPERATOR)) == "", "the control"
        refusals = [one for one in await found.parts.records() if isinstance(one, Refusal)]
    (refusal,) = [one for one in refusals if one.principal == STRANGER]
    assert (refusal.reason, refusal.action) == (Reason.DENIED, "broker.operate")


async def test_who_is_denied_cannot_lift_it_and_nobody_denies_themselves(tmp_path: Path) -> None:
    async with operating(tmp_path) as found:
        mine = {"principal": OPERATOR}, {"trust_domain": DOMAIN}, {"action": "broker.operate"}
        for chosen in (*mine, {"principal": OPERATOR, "action": "broker.operate"}):
            assert await why(found.revoke(**chosen, standing=True)) == Reason.MALFORMED
        assert await found.standing() == []
        entry = (await found.revoke(principal=SECOND_OPERATOR, standing=True)).standing_id
        assert await why(found.lift(entry, SECOND_OPERATOR)) == Reason.REVOKED
        assert await why(found.standing(SECOND_OPERATOR)) == Reason.REVOKED
        await found.lift(entry)
        assert await why(found.standing(SECOND_OPERATOR)) == ""
        assert (await found.revoke(trust_domain=DOMAIN)).hits == 0, "live ones of one's own domain may be revoked"


async def test_what_does_not_stand_is_not_lifted(tmp_path: Path) -> None:
    async with operating(tmp_path) as found:
        entry = (await found.revoke(principal=AGENT, standing=True)).standing_id
        for wrong in ("", "no-such-id", entry.upper() + "0", entry[:-1], "\x00" * 500):
            assert await why(found.lift(wrong)) == Reason.DENIED
        assert await why(found.lift(entry, reason="x\ny")) == Reason.MALFORMED
        assert await found.reason() == Reason.REVOKED
        await found.lift(entry)
        assert await why(found.lift(entry)) == Reason.DENIED
        refusals = [one.stage for one in await found.parts.records() if isinstance(one, Refusal)]
    assert refusals.count("lift") == 7


async def test_so_much_stands_that_decisions_would_take_longer_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operator_revocation, "MAX_STANDING", 2)
    async with operating(tmp_path) as found:
        entries = [(await found.revoke(principal=one, standing=True)).standing_id for one in (AGENT, OTHER)]
        assert await why(found.revoke(principal=FAR, standing=True)) == Reason.QUOTA
        assert await found.reason(who=FAR) == ""
        await found.lift(entries[0])
        assert await why(found.revoke(principal=FAR, standing=True)) == ""


# -- what makes no sense -----------------------------------------------------------------------------------------------


async def test_an_order_that_cannot_be_read_or_is_over_is_refused_and_recorded(tmp_path: Path) -> None:
    async with operating(tmp_path) as found:
        token, now = await found.token(), found.now()
        assert await why(found.revoke()) == Reason.MALFORMED
        for until in (now - timedelta(seconds=1), now - timedelta(days=9)):
            assert await why(found.revoke(principal=AGENT, standing=True, until=until)) == Reason.MALFORMED
        assert (found.dead(token), await found.standing()) == (False, [])
        refusals = [one for one in await found.parts.records() if isinstance(one, Refusal)]
    assert [(one.stage, one.principal) for one in refusals] == [("revoke", OPERATOR)] * 3
