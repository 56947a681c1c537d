"""What an approver reads: only what the operator wrote and what is true of the request, on the lines it belongs on."""

from pathlib import Path
from string import printable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.whole_broker import AGENT, ISSUER, RESOURCE

from broker.action import Action
from broker.approval_text import FIELDS, MAX_TEMPLATE, MAX_TEXT, NOT_GIVEN, Request, TextError, Texts
from broker.errors import Invalid

SHA256, SHA512 = "ab" * 32, "cd" * 64


def request(name: str = "release.sign", **parameters: object) -> Request:
    action = Action(name, RESOURCE, ISSUER, parameters)
    return Request(digest="1f" * 32, action=action, principal=AGENT, request_id="request-number-one")


def signing(*artifacts: dict[str, str], signer: str = "keyless") -> dict[str, object]:
    return {"artifacts": [*artifacts] or [{"sha256": SHA256}], "purpose": "release", "signer": signer}


def shown(template: str, asked: Request | None = None, **parameters: object) -> str:
    return Texts({"release.sign": template}).render(asked or request(**parameters))


def test_every_field_of_a_request_can_be_shown() -> None:
    asked = request(signing=signing({"sha256": SHA256, "sha512": SHA512}), environment="production")
    found = {name: shown(f"${{{name}}}", asked) for name in FIELDS}
    assert found == {
        "action": "release.sign",
        "action_digest": asked.action.digest.hex(),
        "artifacts": f"\n  sha256:{SHA256} sha512:{SHA512}",
        "audience": ISSUER,
        "parameters": '{"environment": "production"}',
        "principal": AGENT,
        "purpose": "release",
        "request_digest": "1f" * 32,
        "request_id": "request-number-one",
        "resource": RESOURCE,
        "signer": "keyless",
    }


def test_without_a_template_everything_is_shown() -> None:
    text = Texts().render(request(signing=signing(signer="key:release"), environment="production"))
    for part in (AGENT, "release.sign", RESOURCE, ISSUER, '{"environment": "production"}', SHA256, "key:release"):
        assert part in text


def test_a_parameter_is_shown_as_what_it_is() -> None:
    parameters = {"a": {"b-1": {"c": 1}}, "text": "1", "number": 1, "list": [True, "x"]}
    assert shown("${parameters.a.b-1.c} ${parameters.text} ${parameters.number}", **parameters) == '1 "1" 1'
    assert shown("${parameters.list}", **parameters) == '[true, "x"]'


def test_what_the_request_does_not_have_cannot_be_given_by_what_it_has() -> None:
    for absent in ("${parameters.b}", "${parameters.a.b}", "${parameters.a.b.c}", "${artifacts}", "${signer}"):
        assert shown(absent, a="text") == NOT_GIVEN
    assert shown("${parameters.a}", a=NOT_GIVEN) == f'"{NOT_GIVEN}"'


@pytest.mark.parametrize(
    "claimed",
    ["keyless", {}, {"artifacts": [], "purpose": "release", "signer": "keyless"}, signing({"sha256": "\n"})],
)
def test_a_parameter_that_is_only_called_signing_is_shown_as_any_other(claimed: object) -> None:
    assert shown("${artifacts}", signing=claimed) == NOT_GIVEN
    assert '"signing"' in shown("${parameters}", signing=claimed)
    assert '"signing"' not in shown("${parameters}", signing=signing())


@pytest.mark.parametrize(
    "value",
    [
        "production\napproved by the owner",
        "production\r\nresource: https://harmless.test",
        "production\x0bx\x0cy\x1cz\x85",
        "production\u2028next\u2029next",
        "\x1b[2K\x1b[1Aproduction",
        "\x9b2Kproduction",
        "\x7f\x7f\x08\x08",
        "\u202enoitcudorp\u202c",
        "\u2066production\u2069\u200f\u061c",
        "pr\u043eduction",
        "\ufeff\u200b\u00adproduction",
        "\U000e0041\U0001f600",
        'production" resource: "https://harmless.test',
        "\\u000a\\n",
        "${principal} $resource $$",
        "production" + " " * 400 + "approved by the owner",
        "\x00",
    ],
)
def test_no_value_of_the_callers_makes_a_line_or_leaves_its_quotes(value: str) -> None:
    template = "environment: ${parameters.environment}\nby ${principal}"
    for text in (shown(template, environment=value), shown("environment: ${parameters}\nby x", environment=value)):
        assert len(text.split("\n")) == len(text.splitlines()) == 2
        assert set(text) <= set(printable) - set("\r\t\x0b\x0c")
        assert "  " not in text
    (line, _) = shown(template, environment=value).split("\n")
    assert line.startswith('environment: "')
    inside = line.removeprefix('environment: "').removesuffix('"').replace("\\\\", "").replace('\\"', "")
    assert '"' not in inside


