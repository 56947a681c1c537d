"""A signing key is published by the word of the broker's own SVID: who can write the store cannot add one."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519
from structlog.testing import capture_logs
from support.issuer import ISSUER, NOW
from support.ledger_records import open_ledger
from support.pki import CA, Svid, seeded_ec_key, snapshot

from broker.credentials import jose, keys
from broker.credentials.keyring import KeyRing
from broker.credentials.keys import KEY_LIFETIME, PUBLISH_AHEAD, KeyStatement, PublishedKey, SigningKey
from broker.errors import BrokerError, Reason, Refused, Unavailable
from broker.guard.keys import MAX_KEYS, parse_key_set
from broker.identity.spiffe_id import SpiffeId

BROKER = "spiffe://acme.test/broker"
OURS, FOREIGN = CA("acme.test"), CA("evil.test")
OWN = OURS.svid(BROKER)
TRUST = snapshot(OURS.bundle(), FOREIGN.bundle(), own=OWN.own())
KEY = SigningKey.generate(NOW)


def statement(key: SigningKey = KEY, **changes: Any) -> bytes:
    jwk = jose.to_jwk(key.private.public_key())
    members = {"issuer": ISSUER, "broker": BROKER, "kid": key.kid, "x": jwk.x, "y": jwk.y}
    times = {"signed_at": int(NOW.timestamp()), "use_until": int(key.use_until.timestamp())}
    return msgspec.json.encode(members | times | changes)


def signed(said: bytes, by: Svid = OWN, context: bytes = keys._CONTEXT) -> PublishedKey:
    return PublishedKey(statement=said, signature=by.key.sign(context + said, jose.ES256), chain=by.chain)


def verify(published: PublishedKey, now: datetime = NOW) -> keys.VerifiedKey:
    return keys.verify_published(published, issuer=ISSUER, broker=SpiffeId.parse(BROKER), snapshot=TRUST, now=now)


def test_a_key_that_our_svid_vouches_for_is_served_until_its_last_credential_has_ended() -> None:
    found = verify(keys.publish(KEY, ISSUER, OWN.own(), NOW))
    assert found.kid == KEY.kid
    assert found.serve_until >= KEY.use_until + timedelta(seconds=305) - timedelta(seconds=1)
    assert jose.load_jwk(found.jwk) == KEY.private.public_key()
    assert verify(signed(statement()))


STRANGER = SigningKey.generate(NOW)


@pytest.mark.parametrize(
    "published",
    [
        signed(statement(STRANGER), OURS.svid("spiffe://acme.test/build/agent")),
        signed(statement(STRANGER), FOREIGN.svid("spiffe://evil.test/broker")),
        signed(statement(STRANGER), CA("acme.test", seed="another root").svid(BROKER)),
        signed(statement(STRANGER), OURS.svid(BROKER, not_before=NOW - timedelta(2), lifetime=-timedelta(1))),
        PublishedKey(statement=statement(STRANGER), signature=signed(statement()).signature, chain=OWN.chain),
        PublishedKey(statement=statement(STRANGER), signature=b"", chain=OWN.chain),
        PublishedKey(statement=statement(STRANGER), signature=signed(statement(STRANGER)).signature, chain=()),
        PublishedKey(statement=statement(STRANGER), signature=signed(statement(STRANGER)).signature, chain=(b"x",)),
        signed(statement(STRANGER), context=b""),
        signed(statement(STRANGER), context=b"another thing that SVIDs sign\n"),
        signed(statement(STRANGER, kid=KEY.kid)),
        signed(statement(STRANGER, issuer="https://broker.evil.test")),
        signed(statement(STRANGER, broker="spiffe://acme.test/build/agent")),
        signed(statement(STRANGER, signed_at=int(NOW.timestamp()) + 60)),
        signed(statement(STRANGER, signed_at=int(NOW.timestamp()) - 3600)),
        signed(statement(STRANGER, use_until=int((NOW + KEY_LIFETIME + PUBLISH_AHEAD).timestamp()) + 60)),
        signed(statement(STRANGER, use_until=2**62)),
        signed(statement(STRANGER, signed_at=2**62, use_until=2**62)),
        signed(statement(STRANGER, signed_at=-(2**62))),
        signed(statement(STRANGER, x="AA")),
        signed(statement(STRANGER, x=jose.to_jwk(STRANGER.private.public_key()).y)),
        signed(b"{}"),
        signed(b"not JSON"),
    ],
)
def test_a_key_that_our_svid_does_not_vouch_for_is_refused(published: PublishedKey) -> None:
    with pytest.raises(Refused):
        verify(published)
    assert verify(signed(statement()))


def test_a_record_outlives_the_svid_that_signed_it_as_keys_do() -> None:
    published = keys.publish(KEY, ISSUER, OWN.own(), NOW)
    assert verify(published, NOW + timedelta(hours=20)).kid == KEY.kid


def test_a_statement_has_no_private_half() -> None:
    published = keys.publish(KEY, ISSUER, OWN.own(), NOW)
    assert msgspec.json.decode(published.statement, type=KeyStatement).kid == KEY.kid
    assert set(msgspec.json.decode(published.statement)) == set(KeyStatement.__struct_fields__)


class Store:
    """Records as the database keeps them: whoever writes it can put anything in."""

    def __init__(self) -> None:
        self.rows: dict[str, bytes] = {}

    async def publish_key(self, kid: str, record: bytes, serve_until: datetime, now: datetime) -> None:
        assert serve_until > now
        self.rows[kid] = record

    async def retire_keys(self, serve_until: datetime, keep: int) -> None:
        assert serve_until
        assert keep

    async def published_keys(self, now: datetime) -> Sequence[bytes]:
        assert now
        return list(self.rows.values())


def ring(store: Store, **changes: Any) -> KeyRing:
    return KeyRing(store, lambda: TRUST, issuer=ISSUER, **changes)


async def test_who_writes_the_store_adds_no_key_and_stops_none() -> None:
    store = Store()
    ours = ring(store)
    await ours.start(NOW)
    kid = ours.current(NOW).kid
    for name, published in {
        "stranger": signed(statement(STRANGER), FOREIGN.svid("spiffe://evil.test/broker")),
        "unsigned": PublishedKey(statement=statement(STRANGER), signature=b"", chain=()),
        "huge times": signed(statement(STRANGER, signed_at=2**62, use_until=2**62)),
    }.items():
        store.rows[name] = msgspec.msgpack.encode(published)
    store.rows["garbage"], store.rows["empty"] = b"\xff\x00garbage", b""
    await ours.maintain(NOW)
    assert set(parse_key_set(ours.key_set())) == {kid}
    with pytest.raises(Refused):
        ours.public(STRANGER.kid)
    assert ours.public(kid)


async def test_another_process_of_the_same_broker_serves_its_predecessors_key() -> None:
    store = Store()
    before, after = ring(store), ring(store)
    await before.start(NOW)
    await after.start(NOW)
    assert set(parse_key_set(after.key_set())) == {before.current(NOW).kid, after.current(NOW).kid}


async def test_a_key_is_published_before_its_first_use_for_longer_than_a_guard_caches() -> None:
    now, seen = NOW, {}
    trust = [TRUST]
    ours = KeyRing(Store(), lambda: trust[-1], issuer=ISSUER)
    await ours.start(NOW)
    first = ours.current(NOW).kid
    while now < NOW + KEY_LIFETIME + timedelta(minutes=4):
        if (now - NOW) % timedelta(minutes=30) == timedelta(0):  # SPIRE renews our SVID at half its life
            renewed = OURS.svid(BROKER, not_before=now - timedelta(seconds=10), lifetime=now - NOW + timedelta(hours=1))
            trust.append(snapshot(OURS.bundle(), own=renewed.own()))
        await ours.maintain(now)
        for kid in parse_key_set(ours.key_set()):
            seen.setdefault(kid, now)
        used = ours.current(now).kid
        assert used == first or now - seen[used] >= PUBLISH_AHEAD
        now += timedelta(minutes=1)
    assert len(seen) == 2
    assert ours.current(now).kid != first
    assert first in parse_key_set(ours.key_set())  # for what it signed last


async def test_without_a_published_key_nothing_is_signed() -> None:
    ours = ring(Store())
    with pytest.raises(Unavailable) as caught:
        ours.current(NOW)
    assert caught.value.reason is Reason.IDENTITY_UNAVAILABLE
    nobody = KeyRing(Store(), lambda: snapshot(OURS.bundle()), issuer=ISSUER)
    with pytest.raises(Unavailable):
        await nobody.start(NOW)
    await ours.start(NOW)
    assert ours.current(NOW)


def test_a_key_that_would_live_too_long_or_too_short_is_a_mistake() -> None:
    for lifetime in (KEY_LIFETIME + timedelta(seconds=1), 2 * PUBLISH_AHEAD):
        with pytest.raises(ValueError, match="lives"):
            ring(Store(), lifetime=lifetime)
    assert ring(Store(), lifetime=KEY_LIFETIME)


def test_only_the_kinds_of_svid_key_that_we_can_check_vouch() -> None:
    odd = OURS.svid(BROKER, key=ed25519.Ed25519PrivateKey.generate())
    with pytest.raises(TypeError, match="EC or RSA"):
        keys.publish(KEY, ISSUER, odd.own(), NOW)
    with pytest.raises(BrokerError):
        verify(PublishedKey(statement=statement(), signature=odd.key.sign(b"x"), chain=odd.chain))
    assert keys.publish(KEY, ISSUER, OURS.svid(BROKER, key=seeded_ec_key("x")).own(), NOW)


async def test_a_crash_loop_does_not_fill_the_key_set_and_its_tokens_stay_good(tmp_path: Path) -> None:
    """A guard refuses a set that is too large, and with it every token."""
    kids: list[str] = []
    for number in range(200):
        now = NOW + timedelta(seconds=number)
        async with await open_ledger(tmp_path, lambda now=now: now) as ledger:
            ours = KeyRing(ledger, lambda: TRUST, issuer=ISSUER)
            await ours.start(now)
            kids.append(ours.current(now).kid)
            assert ours.public(kids[-1])
            assert len(kids) == 1 or ours.public(kids[-2])
            assert len(parse_key_set(ours.key_set())) <= MAX_KEYS // 2
            if number == 199:
                last_credential_ends = now + timedelta(seconds=305)
                await ours.maintain(last_credential_ends - timedelta(seconds=1))
                assert ours.public(kids[-2])
                await ours.maintain(last_credential_ends)
                assert set(parse_key_set(ours.key_set())) == {kids[-1]}
                with pytest.raises(Refused):
                    ours.public(kids[-2])


@pytest.mark.parametrize("row", [None, b"", b"garbage", msgspec.msgpack.encode(signed(statement(STRANGER, x="AA")))])
async def test_our_own_key_comes_back_when_somebody_took_it_out_of_the_store(row: bytes | None) -> None:
    store = Store()
    ours = ring(store)
    await ours.start(NOW)
    kid = ours.current(NOW).kid
    if row is None:
        del store.rows[kid]
    else:
        store.rows[kid] = row
    await ours.maintain(NOW)
    assert ours.current(NOW).kid == kid
    assert set(parse_key_set(ours.key_set())) == {kid}


async def test_after_a_pause_longer_than_its_keys_live_a_broker_signs_at_once() -> None:
    later = NOW + KEY_LIFETIME + timedelta(minutes=1)
    trust = [TRUST]
    ours = KeyRing(Store(), lambda: trust[-1], issuer=ISSUER)
    await ours.start(NOW)
    first = ours.current(NOW).kid
    renewed = OURS.svid(BROKER, not_before=later, lifetime=later - NOW + timedelta(hours=1))
    trust.append(snapshot(OURS.bundle(), own=renewed.own()))
    with pytest.raises(Unavailable):
        ours.current(later)
    await ours.maintain(later)
    assert ours.current(later).kid != first
    assert ours.current(later).kid in parse_key_set(ours.key_set())


async def test_after_its_clock_went_back_a_broker_signs_at_once() -> None:
    ours = ring(Store())
    await ours.start(NOW + timedelta(minutes=30))
    await ours.maintain(NOW)
    assert ours.current(NOW).kid in parse_key_set(ours.key_set())


async def test_a_refused_key_is_logged_once_and_not_every_few_seconds() -> None:
    store = Store()
    ours = ring(store)
    await ours.start(NOW)
    with capture_logs() as logs:
        store.rows["one"] = b"garbage"
        for _ in range(5):
            await ours.maintain(NOW)
        store.rows["another"] = b"other garbage"
        await ours.maintain(NOW)
    assert [one["event"] for one in logs] == ["published_key_refused"] * 2


async def test_a_key_that_cannot_be_vouched_for_is_not_published_over_and_over() -> None:
    store, trust = Store(), [TRUST]
    ours = KeyRing(store, lambda: trust[-1], issuer=ISSUER)
    await ours.start(NOW)
    before = dict(store.rows)
    trust.append(snapshot(CA("acme.test", seed="another root").bundle(), own=OWN.own()))
    await ours.maintain(NOW)
    with pytest.raises(Unavailable):
        ours.current(NOW)
    assert store.rows == before
    trust.append(TRUST)
    await ours.maintain(NOW)
    assert ours.current(NOW)
