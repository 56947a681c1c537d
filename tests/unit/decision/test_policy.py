"""Slices: what belongs to an action, and nothing else."""

import pytest

from broker.decision.expressions import MAX_DEPTH
from broker.decision.findings import Defect, PolicyError
from broker.decision.policy import compile_policy

REFUND = 'action == Action::"orders.refund"'


def rules_of(policy, action):
    return [rule.id for rule in policy.slice(action).rules]


def test_a_slice_holds_the_policies_whose_action_scope_leaves_the_action_in(world):
    policy = world.policy(
        '@id("all") forbid (principal is Workload, action, resource) when { resource in Resource::"https://a.test" };',
        '@id("one") permit (principal, action == Action::"orders.refund", resource);',
        '@id("group") permit (principal, action in Action::"money", resource);',
        '@id("list") permit (principal, action in [Action::"orders.read", Action::"money"], resource);',
        '@id("read") permit (principal, action == Action::"orders.read", resource);',
        '@id("in-itself") permit (principal, action in Action::"orders.read", resource);',
    )
    assert rules_of(policy, "orders.refund") == [f"p.cedar#{n}" for n in ("all", "one", "group", "list")]
    assert rules_of(policy, "orders.read") == [f"p.cedar#{n}" for n in ("all", "list", "read", "in-itself")]
    assert rules_of(policy, "broker.operate") == rules_of(policy, "broker.approve") == ["p.cedar#all"]


def test_groups_of_groups_reach_the_action(world):
    schema = """action "top"; action "mid" in ["top"];
      action "leaf" in ["mid"] appliesTo { principal: [Workload], resource: [Resource], context: {} };"""
    policy = world.policy('@id("top") permit (principal, action in Action::"top", resource);', schema=schema)
    assert rules_of(policy, "leaf") == ["p.cedar#top"]
    assert policy.slice("top") is None
    assert policy.slice("mid") is None


def test_attestors_are_what_a_policy_names_and_what_the_schema_requires(world):
    named = f"permit (principal, {REFUND}, resource) when {{ context has process }};"
    assert world.policy(named).slice("orders.refund").attestors == {"spire", "process"}
    assert world.policy(world.allow).slice("orders.refund").attestors == {"spire"}
    assert world.policy(world.allow).slice("orders.read").attestors == frozenset()
    assert world.policy(named).attestors == {"spire", "process", "approval"}, "an emergency takes approvals, always"


@pytest.mark.parametrize(
    "condition",
    [
        "context.process.uid == 1",
        "[context.process].contains(context.process)",
        "{ a: context.process }.a.uid == 1",
        "(if true then context.process else context.process).uid == 1",
        'context["process"]["uid"] == 1',
    ],
)
def test_every_way_to_name_evidence_is_seen(world, condition):
    schema = world.schema.replace("process?: Process", "process: Process")
    policy = world.policy(f"permit (principal, {REFUND}, resource) when {{ {condition} }};", schema=schema)
    assert policy.rules[0].evidence == {"process"}


@pytest.mark.parametrize(
    "condition",
    [
        'context.process.exe == "/usr/bin/agent"',
        'context["process"]["exe"] like "/usr/*"',
        '[{ a: context.process.exe }].contains({ a: "/usr/bin/agent" })',
        '(if context.process.uid == 1 then context.process else context.process).exe == "/usr/bin/agent"',
        'context.process.uid == 1 && !(context.process.exe == "/bin/sh")',
    ],
)
def test_no_permit_rests_on_a_path_that_the_caller_can_arrange(world, condition):
    schema = world.schema.replace("process?: Process", "process: Process")
    text = f"permit (principal, {REFUND}, resource) when {{ {condition} }};"
    with pytest.raises(PolicyError) as caught:
        world.policy(text, schema=schema)
    (finding,) = caught.value.findings
    assert (finding.defect, "exe_sha256" in finding.fix) == (Defect.FORGEABLE, True)
    assert world.policy(text.replace(".exe", ".exe_sha256").replace('"exe"', '"exe_sha256"'), schema=schema).rules


def test_a_parameter_called_exe_is_the_operators_own(world):
    schema = world.schema.replace("amount: Long", "exe: String")
    policy = world.policy(
        f'permit (principal, {REFUND}, resource) when {{ context has parameters && context.parameters.exe == "x" }};',
        schema=schema,
    )
    assert policy.rules


def test_evidence_named_only_in_unless_is_seen(world):
    policy = world.policy(f"forbid (principal, {REFUND}, resource) unless {{ context has process.uid }};")
    assert policy.slice("orders.refund").attestors == {"spire", "process"}


def test_parameters_are_no_attestor(world):
    policy = world.policy(f"permit (principal, {REFUND}, resource) when {{ context has parameters }};")
    assert policy.slice("orders.refund").attestors == {"spire"}
    assert policy.slice("orders.refund").parameters is False
    assert policy.slice("orders.read").parameters is None


