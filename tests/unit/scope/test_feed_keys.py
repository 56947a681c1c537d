"""Keys rotate without a gap: whoever follows the feed knows the key of each token, whenever that was minted."""

from datetime import UTC, timedelta
from pathlib import Path

from support.ledger_records import open_ledger
from support.lives import Reader
from support.pki import CA, NOW, snapshot
from support.whole_broker import BROKER, ISSUER

from broker.credentials.keyring import KeyRing
from broker.guard.keys import UnknownKey
from broker.scope.feed import Feed

LIFETIME, AHEAD = timedelta(minutes=30), timedelta(minutes=6)


async def test_a_guard_that_hears_the_feed_knows_each_key_from_before_its_first_token_to_its_last(
    tmp_path: Path,
) -> None:
    """Every 30 s of three hours."""
    authority, now, feed = CA(now=NOW), NOW.astimezone(UTC), Feed()
    own = authority.svid(BROKER, lifetime=timedelta(days=1)).own()
    reader = Reader(feed, now=now)
    async with await open_ledger(tmp_path, lambda: now) as ledger:
        trust = snapshot(authority.bundle(), own=own)
        ring = KeyRing(ledger, lambda: trust, issuer=ISSUER, lifetime=LIFETIME, ahead=AHEAD)
        await ring.start(now)
        feed.offer_keys(ring.key_set())
        used: dict[str, object] = {}
        told = []
        for _ in range(360):
            now += timedelta(seconds=30)
            await ring.maintain(now)
            kid = ring.current(now).kid  # a token is minted before the feed says anything new
            reader.now = now
            feed.proven(now)
            assert kid in {*reader.catch_up().kids()} or not told
            used[kid] = now
            feed.offer_keys(ring.key_set())
            told.append(feed.position)
            reader.catch_up()
            for known, when in used.items():
                if now < when + timedelta(seconds=305):
                    assert reader.state.key(known)
        assert len(used) > 5, "keys were replaced"
        assert told[-1] < 360 / 2, "and told where they changed alone"
        try:
            reader.state.key(next(iter(used)))
        except UnknownKey:
            return
    raise AssertionError("what was withdrawn is known no more")
