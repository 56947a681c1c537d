"""What we show to ticket systems, and what their webhooks show to us: in files, taken again when those change."""

import base64
import re
from pathlib import Path
from typing import Final, Literal

from broker.signing.secret_file import read_secret

MAX_CREDENTIAL: Final = 4096  # bytes
MAX_SECRETS: Final = 4  # at one time: the old and the new while they change
MIN_SECRET: Final = 16  # bytes: as many as can be guessed by nobody
MAX_SECRET: Final = 512

_USER: Final = re.compile(r"[^:\x00-\x1f\x7f]+:[^\x00-\x1f\x7f]*")  # RFC 7617 section 2
_TOKEN: Final = re.compile(r"[\x21-\x7e]+")


class Credential:
    """The value of `Authorization`, as the file has it now: `user:password` for basic, the token for bearer.

    Raises: ValueError where the file cannot be used.
    """

    def __init__(self, file: Path, kind: Literal["basic", "bearer"]) -> None:
        self._file, self._kind = file, kind
        self._current = self._read()

    def __call__(self) -> str:
        """It, as it was last taken."""
        return self._current

    def reload(self) -> None:
        """Blocks. Raises: ValueError; then nothing changed."""
        self._current = self._read()

    def _read(self) -> str:
        text = _one_line(self._file, MAX_CREDENTIAL)
        if self._kind == "bearer":
            if not _TOKEN.fullmatch(text):
                raise ValueError(f"{self._file} is not one token, of printable ASCII without spaces")
            return f"Bearer {text}"
        if not _USER.fullmatch(text):
            raise ValueError(f"{self._file} is not user:password in one line")
        return f"Basic {base64.b64encode(text.encode()).decode()}"


class HookSecrets:
    """The secrets of a webhook, one a line. Raises: ValueError where the file cannot be used."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._current = self._read()

    def __call__(self) -> tuple[bytes, ...]:
        """They, as they were last taken: never none."""
        return self._current

    def reload(self) -> None:
        """Blocks. Raises: ValueError; then nothing changed."""
        self._current = self._read()

    def _read(self) -> tuple[bytes, ...]:
        content = read_secret(self._file, MAX_SECRETS * (MAX_SECRET + 2))
        found = tuple(line for line in content.splitlines() if line)
        if not 1 <= len(found) <= MAX_SECRETS:
            raise ValueError(f"{self._file} has one secret a line, {MAX_SECRETS} at most")
        if any(not MIN_SECRET <= len(secret) <= MAX_SECRET for secret in found):
            raise ValueError(f"{self._file} has a secret that is not {MIN_SECRET} to {MAX_SECRET} bytes long")
        return found


def _one_line(file: Path, most: int) -> str:
    try:
        return read_secret(file, most).decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8") from error
