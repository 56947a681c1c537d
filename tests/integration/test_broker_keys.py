"""The broker's signing keys as guards meet them: published before they are used, and good after a restart."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from support.ledger_records import open_ledger
from support.pki import CA, NOW, snapshot
from support.receiving import as_action, guard_of, key_ids, shown
from support.whole_broker import BROKER, serving, whole_broker

from broker.credentials import jose
from broker.credentials.keyring import KeyRing
from broker.errors import Reason, Refused
from broker.guard.keys import parse_key_set

LIFETIME, AHEAD = timedelta(minutes=30), timedelta(minutes=6)


async def test_a_key_is_in_the_key_set_before_its_first_use_and_until_its_last_token_ended(tmp_path: Path) -> None:
    """Every 30 s of three hours: whoever fetched the key set within `AHEAD` knows the key of today's tokens."""
    authority = CA(now=NOW)
    now = NOW.astimezone(UTC)
    async with await open_ledger(tmp_path, lambda: now) as ledger:
        ring = KeyRing(
            ledger,
            lambda: snapshot(authority.bundle(), own=authority.svid(BROKER, lifetime=timedelta(days=1)).own()),
            issuer="https://broker.acme.test",
            lifetime=LIFETIME,
            ahead=AHEAD,
        )
        await ring.start(now)
        published: dict[str, datetime] = {}
        last_used: dict[str, datetime] = {}
        first_used: dict[str, datetime] = {}
        for _ in range(360):
            now += timedelta(seconds=30)
            await ring.maintain(now)
            key_set = parse_key_set(ring.key_set())
            for kid in key_set:
                published.setdefault(kid, now)
            kid = ring.current(now).kid
            first_used.setdefault(kid, now)
            last_used[kid] = now
            for used, when in last_used.items():
                if now < when + timedelta(seconds=305):
                    assert used in key_set, "a token may still be out"
        assert len(first_used) > 5, "keys were replaced"
        started = min(first_used.values())
        for kid, when in first_used.items():
            assert when == started or when - published[kid] >= AHEAD - timedelta(seconds=30)
        gone = [kid for kid, when in last_used.items() if now > when + LIFETIME + AHEAD + timedelta(seconds=305)]
        assert gone
        assert not set(gone) & set(parse_key_set(ring.key_set())), "what has ended is withdrawn"


async def test_a_restart_leaves_earlier_tokens_good_until_they_expire() -> None:
    with whole_broker() as whole:
        async with whole.wire() as wire:
            token, single = await wire.token("orders.once"), await wire.token("orders.charge")
            (before,) = await key_ids(whole)
            key = wire.key
        whole.broker.kill()  # nothing is written down on the way out

        with serving(whole.broker.folder / "broker.toml", whole.domain) as whole.broker:
            after = await key_ids(whole)
            assert before in after
            assert len(after) == 2, "the new process has a key of its own"
            async with whole.wire() as wire, guard_of(whole) as guard:
                await guard.admit(shown(token, key), as_action("orders.once"))
                with pytest.raises(Refused) as refused:
                    await guard.admit(shown(token, key), as_action("orders.once"))
                assert refused.value.reason is Reason.ALREADY_USED
                assert await wire.check(single, "orders.charge") == ""
                assert not (await wire.redeem(single, "idempotency-id-1")).reason
                new = await wire.token("orders.once")
                await guard.admit(shown(new, wire.key), as_action("orders.once"))
                assert jose.parse(new, typ="at+jwt").header.kid in after - {before}