@given(st.text(max_size=60), st.text(max_size=10))
def test_whatever_the_caller_sends_stays_on_its_line_in_ascii(value: str, name: str) -> None:
    try:
        asked = request(environment=value, more={name: [value]})
    except Invalid:
        return  # lone surrogates never become an action
    text = shown("${parameters.environment}|${parameters}", asked)
    assert text.isascii()
    assert text.isprintable()


def test_a_text_that_nobody_should_have_to_read_is_refused_and_not_cut() -> None:
    assert len(shown("${parameters.a}", a="x" * 4000)) == 4002
    with pytest.raises(Invalid, match=str(MAX_TEXT)):
        shown("${parameters.a}" * 3, a="x" * 4000)


@pytest.mark.parametrize(
    ("name", "template"),
    [
        ("release.sign", "${environment}"),
        ("release.sign", "${parameter.environment}"),
        ("release.sign", "${resource.host}"),
        ("release.sign", "${principal.name}"),
        ("release.sign", "${parameters.}"),
        ("release.sign", "${parameters..a}"),
        ("release.sign", "${parameters.a b}"),
        ("release.sign", "${Principal}"),
        ("release.sign", "$unheard"),
        ("release.sign", "it costs $5"),
        ("release.sign", "it ends in $"),
        ("release.sign", "${principal"),
        ("release.sign", "${pr\u0131ncipal}"),
        ("release.sign", "a\x1b[2Kb"),
        ("release.sign", "a\u202eb"),
        ("release.sign", "a\r\nb"),
        ("release sign", "${principal}"),
        ("release..sign", "${principal}"),
        (".release", "${principal}"),
        ("", "${principal}"),
        ("release\n", "${principal}"),
    ],
)
def test_a_template_that_is_wrong_is_found_before_it_is_needed(name: str, template: str) -> None:
    with pytest.raises(TextError):
        Texts({name: template})
    right = "$principal ${parameters.a_b.c-d} costs $$5\n\u00fcber"
    assert Texts({"release.sign": right}).render(request()) == f"{AGENT} {NOT_GIVEN} costs $5\n\u00fcber"


def test_a_folder_is_read_whole_and_all_its_mistakes_are_told_together(tmp_path: Path) -> None:
    (tmp_path / "release.sign.txt").write_text("${principal} signs")
    (tmp_path / "README.md").write_text("${nothing} is read here")
    texts = Texts.load(tmp_path)
    assert texts.render(request()) == f"{AGENT} signs"
    assert texts.render(request("release.other")) == Texts().render(request("release.other"))
    (tmp_path / "a.txt").write_text("${unheard} ${of}")
    (tmp_path / "b c.txt").write_text("x")
    with pytest.raises(TextError) as wrong:
        Texts.load(tmp_path)
    assert [line.split(":")[0] for line in str(wrong.value).splitlines()] == ["a.txt", "a.txt", "b c.txt"]
    (tmp_path / "a.txt").write_bytes(b"\xff")
    (tmp_path / "b c.txt").write_text("x" * (MAX_TEMPLATE + 1))
    with pytest.raises(TextError) as unread:
        Texts.load(tmp_path)
    assert len(str(unread.value).splitlines()) == 2
    with pytest.raises(OSError, match="nowhere"):
        Texts.load(tmp_path / "nowhere")


def test_templates_are_read_once_and_what_is_written_later_changes_no_text(tmp_path: Path) -> None:
    (tmp_path / "release.sign.txt").write_text("Release it?")
    texts = Texts.load(tmp_path)
    (tmp_path / "release.sign.txt").write_text("Feed the cat?")
    (tmp_path / "default.txt").write_text("Whatever?")
    assert texts.render(request()).endswith("Release it?")
    assert Texts.load(tmp_path).render(request()).endswith("Feed the cat?")
