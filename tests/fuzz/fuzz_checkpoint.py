"""Fuzz target: signed notes, verifier keys and checkpoints.

Run: `PYTHONPATH=.:tests python -m fuzz.fuzz_checkpoint -max_total_time=60`.
"""

import sys
from collections.abc import Callable
from typing import TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from broker.ledger import checkpoint, note
from broker.ledger.checkpoint import Checkpoint
from broker.ledger.note import NoteError, VerifierKey

Found = TypeVar("Found", Checkpoint, bytes, VerifierKey)
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
VERIFIER = VerifierKey("broker.acme.test/ledger", KEY.public_key().public_bytes_raw())
TEXT = f"{VERIFIER.name}\n17\nAAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=\nepoch 3\ntime 2026-11-22T23:07:00Z\n"
NOTE = note.sign(TEXT, VERIFIER.name, KEY)


def one_input(data: bytes) -> None:
    """Bytes as a note, as part of a good one, as a checkpoint truly signed, and as a verifier key."""
    assert attempt(lambda: checkpoint.verify(data, VERIFIER)) is None or data.startswith(NOTE)
    changed = spliced(NOTE, data)
    found = attempt(lambda: checkpoint.verify(changed, VERIFIER))
    assert found is None or found.text() == TEXT, "another text was taken for the signed one"
    text = spliced(TEXT.encode(), data).decode(errors="replace")
    signed = attempt(lambda: note.sign(text, VERIFIER.name, KEY))
    if isinstance(signed, bytes) and len(signed) <= note.MAX_NOTE:
        assert note.verify(signed, VERIFIER) == text
        parsed = attempt(lambda: checkpoint.parse(text))
        assert parsed is None or parsed.text() == text, "two texts for one checkpoint"
    key_text = spliced(str(VERIFIER).encode(), data).decode(errors="replace")
    key = attempt(lambda: VerifierKey.parse(key_text))
    assert key is None or str(key) == key_text, "two texts for one key"


def attempt(make: Callable[[], Found]) -> Found | None:
    """What `make` makes; None where it refuses. Anything else it raises is a finding."""
    try:
        return make()
    except NoteError:
        return None


def spliced(text: bytes, data: bytes) -> bytes:
    """`text` with a part of it replaced: two bytes of `data` say which part, the others by what."""
    first, last = sorted(at % (len(text) + 1) for at in (data + b"\0\0")[:2])
    return text[:first] + data[2:] + text[last:]


if __name__ == "__main__":
    import atheris

    atheris.instrument_all()
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
