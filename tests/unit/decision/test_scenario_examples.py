"""The policies of the scenarios in examples/: their own tests pass, and each condition has one that needs it."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.decision.policy import PolicyDocuments
from broker.decision.policy_tests import run_policy_tests

EXAMPLES = Path(__file__).parents[3] / "examples"
NAMES = ["incident-query", "leaving-process", "prompt-injection", "rotated-account"]
POLICY = re.compile(r'^@id\("([^"]+)"\)\n(?:@[^\n]*\n)*(permit|forbid) \(.*?;$', re.MULTILINE | re.DOTALL)
SCOPE = re.compile(r"^  (principal|resource) (?:==|in) .*?(?=,?$)", re.MULTILINE)
CONDITION = re.compile(r"^  (?:context|\[).*?(?=(?: &&)?$)", re.MULTILINE)


def weaker(text: str) -> Iterator[tuple[str, str]]:
    """What is taken out of a file, and the file without it: each policy, each part of a scope, each condition."""
    for policy in POLICY.finditer(text):
        start, end = policy.span()
        yield policy[1], text[:start] + text[end:]
        for part in SCOPE.finditer(text, start, end):
            yield part[0].strip(), f"{text[: part.start()]}  {part[1]}{text[part.end() :]}"
        for part in CONDITION.finditer(text, start, end):
            excepts = policy[2] == "permit" and "unless {" in text[start : part.start()]
            always = "resource != resource" if excepts else "resource == resource"
            yield part[0].strip(), f"{text[: part.start()]}  {always}{text[part.end() :]}"


def cases() -> Iterator[object]:
    for name in NAMES:
        for path in sorted((EXAMPLES / name / "policy").glob("*.cedar")):
            for what, instead in weaker(path.read_text()):
                yield pytest.param(name, path.name, instead, id=f"{name}-{what}")


def failed(folder: Path) -> set[str]:
    return {result.name for result in run_policy_tests(folder, PolicyDocuments.load(folder)) if not result.passed}


@pytest.mark.parametrize("name", NAMES)
def test_its_tests_pass(name: str) -> None:
    folder = EXAMPLES / name / "policy"
    assert len(run_policy_tests(folder, PolicyDocuments.load(folder))) >= 4
    assert failed(folder) == set()


@pytest.mark.parametrize(("name", "file", "instead"), list(cases()))
def test_what_is_taken_out_of_a_policy_is_missed_by_a_test(tmp_path: Path, name: str, file: str, instead: str) -> None:
    folder = shutil.copytree(EXAMPLES / name / "policy", tmp_path / "policy")
    (folder / file).write_text(instead)
    assert failed(folder)
