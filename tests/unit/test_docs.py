"""What the documents say is so: links lead somewhere, named tests and files exist, tables are those of the code."""

import re
import tomllib
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import msgspec
import pytest
from pydantic import BaseModel
from support.constants import value_of
from tools.missing_parts import NEEDS

from broker.cli import main
from broker.cli.config import Config
from broker.cli.guard_config import load as load_guard
from broker.cli.trust_file import TrustFile
from broker.decision.declarations import BASE_SCHEMA
from broker.decision.obligations import _KNOWN as ANNOTATIONS
from broker.decision.policy_init import policy_init
from broker.edges.metrics import Metrics
from broker.identity.spiffe_id import SpiffeId
from broker.ledger import records
from broker.status import STATUS

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", "CHANGELOG.md"] + [
    str(page.relative_to(ROOT)) for folder in ("docs", "examples") for page in sorted((ROOT / folder).rglob("*.md"))
]
API = (ROOT / "docs/api.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
# Of the machine that a page was written on, and where packages come from: both are the reader's own.
NOT_FOR_READERS = re.compile(
    r"/(?:root|home|Users|work)/|/tmp/[a-z]|https?://(?:127\.0\.0\.1:[1-9]\d{4}|localhost)|pypi|index-url|goproxy|artifactory",
    re.IGNORECASE,
)
ROW = re.compile(r"^\| (.*) \|$", re.MULTILINE)


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def table(text: str, first: str) -> list[list[str]]:
    """The rows of the table whose head begins with these cells."""
    head = text.index(f"| {first} |")
    rows = text[head : text.index("\n\n", head)].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]


def plain(cell: str) -> str:
    return cell.strip("`| ")


