"""The folder of the certificate authority: which CAs there are, their certificates, and where their keys are.

ca.json              the index: every CA that was ever made here, in order; written last, so it commits the rest
<name>.pem           certificates: root-1, issuing-1, …
<name>.key.pem       keys that are files: 0600 in a folder 0700

A root's key may be taken away and kept offline: only `ca rotate` needs it.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Final, Literal

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.serialization import Encoding

INDEX: Final = "ca.json"
_MAX_FILE: Final = 256 * 1024

CaName = Annotated[str, msgspec.Meta(pattern=r"^(root|issuing)-[1-9][0-9]{0,3}\Z")]  # it becomes a file's name


class CaError(ValueError):
    """The folder, or what was asked of it, is not usable; the message says what to do."""


class KeyInFile(msgspec.Struct, frozen=True, kw_only=True, tag="file", forbid_unknown_fields=True):
    """file: absolute, or relative to the CA folder; PKCS #8 PEM."""

    file: str


class KeyInToken(msgspec.Struct, frozen=True, kw_only=True, tag="pkcs11", forbid_unknown_fields=True):
    """module: the PKCS #11 library. token, label: of the token and of the key in it. pin_file: read at each login."""

    module: str
    token: str
    label: str
    pin_file: str


KeyPlace = KeyInFile | KeyInToken


class CaEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One CA. parent: the name of its root; a root's own name. use_from: seconds since 1970; signs nothing before."""

    name: CaName
    parent: CaName
    key: KeyPlace
    use_from: int

    @property
    def is_root(self) -> bool:
        """Whether it certifies issuing CAs, and itself."""
        return self.name == self.parent


