"""Checkpoints and the files that hold them."""

import contextlib
import os
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from hypothesis import given
from hypothesis import strategies as st
from support.ledger_records import NAME, NOW, checkpointer

from broker.errors import Unavailable
from broker.ledger import checkpoint, note
from broker.ledger.checkpoint import Checkpoint, Checkpointer

HEAD = bytes(range(32))
TEXT = "broker.acme.test/ledger\n17\nAAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=\nepoch 3\ntime 2026-11-22T23:07:00Z\n"


def test_a_checkpoint_is_this_text() -> None:
    made = Checkpoint(origin=NAME, size=17, head=HEAD, epoch=3, at=NOW)
    assert made.text() == TEXT
    assert checkpoint.parse(TEXT) == made


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("\n17\n", "\n017\n"),
        ("\n17\n", "\n-17\n"),
        ("\n17\n", "\n17 \n"),
        ("\n17\n", "\n1_7\n"),
        ("\n17\n", "\n\u0661\u0667\n"),
        ("AAEC", "AEC"),
        ("HR8=", "HR9="),
        ("Hh8=", "Hg=="),
        ("epoch 3", "epoch 0"),
        ("epoch 3", "epoch three"),
        ("epoch 3\n", ""),
        ("T23:07:00Z", "T24:07:00Z"),
        ("T23:07:00Z", "T23:07:00"),
        ("T23:07:00Z", "T23:07:00+01:00"),
        ("T23:07:00Z", "T23:07:00.000000Z"),
        ("Z\n", "Z\nmore\n"),
        ("Z\n", "Z\n\n"),
    ],
)
def test_a_checkpoint_in_any_other_form_is_refused(old: str, new: str) -> None:
    changed = TEXT.replace(old, new) if old in TEXT else TEXT.replace("=", "==")
    assert changed != TEXT
    with pytest.raises(note.NoteError):
        checkpoint.parse(changed)


@given(st.text())
def test_any_text_is_a_checkpoint_in_canonical_form_or_refused(text: str) -> None:
    with contextlib.suppress(note.NoteError):
        assert checkpoint.parse(text).text() == text


def test_the_key_is_made_once_for_its_owner_alone(tmp_path: Path) -> None:
    first = checkpointer(tmp_path)
    assert stat.S_IMODE((tmp_path / "checkpoint.key").stat().st_mode) == 0o600
    assert checkpointer(tmp_path).verifier_key == first.verifier_key


def test_a_written_checkpoint_reads_back(tmp_path: Path) -> None:
    one = checkpointer(tmp_path)
    assert one.read() is None
    one.write(17, HEAD, 3, NOW)
    found = one.read()
    assert found is not None
    assert found[0] == Checkpoint(origin=NAME, size=17, head=HEAD, epoch=3, at=NOW)
    assert {file.name for file in tmp_path.iterdir()} == {"checkpoint", "checkpoint.key"}


def test_a_checkpoint_key_open_to_others_is_refused(tmp_path: Path) -> None:
    checkpointer(tmp_path)
    (tmp_path / "checkpoint.key").chmod(0o640)
    with pytest.raises(Unavailable, match="chmod 600"):
        checkpointer(tmp_path)


def test_a_checkpoint_key_that_is_none_is_refused(tmp_path: Path) -> None:
    key = tmp_path / "checkpoint.key"
    key.touch(0o600)
    with pytest.raises(Unavailable, match="not a private key"):
        checkpointer(tmp_path)
    other = generate_private_key(SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    key.write_bytes(other)
    with pytest.raises(Unavailable, match="not an Ed25519 key"):
        checkpointer(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "forged", "other-name", "other-key", "unreadable"])
def test_a_checkpoint_that_is_not_ours_is_never_passed_over(tmp_path: Path, damage: str) -> None:
    one = checkpointer(tmp_path)
    one.write(17, HEAD, 3, NOW)
    file = tmp_path / "checkpoint"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-10])
    elif damage == "forged":
        file.write_bytes(file.read_bytes().replace(b"\n17\n", b"\n16\n"))
    elif damage == "other-name":
        Checkpointer(tmp_path / "checkpoint.key", file, "broker.other.test/ledger").write(17, HEAD, 3, NOW)
    elif damage == "other-key":
        Checkpointer(tmp_path / "other.key", file, NAME).write(17, HEAD, 3, NOW)
    else:
        file.unlink()
        file.mkdir()
    with pytest.raises(Unavailable, match="checkpoint"):
        one.read()


def test_a_note_of_our_key_with_another_origin_inside_is_refused(tmp_path: Path) -> None:
    one = checkpointer(tmp_path)
    text = TEXT.replace("acme", "other")
    signed = note.sign(text, NAME, one._key)
    assert note.verify(signed, one.verifier_key) == text
    with pytest.raises(note.NoteError, match=r"is of broker\.other\.test"):
        checkpoint.verify(signed, one.verifier_key)


def test_a_checkpoint_that_cannot_be_replaced_leaves_the_old_one_whole(tmp_path: Path) -> None:
    one = checkpointer(tmp_path)
    one.write(17, HEAD, 3, NOW)
    (tmp_path / "checkpoint.new").mkdir()  # in the way of the temporary file
    with pytest.raises(OSError, match=r"checkpoint\.new"):
        one.write(18, HEAD, 3, NOW)
    found = one.read()
    assert found is not None
    assert found[0].size == 17


def test_a_checkpoint_key_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpointer(tmp_path)
    assert checkpointer(tmp_path)
    other = 65534
    if os.geteuid() == 0:  # only root can give the file away; who is not root is taken for somebody else
        os.chown(tmp_path / "checkpoint.key", other, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: other)
    with pytest.raises(Unavailable, match="chown it"):
        checkpointer(tmp_path)


def test_what_somebody_left_in_the_place_of_the_new_key_gets_nothing_of_it(tmp_path: Path) -> None:
    left = tmp_path / "checkpoint.key.new"
    left.touch(0o666)
    left.chmod(0o666)
    with left.open() as reading_along:
        checkpointer(tmp_path)
        assert reading_along.read() == ""
    assert stat.S_IMODE((tmp_path / "checkpoint.key").stat().st_mode) == 0o600
    assert checkpointer(tmp_path), "and the key is good"
