"""Checkpoints: how far the chain had come, signed, and kept outside the store.

The text is a C2SP tlog-checkpoint (https://c2sp.org/tlog-checkpoint), with one difference: the third line is the head
of our hash chain, not the root of a Merkle tree.

    broker.acme.test/ledger                         origin: the ledger's name, also the key's
    20852163                                        size: number of records
    CsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=    head of the chain after them
    epoch 3
    time 2026-11-22T23:07:00Z

The key is made at first start, is used for nothing else, and never leaves its file. The file outside is replaced
atomically: the older note or the newer one is there, whatever happens.
"""

import base64
import contextlib
import os
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from broker.errors import Reason, Unavailable
from broker.ledger import chain, note

_SIZE = re.compile(r"0|[1-9][0-9]{0,17}")
_EPOCH = re.compile(r"epoch ([1-9][0-9]{0,17})")
_TIME = re.compile(r"time ([0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(?:\.[0-9]{6})?)Z")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The chain had `size` records and this head at `at` (aware UTC), in `epoch`."""

    origin: str
    size: int
    head: bytes
    epoch: int
    at: datetime

    def text(self) -> str:
        """The note's text."""
        head = base64.b64encode(self.head).decode()
        at = self.at.astimezone(UTC).replace(tzinfo=None).isoformat()
        return f"{self.origin}\n{self.size}\n{head}\nepoch {self.epoch}\ntime {at}Z\n"


def parse(text: str) -> Checkpoint:
    """The checkpoint in a verified note's text. Raises: note.NoteError."""
    lines = text.removesuffix("\n").split("\n")
    if len(lines) != 5:
        raise note.NoteError("a checkpoint has five lines: origin, size, head, epoch, time")
    epoch, at = _EPOCH.fullmatch(lines[3]), _TIME.fullmatch(lines[4])
    if not _SIZE.fullmatch(lines[1]) or not epoch or not at:
        raise note.NoteError("the checkpoint's size, epoch or time is malformed")
    try:
        head = base64.b64decode(lines[2], validate=True)
        moment = datetime.fromisoformat(at[1]).replace(tzinfo=UTC)
    except ValueError as error:
        raise note.NoteError("the checkpoint's head or time is malformed") from error
    if len(head) != chain.HASH_BYTES:
        raise note.NoteError("the checkpoint's head is not 32 bytes")
    found = Checkpoint(origin=lines[0], size=int(lines[1]), head=head, epoch=int(epoch[1]), at=moment)
    if found.text() != text:
        raise note.NoteError("the checkpoint is not in canonical form")
    return found


def verify(signed: bytes, key: note.VerifierKey) -> Checkpoint:
    """The checkpoint in a note signed by `key`, whose name must be its origin. Raises: note.NoteError."""
    found = parse(note.verify(signed, key))
    if found.origin != key.name:
        raise note.NoteError(f"the checkpoint is of {found.origin}, not of {key.name}")
    return found


def write_atomically(path: Path, content: bytes, mode: int) -> None:
    """Replaces `path`: after a crash it holds the old content or the new, whole. Raises: OSError."""
    temporary = path.with_name(path.name + ".new")
    temporary.unlink(missing_ok=True)  # a left-over, or somebody's who would keep it open and read along
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)  # the new name is durable only with its folder
    finally:
        os.close(folder)


def _unusable(detail: str) -> Unavailable:
    return Unavailable(Reason.LEDGER_UNAVAILABLE, detail)


class Checkpointer:
    """Signs checkpoints with the key in `key_file` (made when missing, 0600) and keeps the last in `out_file`.

    name: the ledger's, such as `broker.acme.test/ledger`.
    `out_file` is worth the most on another disk or volume than the store, so that no backup restores both.

    Raises: Unavailable when the key cannot be read, written, is open to others or another user's; ValueError for a bad
    name.
    Holds: the key, in memory; no descriptor.
    """

    def __init__(self, key_file: Path, out_file: Path, name: str) -> None:
        self.out_file = out_file
        self._name = note.check_name(name)
        self._key = _load_or_make(key_file)
        self.verifier_key = note.VerifierKey(name, self._key.public_key().public_bytes_raw())

    def read(self) -> tuple[Checkpoint, bytes] | None:
        """The last checkpoint and its note; None where there is no file.

        Raises: Unavailable when there is one that we cannot read or did not sign: it might be the proof that the store
        was put back, so nothing goes on without it.
        """
        try:
            signed = self.out_file.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _unusable(
                f"cannot read the checkpoint {self.out_file}: {error.strerror}; make it readable"
            ) from error
        try:
            return verify(signed, self.verifier_key), signed
        except note.NoteError as error:
            raise _unusable(
                f"the checkpoint {self.out_file} does not verify ({error}). Put back the checkpoint and the key file "
                "that belong to this ledger. Only if they are lost for good, move the checkpoint away: the ledger then "
                "starts a new epoch, and no credential issued until now counts",
            ) from error

    def write(self, size: int, head: bytes, epoch: int, now: datetime) -> None:
        """Signs and keeps a checkpoint, durable on return. Raises: OSError."""
        found = Checkpoint(origin=self._name, size=size, head=head, epoch=epoch, at=now)
        write_atomically(self.out_file, note.sign(found.text(), self._name, self._key), 0o644)


def _load_or_make(path: Path) -> Ed25519PrivateKey:
    try:
        if not path.exists():
            key = Ed25519PrivateKey.generate()
            write_atomically(path, _pem(key), 0o600)
            return key
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if status.st_mode & 0o077:
                raise _unusable(f"the checkpoint key {path} is open to others: chmod 600 it")
            if status.st_uid not in (0, os.geteuid()):
                raise _unusable(
                    f"the checkpoint key {path} belongs to user {status.st_uid}, who may have read or replaced it: "
                    "chown it to the broker's user if it is the right one"
                )
            loaded = serialization.load_pem_private_key(file.read(), password=None)
    except OSError as error:
        raise _unusable(f"cannot read or make the checkpoint key {path}: {error.strerror}") from error
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise _unusable(f"{path} is not a private key in PEM: put the ledger's checkpoint key back") from error
    if not isinstance(loaded, Ed25519PrivateKey):
        raise _unusable(f"{path} is not an Ed25519 key: put the ledger's checkpoint key back")
    return loaded


def _pem(key: Ed25519PrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