def anchors(text: str) -> set[str]:
    """As the usual renderers name headings."""
    heads = re.findall(r"^#+ (.*)$", without_code(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(read(page))):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        found = (ROOT / page).parent / path if path else ROOT / page
        assert found.exists(), f"{page} links to {target}"
        if anchor:
            assert anchor in anchors(found.read_text(encoding="utf-8")), f"{page} links to {target}"


@pytest.mark.parametrize("page", PAGES)
def test_no_page_names_the_machine_it_was_written_on_or_where_packages_come_from(page: str) -> None:
    assert NOT_FOR_READERS.findall(read(page)) == []


def test_such_names_would_be_found() -> None:
    for name in ("/home/me/x", "/Users/me/x", "--index-url", "https://127.0.0.1:38627/x", "/tmp/build/x"):
        assert NOT_FOR_READERS.search(f"see {name}."), name


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_is_named_exists(page: str) -> None:
    for name in re.findall(r"`((?:broker|attestors|proto|tests|docs)/[\w./*-]*)`", read(page)):
        assert list(ROOT.glob(name.rstrip("/"))), f"{page} names {name}"


def existing_tests() -> set[str]:
    files = [file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("test_*.py")]
    return {name for text in files for name in re.findall(r"^\s*(?:async )?def (test_\w+)", text, re.MULTILINE)}


def test_every_test_that_the_threat_model_names_exists_and_each_threat_names_one() -> None:
    page, existing = read("docs/threat-model.md"), existing_tests()
    named = re.findall(r"`(test_\w+)`", page)
    assert [name for name in named if name not in existing] == []
    assert len(named) > 100
    threats = [row for row in ROW.findall(page) if row.count(" | ") == 2 and not row.startswith("threat |")]
    assert [row for row in threats if "`test_" not in row] == []


# -- tables that are the code's ----------------------------------------------------------------------------------------


def test_the_table_of_reasons_is_the_one_in_status() -> None:
    rows = {plain(row[0]): [plain(cell) for cell in row[1:6]] for row in table(API, "reason | gRPC")}
    assert rows == {
        str(reason): [s.grpc.name, str(s.http), s.oauth, str(s.token_http), s.resource or "none"]
        for reason, s in STATUS.items()
    }


def keys(model: type[BaseModel], above: tuple[str, ...] = ()) -> Iterator[tuple[str, str, str]]:
    """Key, default and variable. What stands under a name of the operator's has no variable of its own."""
    for name, field in model.model_fields.items():
        kind, path = field.annotation, (*above, name)
        if is_table(kind):
            yield from keys(kind, path)
            continue
        default = "required" if field.is_required() else shown(field.get_default(call_default_factory=True))
        yield ".".join(path), default, "\N{EN DASH}" if "NAME" in path else "ACTION_BROKER_" + "__".join(path).upper()
        for inner in filter(is_table, typing.get_args(kind)):
            yield from keys(inner, (*path, "NAME") if typing.get_origin(kind) is dict else path)


def is_table(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def shown(default: Any) -> str:
    return "none" if default is None else str(default) or '""'


def test_the_table_of_configuration_has_every_key_with_its_default_and_variable() -> None:
    folder = Config(issuer="https://b.test", trust_domain="b.test").state_folder
    derived = {
        f"ledger.{name}": f"STATE_FOLDER/{file}"
        for name, file in (
            ("file", "ledger.sqlite"),
            ("checkpoint_file", "checkpoint"),
            ("checkpoint_key_file", "checkpoint.key"),
        )
    }
    config = Config(issuer="https://b.test", trust_domain="b.test")
    for key, said in derived.items():
        path = getattr(config, key.replace("ledger.file", "ledger_file").removeprefix("ledger."))
        assert str(path) == said.replace("STATE_FOLDER", str(folder))
    rows = [(plain(row[0]), plain(row[1]), plain(row[2])) for row in table(API, "key | default")]
    assert rows == [(key, derived.get(key, default), variable) for key, default, variable in keys(Config)]


def test_the_table_of_the_trust_file_has_every_key_with_its_default() -> None:
    rows = [(plain(row[0]), plain(row[1])) for row in table(API, "key of the trust file | default")]
    assert rows == [(key, default) for key, default, _ in keys(TrustFile)]


def test_configuration_that_is_shown_and_not_run_is_valid() -> None:
    shown_blocks = re.findall(r"^```toml shown\n(.*?)^```$", README + API, re.MULTILINE | re.DOTALL)
    found = [tomllib.loads(text) for text in shown_blocks]
    assert any("signing" in one for one in found)
    for one in found:
        if "builders" in one:
            TrustFile(**one)
        else:
            Config(issuer="https://b.test", trust_domain="b.test", **one)


def test_configuration_of_a_guard_that_is_shown_is_valid(tmp_path: Path) -> None:
    shown_blocks = re.findall(r"^```toml guard\n(.*?)^```$", README + API, re.MULTILINE | re.DOTALL)
    assert shown_blocks
    for text in shown_blocks:
        (tmp_path / "guard.toml").write_text(text)
        assert load_guard(tmp_path / "guard.toml").rules


def test_the_table_of_record_kinds_has_every_kind_with_its_fields() -> None:
    rows = {plain(row[0]): re.findall(r"`(\w+)`", row[1]) for row in table(API, "kind | fields")}
    common = {"at", "correlation_id"}
    infos = [msgspec.inspect.type_info(kind) for kind in typing.get_args(records.Record)]
    assert rows == {
        info.tag: [field.name for field in info.fields if field.name not in common]
        for info in infos
        if isinstance(info, msgspec.inspect.StructType)
    }


def test_the_table_of_metrics_has_every_metric() -> None:
    rows = {plain(row[0]).removesuffix("_total"): row[1] for row in table(API, "metric | type")}
    assert rows == {metric.name: metric.type for metric in Metrics().registry.collect()}


def commands(group: click.Command, context: click.Context, above: str = "") -> Iterator[str]:
    if isinstance(group, click.Group) and not (above and group.invoke_without_command):
        for name in group.list_commands(context):
            inner = group.get_command(context, name)
            if inner is not None:
                yield from commands(inner, context, f"{above} {name}".strip())
    else:
        yield above


def test_the_table_of_commands_has_every_command() -> None:
    assert sorted(plain(row[0]) for row in table(API, "command | what | JSON")) == sorted(
        commands(main, click.Context(main))
    )
    said = re.findall(r"`([a-z -]+)`", "".join(row[0] for row in table(README, "command |")))
    words = {word for name in said for word in name.split()}
    assert words == {word for name in commands(main, click.Context(main)) for word in name.split()}


def test_each_bound_of_what_may_be_stale_names_tests_that_exist() -> None:
    bounds, _, shown_by = read("docs/staleness.md").partition("## Shown by")
    rows = [row.split(" | ")[0] for row in ROW.findall(bounds) if not row.startswith(("what |", "what changes |"))]
    assert len(rows) > 150
    assert len(set(rows)) == len(rows), "each row has a name of its own"
    shown_rows = [row.split(" | ") for row in ROW.findall(shown_by)][1:]
    assert [row[0] for row in shown_rows] == rows
    existing = existing_tests()
    named = [(row[0], re.findall(r"`(test_\w+)`", row[1])) for row in shown_rows]
    assert [name for name, tests in named if not tests] == []
    assert [(name, test) for name, tests in named for test in tests if test not in existing] == []


KEPT = re.compile(r"self\._\w+: (?:Final\[)?(?:dict|set|deque|OrderedDict|Counter)\[.*\] = |^    _\w+: Final\[dict\[")
"""What an object keeps from one call to the next, as this code writes it."""


def test_every_module_whose_objects_keep_something_says_so_in_the_page_on_staleness() -> None:
    listed = set(re.findall(r"`((?:broker|attestors)/[a-z0-9_/]+\.py)`", read("docs/staleness.md")))
    keeping = {
        str(file.relative_to(ROOT))
        for folder in ("broker", "attestors")
        for file in (ROOT / folder).rglob("*.py")
        if "_proto" not in file.parts and any(KEPT.search(line) for line in file.read_text().splitlines())
    }
    assert "broker/redemption.py" in keeping, "the search finds what it is to find"
    assert sorted(keeping - listed) == []


def test_the_annotations_are_those_that_policies_may_have() -> None:
    said = {name for row in table(API, "annotation | on") for name in re.findall(r"`@(\w+)", row[0])}
    assert said == set(ANNOTATIONS)


def test_the_base_schema_is_the_one_that_is_there() -> None:
    found = re.search(r"^```cedarschema base\n(.*?)^```$", API, re.MULTILINE | re.DOTALL)
    assert found is not None
    assert found[1] == BASE_SCHEMA


def test_the_policy_in_the_readme_is_what_policy_init_writes(tmp_path: Path) -> None:
    policy_init(tmp_path / "policy", SpiffeId.parse("spiffe://acme.test/operator"))
    found = re.search(r"^```cedar shown\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert found is not None
    assert found[1] in (tmp_path / "policy/example.cedar").read_text(encoding="utf-8")


def test_lifetimes_and_limits_are_those_in_the_code() -> None:
    rows = [*table(README, "what | how long"), *table(README, "limit |")]
    said = {plain(row[2]): float(re.sub(r"[^\d]", "", row[1])) for row in rows if len(row) > 2 and ":" in row[2]}
    assert len(said) > 20
    assert said == {name: value_of(name) for name in said}


def test_the_readme_shows_how_make_test_says_what_it_left_out() -> None:
    said = re.findall(r"^Left out, for want of (.*)$", README, re.MULTILINE)
    assert said
    assert set(said) <= set(NEEDS.values())


def test_the_version_is_the_one_in_the_changelog() -> None:
    version = tomllib.loads(read("pyproject.toml"))["project"]["version"]
    assert f"## [{version}]" in read("CHANGELOG.md")
