"""RFC 3161 timestamps by an authority in memory; tests/integration/test_timestamp_authority.py has the real one."""

import dataclasses
from datetime import timedelta

import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID
from hypothesis import given, settings
from hypothesis import strategies as st
from support.pki import NOW
from support.timestamps import Tsa

from attestors.rfc3161 import MAX_RESPONSE, TimestampError, TimestampRoot, read_chain, verify_timestamp

SIGNED = b"a signature"
TSA, STRANGER = Tsa.made(), Tsa.made()
GOOD = TSA.stamp(SIGNED)


def test_a_timestamp_proves_its_time() -> None:
    assert verify_timestamp(GOOD, SIGNED, [TSA.root]) == NOW
    assert verify_timestamp(GOOD, SIGNED, [STRANGER.root, TSA.root]) == NOW
    assert verify_timestamp(TSA.stamp(SIGNED, nonce=7), SIGNED, [TSA.root], nonce=7) == NOW


def test_an_authority_is_known_by_its_root_alone_too() -> None:
    assert verify_timestamp(GOOD, SIGNED, [TimestampRoot(chain=TSA.chain[1:])]) == NOW


@pytest.mark.parametrize("hash_name", ["sha256", "sha384", "sha512"])
def test_strong_hashes_of_the_message_count(hash_name: str) -> None:
    stamp = TSA.stamp(SIGNED, hash_name=hash_name)
    assert verify_timestamp(stamp, SIGNED, [TSA.root]) == NOW
    with pytest.raises(TimestampError, match="mismatch between messages"):
        verify_timestamp(stamp, SIGNED + b"!", [TSA.root])


REFUSED = {
    "another message": (TSA.stamp(b"another"), "mismatch between messages"),
    "a weak hash": (TSA.stamp(SIGNED, hash_name="sha1"), "unsupported hash"),
    "an imprint of another length": (TSA.stamp(imprint=b"short"), "mismatch between messages"),
    "another authority": (STRANGER.stamp(SIGNED), "not signed by a trusted authority"),
    "granted with modifications": (TSA.stamp(SIGNED, status=1), "did not grant"),
    "rejected": (TSA.stamp(SIGNED, status=2), "did not grant"),
    "waiting": (TSA.stamp(SIGNED, status=3), "did not grant"),
    "an unheard-of status": (TSA.stamp(SIGNED, status=77), "did not grant"),
    "another's certificate": (TSA.stamp(SIGNED, certificates=STRANGER.chain[:1]), "no leaf certificate"),
    "nine certificates": (
        TSA.stamp(SIGNED, certificates=[*TSA.chain, *(Tsa.made().chain[0] for _ in range(7))]),
        "more than 8 certificates",
    ),
    "before its certificate": (TSA.stamp(SIGNED, NOW - timedelta(days=2)), "was not valid then"),
    "after its certificate": (TSA.stamp(SIGNED, NOW + timedelta(days=365)), "was not valid then"),
    "trailing bytes": (GOOD + b"\0", "cannot be read"),
    "cut short": (GOOD[:-1], "cannot be read"),
    "nothing": (b"", "cannot be read"),
    "too much": (GOOD + bytes(MAX_RESPONSE), "larger than"),
}


@pytest.mark.parametrize(("stamp", "why"), REFUSED.values(), ids=REFUSED)
def test_what_proves_no_time_is_refused(stamp: bytes, why: str) -> None:
    with pytest.raises(TimestampError, match=why):
        verify_timestamp(stamp, SIGNED, [TSA.root])


@pytest.mark.parametrize("nonce", [None, 0, 8])
def test_the_answer_to_another_question_is_refused(nonce: int | None) -> None:
    with pytest.raises(TimestampError, match="nonce mismatch"):
        verify_timestamp(TSA.stamp(SIGNED, nonce=nonce), SIGNED, [TSA.root], nonce=7)


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize(
    ("purposes", "critical"),
    [
        ([ExtendedKeyUsageOID.CODE_SIGNING], True),
        ([ExtendedKeyUsageOID.TIME_STAMPING], False),
        ([ExtendedKeyUsageOID.TIME_STAMPING, ExtendedKeyUsageOID.CODE_SIGNING], True),
    ],
    ids=["for-code", "not-critical", "for-more"],
)
def test_only_a_certificate_for_time_stamping_alone_stamps(purposes, critical, pinned) -> None:
    tsa = Tsa.made(purposes=purposes, critical=critical)
    root = tsa.root if pinned else TimestampRoot(chain=tsa.chain[1:])
    with pytest.raises(TimestampError):
        verify_timestamp(tsa.stamp(SIGNED), SIGNED, [root])


def test_a_pinned_authority_is_not_exchanged_for_another_of_the_same_root() -> None:
    pinned = TimestampRoot(chain=(STRANGER.chain[0], *TSA.chain[1:]))
    with pytest.raises(TimestampError):
        verify_timestamp(GOOD, SIGNED, [pinned])


def test_an_authority_counts_within_its_time_alone() -> None:
    edge = dataclasses.replace(TSA.root, valid_from=NOW, valid_until=NOW)
    assert verify_timestamp(GOOD, SIGNED, [edge]) == NOW
    for changed in ({"valid_from": NOW + timedelta(seconds=1)}, {"valid_until": NOW - timedelta(seconds=1)}):
        with pytest.raises(TimestampError, match="not trusted at the time"):
            verify_timestamp(GOOD, SIGNED, [dataclasses.replace(TSA.root, **changed)])


def test_an_answer_without_certificate_needs_a_pinned_one() -> None:
    bare = TSA.stamp(SIGNED, certificates=())
    assert verify_timestamp(bare, SIGNED, [TSA.root]) == NOW
    with pytest.raises(TimestampError, match="not signed by a trusted authority"):
        verify_timestamp(bare, SIGNED, [TimestampRoot(chain=TSA.chain[1:])])


def test_two_certificates_of_one_name_are_refused() -> None:
    """One could be looked at for its purpose, and the other for its key."""
    twin = TSA.twin()
    assert (twin.issuer, twin.serial_number) == (TSA.chain[0].issuer, TSA.chain[0].serial_number)
    with pytest.raises(TimestampError, match="same issuer and serial number"):
        verify_timestamp(TSA.stamp(SIGNED, certificates=[TSA.chain[0], twin]), SIGNED, [TSA.root])


def test_nobody_trusted_proves_nothing() -> None:
    with pytest.raises(TimestampError, match="no timestamp authority is trusted"):
        verify_timestamp(GOOD, SIGNED, [])


def test_a_chain_is_read_with_its_root_last() -> None:
    assert read_chain(TSA.pem).chain == TSA.chain
    with pytest.raises(ValueError, match="ends with a root"):
        TimestampRoot(chain=TSA.chain[::-1])
    with pytest.raises(ValueError, match="at least one certificate"):
        TimestampRoot(chain=())
    with pytest.raises(ValueError, match="PEM"):
        read_chain(b"no PEM")


# What no signature covers, in an answer with one signer: names of algorithms that OpenSSL takes from elsewhere.
@settings(max_examples=300, deadline=None)
@given(at=st.integers(0, len(GOOD) - 1), bit=st.integers(0, 7))
@pytest.mark.filterwarnings("ignore:Parsed a serial number:cryptography.utils.CryptographyDeprecationWarning")
def test_a_flipped_bit_never_moves_the_time(at: int, bit: int) -> None:
    changed = bytearray(GOOD)
    changed[at] ^= 1 << bit
    try:
        assert verify_timestamp(bytes(changed), SIGNED, [TSA.root]) == NOW
    except TimestampError:
        return