class _Index(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    format: Literal[1] = 1
    issuer: str
    authorities: tuple[CaEntry, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class NewCa:
    """What `CaFolder.add` writes. key_pem: None where the key is in a token."""

    entry: CaEntry
    certificate: x509.Certificate
    key_pem: bytes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CaFolder:
    """The folder as it was read: every certificate is signed by its parent. issuer: the broker's."""

    path: Path
    issuer: str
    authorities: tuple[CaEntry, ...]
    certificates: MappingProxyType[str, x509.Certificate]

    @classmethod
    def create(cls, path: Path, issuer: str) -> "CaFolder":
        """An empty one; nothing is committed until the first `add`. Raises: CaError when something is there."""
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            if any(path.iterdir()):
                raise CaError(f"{path} is not empty: choose another folder; a CA is never written over")
            path.chmod(0o700)  # whatever the umask, and also where it was there before
        except OSError as error:
            raise CaError(f"{path} cannot be made: {error.strerror}") from error
        return cls(path=path, issuer=issuer, authorities=(), certificates=MappingProxyType({}))

    @classmethod
    def open(cls, path: Path) -> "CaFolder":
        """Reads it. Raises: CaError."""
        try:
            index = msgspec.json.decode(_read(path / INDEX), type=_Index)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise CaError(f"{path / INDEX} is damaged ({error}): restore it from a copy") from error
        certificates = {entry.name: _certificate(path, entry.name) for entry in index.authorities}
        if len(certificates) != len(index.authorities):
            raise CaError(f"{path / INDEX} names a CA twice: restore it from a copy")
        for entry in index.authorities:
            _require_signed(certificates[entry.name], certificates.get(entry.parent), entry.name)
        return cls(
            path=path,
            issuer=index.issuer,
            authorities=index.authorities,
            certificates=MappingProxyType(certificates),
        )

    @property
    def roots(self) -> tuple[CaEntry, ...]:
        """In the order in which they were made."""
        return tuple(entry for entry in self.authorities if entry.is_root)

    @property
    def issuing(self) -> tuple[CaEntry, ...]:
        """In the order in which they were made."""
        return tuple(entry for entry in self.authorities if not entry.is_root)

    def chain(self, entry: CaEntry) -> tuple[x509.Certificate, ...]:
        """An issuing CA's certificate and its root's."""
        return self.certificates[entry.name], self.certificates[entry.parent]

    def current(self, now: datetime) -> CaEntry:
        """The newest issuing CA that may sign now. Raises: CaError when none may."""
        for entry in reversed(self.issuing):
            begin = max(entry.use_from, *(int(one.not_valid_before_utc.timestamp()) for one in self.chain(entry)))
            if begin <= now.timestamp() and now < min(one.not_valid_after_utc for one in self.chain(entry)):
                return entry
        raise CaError(f"no CA in {self.path} may sign now: look at `action-broker ca show`, then `ca rotate`")

    def resolve(self, place: KeyPlace) -> KeyPlace:
        """The same place with an absolute file name."""
        return KeyInFile(file=str(self.path / place.file)) if isinstance(place, KeyInFile) else place

    def next_name(self, kind: Literal["root", "issuing"]) -> str:
        """A name that was never used here."""
        numbers = [int(entry.name.partition("-")[2]) for entry in self.authorities if entry.name.startswith(kind)]
        return f"{kind}-{max(numbers, default=0) + 1}"

    def add(self, new: Sequence[NewCa]) -> "CaFolder":
        """Writes certificates and keys, then the index: after a crash the CAs are all there, or none is in force.

        Raises: CaError, also when somebody else added one since this was read.
        """
        with _locked(self.path):
            if (self.path / INDEX).exists() and CaFolder.open(self.path).authorities != self.authorities:
                raise CaError(f"{self.path} was changed meanwhile: look at `action-broker ca show`, then try again")
            self._put(new)
        return CaFolder.open(self.path)

    def _put(self, new: Sequence[NewCa]) -> None:
        try:
            for one in new:
                if one.key_pem is not None:
                    _write(self.path / f"{one.entry.name}.key.pem", one.key_pem, 0o600)
                _write(self.path / f"{one.entry.name}.pem", one.certificate.public_bytes(Encoding.PEM), 0o644)
            index = _Index(issuer=self.issuer, authorities=(*self.authorities, *(one.entry for one in new)))
            _write(self.path / INDEX, msgspec.json.format(msgspec.json.encode(index), indent=1) + b"\n", 0o644)
        except OSError as error:
            raise CaError(f"{error.filename or self.path} cannot be written: {error.strerror}") from error


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_FILE + 1)
    except OSError as error:
        raise CaError(f"{path} cannot be read ({error.strerror}): make a CA with `action-broker ca init`") from error
    if len(content) > _MAX_FILE:
        raise CaError(f"{path} is larger than any such file: restore it from a copy")
    return content


def _certificate(path: Path, name: str) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(_read(path / f"{name}.pem"))
    except ValueError as error:
        if isinstance(error, CaError):
            raise
        raise CaError(f"{path / name}.pem is no certificate: restore it from a copy") from error


def _require_signed(certificate: x509.Certificate, parent: x509.Certificate | None, name: str) -> None:
    if parent is None:
        raise CaError(f"the root of {name} is not in {INDEX}: restore the folder from a copy")
    try:
        certificate.verify_directly_issued_by(parent)
    except (ValueError, TypeError, InvalidSignature) as error:
        raise CaError(f"{name}.pem is not signed by its root: restore the folder from a copy") from error


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One writer at a time; two at once would mix their files. Raises: CaError."""
    try:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise CaError(f"{path} cannot be opened: {error.strerror}") from error
    try:
        if os.fstat(folder).st_mode & 0o077:
            raise CaError(f"{path} is open to others: chmod 700 {path}")
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise CaError(f"{path} is being changed by another command: wait for it, then try again") from error
    finally:
        os.close(folder)  # unlocks


def _write(path: Path, content: bytes, mode: int) -> None:
    """Replaces `path`: after a crash it holds the old content or the new, whole. Raises: OSError."""
    temporary = path.with_name(path.name + ".new")
    temporary.unlink(missing_ok=True)
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
