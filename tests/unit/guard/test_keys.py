"""The key set as a guard keeps it: what it refuses to read, how long it believes it, and how often it asks."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from support.issuer import Issuer

from broker.credentials.keys import PUBLISH_AHEAD
from broker.errors import Invalid, Reason
from broker.guard import KeyCache
from broker.guard.keys import MAX_AGE, MAX_KEYS, REFRESH_AFTER, RETRY_AFTER, StaleKeys, UnknownKey, parse_key_set

ISSUER, OTHER = Issuer(), Issuer("another")


def key_set(*keys: dict[str, Any]) -> bytes:
    return json.dumps({"keys": list(keys)}).encode()


def jwk(issuer: Issuer = ISSUER, **changes: Any) -> dict[str, Any]:
    members = json.loads(issuer.jwks(**changes))["keys"][0]
    return {name: value for name, value in members.items() if value is not None}


def test_a_key_set_is_read_by_kid() -> None:
    assert set(parse_key_set(key_set(jwk(), jwk(OTHER)))) == {ISSUER.kid, OTHER.kid}


def test_a_key_without_use_or_alg_is_one_for_signatures() -> None:
    assert set(parse_key_set(key_set(jwk(use=None, alg=None)))) == {ISSUER.kid}


@pytest.mark.parametrize(
    "other",
    [
        {"kty": "RSA", "n": "AQAB", "e": "AQAB", "kid": "rsa"},
        {"kty": "OKP", "crv": "Ed25519", "x": "AA", "kid": "ed", "alg": "EdDSA"},
        jwk(OTHER, crv="P-384"),
        jwk(OTHER, use="enc"),
        jwk(OTHER, use="jwt-svid"),
        jwk(OTHER, alg="ES384"),
        jwk(OTHER, alg="HS256"),
        {"kty": "of the future", "kid": "new"},
    ],
)
def test_a_key_of_another_kind_is_left_out_and_alone_makes_no_set(other: dict[str, Any]) -> None:
    assert set(parse_key_set(key_set(other, jwk()))) == {ISSUER.kid}
    with pytest.raises(Invalid):
        parse_key_set(key_set(other))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b"[]",
        b'{"keys": {}}',
        key_set(),
        key_set(jwk(d="AA")),
        key_set(jwk(), {"kty": "RSA", "n": "AQAB", "e": "AQAB", "kid": "rsa", "p": "AA"}),
        key_set(jwk(), {"kty": "oct", "k": "c2VjcmV0", "kid": "shared"}),
        key_set(jwk(), jwk()),
        key_set(jwk(), jwk(OTHER, kid=ISSUER.kid)),
        key_set(jwk(), {"kty": "RSA", "n": "AQAB", "e": "AQAB", "kid": ISSUER.kid}),
        key_set(jwk(kid=None)),
        key_set(jwk(kid="")),
        key_set(jwk(kid=7)),
        key_set(jwk(x=None)),
        key_set(jwk(x=ISSUER.jwk.y)),
        key_set(jwk(x=ISSUER.jwk.x + "=")),
        key_set(jwk(), jwk(OTHER, y="AA")),
        key_set(*[jwk(kid=f"k{number}") for number in range(MAX_KEYS + 1)]),
        ISSUER.jwks()[:-2] + b" " * 70_000 + b"]}",
        ISSUER.jwks().replace(b'"kty"', b'"kid": "first", "kty"'),
        b'{"keys": [], ' + ISSUER.jwks()[1:],
        ISSUER.jwks().decode().encode("utf-16"),
    ],
)
def test_a_set_that_is_damaged_ambiguous_or_holds_a_secret_is_refused_whole(body: bytes) -> None:
    with pytest.raises(Invalid):
        parse_key_set(body)
    assert parse_key_set(ISSUER.jwks())


class Origin:
    """The broker's key set, counting how often it is asked."""

    def __init__(self) -> None:
        self.asked, self.answer, self.now = 0, ISSUER.jwks(), 1000.0
        self.was_asked = asyncio.Event()
        self.gate: Callable[[], Awaitable[None]] | None = None

    async def fetch(self) -> bytes:
        self.asked += 1
        self.was_asked.set()
        if self.gate:
            await self.gate()
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer

    def cache(self) -> KeyCache:
        return KeyCache(self.fetch, seconds=lambda: self.now)


