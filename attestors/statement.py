"""in-toto Statements v1: what is said (a predicate of some type) of which artifacts (its subjects).

Source: https://github.com/in-toto/attestation/tree/main/spec/v1, statement.md and digest_set.md.

An artifact is recognised by digests alone, never by a name. Where both sides give an algorithm they must agree in it:
one digest that fits beside one that does not is a trap, not a match.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

from google.protobuf.descriptor import Descriptor
from google.protobuf.json_format import ParseDict, ParseError
from in_toto_attestation.v1.statement import STATEMENT_TYPE_URI
from in_toto_attestation.v1.statement_pb2 import Statement as StatementMessage

from attestors.strict_json import parse_object, require_one_spelling

MAX_SUBJECTS: Final = 1024
STRONG: Final = MappingProxyType(
    {"sha256": 64, "sha384": 96, "sha512": 128, "sha512_256": 64, "sha3_256": 64, "sha3_384": 96, "sha3_512": 128}
)
"""Algorithms as strong as SHA-256, by their names in a DigestSet, and the hexadecimal digits of each."""
MEMBERS: Final = frozenset({"_type", "subject", "predicateType", "predicate"})
"""Of a statement, and no others of one that we sign."""
SUBJECT_MEMBERS: Final = frozenset({"name", "uri", "digest", "content", "downloadLocation", "mediaType", "annotations"})
"""Of a ResourceDescriptor, likewise."""

_HEX = re.compile(r"[0-9a-f]+")


class StatementError(ValueError):
    """It is no statement, or not about these artifacts. The message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Statement:
    """subjects: of each artifact its digests, algorithm → hexadecimal. predicate: JSON, {} for none."""

    subjects: tuple[Mapping[str, str], ...]
    predicate_type: str
    predicate: Mapping[str, Any] = field(repr=False)


def parse_statement(payload: bytes) -> Statement:
    """From its JSON. Names that it does not know are ignored (parsing rules of the specification).

    Raises: StatementError, also where others could read it as a statement about something else. Not checked: who says
    so; what the predicate means.
    """
    return _read(_document(payload))


def parse_statement_to_sign(payload: bytes) -> Statement:
    """The same, and it has no names but the specification's: what we do not know, somebody else may look for.

    Raises: StatementError. Not checked: names inside the predicate and annotations, on which we say nothing.
    """
    document = _document(payload)
    found = _read(document)
    if not document.keys() <= MEMBERS:
        raise StatementError(f"a statement to be signed has the members {', '.join(sorted(MEMBERS))} alone")
    if not all(subject.keys() <= SUBJECT_MEMBERS for subject in document["subject"]):
        raise StatementError(f"a subject to be signed has the members {', '.join(sorted(SUBJECT_MEMBERS))} alone")
    return found