@pytest.mark.parametrize("mark", ["", "?"])
def test_the_audience_is_no_evidence_whether_it_is_required_or_optional(world, mark):
    schema = world.schema.replace("spire?: Spire", f"audience{mark}: String")
    part = world.policy("forbid (principal, action, resource) when { context has audience };", schema=schema).slice(
        "orders.read"
    )
    assert (part.audience, part.attestors, part.required, part.optional) == (True, set(), set(), set())
    assert not world.policy(world.allow).slice("orders.read").audience


def test_what_operators_do_is_permitted_only_by_a_policy_that_names_it(world):
    with pytest.raises(PolicyError) as caught:
        world.policy('permit (principal == Workload::"spiffe://acme.test/support/agent", action, resource);')
    (finding,) = caught.value.findings
    assert (finding.defect, "broker.operate" in finding.problem) == (Defect.EVERY_ACTION, True)
    assert "action in [..]" in finding.fix
    named = world.policy('permit (principal, action == Action::"broker.operate", resource);', world.allow)
    assert rules_of(named, "broker.operate") == ["p.cedar#0"]


def test_evidence_that_one_action_declares_is_not_gathered_for_another(world):
    policy = world.policy("forbid (principal, action, resource) unless { context has process };")
    assert policy.slice("orders.refund").attestors == {"spire", "process"}
    assert policy.slice("orders.read").attestors == frozenset()


def test_a_context_declared_by_name_is_read_like_one_in_place(world):
    schema = """
      type Inner = {
        spire: Spire, @doc("x: y") process?: Process, parameters: { a: { b?: Long }, c: Set<{ d: Long }> }
      };
      type Outer = Inner;
      action "x" appliesTo { principal: [Workload], resource: [Resource], context: Outer };
    """
    part = world.policy("", schema=schema).slice("x")
    assert (part.required, part.optional, part.parameters) == ({"spire"}, {"process"}, True)


def test_attribute_names_that_look_like_schema_words_are_only_names(world):
    schema = """action "x" appliesTo { principal: [Workload], resource: [Resource],
      context: { context: Spire, "type": { action: Long }, namespace?: Spire } };"""
    part = world.policy("", schema=schema).slice("x")
    assert (part.required, part.optional) == ({"context", "type"}, {"namespace"})


@pytest.mark.parametrize("mark", ["", "?"])
@pytest.mark.parametrize("written", ["Signing", "Mine"])
def test_an_action_signs_where_its_parameters_have_signing(world, written, mark):
    schema = f"""type Mine = Signing; type Asked = {{ @doc("what: {{") signing{mark}: {written}, note: String }};
      action "x" appliesTo {{ principal: [Workload], resource: [Resource], context: {{ parameters: Asked }} }};
      action "y" appliesTo {{ principal: [Workload], resource: [Resource],
        context: {{ parameters?: {{ within: {{ signing: Signing }}, set: Set<{{ signing: Long }}> }} }} }};"""
    policy = world.policy("", schema=schema)
    assert (policy.slice("x").signs, policy.slice("y").signs) == (True, False)


@pytest.mark.parametrize("written", ["String", "{ signer: String }", "Set<Signing>", "Artifact", "Mine", "Workload"])
def test_a_parameter_named_signing_is_what_a_signature_is_asked_for_with(world, written):
    schema = f"""type Mine = {{ artifacts: Set<Artifact>, purpose: String, signer: String }};
      action "x" appliesTo {{ principal: [Workload], resource: [Resource],
        context: {{ parameters: {{ signing: {written} }} }} }};"""
    with pytest.raises(PolicyError) as caught:
        world.policy("", schema=schema)
    (finding,) = caught.value.findings
    assert (finding.defect, finding.line, "signing: Signing" in finding.fix) == (Defect.SCHEMA, 2, True)
    assert world.policy("", schema=schema.replace("signing:", "signed:")).slice("x")


def test_a_key_for_a_group_needs_one_action_in_it_that_signs(world):
    schema = (
        world.schema
        + """action "orders.sign" in ["money"] appliesTo { principal: [Workload],
      resource: [Resource], context: { parameters: { signing: Signing } } };"""
    )
    text = '@key("release") permit (principal, action in Action::"money", resource);'
    assert world.policy(text, schema=schema).rules
    with pytest.raises(PolicyError) as caught:
        world.policy(text)
    assert [finding.defect for finding in caught.value.findings] == [Defect.BAD_OBLIGATION]


def test_nobody_looks_for_what_identification_alone_can_tell(world):
    policy = world.policy(
        'permit (principal, action == Action::"broker.approve", resource) when { context has person };', world.allow
    )
    assert policy.slice("broker.approve").attestors == {"person"}
    assert policy.attestors == {"spire", "approval"}


def test_the_base_schema_alone_knows_what_operators_do():
    policy = compile_policy({}, {})
    assert sorted(policy.slices) == ["broker.approve", "broker.breakglass", "broker.operate", "broker.score"]