@pytest.fixture
def origin() -> Origin:
    return Origin()


def test_a_guard_never_keeps_a_set_longer_than_a_key_is_published_ahead() -> None:
    assert REFRESH_AFTER < MAX_AGE < PUBLISH_AHEAD.total_seconds()


async def test_without_a_set_nothing_is_believed(origin: Origin) -> None:
    keys = origin.cache()
    with pytest.raises(StaleKeys) as caught:
        keys.key(ISSUER.kid)
    assert caught.value.reason is Reason.SCOPE_STALE
    assert await keys.refetch()
    assert keys.key(ISSUER.kid)
    with pytest.raises(UnknownKey):
        keys.key(OTHER.kid)


async def test_a_set_is_believed_up_to_its_bound_and_not_a_moment_longer(origin: Origin) -> None:
    keys = origin.cache()
    assert await keys.refetch()
    origin.answer = ConnectionError("the broker is away")
    origin.now += MAX_AGE - 0.001
    assert not await keys.refetch()
    assert keys.key(ISSUER.kid)
    origin.now += 0.001
    with pytest.raises(StaleKeys, match="the broker is away"):
        keys.key(ISSUER.kid)
    origin.now += RETRY_AFTER
    origin.answer = ISSUER.jwks()
    assert await keys.refetch()
    assert keys.key(ISSUER.kid)


async def test_the_age_of_a_set_counts_from_when_it_was_asked_for(origin: Origin) -> None:
    async def slow() -> None:
        origin.now += 4

    origin.gate = slow
    keys = origin.cache()
    assert await keys.refetch()
    origin.now += MAX_AGE - 4
    with pytest.raises(StaleKeys):
        keys.key(ISSUER.kid)


async def test_a_withdrawn_key_is_gone_with_the_next_set(origin: Origin) -> None:
    keys = origin.cache()
    assert await keys.refetch()
    origin.answer, origin.now = OTHER.jwks(), origin.now + RETRY_AFTER
    assert await keys.refetch()
    assert keys.key(OTHER.kid)
    with pytest.raises(UnknownKey):
        keys.key(ISSUER.kid)


async def test_strangers_kids_do_not_make_a_guard_hammer_the_broker(origin: Origin) -> None:
    keys = origin.cache()
    assert await keys.refetch()
    for _ in range(50):
        assert not await keys.refetch()
    assert origin.asked == 1
    origin.now += RETRY_AFTER
    assert await keys.refetch()
    assert origin.asked == 2


async def test_all_who_wait_share_one_fetch(origin: Origin) -> None:
    release = asyncio.Event()
    origin.gate = release.wait
    keys = origin.cache()
    waiting = [asyncio.create_task(keys.refetch()) for _ in range(20)]
    await origin.was_asked.wait()
    waiting[0].cancel()  # one who gives up does not take the fetch from the others
    release.set()
    assert await asyncio.gather(*waiting[1:]) == [True] * 19
    assert origin.asked == 1


async def test_a_set_is_replaced_beside_its_use_before_it_is_too_old(origin: Origin) -> None:
    keys = origin.cache()
    assert await keys.refetch()
    keys.refresh_if_due()
    origin.now += REFRESH_AFTER
    origin.answer = key_set(jwk(), jwk(OTHER))
    keys.refresh_if_due()
    assert keys.key(ISSUER.kid)
    assert await keys.refetch()  # the one under way
    assert origin.asked == 2
    assert keys.key(OTHER.kid)


@pytest.mark.parametrize("answer", [b"nonsense", key_set(jwk(d="AA")), OSError("refused"), RuntimeError("a bug")])
async def test_a_fetch_that_fails_or_is_damaged_leaves_the_old_set(origin: Origin, answer: Any) -> None:
    keys = origin.cache()
    assert await keys.refetch()
    origin.answer, origin.now = answer, origin.now + RETRY_AFTER
    assert not await keys.refetch()
    assert keys.key(ISSUER.kid)
    assert keys.last_error


async def test_closing_ends_a_fetch_under_way(origin: Origin) -> None:
    origin.gate = asyncio.Event().wait
    keys = origin.cache()
    waiting = asyncio.create_task(keys.refetch())
    await origin.was_asked.wait()
    await keys.close()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await keys.close()
