"""`policy init|validate|test|show`, as an operator runs them before anything is in force."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.cli import cli

OPERATOR = "spiffe://acme.test/operator"
BROKEN = 'permit (principal, action == Action::"orders.refund", resource) when { context.parameters.amuont <= 1 };'


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """What `policy init` writes."""
    ran = cli("policy", "init", tmp_path / "policy", "--operator", OPERATOR, "--json")
    assert ran.code == 0
    assert {Path(file).name for file in ran.value["written"]} == {
        "operators.cedar",
        "example.cedarschema",
        "example.cedar",
        "example.toml",
    }
    return tmp_path / "policy"


def test_what_init_writes_is_valid_passes_its_tests_and_is_shown(folder: Path) -> None:
    valid = cli("policy", "validate", folder, "--json")
    assert (valid.code, valid.value["valid"], valid.value["policies"]) == (0, True, 3)
    tested = cli("policy", "test", folder, "--json")
    assert (tested.code, tested.value) == (0, {"passed": 5, "failed": []})
    shown = cli("policy", "show", folder, "--json")
    base = {"broker.approve", "broker.breakglass", "broker.operate", "broker.score"}
    assert {one["action"] for one in shown.value} == base | {"orders.refund"}
    people = cli("policy", "show", folder, "--action", "orders.refund")
    assert (people.code, "small-refunds" in people.out, "broker.operate" in people.out) == (0, True, False)
    assert cli("policy", "show", folder, "--action", "orders.other").code == 2


def test_init_writes_over_nothing_and_names_no_operator_by_itself(folder: Path) -> None:
    again = cli("policy", "init", folder, "--operator", OPERATOR, "--json")
    assert (again.code, again.value["valid"]) == (2, False)
    assert "is not empty" in again.value["findings"][0]["problem"]
    for operator in ("nobody", "spiffe://acme.test"):
        ran = cli("policy", "init", folder / "new", "--operator", operator)
        assert ran.code == 2
        assert ran.err
        assert not (folder / "new").exists()


def test_every_mistake_in_a_folder_comes_in_one_report(folder: Path) -> None:
    (folder / "broken.cedar").write_text(BROKEN)
    (folder / "worse.cedar").write_text("permit (everything);")
    ran = cli("policy", "validate", folder, "--json")
    assert (ran.code, ran.value["valid"]) == (2, False)
    assert {"worse.cedar"} <= {finding["file"] for finding in ran.value["findings"]}
    assert all(finding["fix"] for finding in ran.value["findings"])
    people = cli("policy", "test", folder)
    assert (people.code, people.out, "worse.cedar:1" in people.err) == (2, "", True)
    (folder / "worse.cedar").unlink()
    ran = cli("policy", "show", folder, "--json")
    assert (ran.code, ran.value["findings"][0]["file"]) == (2, "broken.cedar")


def test_a_case_that_comes_otherwise_is_exit_code_3_and_no_cases_at_all_are_a_mistake(folder: Path) -> None:
    cases = folder / "tests" / "example.toml"
    cases.write_text(cases.read_text().replace("amount = 101", "amount = 99"))
    ran = cli("policy", "test", folder, "--json")
    assert (ran.code, ran.value["passed"], len(ran.value["failed"])) == (3, 4, 1)
    assert "expected deny, but it is allowed" in ran.value["failed"][0]["problem"]
    cases.write_text("[[case]]\nname = 1\n")
    assert cli("policy", "test", folder, "--json").code == 2
    cases.unlink()
    ran = cli("policy", "test", folder)
    assert (ran.code, "no cases" in ran.err) == (2, True)


def test_a_folder_that_is_not_there_is_a_mistake_and_no_crash(tmp_path: Path) -> None:
    for command in ("validate", "test", "show"):
        ran = cli("policy", command, tmp_path / "nothing", "--json")
        assert (ran.code, ran.value["valid"]) == (2, False)