def _document(payload: bytes) -> dict[str, Any]:
    try:
        document = parse_object(payload, "the statement")
        ParseDict(document, StatementMessage(), ignore_unknown_fields=True)  # every member has the type it must have
    except (ParseError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise StatementError("the statement does not have the form of an in-toto Statement") from error
    except ValueError as error:
        raise StatementError(str(error)) from error
    return document


def _read(document: Mapping[str, Any]) -> Statement:
    if document.get("_type") != STATEMENT_TYPE_URI:
        raise StatementError(f"the statement's _type is not {STATEMENT_TYPE_URI}")
    subjects, predicate_type = document.get("subject") or [], document.get("predicateType")
    if not 1 <= len(subjects) <= MAX_SUBJECTS:
        raise StatementError(f"the statement does not have 1 to {MAX_SUBJECTS} subjects")
    if not isinstance(predicate_type, str) or not predicate_type:
        raise StatementError("the statement has no predicateType")
    require_one_reading(document, StatementMessage.DESCRIPTOR, "the statement")
    return Statement(
        subjects=tuple(_read_digests(subject) for subject in subjects),
        predicate_type=predicate_type,
        predicate=document.get("predicate") or {},
    )


def require_one_reading(found: Mapping[str, Any], kind: Descriptor, what: str) -> None:
    """That all who read this JSON as a message of this kind find the same members, down to those of free form.

    Refused are names that differ in case alone, and protobuf's own names of fields, such as "predicate_type": its
    readers take them for the JSON names, and nobody else does. Raises: StatementError naming `what`.
    """
    require_one_name(found, what)
    for member in kind.fields:
        if member.name != member.json_name and member.name in found:
            raise StatementError(f"{what} has the name {member.name!r}, which some read as {member.json_name!r}")
        value, inner = found.get(member.json_name), member.message_type
        for one in value if isinstance(value, list) else (value,):
            if inner is None or not isinstance(one, dict):
                continue
            if inner.GetOptions().map_entry or inner.file.package == "google.protobuf":
                require_one_name(one, what)
            else:
                require_one_reading(one, inner, what)


def require_one_name(found: Mapping[str, Any], what: str) -> None:
    """As `require_one_spelling`. Raises: StatementError."""
    try:
        require_one_spelling(found, what)
    except ValueError as error:
        raise StatementError(str(error)) from error


def _read_digests(subject: object) -> Mapping[str, str]:
    if not isinstance(subject, dict):  # protobuf's reader takes a string for an object without members
        raise StatementError("a subject of the statement is not an object")
    digests: dict[str, str] = subject.get("digest") or {}
    if not digests.keys() & STRONG.keys():
        raise StatementError("a subject of the statement has no digest of sha256 or stronger")
    for algorithm in digests.keys() & STRONG.keys():
        if len(digests[algorithm]) != STRONG[algorithm] or not _HEX.fullmatch(digests[algorithm]):
            raise StatementError(f"a subject's {algorithm} is not {STRONG[algorithm]} lower-case hexadecimal digits")
    return MappingProxyType(digests)


def names_artifact(subject_digests: Mapping[str, str], artifact: Mapping[str, str]) -> bool:
    """Whether a subject is this artifact: some algorithm of sha256 or stronger is given by both, and they agree.

    Raises: StatementError where they agree in one algorithm and conflict in another, or where the subject has none of
    sha256 or stronger.
    """
    if not subject_digests.keys() & STRONG.keys():
        raise StatementError("a subject has no digest of sha256 or stronger")
    shared = subject_digests.keys() & artifact.keys()
    agreeing = {algorithm for algorithm in shared if subject_digests[algorithm] == artifact[algorithm]}
    if agreeing and agreeing != shared:
        conflicting = min(shared - agreeing)
        raise StatementError(f"a subject has the artifact's {min(agreeing)}, but another {conflicting}")
    return bool(agreeing & STRONG.keys())


def require_subjects(statement: Statement, artifacts: Sequence[Mapping[str, str]]) -> None:
    """That each of the artifacts is a subject. There may be more subjects: a build makes many things.

    Raises: StatementError. Not checked: digests of an artifact that no subject gives; they may be of something else.
    """
    for artifact in artifacts:
        _naming(statement, artifact)


def require_vouched(statement: Statement, artifacts: Sequence[Mapping[str, str]]) -> None:
    """That each of the artifacts is a subject, and that one subject gives every digest that the artifact is named by.

    So nobody adds the digest of something else to the name of what was built. Raises: StatementError.
    """
    for artifact in artifacts:
        lacking = min((artifact.keys() - subject.keys() for subject in _naming(statement, artifact)), key=len)
        if lacking:
            raise StatementError(f"no subject of the statement gives the {min(lacking)} of {_name(artifact)} as well")


def require_exactly(statement: Statement, artifacts: Sequence[Mapping[str, str]]) -> None:
    """That the subjects are these artifacts, no less and no more, by no other digests than were granted.

    A further digest would be one that nobody granted: others may recognise an artifact by any digest of a subject.

    Raises: StatementError.
    """
    require_subjects(statement, artifacts)
    for subject in statement.subjects:
        if not any(subject.items() <= artifact.items() for artifact in artifacts):
            raise StatementError("the statement has a subject, or a digest of one, that was not granted")


def _naming(statement: Statement, artifact: Mapping[str, str]) -> list[Mapping[str, str]]:
    """The subjects that are the artifact, one at least. Raises: StatementError; also where one conflicts with it."""
    found = [subject for subject in statement.subjects if names_artifact(subject, artifact)]
    if not found:
        raise StatementError(f"the statement is not about {_name(artifact)}")
    return found


def _name(artifact: Mapping[str, str]) -> str:
    algorithm = min(artifact)
    return f"{algorithm}:{artifact[algorithm]}"
