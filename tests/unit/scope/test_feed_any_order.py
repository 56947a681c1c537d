"""Whatever happens, and at whatever pace a guard reads, it ends up knowing exactly what a fresh snapshot says."""

from collections.abc import Sequence

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule
from support.lives import NOW, OTHERS, POLICY, Reader, live
from support.whole_broker import AGENT, OPERATOR, ORDERS

from broker.errors import Reason
from broker.guard.scope_state import FeedBroken
from broker.scope.feed import Feed
from broker.scope.live import Live
from broker.scope.suspension import Common, Suspension

LIVES = [
    live(f"{number}", audience=audience, principal=principal, action=action, policy_revision=policy)
    for number, (audience, principal, action, policy) in enumerate(
        (audience, principal, action, policy)
        for _ in range(4)
        for audience in (ORDERS, OTHERS)
        for principal in (AGENT, OPERATOR)
        for action in ("orders.read", "orders.once")
        for policy in (POLICY, "sha256:later")
    )
]
COMMONS = [
    None,
    Common(actions=frozenset({"orders.read"})),
    Common(policy_other_than="sha256:later"),
    Common(principal=AGENT),
    Common(trust_domain="acme.test"),
]


def lists(least: int, most: int) -> st.SearchStrategy[list[Live]]:
    numbers = st.lists(st.integers(0, len(LIVES) - 1), min_size=least, max_size=most, unique=True)
    return numbers.map(lambda chosen: [LIVES[number] for number in chosen])


some = lists(0, 4)


class AnyOrder(RuleBasedStateMachine):
    """Few changes are kept and few fit into a message, so that readers fall behind and snapshots come in parts."""

    readers = Bundle("readers")
    suspensions = Bundle("suspensions")

    @initialize()
    def begin(self) -> None:
        self.feed = Feed(kept=4, in_one=2)
        self.feed.proven(NOW)
        self.refused: set[str] = set()
        self.reading: list[Reader] = []
        self.number = 0

    @rule(lives=some, reason=st.sampled_from([Reason.DENIED, Reason.REVOKED]))
    def refuse(self, lives: Sequence[Live], reason: Reason) -> None:
        fresh = [one for one in lives if one.jti not in self.refused]
        self.refused |= {one.jti for one in fresh}
        self.feed.refuse(fresh, reason)

    @rule(lives=lists(5, 6))
    def refuse_more_than_is_kept(self, lives: Sequence[Live]) -> None:
        for one in lives:
            self.refuse([one], Reason.DENIED)

    @rule(target=suspensions, lives=some, common=st.sampled_from(COMMONS))
    def suspend(self, lives: Sequence[Live], common: Common | None) -> Suspension:
        fitting = [one for one in LIVES if common.fits(one)] if common is not None else lives
        self.number += 1
        waiting = {one.jti: one for one in fitting}
        made = Suspension(id=self.number, cause="cause", common=common, waiting=waiting)
        self.feed.suspend(made)
        return made

    @rule(suspension=suspensions, lives=some)
    def release(self, suspension: Suspension, lives: Sequence[Live]) -> None:
        self.feed.release(suspension.id, lives)

    @rule(suspension=consumes(suspensions))
    def end(self, suspension: Suspension) -> None:
        self.feed.release(suspension.id, (), all_left=True)

    @rule(number=st.integers(0, 3))
    def change_keys(self, number: int) -> None:
        self.feed.offer_keys(KEY_SETS[number])

    @rule(target=readers, audiences=st.sampled_from([(ORDERS,), (OTHERS,), (ORDERS, OTHERS)]))
    def come(self, audiences: tuple[str, ...]) -> Reader:
        made = Reader(self.feed, *audiences)
        self.reading.append(made)
        return made

    @rule(reader=readers, count=st.integers(1, 4), cut=st.booleans())
    def read(self, reader: Reader, count: int, cut: bool) -> None:  # noqa: FBT001 - drawn
        for _ in range(count):
            try:
                reader.read()
            except (LookupError, FeedBroken):  # it fell behind, or came back in the middle of a snapshot: anew
                reader.come_back()
        if cut:
            reader.come_back()

    @invariant()
    def nobody_believes_what_was_refused_once_it_knows_all(self) -> None:
        for reader in getattr(self, "reading", []):
            if reader.knows_all and reader.state.is_whole:
                fresh = Reader(self.feed, *reader.audiences).catch_up()
                own = [one for one in LIVES if one.audience in reader.audiences]
                assert reader.say(own) == fresh.say(own)
                assert all(reader.says(one) for one in own if one.jti in self.refused)
                assert reader.kids() == fresh.kids()

    def teardown(self) -> None:
        for reader in getattr(self, "reading", []):
            for _ in range(100):
                if reader.knows_all and reader.state.is_whole:
                    break
                self.read(reader, 1, cut=False)
            assert reader.knows_all, "it gets there"
        self.nobody_believes_what_was_refused_once_it_knows_all()


KEY_SETS = [
    b'{"keys":[{"kty":"EC","crv":"P-256","kid":"%d","use":"sig","alg":"ES256",'
    b'"x":"f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU","y":"x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0"}]}' % number
    for number in range(4)
]

TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
