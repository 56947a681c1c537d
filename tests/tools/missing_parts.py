"""The last lines of `make test`: each suite that was left out, the part that it needs, and how to run it.

    python tests/tools/missing_parts.py

Reads the markers in the test files, without importing them. The markers are those of pyproject.toml.
"""

import ast
import os
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

if __name__ == "__main__":  # then only this file's own folder can be imported from
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools import parts

TESTS = Path(__file__).resolve().parents[1]
# In this order: a test that needs several parts is told under the first.
NEEDS = {
    "spire": "a real SPIRE: `make test-real` takes it from PATH, or builds it once and keeps it",
    "slow": "minutes: `make test-real` takes them",
    "cosign": "cosign and timestamp-server: `make test-real` takes them from PATH, or builds them once and keeps them",
    "softhsm": "SoftHSM2: `make test-real` takes it from the machine, or brings it from its Debian archive",
    "root": "root, since they run processes of other users: `sudo make test-real`",
}


def missing(*, is_root: bool, here: Collection[str]) -> dict[str, str]:
    """Markers of the tests that `make test` leaves out here, and what those need. `here`: as tools.parts gives it."""
    present = {*here, "root"} if is_root else {*here}
    return {marker: what for marker, what in NEEDS.items() if marker not in present}


def left_out(tests: Path, needs: dict[str, str]) -> Iterator[tuple[str, int, str]]:
    """File, number of tests, and the marker that leaves them out."""
    for file in sorted(tests.rglob("test_*.py")):
        found = dict.fromkeys(needs, 0)
        for marks in _tests(ast.parse(file.read_text(encoding="utf-8"))):
            marker = next((marker for marker in needs if marker in marks), None)
            if marker is not None:
                found[marker] += 1
        for marker, count in found.items():
            if count:
                yield str(file.relative_to(tests.parent)), count, marker


def _tests(module: ast.Module) -> Iterator[set[str]]:
    """The markers of each test function: its own and the module's."""
    own = {
        mark
        for node in module.body
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "pytestmark" for t in node.targets)
        for mark in _marks(node.value)
    }
    for node in module.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
            yield own.union(*map(_marks, node.decorator_list))


def _marks(node: ast.expr) -> set[str]:
    """Each X of `pytest.mark.X` in it."""
    return {
        inner.attr
        for inner in ast.walk(node)
        if isinstance(inner, ast.Attribute) and isinstance(inner.value, ast.Attribute) and inner.value.attr == "mark"
    }


def report(tests: Path, *, is_root: bool, here: Collection[str]) -> str:
    """What to print."""
    needs = missing(is_root=is_root, here=here)
    found = list(left_out(tests, needs))
    if not found:
        return "Nothing was left out: every suite ran."
    lines = []
    for marker, what in needs.items():
        suites = [(file, count) for file, count, why in found if why == marker]
        if suites:
            lines.append(f"Left out, for want of {what}")
            width = max(len(file) for file, _ in suites)
            lines += [f"  {file:<{width}}  {count:>3} {'test' if count == 1 else 'tests'}" for file, count in suites]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(f"{report(TESTS, is_root=os.geteuid() == 0, here=parts.here())}\n")
