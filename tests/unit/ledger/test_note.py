"""Signed notes by https://c2sp.org/signed-note: what is signed verifies, and nothing else does."""

import base64

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from broker.ledger import note
from broker.ledger.note import NoteError, VerifierKey

# The example of Go's golang.org/x/mod/sumdb/note documentation: somebody else's note must verify here.
FOREIGN_KEY = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"
FOREIGN_TEXT = "If you think cryptography is the answer to your problem,\nthen you don't know what your problem is.\n"
FOREIGN_NOTE = (
    FOREIGN_TEXT + "\n— PeterNeumann x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngot"
    "pRZb6KE6RyyBwJnAM=\n"
)
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
VERIFIER = VerifierKey("broker.acme.test/ledger", KEY.public_key().public_bytes_raw())
TEXT = "first line\n\nafter an empty line\n"
NOTE = note.sign(TEXT, VERIFIER.name, KEY)


def test_a_note_signed_by_another_implementation_verifies() -> None:
    assert note.verify(FOREIGN_NOTE.encode(), VerifierKey.parse(FOREIGN_KEY)) == FOREIGN_TEXT
    assert str(VerifierKey.parse(FOREIGN_KEY)) == FOREIGN_KEY


def test_our_note_verifies_with_our_key() -> None:
    assert note.verify(NOTE, VerifierKey.parse(str(VERIFIER))) == TEXT


def test_signatures_of_unknown_keys_beside_ours_are_ignored() -> None:
    witness = note.sign(TEXT, "witness.test/w1", Ed25519PrivateKey.generate()).decode().rpartition("\n\n")[2]
    assert note.verify(NOTE + witness.encode(), VERIFIER) == TEXT
    same_name = note.sign(TEXT, VERIFIER.name, Ed25519PrivateKey.generate()).decode().rpartition("\n\n")[2]
    assert note.verify(NOTE + same_name.encode(), VERIFIER) == TEXT


@given(at=st.integers(0, len(NOTE) - 1), bit=st.integers(0, 7))
def test_a_note_with_any_bit_flipped_never_verifies(at: int, bit: int) -> None:
    forged = bytearray(NOTE)
    forged[at] ^= 1 << bit
    with pytest.raises(NoteError):
        note.verify(bytes(forged), VERIFIER)


def test_a_note_by_another_key_under_our_name_never_verifies() -> None:
    with pytest.raises(NoteError, match="not signed by"):
        note.verify(note.sign(TEXT, VERIFIER.name, Ed25519PrivateKey.generate()), VERIFIER)


def test_a_note_by_our_key_under_another_name_never_verifies() -> None:
    with pytest.raises(NoteError, match="not signed by"):
        note.verify(note.sign(TEXT, "broker.other.test/ledger", KEY), VERIFIER)


def test_a_bad_signature_under_our_key_id_rejects_a_note_that_another_line_signs_well() -> None:
    text, line = NOTE.decode().rpartition("\n\n")[0::2]
    bad = base64.b64decode(line.split(" ")[2])[:4] + bytes(64)
    with_bad = f"{text}\n\n{line}— {VERIFIER.name} {base64.b64encode(bad).decode()}\n"
    with pytest.raises(NoteError, match="is not good"):
        note.verify(with_bad.encode(), VERIFIER)


@pytest.mark.parametrize(
    "forged",
    [
        b"",
        b"\n\n",
        NOTE[:-1],
        NOTE.replace(b"\n\n\xe2", b"\n\xe2"),
        NOTE.replace("— ".encode(), b"- "),
        NOTE.replace(b"first", b"fi\rst"),
        NOTE.replace(b"first", b"fi\xffst"),
        NOTE + b"\n",
        NOTE + NOTE.rpartition(b"\n\n")[2] * 16,
        b"x" * (note.MAX_NOTE + 1),
    ],
    ids=[
        "empty",
        "no-signature",
        "no-last-newline",
        "no-blank-line",
        "hyphen-for-dash",
        "control-character",
        "not-utf8",
        "blank-line-at-the-end",
        "17-signatures",
        "oversized",
    ],
)
def test_a_malformed_note_is_refused(forged: bytes) -> None:
    with pytest.raises(NoteError):
        note.verify(forged, VERIFIER)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "name",
        "name+00000000",
        FOREIGN_KEY.replace("c74f20a3", "c74f20a4"),
        FOREIGN_KEY.replace("c74f20a3", "C74F20A3"),
        FOREIGN_KEY.replace("PeterNeumann", "Peter Neumann"),
        FOREIGN_KEY.replace("+AR", "+BR"),
        FOREIGN_KEY + "\n",
        FOREIGN_KEY[:-4],
    ],
)
def test_a_mistyped_verifier_key_is_refused(text: str) -> None:
    with pytest.raises(NoteError):
        VerifierKey.parse(text)


@pytest.mark.parametrize("name", ["", "a b", "a+b", "a\u00a0b", "a\nb", "x" * 257])
def test_a_name_that_cannot_stand_in_a_signature_line_is_refused(name: str) -> None:
    with pytest.raises(NoteError):
        note.sign(TEXT, name, KEY)


@pytest.mark.parametrize("text", ["", "no newline", "bell\a\n"])
def test_a_text_that_no_note_may_hold_is_not_signed(text: str) -> None:
    with pytest.raises(NoteError):
        note.sign(text, VERIFIER.name, KEY)
