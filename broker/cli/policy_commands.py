"""`policy init|validate|test|show`: the operator's folder, without a running broker."""

import dataclasses
from pathlib import Path

import click
from rich.markup import escape

from broker.cli.output import REFUSED, USAGE, Output, pass_output
from broker.decision.findings import Finding, PolicyError
from broker.decision.policy import Policy, PolicyDocuments
from broker.decision.policy_init import policy_init
from broker.decision.policy_tests import run_policy_tests
from broker.decision.show import show as shown
from broker.errors import Invalid
from broker.identity.spiffe_id import SpiffeId

FOLDER = click.argument("folder", type=click.Path(path_type=Path, file_okay=False))


@click.group()
def policy() -> None:
    """Write, check and look at a policy folder (Cedar)."""


def _fail(output: Output, findings: tuple[Finding, ...], code: int) -> None:
    output.value({"valid": False, "findings": [dataclasses.asdict(finding) for finding in findings]})
    if not output.as_json:
        for finding in findings:
            click.echo(str(finding), err=True)
    raise SystemExit(code)


def _load(output: Output, folder: Path) -> Policy:
    try:
        return PolicyDocuments.load(folder)
    except PolicyError as error:
        _fail(output, error.findings, USAGE)
        raise


@policy.command()
@FOLDER
@click.option("--operator", required=True, help="The SPIFFE ID of the first operator.")
@pass_output
def init(output: Output, folder: Path, operator: str) -> None:
    """Write a folder to begin with: the first operator, an example action and its test."""
    try:
        files = policy_init(folder, SpiffeId.parse(operator))
    except Invalid as error:
        output.fail(f"--operator: {error.detail}", USAGE)
    except PolicyError as error:
        _fail(output, error.findings, USAGE)
        raise
    output.value({"written": [str(file) for file in files]})
    for file in files:
        output.say(f"wrote {escape(str(file))}")
    output.say(f"next: action-broker policy test {escape(str(folder))}")


@policy.command()
@FOLDER
@pass_output
def validate(output: Output, folder: Path) -> None:
    """Check every document; all mistakes in one report."""
    found = _load(output, folder)
    output.value({"valid": True, "revision": found.revision, "policies": len(found.rules)})
    output.say(f"[green]valid[/]: {len(found.rules)} policies, revision {found.revision}")


@policy.command()
@FOLDER
@pass_output
def test(output: Output, folder: Path) -> None:
    """Run the cases in FOLDER/tests/*.toml against the folder's policies."""
    found = _load(output, folder)
    try:
        results = run_policy_tests(folder, found)
    except PolicyError as error:
        _fail(output, error.findings, USAGE)
        raise
    failed = [result for result in results if not result.passed]
    output.value({"passed": len(results) - len(failed), "failed": [dataclasses.asdict(result) for result in failed]})
    for result in results:
        mark = "[green]ok[/]  " if result.passed else "[red]FAIL[/]"
        output.say(f"{mark} {escape(result.file)}: {escape(result.name)} {escape(result.problem)}".rstrip())
    if not results:
        output.fail(f"no cases in {folder}/tests: what a policy should refuse is worth writing down", USAGE)
    if failed:
        raise SystemExit(REFUSED)


@policy.command()
@FOLDER
@click.option("--action", "only", help="This action alone.")
@pass_output
def show(output: Output, folder: Path, only: str | None) -> None:
    """List each action with its policies, obligations and the attestors that it needs."""
    actions = [one for one in shown(_load(output, folder)) if only in {None, one.action}]
    if not actions:
        output.fail(f"no such action: {only}", USAGE)
    output.value([dataclasses.asdict(one) for one in actions])
    for one in actions:
        needs = ", ".join(name if name in one.required else f"{name}?" for name in one.attestors) or "nothing"
        output.say(f"[bold]{escape(one.action)}[/]  needs {needs}; parameters {one.parameters}")
        rows = [
            (
                f"  {rule.effect}",
                rule.id,
                f"≤ {rule.max_ttl_s} s" if rule.max_ttl_s else "",
                rule.use or "",
                " ".join(rule.signers),
            )
            for rule in one.policies
        ]
        if rows:
            columns = ("  effect", "policy", "lives", "use", "signs by" if any(row[-1] for row in rows) else "")
            output.table(columns, [tuple(map(escape, row)) for row in rows])
        else:
            output.say("  no policy: always refused")
