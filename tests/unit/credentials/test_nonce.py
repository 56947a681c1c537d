"""Nonces (RFC 9449 section 8): ours, for one connection, once, for 30 seconds, without memory for strangers."""

from datetime import timedelta

import pytest
from support.issuer import NOW

from broker.credentials import nonce
from broker.credentials.jose import b64url, b64url_decode
from broker.credentials.nonce import Nonces
from broker.errors import Reason, Refused


def refusal(nonces: Nonces, given: str | None, binding: str = "connection-1", *, after: float = 0) -> Reason:
    with pytest.raises(Refused) as caught:
        nonces.consume(given, binding, NOW + timedelta(seconds=after))
    return caught.value.reason


def test_a_nonce_counts_once() -> None:
    nonces = Nonces()
    given = nonces.issue("connection-1", NOW)
    nonces.consume(given, "connection-1", NOW)
    assert refusal(nonces, given) is Reason.PROOF_REPLAYED
    nonces.consume(nonces.issue("connection-1", NOW), "connection-1", NOW)


def test_a_nonce_of_one_connection_is_nothing_on_another() -> None:
    nonces = Nonces()
    given = nonces.issue("connection-1", NOW)
    for other in ("connection-2", "", "connection-1 ", "connection-11"):
        assert refusal(nonces, given, other) is Reason.NONCE_REQUIRED
    nonces.consume(given, "connection-1", NOW)


def test_a_nonce_lives_for_30_seconds() -> None:
    nonces = Nonces()
    given = nonces.issue("connection-1", NOW)
    assert refusal(nonces, given, after=30.001) is Reason.NONCE_REQUIRED
    assert refusal(nonces, given, after=-0.001) is Reason.NONCE_REQUIRED
    nonces.consume(given, "connection-1", NOW + timedelta(seconds=30))
    assert refusal(nonces, given, after=30) is Reason.PROOF_REPLAYED


@pytest.mark.parametrize("given", [None, "", "x", "=", "ü" * 20, "A" * 43, "A" * 10_000])
def test_what_is_not_a_nonce_of_ours_asks_for_one(given: str | None) -> None:
    assert refusal(Nonces(), given) is Reason.NONCE_REQUIRED


def test_no_bit_of_a_nonce_can_be_changed() -> None:
    nonces = Nonces()
    raw = b64url_decode(nonces.issue("connection-1", NOW).encode())
    for at in range(len(raw)):
        changed = raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]
        assert refusal(nonces, b64url(changed)) is Reason.NONCE_REQUIRED
    assert refusal(nonces, b64url(raw[:16])) is Reason.NONCE_REQUIRED
    nonces.consume(b64url(raw), "connection-1", NOW)


def test_a_nonce_of_another_process_is_nothing_here() -> None:
    assert refusal(Nonces(), Nonces().issue("connection-1", NOW)) is Reason.NONCE_REQUIRED


def test_strangers_who_ask_for_nonces_fill_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nonce, "MAX_REMEMBERED", 2)
    nonces = Nonces()
    given = [nonces.issue("connection-1", NOW) for _ in range(1000)]
    nonces.consume(given[0], "connection-1", NOW)
    nonces.consume(given[1], "connection-1", NOW)
    assert refusal(nonces, given[2]) is Reason.QUOTA
    later = NOW + timedelta(seconds=31)
    nonces.consume(nonces.issue("connection-1", later), "connection-1", later)


def test_a_used_nonce_is_not_good_again_when_the_clock_goes_ahead_and_back() -> None:
    for in_between in (False, True):
        nonces = Nonces()
        used, unused = nonces.issue("connection-1", NOW), nonces.issue("connection-1", NOW + timedelta(seconds=1))
        nonces.consume(used, "connection-1", NOW)
        ahead = NOW + timedelta(seconds=40)
        nonces.consume(nonces.issue("connection-1", ahead), "connection-1", ahead)
        if in_between:
            nonces.issue("connection-1", NOW)
        assert refusal(nonces, used, after=2) is Reason.NONCE_REQUIRED
        if not in_between:
            nonces.consume(unused, "connection-1", NOW + timedelta(seconds=2))


def test_a_clock_that_was_hours_ahead_stops_nobody() -> None:
    nonces = Nonces()
    for after in (0, 7200, 7300, 10, 11):
        now = NOW + timedelta(seconds=after)
        given = nonces.issue("connection-1", now)
        nonces.consume(given, "connection-1", now)
        assert refusal(nonces, given, after=after) is Reason.PROOF_REPLAYED
