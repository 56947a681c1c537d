"""Reads a PIN or a private key from a file that nobody else can read."""

import os
import stat
from pathlib import Path
from typing import Final

from broker.signing.signer import UnusableKey

# The group may read: a Kubernetes volume with fsGroup is 0440. It may not write, and others may nothing.
_TOO_OPEN: Final = 0o037


def read_secret(path: Path, most: int) -> bytes:
    """The bytes of the file. `most`: bytes it may have. Links are followed, since mounted secrets are links.

    Raises: UnusableKey where it is missing, no regular file, too long, too open, or another user's. The message never
    has the content.
    """
    try:
        # NONBLOCK: opening a pipe must not wait for its writer.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise UnusableKey(f"{path} is no regular file")
            if found.st_mode & _TOO_OPEN:
                raise UnusableKey(f"{path} can be read or written by others: chmod 600 {path}")
            if found.st_uid not in {0, os.geteuid()}:
                raise UnusableKey(f"{path} belongs to another user: chown it to the broker's, or to root")
            content = file.read(most + 1)
    except OSError as error:
        raise UnusableKey(f"{path} cannot be read: {error.strerror}") from error
    if len(content) > most:
        raise UnusableKey(f"{path} is longer than {most} bytes: it is something else")
    return content
