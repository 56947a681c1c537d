"""Cutting Cedar text into statements exactly as Cedar does, and refusing what would crash or deceive."""

import json

import pytest
from cedarpy import policies_to_json_str
from hypothesis import example, given, settings
from hypothesis import strategies as st

from broker.decision.findings import Defect
from broker.decision.source import MAX_NESTING, check_text, statements

POLICY = "permit (principal, action, resource);"


def defects(text, file="a.cedar"):
    return [finding.defect for finding in check_text(file, text)]


def test_statements_know_their_lines():
    second = 'forbid (principal,\n action, resource) when { "a;\\"b\n" == "c" };'
    text = f'// one; two\n\n{POLICY} {second}\n  // x\n@id("z") {POLICY}'
    assert [statement.line for statement in statements(text)] == [3, 3, 7]


PIECES = st.sampled_from(
    [
        POLICY,
        'permit (principal, action, resource) when { "a;//\\"b" == "{(" };',
        'forbid (principal, action, resource) when { {a: ";"}.a == "//" };',
        '@doc("x; // y") ',
        "// a comment; permit (\n",
        "//\u2028;\n",
        '// "\n',
        "//\r",
        *"\n \t",
    ]
)


@settings(max_examples=300, deadline=None)
@given(st.lists(PIECES, max_size=8).map("".join))
@example("// " + POLICY + "\r" + POLICY)
@example('permit (principal, action, resource) when { "\n" == "" };')
def test_the_statements_of_a_file_are_the_policies_that_cedar_reads(text):
    try:
        whole = json.loads(policies_to_json_str(text))["staticPolicies"]
    except ValueError:
        return
    parts = [json.loads(policies_to_json_str(statement.text))["staticPolicies"] for statement in statements(text)]
    assert [part["policy0"] for part in parts] == [whole[f"policy{n}"] for n in range(len(whole))]
    assert all(len(part) == 1 for part in parts)


@pytest.mark.parametrize("brackets", ["()", "[]", "{}"])
def test_nesting_that_would_crash_the_parser_is_refused(brackets):
    opening, closing = brackets
    assert defects(opening * (MAX_NESTING + 1) + closing * (MAX_NESTING + 1)) == [Defect.TOO_DEEP]
    assert set(defects(opening * 5000)) == {Defect.TOO_DEEP}
    assert defects(opening * MAX_NESTING + closing * MAX_NESTING) == []


def test_comparisons_do_not_count_as_nesting_or_against_it():
    assert defects("(" + " < ".join("a" * 100) + ")") == []
    assert defects("(>" * 100) == [Defect.TOO_DEEP]


def test_types_nest_in_a_schema():
    assert defects("Set<" * 100, "a.cedarschema") == [Defect.TOO_DEEP]
    assert defects("Set<" * 10 + "Long" + ">" * 10, "a.cedarschema") == []


@pytest.mark.parametrize("operator", [" && true", "+1", ".a", "!", '["a"]', " has a", " || a", " == 1", "if "])
def test_a_chain_that_would_crash_the_parser_is_refused(operator):
    assert defects(operator * 20_000 + ";") == [Defect.TOO_DEEP]
    assert defects(f"{operator * 20};\n" * 1000) == []


def test_large_sets_are_no_chains():
    items = ", ".join(f'"https://a.test/{n}?x=1&&y"' for n in range(5000))
    assert defects(f"permit (principal, action, resource) when {{ [{items}].contains(context.x.y) }};") == []


def test_brackets_in_strings_and_comments_do_not_count():
    assert defects(f'// {"(" * 99}\npermit (principal, action, resource) when {{ "{"[" * 99}" == "" }};') == []


@pytest.mark.parametrize(
    "char", ["\x00", "\x0b", "\r", "\x85", "\u200b", "\u202e", "\u2066", "\u2028", "\ufeff", "\ue000", "\U000e0041"]
)
def test_characters_that_a_reviewer_does_not_see_are_refused(char):
    assert defects(f"// a{char}b") == [Defect.HIDDEN_CHARACTER]


@pytest.mark.parametrize("text", ["// café 東京 🜚", "\t\n", "// plain"])
def test_characters_that_a_reviewer_sees_are_not(text):
    assert defects(text) == []
