"""Operators' own tests beside their policies, and the folder that `policy init` writes."""

from pathlib import Path

import pytest
from support.releases import PERMIT, policy

from broker.action import Action
from broker.decision.decide import decide
from broker.decision.findings import Defect, PolicyError
from broker.decision.policy import PolicyDocuments
from broker.decision.policy_init import policy_init
from broker.decision.policy_tests import run_policy_tests
from broker.decision.show import show
from broker.errors import Refused
from broker.identity.spiffe_id import SpiffeId

EXAMPLE = Path(__file__).parents[3] / "examples" / "release-signing" / "policy"
OPERATOR = SpiffeId.parse("spiffe://acme.test/ops/alice")

CASE = """
[[case]]
name = "refund"
principal = "spiffe://acme.test/support/agent"
action = "orders.refund"
resource = "https://orders.acme.test/orders/17"
audience = "spiffe://acme.test/orders"
parameters = { amount = 30 }
facts.spire = { ids = [] }
"""


@pytest.fixture
def run(tmp_path, world):
    def run(case, *texts, suffix="toml"):
        (tmp_path / "tests").mkdir(exist_ok=True)
        (tmp_path / "tests" / f"t.{suffix}").write_text(case)
        return [result.problem for result in run_policy_tests(tmp_path, world.policy(*texts))]

    return run


def test_what_is_expected_passes(run, world):
    assert run(CASE + 'expect = "allow"', world.allow) == [""]
    assert run(CASE + 'expect = "deny"', "") == [""]


def test_a_refusal_where_allow_is_expected_fails_and_says_where(run):
    permit = '@id("r") permit (principal, action == Action::"orders.refund", resource) when { context has process };'
    (problem,) = run(CASE + 'expect = "allow"', permit)
    assert "expected allow, got denied" in problem
    assert "p.cedar#r fails at: when { context has process }" in problem


def test_an_allow_where_deny_is_expected_fails_and_names_the_policy(run, world):
    assert run(CASE + 'expect = "deny"', world.allow) == ["expected deny, but it is allowed by p.cedar#allow"]


def test_obligations_are_compared(run, world):
    allow = f'@max_ttl("90s") @single_use {world.allow}'
    right = CASE + 'expect = "allow"\nmax_ttl = "90s"\nuse = "single"\npolicies = ["p.cedar#allow"]'
    assert run(right, allow) == [""]
    (problem,) = run(right, world.allow)
    assert problem == "expected a life of 90s, got 60s; expected use single, got once"
    assert "to permit it" in run(right.replace("#allow", "#other"), allow)[0]


def test_a_malformed_case_never_passes_as_a_refusal(run):
    (problem,) = run(CASE.replace("https://orders", "https://ORDERS") + 'expect = "deny"', "")
    assert "malformed" in problem


@pytest.mark.parametrize(
    "wrong",
    [
        "expect = 1",
        'expect = "maybe"',
        'expected = "deny"',
        "",
        'expect = "deny"\nfacts.spire = 1',
        "[[",
        'expect = "deny"\nmax_tll = "1s"',
    ],
)
def test_a_file_that_holds_no_cases_is_no_passed_test(run, wrong):
    with pytest.raises(PolicyError) as caught:
        run(CASE + wrong, "")
    assert caught.value.findings[0].file == "tests/t.toml"


def test_an_empty_test_file_is_refused(run):
    with pytest.raises(PolicyError):
        run("", "")


def test_json_cases_are_read_too(run, world):
    case = """{"case": [{"name": "n", "principal": "spiffe://acme.test/a", "action": "orders.read",
      "resource": "https://orders.acme.test/orders/17", "audience": "spiffe://acme.test/orders", "expect": "allow"}]}"""
    assert run(case, world.allow, suffix="json") == [""]


