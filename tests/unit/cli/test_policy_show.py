"""`policy show` tells by which signers each permit signs."""

from pathlib import Path

from click.testing import CliRunner

from broker.cli.main import main

EXAMPLE = Path(__file__).parents[3] / "examples" / "release-signing" / "policy"
PLAIN = 'action "orders.read" appliesTo { principal: [Workload], resource: [Resource], context: {} };'


def test_the_signers_of_each_permit_are_shown_for_actions_that_sign() -> None:
    ran = CliRunner(env={"COLUMNS": "200"}).invoke(main, ["policy", "show", str(EXAMPLE), "--action", "release.sign"])
    assert ran.exit_code == 0, ran.output
    lines = {
        line.split()[1].rpartition("#")[2]: line for line in ran.output.splitlines() if line.startswith("  permit")
    }
    assert lines["staging"].split()[-1] == "keyless"
    assert lines["production-by-the-release-key"].split()[-1] == "key:release"
    assert lines["staging-with-the-agents-own-key"].split()[-2:] == ["agent-key", "keyless"]
    assert "signs by" in ran.output


def test_an_action_that_signs_nothing_has_no_signers(tmp_path: Path) -> None:
    (tmp_path / "a.cedarschema").write_text(PLAIN)
    (tmp_path / "a.cedar").write_text('permit (principal, action == Action::"orders.read", resource);')
    ran = CliRunner().invoke(main, ["policy", "show", str(tmp_path), "--action", "orders.read"])
    assert (ran.exit_code, "signs by" in ran.output, "keyless" in ran.output) == (0, False, False)