def test_the_revision_names_the_texts(world):
    first, same, other = world.policy(world.allow), world.policy(world.allow), world.policy(f"{world.allow} ")
    assert first.revision == same.revision != other.revision
    assert first.revision.startswith("sha256:")
    moved = compile_policy({"q.cedar": world.allow}, {"p.cedarschema": world.schema})
    assert moved.revision != first.revision


def test_every_mistake_is_in_one_report_with_its_place(world):
    template = "permit (principal == ?principal, action, resource);"
    with pytest.raises(PolicyError) as caught:
        compile_policy(
            {
                "a.cedar": f'// first\n@maxttl("1s")\npermit (principal, {REFUND}, resource);\n\n{template}',
                "b.cedar": "permit (principal, action, resource",
                "c.cedar": 'permit (principal, action == Action::"nope", resource);',
            },
            {"p.cedarschema": world.schema},
        )
    found = {(f.file, f.line, f.defect) for f in caught.value.findings}
    assert found == {
        ("a.cedar", 2, Defect.UNKNOWN_ANNOTATION),
        ("a.cedar", 5, Defect.TEMPLATE),
        ("b.cedar", 0, Defect.SYNTAX),
        ("c.cedar", 1, Defect.TYPE),
    }
    assert len(str(caught.value).splitlines()) == 4


def test_mistakes_in_schema_and_policies_are_reported_together():
    with pytest.raises(PolicyError) as caught:
        compile_policy({"a.cedar": "permit ("}, {"a.cedarschema": "entity ;"})
    assert {f.defect for f in caught.value.findings} == {Defect.SYNTAX, Defect.SCHEMA}


def test_a_syntax_error_is_found_at_its_line(world):
    with pytest.raises(PolicyError) as caught:
        world.policy(
            world.allow, "", '// "; a quote in a comment', "permit (principal, actoin, resource);", world.allow
        )
    assert [finding.line for finding in caught.value.findings] == [4]


def test_a_policy_without_an_id_is_named_by_its_place(world):
    policy = world.policy(f"permit (principal, {REFUND}, resource);", world.allow)
    assert [rule.id for rule in policy.rules] == ["p.cedar#0", "p.cedar#allow"]


def test_a_comment_that_hides_a_policy_keeps_it_hidden(world):
    policy = world.policy(f'// ; {world.allow}\n{world.allow} // "; forbid (principal, action, resource);')
    assert len(policy.rules) == 1


def test_required_evidence_does_not_switch_a_forbid_off(world):
    # orders.refund requires spire: without it nothing is decided at all.
    policy = world.policy(
        f"forbid (principal, {REFUND}, resource) when {{ context has spire && context.spire.ids.isEmpty() }};"
    )
    assert policy.rules


DEEP = [
    (lambda n: " && ".join(["context.spire.ids.isEmpty()"] * n), 4),
    (lambda n: " || ".join(['resource in Resource::"https://orders.acme.test/v1"'] * n), 2),
    (lambda n: "if context.spire.ids.isEmpty() then " * n + "true" + " else false" * n, 4),
    (lambda n: "1" + " + 1" * n + " == 3", 2),
]


@pytest.mark.parametrize(("shape", "spare"), DEEP)
def test_a_condition_as_deep_as_may_be_is_compiled_and_a_deeper_one_is_a_finding(world, shape, spare):
    deepest = MAX_DEPTH - spare
    policy = world.policy(f"permit (principal, {REFUND}, resource) when {{ {shape(deepest)} }};")
    assert policy.rules
    for depth in (MAX_DEPTH + 1, 200, 20_000):
        with pytest.raises(PolicyError) as caught:
            world.policy(f"permit (principal, {REFUND}, resource) when {{ {shape(depth)} }};")
        assert [finding.defect for finding in caught.value.findings] == [Defect.TOO_DEEP]


def test_many_conditions_are_written_as_many_clauses(world):
    clauses = 'when { context.spire.ids.contains("spiffe://acme.test/a") } ' * 100
    assert world.policy(f"permit (principal, {REFUND}, resource) {clauses};").rules


def test_a_chain_of_groups_that_would_crash_the_compiler_is_refused(world):
    def chain(n):
        return 'action "a0";' + "".join(f'action "a{k}" in ["a{k - 1}"];' for k in range(1, n))

    assert world.policy("", schema=chain(100))
    with pytest.raises(PolicyError) as caught:
        world.policy("", schema=chain(20_000))
    assert [finding.defect for finding in caught.value.findings] == [Defect.TOO_LARGE]


def test_many_policies_are_read_in_batches_and_keep_their_order(world):
    texts = [
        f'@id("p{n}") permit (principal == Workload::"spiffe://acme.test/w{n}", {REFUND}, resource);' for n in range(50)
    ]
    policy = world.policy(*texts)
    assert rules_of(policy, "orders.refund") == [f"p.cedar#p{n}" for n in range(50)]
    assert [rule.line for rule in policy.rules] == list(range(1, 51))