COMMON = """
[common]
principal = "spiffe://acme.test/support/agent"
action = "orders.refund"
resource = "https://orders.acme.test/orders/17"
audience = "spiffe://acme.test/orders"
parameters = { amount = 30 }
facts.spire = { ids = ["spiffe://acme.test/support/agent"] }
facts.process = { uid = 1600, gid = 1600, exe = "/a", exe_sha256 = "", cgroup = "/" }
[[case]]
name = "c"
"""
NOT_AS_ROOT = """forbid (principal, action in Action::"money", resource)
  unless { context has process && context.process.uid != 0 };"""


class TestCommon:
    @pytest.mark.parametrize(
        ("own", "expect"),
        [
            ("", "allow"),
            ("facts.process.uid = 0", "deny"),
            ('without = ["process"]', "deny"),
            ('action = "orders.read"\nparameters = { amount = 1 }', "deny"),
            ("parameters.amount = 31", "allow"),
            ('parameters.amount = "31"', "deny"),
        ],
    )
    def test_a_case_says_in_what_it_differs(self, run, world, own, expect):
        other = "allow" if expect == "deny" else "deny"
        assert run(f'{COMMON}{own}\nexpect = "{expect}"', world.allow, NOT_AS_ROOT) == [""]
        assert run(f'{COMMON}{own}\nexpect = "{other}"', world.allow, NOT_AS_ROOT) != [""]

    def test_one_case_leaves_nothing_behind_for_the_next(self, run, world):
        two = f'{COMMON}facts.process.uid = 0\nexpect = "deny"\n[[case]]\nname = "d"\nexpect = "allow"'
        assert run(two, world.allow, NOT_AS_ROOT) == ["", ""]

    @pytest.mark.parametrize(
        "wrong",
        ['without = ["spier"]\nexpect = "deny"', 'expect = "allow"\nreason = "denied"', 'expect = "deny"\nuse = "once"',
         'expect = "deny"\nreason = "nope"', 'expect = "deny"\nfacts = 1'],
    )  # fmt: skip
    def test_a_case_that_could_not_fail_as_meant_is_refused(self, run, world, wrong):
        with pytest.raises(PolicyError):
            run(COMMON + wrong, world.allow)

    def test_a_misspelt_member_of_what_is_common_is_refused(self, run, world):
        with pytest.raises(PolicyError) as caught:
            run(COMMON.replace("audience", "audeince") + 'expect = "deny"', world.allow)
        assert "case.0.audeince" in caught.value.findings[0].problem


class TestReasons:
    WAITS = 'permit (principal, action == Action::"release.sign", resource) when { context.approval.count >= 2 };'

    @pytest.mark.parametrize(
        ("own", "reason"),
        [
            ("", "approval_required"),
            ('without = ["provenance"]', "provenance_missing"),
            ('parameters.signing.signer = "key:release"', "denied"),
            ('action = "release.other"', "unknown_action"),
        ],
    )
    def test_a_refusal_comes_with_the_reason_that_its_caller_is_told(self, tmp_path, own, reason):
        example = (EXAMPLE / "tests" / "release.toml").read_text().partition("[[case]]")[0]
        (tmp_path / "tests").mkdir()
        texts = policy(self.WAITS, schema=(EXAMPLE / "release.cedarschema").read_text())
        for told in (reason, "expired"):
            case = f'{example}[[case]]\nname = "c"\n{own}\nexpect = "deny"\nreason = "{told}"'
            (tmp_path / "tests" / "t.toml").write_text(case)
            (result,) = run_policy_tests(tmp_path, texts)
            assert result.passed is (told == reason)
            assert result.passed or f"expected expired, got {reason}" in result.problem

    def test_a_person_asks_too(self, run):
        case = """[[case]]
          name = "n"
          principal = "https://login.acme.test/subject/YWxpY2U"
          action = "broker.approve"
          resource = "https://orders.acme.test/orders/17"
          audience = "https://broker.acme.test"
          parameters = { action = "orders.refund", principal = "spiffe://acme.test/a" }
        """
        permit = (
            'permit (principal in Issuer::"https://login.acme.test", action == Action::"broker.approve", resource);'
        )
        assert run(case + 'expect = "allow"', permit) == [""]
        (problem,) = run(case.replace("YWxpY2U", "alice@acme") + 'expect = "deny"', permit)
        assert "malformed" in problem


