"""What commands write is the old file or the new one, whole; what they read is bounded."""

import os
import stat
from pathlib import Path

import pytest

from broker.cli.files import read_bounded, require_writable, write_or_fail, write_whole
from broker.cli.output import Output

OUTPUT = Output(as_json=False)


def test_a_file_is_written_whole_with_its_mode_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.write_text("old")
    target.chmod(0o666)
    write_whole(target, b"new", 0o600)
    assert (target.read_bytes(), stat.S_IMODE(target.stat().st_mode)) == (b"new", 0o600)
    assert list(tmp_path.iterdir()) == [target]


def test_a_link_is_followed_and_a_pipe_is_written_to(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    require_writable(OUTPUT, tmp_path / "link")
    write_whole(tmp_path / "link", b"new")
    assert (tmp_path / "real").read_bytes() == b"new"
    assert (tmp_path / "link").is_symlink()
    reader, writer = os.pipe()
    write_whole(Path(f"/dev/fd/{writer}"), b"through")
    assert os.read(reader, 100) == b"through"
    for descriptor in (reader, writer):
        os.close(descriptor)


@pytest.mark.parametrize("where", ["folder", "file/under", "/proc/nothing", "broken/link"])
def test_what_cannot_be_written_is_told_before_and_after(
    tmp_path: Path, where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "broken").symlink_to("/nonexistent/place")
    for work in (
        lambda: require_writable(OUTPUT, tmp_path / where),
        lambda: write_or_fail(OUTPUT, tmp_path / where, b"x"),
    ):
        with pytest.raises(SystemExit) as ended:
            work()
        assert ended.value.code == 2
        assert where.rpartition("/")[2] in capsys.readouterr().err
    assert not list((tmp_path / "folder").iterdir())


def test_a_place_that_can_be_written_is_made_and_left_empty(tmp_path: Path) -> None:
    require_writable(OUTPUT, tmp_path / "new" / "folder" / "file")
    assert list((tmp_path / "new" / "folder").iterdir()) == []
    require_writable(OUTPUT, Path("/dev/null"))


def test_a_file_is_not_read_past_its_bound(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    assert read_bounded(OUTPUT, tmp_path / "file", 5) == b"12345"
    for path, most in ((tmp_path / "file", 4), (Path("/dev/zero"), 10), (tmp_path, 10), (tmp_path / "none", 10)):
        with pytest.raises(SystemExit):
            read_bounded(OUTPUT, path, most)
        assert str(path) in capsys.readouterr().err
