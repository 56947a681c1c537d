"""A suspension names the same credentials to a guard as here, one by one or by what they have in common."""

from hypothesis import given
from hypothesis import strategies as st
from support.lives import OTHERS, POLICY, Reader, live
from support.whole_broker import AGENT, OPERATOR, ORDERS

from broker.scope.feed import Feed
from broker.scope.live import Live
from broker.scope.suspension import BY_NAME, Common, Suspension

FOREIGN = "spiffe://other.test/build/agent"
lives = st.builds(
    lambda number, principal, action, policy, audience: live(
        f"jti-{number}", principal=principal, action=action, policy_revision=policy, audience=audience
    ),
    st.integers(0, 10**6),
    st.sampled_from([AGENT, OPERATOR, FOREIGN]),
    st.sampled_from(["orders.read", "orders.once"]),
    st.sampled_from([POLICY, "sha256:later"]),
    st.sampled_from([ORDERS, OTHERS]),
)
commons = st.builds(
    Common,
    policy_other_than=st.sampled_from(["", POLICY, "sha256:later"]),
    actions=st.sets(st.sampled_from(["orders.read", "orders.once"])).map(frozenset),
    principal=st.sampled_from(["", AGENT, FOREIGN, "spiffe://acme.test/build/", "spiffe://acme.test/buil"]),
    trust_domain=st.sampled_from(["", "acme.test", "other.test"]),
)


def many(count: int = BY_NAME + 1, **changes: object) -> list[Live]:
    return [live(f"one-of-many-{number}", **changes) for number in range(count)]


def told(suspension: Suspension) -> Reader:
    feed = Feed()
    feed.proven(Reader(feed).now)
    feed.suspend(suspension)
    return Reader(feed, ORDERS, OTHERS).catch_up()


@given(commons, st.lists(lives, max_size=8))
def test_a_guard_takes_exactly_those_for_suspended_that_have_it_in_common(common: Common, others: list[Live]) -> None:
    found = [one for one in (*many(), *others) if common.fits(one)]
    suspension = Suspension.of(1, "cause", found, common)
    if not found:
        return
    reader = told(suspension)
    for one in others:
        named = suspension.common is None
        expected = one.jti in suspension.waiting if named else common.fits(one)
        assert reader.says(one) == ("suspended" if expected else ""), one


def test_few_are_named_one_by_one_and_many_by_what_they_have_in_common() -> None:
    few, more = many(BY_NAME), many()
    common = Common(actions=frozenset({"orders.read"}))
    newcomer = live("newcomer")
    one_by_one, together = Suspension.of(1, "cause", few, common), Suspension.of(2, "cause", more, common)
    assert (one_by_one.common, together.common) == (None, common)
    assert not one_by_one.fits(newcomer), "nobody takes it for one of them"
    assert together.fits(newcomer)
    assert not together.fits(more[0]), "it is one of them"
    assert not together.fits(live("other", action="orders.once"))
    assert Suspension.of(3, "cause", more, None).common is None