class TestInit:
    def test_the_written_folder_is_taken_and_its_tests_pass(self, tmp_path):
        folder = tmp_path / "policy"
        written = policy_init(folder, OPERATOR)
        results = run_policy_tests(folder, PolicyDocuments.load(folder))
        assert [result.problem for result in results] == ["", "", "", "", ""]
        assert {path.name for path in written} == {
            "operators.cedar", "example.cedar", "example.cedarschema", "example.toml",
        }  # fmt: skip

    def test_the_first_operator_exists_by_policy_and_nobody_else_does(self, tmp_path, world):
        policy_init(tmp_path / "policy", OPERATOR)
        policy = PolicyDocuments.load(tmp_path / "policy")
        operate = Action("broker.operate", "https://broker.acme.test/explain", "https://broker.acme.test")
        assert decide(policy, OPERATOR, operate, {}, world.now, not_after=world.not_after)
        for other in ("spiffe://acme.test/ops/bob", "spiffe://acme.test/ops/alice/x", "spiffe://evil.test/ops/alice"):
            with pytest.raises(Refused):
                decide(policy, SpiffeId.parse(other), operate, {}, world.now, not_after=world.not_after)

    def test_nothing_that_exists_is_overwritten(self, tmp_path):
        (tmp_path / "mine.cedar").write_text("// mine")
        with pytest.raises(PolicyError) as caught:
            policy_init(tmp_path, OPERATOR)
        assert caught.value.findings[0].defect is Defect.FOLDER
        assert [path.name for path in tmp_path.iterdir()] == ["mine.cedar"]

    def test_a_trust_domain_is_no_operator(self, tmp_path):
        with pytest.raises(PolicyError):
            policy_init(tmp_path / "policy", SpiffeId.parse("spiffe://acme.test"))


def test_show_tells_what_each_action_needs_and_who_decides_it(world):
    process = '@id("p") forbid (principal, action in Action::"money", resource) unless { context has process };'
    shown = {one.action: one for one in show(world.policy(f"@single_use {world.allow}", process))}
    base = ["broker.approve", "broker.breakglass", "broker.operate", "broker.score"]
    assert list(shown) == [*base, "orders.read", "orders.refund"]
    refund = shown["orders.refund"]
    assert (refund.attestors, refund.required, refund.parameters) == (("process", "spire"), ("spire",), "optional")
    assert [(p.id, p.effect, p.max_ttl_s, p.use) for p in refund.policies] == [
        ("p.cedar#allow", "permit", 60, "single"),
        ("p.cedar#p", "forbid", None, None),
    ]
    assert shown["orders.read"].parameters == "none"
    assert not refund.audience


def test_show_tells_who_signs_for_actions_that_ask_for_a_signature_and_for_no_other(world):
    shown = {
        one.action: one for one in show(policy(f'@key("a b") {PERMIT};', PERMIT.replace("permit", "forbid") + ";"))
    }
    assert [p.signers for p in shown["release.sign"].policies] == [("key:a", "key:b"), ()]
    asks_for_none = {one.action: one for one in show(world.policy(world.allow))}["orders.refund"]
    assert [p.signers for p in asks_for_none.policies] == [()]


def test_show_tells_whose_policies_see_the_audience(world):
    schema = world.schema.replace("spire?: Spire", "audience: String")
    shown = {one.action: one for one in show(world.policy(world.allow, schema=schema))}
    assert {name for name, one in shown.items() if one.audience} == {"orders.read"}
    assert shown["orders.read"].attestors == ()
