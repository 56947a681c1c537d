"""SLSA Provenance v1: by which builder, of what and how an artifact was made.

Source: https://slsa.dev/spec/v1.0/provenance, and the build types named below.

What a build type calls its parameters is its own affair, so the source is not read from them. It is the git
repository among the resolved dependencies, which the builder itself fetched: the one that `repository` and `ref` of
the external parameters name, or else the only one. Where that is ambiguous the source is "", and no policy that wants
one is satisfied.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import rfc8785
from google.protobuf.json_format import ParseDict, ParseError
from google.protobuf.timestamp_pb2 import Timestamp
from in_toto_attestation.predicates.provenance.v1.provenance_pb2 import Provenance as ProvenanceMessage
from in_toto_attestation.v1.resource_descriptor_pb2 import ResourceDescriptor

from attestors.statement import Statement, StatementError, require_one_name, require_one_reading

PROVENANCE_TYPE: Final = "https://slsa.dev/provenance/v1"
UNKNOWN_TIME: Final = -1

_GIT = re.compile(r"git\+(?P<repository>[a-z+]+://(?:[^@/#]+@)?[^@#]+)(?:@(?P<ref>[^#]+))?")  # SPDX download location
_COMMIT = ("gitCommit", "sha1")  # DigestSet: sha1 is how older builders name a commit
# Where build types keep what names the source: at the top, as the specification's own example; GitHub's workflow/v1;
# Google Cloud Build's and Tekton's.
_SOURCE_MEMBERS = ("workflow", "buildConfigSource")
_RUNNERS = ("github-hosted", "self-hosted")


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """All "" where unknown. repository: its URI. commit: hexadecimal. ref: such as refs/heads/main. config: its URI."""

    repository: str = ""
    commit: str = ""
    ref: str = ""
    config: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """What a builder says of a build.

    started_at, finished_at: seconds since 1970, -1 where it does not say. external_parameters: RFC 8785 JSON.
    dependencies: "<uri>@<algorithm>:<hex>", sorted. runner: "github-hosted", "self-hosted" or "".
    """

    builder: str
    build_type: str
    source: Source
    invocation: str
    runner: str
    started_at: int
    finished_at: int
    external_parameters: str
    dependencies: tuple[str, ...]


def read_provenance(statement: Statement) -> Provenance:
    """What the statement's predicate says.

    Raises: StatementError where it is of another type, lacks what SLSA requires, ends before it starts, or can be read
    in two ways.
    """
    if statement.predicate_type != PROVENANCE_TYPE:
        raise StatementError(f"the statement is a {statement.predicate_type[:128]}, not a {PROVENANCE_TYPE}")
    try:
        message = ParseDict(dict(statement.predicate), ProvenanceMessage(), ignore_unknown_fields=True)
    except (ParseError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise StatementError("the predicate does not have the form of SLSA Provenance v1") from error
    require_one_reading(statement.predicate, ProvenanceMessage.DESCRIPTOR, "the predicate")
    definition, run = message.build_definition, message.run_details
    # Parameters are read from the JSON, not from the message, where every number is a float.
    told = statement.predicate.get("buildDefinition")
    told = told if isinstance(told, dict) else {}  # protobuf's reader takes a string for an object without members
    parameters = told.get("externalParameters")
    if not run.builder.id or not definition.build_type or not isinstance(parameters, dict):
        raise StatementError("the provenance does not name its builder, its buildType and its externalParameters")
    if not all(one.uri or one.name or one.download_location or one.digest for one in definition.resolved_dependencies):
        raise StatementError("a resolved dependency of the provenance names nothing")
    started_at, finished_at = _epoch(run.metadata.started_on), _epoch(run.metadata.finished_on)
    if UNKNOWN_TIME < finished_at < started_at:
        raise StatementError("the provenance says that the build finished before it started")
    return Provenance(
        builder=run.builder.id,
        build_type=definition.build_type,
        source=_source(parameters, definition.resolved_dependencies),
        invocation=run.metadata.invocation_id,
        runner=_runner(run.builder.id, told.get("internalParameters")),
        started_at=started_at,
        finished_at=finished_at,
        external_parameters=_canonical(parameters),
        dependencies=tuple(sorted({name for one in definition.resolved_dependencies for name in _names(one)})),
    )


def _epoch(found: Timestamp) -> int:
    """Some tools write the year 1 for no time at all."""
    return int(found.seconds) if found.seconds > 0 else UNKNOWN_TIME


def _canonical(parameters: Mapping[str, Any]) -> str:
    try:
        return rfc8785.dumps(dict(parameters)).decode()
    except (ValueError, RecursionError) as error:
        raise StatementError("the external parameters hold what I-JSON does not have") from error


def _names(dependency: ResourceDescriptor) -> Iterator[str]:
    name = dependency.uri or dependency.name or dependency.download_location
    if not dependency.digest:
        yield name
    for algorithm, digest in dependency.digest.items():
        yield f"{name}@{algorithm}:{digest}"


def _source(parameters: Mapping[str, Any], dependencies: list[ResourceDescriptor]) -> Source:
    fetched = [(found, one) for one in dependencies if (found := _GIT.fullmatch(one.uri))]
    named = next(_namings(parameters), None)
    if named is not None:
        fetched = [(found, one) for found, one in fetched if _fits(found, named)]
    if len(fetched) != 1:
        return Source()
    found, dependency = fetched[0]
    repository, ref = found["repository"], found["ref"] or ""
    path = named.get("path") if named is not None else None
    config = f"{repository}/{path.lstrip('/')}{'@' if ref else ''}{ref}" if isinstance(path, str) and path else ""
    commit = next((dependency.digest[name] for name in _COMMIT if name in dependency.digest), "")
    return Source(repository=repository, commit=commit, ref=ref, config=config)


def _namings(parameters: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Objects among the parameters that say which repository."""
    for found in (*(parameters.get(name) for name in _SOURCE_MEMBERS), parameters):
        if isinstance(found, dict) and isinstance(found.get("repository"), str):
            require_one_name(found, "the external parameters")
            yield found


def _fits(found: re.Match[str], named: Mapping[str, Any]) -> bool:
    repository = named["repository"].removeprefix("git+")
    told = (None, "", found["ref"])  # no set: what is looked for may be anything
    return found["repository"] == repository and named.get("ref") in told


def _runner(builder: str, internal: object) -> str:
    """GitHub says it in the builder's id or, for reusable workflows, in a parameter of its own."""
    github = internal.get("github") if isinstance(internal, dict) else None
    if isinstance(github, dict):
        require_one_name(github, "the internal parameters")
    told = github.get("runner_environment") if isinstance(github, dict) else None
    last = builder.rpartition("/")[2]
    return next((one for one in (told, last) if one in _RUNNERS), "")
