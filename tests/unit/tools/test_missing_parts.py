"""What `make test` leaves out is said, and nothing else is."""

from pathlib import Path

import pytest
from tools.missing_parts import report

SPIRE = (
    "import pytest\npytestmark = [pytest.mark.spire, pytest.mark.root]\ndef test_a(): ...\nasync def test_b(): ...\n"
)
SIGNING = "import pytest\npytestmark = pytest.mark.softhsm\ndef test_a(): ...\n@pytest.mark.cosign\ndef test_b(): ...\n"
MIXED = "import pytest\n@pytest.mark.root\ndef test_a(): ...\n@pytest.mark.slow\ndef test_b(): ...\ndef test_c(): ...\n"


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    return folder


def test_each_suite_that_was_left_out_is_named_with_the_part_it_needs(tmp_path: Path) -> None:
    tests = write(tmp_path, test_agents=SPIRE, test_mixed=MIXED)
    as_root, as_another = (report(tests, is_root=is_root, here=()) for is_root in (True, False))
    name = tmp_path.name
    assert [line.split() for line in as_root.splitlines() if line.startswith("  ")] == [
        [f"{name}/test_agents.py", "2", "tests"],
        [f"{name}/test_mixed.py", "1", "test"],
    ]
    assert "a real SPIRE" in as_root
    assert "root, since" not in as_root
    assert "root, since" in as_another
    assert as_another.count("test_mixed.py") == 2


def test_a_run_that_left_nothing_out_says_so(tmp_path: Path) -> None:
    tests = write(tmp_path, test_plain="def test_a(): ...\n", helper=SPIRE)
    assert report(tests, is_root=False, here=()) == "Nothing was left out: every suite ran."


@pytest.mark.parametrize(
    ("here", "told"),
    [
        ((), {"cosign and timestamp-server": 1, "SoftHSM2": 1}),
        (("cosign",), {"SoftHSM2": 2}),
        (("softhsm",), {"cosign and timestamp-server": 1}),
        (("softhsm", "cosign"), {}),
    ],
)
def test_a_part_that_is_on_the_machine_is_not_told_as_missing(
    tmp_path: Path, here: tuple[str, ...], told: dict[str, int]
) -> None:
    lines = report(write(tmp_path, test_signing=SIGNING), is_root=True, here=here).splitlines()
    found = dict(zip(lines[::2], lines[1::2], strict=False))
    as_told = {
        what.removeprefix("Left out, for want of ").split(":")[0]: int(suite.split()[1])
        for what, suite in found.items()
    }
    assert as_told == told
