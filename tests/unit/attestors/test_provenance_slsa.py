"""The source is what the builder itself fetched, and where that is ambiguous it is unknown: nothing is guessed."""

from typing import Any

import pytest
from support.provenance import COMMIT, REPOSITORY, encoded, predicate, statement

from attestors.slsa import Provenance, Source, read_provenance
from attestors.statement import StatementError, parse_statement

MAIN = {"uri": f"git+{REPOSITORY}@refs/heads/main", "digest": {"gitCommit": COMMIT}}
MODULE = {"uri": "git+https://git.acme.test/library@refs/tags/v1", "digest": {"gitCommit": "1" * 40}}
UNKNOWN = Source()


def read(parameters: Any, *dependencies: Any, builder: str = "https://builder.acme.test/v1", **more: Any) -> Provenance:
    said = predicate(builder)
    said["buildDefinition"] |= {"externalParameters": parameters, "resolvedDependencies": list(dependencies)} | more
    return read_provenance(parse_statement(encoded(statement(predicate=said))))


@pytest.mark.parametrize(
    ("parameters", "config"),
    [
        ({"repository": REPOSITORY, "ref": "refs/heads/main"}, ""),
        (
            {"workflow": {"repository": REPOSITORY, "ref": "refs/heads/main", "path": ".github/workflows/r.yml"}},
            f"{REPOSITORY}/.github/workflows/r.yml@refs/heads/main",
        ),
        (
            {"buildConfigSource": {"repository": f"git+{REPOSITORY}", "path": "/cloudbuild.yaml"}},
            f"{REPOSITORY}/cloudbuild.yaml@refs/heads/main",
        ),
    ],
    ids=["the specification's example", "GitHub", "Google Cloud Build"],
)
def test_the_source_is_the_dependency_that_the_parameters_name(parameters: Any, config: str) -> None:
    found = read(parameters, MODULE, MAIN).source
    assert found == Source(repository=REPOSITORY, commit=COMMIT, ref="refs/heads/main", config=config)


def test_the_only_repository_fetched_is_the_source() -> None:
    image = {"uri": "pkg:docker/debian@13", "digest": {"sha256": "0" * 64}}
    assert read({}, image, MAIN).source.repository == REPOSITORY
    assert read({}, image).source == UNKNOWN


@pytest.mark.parametrize(
    ("parameters", "dependencies"),
    [
        ({}, [MAIN, MODULE]),
        ({"repository": "https://git.acme.test/other"}, [MAIN]),
        ({"repository": REPOSITORY, "ref": "refs/heads/main"}, [MAIN | {"uri": f"git+{REPOSITORY}@refs/heads/evil"}]),
        ({"repository": REPOSITORY}, [MAIN, MAIN | {"uri": f"git+{REPOSITORY}@refs/heads/evil"}]),
        ({"repository": REPOSITORY, "ref": ["refs/heads/main"]}, [MAIN]),
        ({"repository": REPOSITORY}, []),
        ({"repository": REPOSITORY}, [MAIN | {"uri": REPOSITORY}]),
    ],
    ids=[
        "two repositories",
        "another was fetched",
        "another ref",
        "two refs",
        "no ref at all",
        "nothing fetched",
        "not by git",
    ],
)
def test_a_source_that_could_be_another_is_unknown(parameters: Any, dependencies: list[Any]) -> None:
    """What a caller wrote into the parameters never becomes the source by itself."""
    assert read({"repository": REPOSITORY, "ref": "refs/heads/main"}, MAIN).source != UNKNOWN
    assert read(parameters, *dependencies).source == UNKNOWN


@pytest.mark.parametrize(
    ("uri", "repository", "ref"),
    [
        ("git+https://h.test/a@refs/heads/dependabot/@types/x", "https://h.test/a", "refs/heads/dependabot/@types/x"),
        ("git+ssh://git@h.test/a@refs/tags/v1", "ssh://git@h.test/a", "refs/tags/v1"),
        ("git+https://h.test/a", "https://h.test/a", ""),
        ("git+https://h.test/a@refs/heads/main#sub", "", ""),
        ("git+h.test/a", "", ""),
    ],
)
def test_repository_and_ref_are_told_apart(uri: str, repository: str, ref: str) -> None:
    found = read({}, {"uri": uri, "digest": {"gitCommit": COMMIT}}).source
    assert (found.repository, found.ref) == (repository, ref)


def test_dependencies_are_named_by_every_digest_in_a_fixed_order() -> None:
    image = {"uri": "pkg:docker/a", "digest": {"sha512": "2", "sha256": "1"}}
    assert read({}, image, {"name": "b"}).dependencies == ("b", "pkg:docker/a@sha256:1", "pkg:docker/a@sha512:2")
    assert read({}, {"name": "b"}, image).dependencies == read({}, image, {"name": "b"}).dependencies


def test_parameters_are_canonical_so_that_policies_and_digests_see_one_text() -> None:
    one, other = read({"b": 1, "a": [1.0, "\u00e9"]}), read({"a": [1, "é"], "b": 1.0})
    assert one.external_parameters == other.external_parameters == '{"a":[1,"é"],"b":1}'


@pytest.mark.parametrize(
    ("builder", "internal", "runner"),
    [
        ("https://github.com/actions/runner/github-hosted", {}, "github-hosted"),
        ("https://github.com/a/b.yml@main", {"github": {"runner_environment": "self-hosted"}}, "self-hosted"),
        ("https://builder.acme.test/v1", {"github": {"runner_environment": "mine"}}, ""),
        ("https://builder.acme.test/v1", {"github": "self-hosted"}, ""),
    ],
)
def test_where_it_ran_is_one_of_two_words_or_unknown(builder: str, internal: Any, runner: str) -> None:
    assert read({}, MAIN, builder=builder, internalParameters=internal).runner == runner


@pytest.mark.parametrize("wrong", [{"buildDefinition": "it"}, {"runDetails": []}, {"buildDefinition": {"x": 1}}])
def test_what_has_another_form_is_refused(wrong: dict[str, Any]) -> None:
    assert read_provenance(parse_statement(encoded(statement())))
    with pytest.raises(StatementError):
        read_provenance(parse_statement(encoded(statement(predicate=predicate() | wrong))))
