"""Files that change while the broker serves are taken as a whole or not at all, and a refusal is not the end of it."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import structlog
from support.processes import until
from support.virtual_time import in_virtual_time

from broker.cli.file_watch import FileWatch
from broker.errors import Reason, Unavailable

SOON_S = 0.01


class Taken:
    """What was taken of a file. Takes nothing that begins with "bad", and nothing while `away`."""

    def __init__(self, file: Path) -> None:
        self.file, self.text, self.tries, self.looks, self.away = file, file.read_text(), 0, 0, False

    def files(self) -> tuple[Path]:
        self.looks += 1
        return (self.file,)

    async def looked_at(self) -> None:
        """A few more times from now on."""
        seen = self.looks
        await until(lambda: self.looks > seen + 3, "it is looked at")

    def reload(self) -> None:
        self.tries += 1
        if self.away:
            raise Unavailable(Reason.SIGNER_UNAVAILABLE, "the token is away")
        text = self.file.read_text()
        if text.startswith("bad"):
            raise ValueError("it is bad")
        self.text = text


@pytest.fixture
def taken(tmp_path: Path) -> Taken:
    (tmp_path / "file").write_text("one")
    return Taken(tmp_path / "file")


@asynccontextmanager
async def watched(taken: Taken) -> AsyncIterator[FileWatch]:
    watch = FileWatch("it", taken.files, taken.reload)
    task = asyncio.create_task(watch.watch(SOON_S))
    try:
        yield watch
    finally:
        task.cancel()
        await asyncio.wait([task])
    assert task.cancelled()  # nothing else ended it


async def test_a_file_that_changed_is_taken_and_one_that_did_not_is_left_alone(taken: Taken) -> None:
    async with watched(taken):
        await taken.looked_at()
        assert taken.tries == 0
        taken.file.write_text("two")
        await until(lambda: taken.text == "two", "it is taken")
        await until(lambda: taken.tries == 2, "it is read twice")
        await taken.looked_at()
        assert taken.tries == 2


async def test_a_change_that_keeps_size_and_time_but_not_the_file_is_seen(taken: Taken) -> None:
    async with watched(taken):
        found = taken.file.stat()
        other = taken.file.with_name("other")
        other.write_text("two")
        os.utime(other, ns=(found.st_atime_ns, found.st_mtime_ns))
        other.replace(taken.file)
        await until(lambda: taken.text == "two", "it is taken")


@pytest.mark.parametrize("wrong", ["bad", None], ids=["refused", "gone"])
async def test_what_cannot_be_used_changes_nothing_is_told_once_and_mended_when_it_is(
    taken: Taken, wrong: str | None
) -> None:
    with structlog.testing.capture_logs() as logs:
        async with watched(taken) as watch:
            if wrong is None:
                taken.file.unlink()
            else:
                taken.file.write_text(wrong)
            await until(lambda: taken.tries > 5, "it is tried again")
            assert taken.text == "one"
            assert watch.last_error
            taken.file.write_text("two")
            await until(lambda: watch.last_error is None and taken.text == "two", "it is taken")
    assert [one["event"] for one in logs].count("files_refused") == 1


async def test_a_token_that_comes_back_is_used_although_no_file_changed(taken: Taken) -> None:
    async with watched(taken) as watch:
        taken.away = True
        taken.file.write_text("two")
        await until(lambda: watch.last_error is not None, "it is refused")
        taken.away = False
        await until(lambda: taken.text == "two", "it is taken")
        assert watch.last_error is None


@in_virtual_time
async def test_a_changed_file_is_taken_within_a_second_and_looked_at_again_a_second_later(tmp_path: Path) -> None:
    """Two writes within a tick of the file system's clock may look like one: hence the second look."""
    file, loop, taken = tmp_path / "file", asyncio.get_running_loop(), []
    file.write_text("one")
    watch = FileWatch("it", lambda: (file,), lambda: taken.append((round(loop.time(), 3), file.read_text())))
    task = asyncio.create_task(watch.watch())
    await asyncio.sleep(3.2)
    assert taken == []
    file.write_text("two, and longer")
    await asyncio.sleep(5)
    assert taken == [(4.0, "two, and longer"), (5.0, "two, and longer")]
    task.cancel()
