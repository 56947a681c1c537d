"""Files that commands read and write: bounded, whole or not at all, and with a sentence instead of a traceback."""

import contextlib
import os
import secrets
import stat
from pathlib import Path

import click

from broker.cli.output import USAGE, Output

INPUT = click.Path(path_type=Path, exists=True, dir_okay=False)
"""A file to read, as an option's type."""
TARGET = click.Path(path_type=Path)
"""A file to write."""


def read_bounded(output: Output, file: Path, most: int) -> bytes:
    """A file's bytes. Ends the command where it cannot be read, or has more than `most`; it is not read past that."""
    try:
        with file.open("rb") as stream:
            found = stream.read(most + 1)
    except OSError as error:
        output.fail(f"{file}: {error.strerror}", USAGE)
    if len(found) > most:
        output.fail(f"{file} is larger than {most} bytes: it is something else", USAGE)
    return found


def require_writable(output: Output, target: Path) -> None:
    """Makes the folder of a file that will be written. Ends the command where it could not be: before it cost anything.

    Not checked: that there is room.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir():
            output.fail(f"{target} is a folder: name a file in it", USAGE)
        if not target.exists() or _is_file(target):
            probe = _beside(target.resolve())
            os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            probe.unlink()
    except OSError as error:
        output.fail(f"{target} cannot be written ({error.strerror}): choose another place", USAGE)


def write_whole(target: Path, content: bytes, mode: int = 0o644) -> None:
    """Writes a file so that it is the old one or the new one, whole. Links are followed. Raises: OSError.

    What is no file (a pipe, a terminal) is written to as it is.
    """
    if target.exists() and not _is_file(target):
        with target.open("wb") as stream:
            stream.write(content)
        return
    target = target.resolve()
    temporary = _beside(target)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
        temporary.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write_or_fail(output: Output, target: Path, content: bytes, mode: int = 0o644) -> None:
    """The same. Ends the command where it cannot be."""
    try:
        write_whole(target, content, mode)
    except OSError as error:
        output.fail(f"{target} cannot be written: {error.strerror}", USAGE)


def _is_file(path: Path) -> bool:
    return stat.S_ISREG(path.stat().st_mode)


def _beside(target: Path) -> Path:
    """A name that nobody has, in the same folder."""
    return target.with_name(f".{secrets.token_hex(8)}.new")
