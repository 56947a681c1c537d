"""Files that may change while we serve: looked at once a second, taken again as a whole or not at all."""

import asyncio
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final, NoReturn

import structlog

from broker.errors import BrokerError

INTERVAL_S: Final = 1.0
Print = tuple[tuple[str, int, int, int], ...]

_log = structlog.get_logger(__name__)


class FileWatch:
    """Calls `reload` when one of the files changes. files: named anew at each look, since a file may name others.

    reload: blocks; raises ValueError, OSError or BrokerError where what is there cannot be used, and then nothing has
    changed. It is tried again at each look: the next file may follow, a token come back.
    """

    def __init__(self, name: str, files: Callable[[], Iterable[Path]], reload: Callable[[], object]) -> None:
        self._name, self._files, self._reload = name, files, reload
        self._seen = self._print()
        self.last_error: str | None = None

    def _print(self) -> Print:
        return tuple(map(_print_of, self._files()))

    async def watch(self, interval_s: float = INTERVAL_S) -> NoReturn:
        """Run it as a task.

        What changed is read twice, an interval apart: two writes within a tick of the clock look like one.
        """
        settled = True
        while True:
            await asyncio.sleep(interval_s)
            found = await asyncio.to_thread(self._print)
            changed = found != self._seen
            if changed or not settled or self.last_error is not None:
                settled, self._seen = not changed, found
                await asyncio.to_thread(self.reload)

    def reload(self) -> None:
        """Takes the files again. What cannot be used is told in the log and in `last_error`; the old stays."""
        try:
            self._reload()
        except (ValueError, OSError, BrokerError) as error:
            if str(error) != self.last_error:
                _log.error("files_refused", what=self._name, why=str(error))
            self.last_error = str(error)
        else:
            self.last_error = None
            _log.info("files_taken", what=self._name)


def _print_of(path: Path) -> tuple[str, int, int, int]:
    try:
        found = path.stat()
    except OSError:
        return str(path), 0, 0, 0
    return str(path), found.st_mtime_ns, found.st_size, found.st_ino
