"""The policy of examples/release-signing: its own tests pass, and each would fail if what it tests were taken out."""

import re
import shutil
from pathlib import Path

import pytest

from broker.decision.findings import Defect, PolicyError
from broker.decision.policy import PolicyDocuments
from broker.decision.policy_tests import run_policy_tests

EXAMPLE = Path(__file__).parents[3] / "examples" / "release-signing" / "policy"


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(EXAMPLE, tmp_path / "policy")
    return tmp_path / "policy"


def failed(folder):
    return {result.name for result in run_policy_tests(folder, PolicyDocuments.load(folder)) if not result.passed}


def test_its_tests_pass(folder):
    assert len(run_policy_tests(folder, PolicyDocuments.load(folder))) >= 30
    assert failed(folder) == set()


def test_every_policy_of_it_has_a_test_that_needs_it(folder):
    policies = sorted(folder.glob("*.cedar"))
    for path in policies:
        text = path.read_text()
        for name in re.findall(r'@id\("([^"]+)"\)', text):
            path.write_text(re.sub(rf'@id\("{name}"\)[^;]*;', "", text))
            assert failed(folder), f"{path.name}#{name} could be taken out"
        path.write_text(text)


@pytest.mark.parametrize(
    ("what", "instead", "case"),
    [
        (
            "count >= 2\n};\n\n// Production by",
            "count >= 1\n};\n\n// Production by",
            "production with one waits for another",
        ),
        (
            "count >= 1\n};\n\n// Production: two",
            "count >= 0\n};\n\n// Production: two",
            "staging with none waits for one",
        ),
        ('.builder == "https://ci.acme.test/builders/release"', '.builder != ""', "another builder"),
        ('.build_type == "https://ci.acme.test/build-types/container/v1"', '.build_type != ""', "another way to build"),
        ('.source == "https://git.acme.test/acme/app"', '.source like "*/app"', "a fork of the source"),
        ('.source_ref == "refs/heads/main"', '.source_ref like "*/main"', "a tag of a protected branch's name"),
        ('"refs/heads/release/*"', '"refs/heads/*"', "a branch that is not protected"),
        ('@id("staging")', '@id("staging") @key("release")', "a named key where no permit names it"),
        ('@id("staging")', '@id("staging") @agent_key', "an agent's own key where no permit says so"),
        ('@key("release")', '@key("release nightly")', "another named key than the one that a permit names"),
        ('@key("release")\n', "", "production with two approvals by the release key"),
        ("@agent_key\n", "", "staging with its own key by the one agent that may"),
    ],
)
def test_a_weaker_policy_fails_the_test_that_is_for_it(folder, what, instead, case):
    path = folder / "release.cedar"
    text = path.read_text()
    assert text.count(what) == 1
    path.write_text(text.replace(what, instead))
    assert case in failed(folder)


def test_approvals_cannot_be_asked_for_in_a_way_that_their_absence_switches_off(folder):
    path = folder / "release.cedar"
    optional = folder / "release.cedarschema"
    optional.write_text(optional.read_text().replace("approval: Approval", "approval?: Approval"))
    path.write_text(
        'forbid (principal, action == Action::"release.sign", resource) '
        "when { context has approval && context.approval.count < 2 };"
    )
    with pytest.raises(PolicyError) as caught:
        PolicyDocuments.load(folder)
    assert [finding.defect for finding in caught.value.findings] == [Defect.FORBID_SWITCHED_OFF]
