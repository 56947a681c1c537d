"""An artifact is recognised by digests alone, and one that conflicts is a trap, not a match."""

import json
from typing import Any

import pytest
from support.provenance import ARTIFACT, SHA256, SHA512, encoded, predicate, statement

from attestors.slsa import read_provenance
from attestors.statement import (
    Statement,
    StatementError,
    names_artifact,
    parse_statement,
    parse_statement_to_sign,
    require_exactly,
    require_subjects,
    require_vouched,
)

OTHER = "0" * 64


def about(*subjects: dict[str, str]):
    return parse_statement(encoded(statement(subject=[{"digest": one} for one in subjects])))


def test_a_statement_is_read_whole() -> None:
    found = parse_statement(encoded(statement()))
    assert [dict(one) for one in found.subjects] == [ARTIFACT]
    assert found.predicate_type == "https://slsa.dev/provenance/v1"
    assert found.predicate["runDetails"]


def test_a_statement_may_have_no_predicate() -> None:
    assert parse_statement(encoded(statement(predicate=None))).predicate == {}


@pytest.mark.parametrize(
    ("subject", "artifact", "expected"),
    [
        ({"sha256": SHA256}, {"sha256": SHA256}, True),
        ({"sha256": SHA256, "sha512": SHA512}, {"sha256": SHA256}, True),
        ({"sha512": SHA512}, ARTIFACT, True),
        ({"sha512": SHA512}, {"sha256": SHA256}, False),  # nothing in common says nothing
        ({"sha256": OTHER}, {"sha256": SHA256}, False),
        ({"sha256": OTHER, "sha512": "0" * 128}, ARTIFACT, False),
    ],
)
def test_an_artifact_is_named_by_what_both_give(
    subject: dict[str, str], artifact: dict[str, str], *, expected: bool
) -> None:
    assert names_artifact(subject, artifact) is expected


@pytest.mark.parametrize(
    "subject",
    [{"sha256": SHA256, "sha512": "0" * 128}, {"sha256": OTHER, "sha512": SHA512}, {"sha1": "0" * 40}, {}],
    ids=["another sha512", "another sha256", "sha1 alone", "nothing"],
)
def test_a_conflict_or_nothing_strong_is_refused(subject: dict[str, str]) -> None:
    assert names_artifact({"sha256": SHA256, "sha512": SHA512}, ARTIFACT)
    with pytest.raises(StatementError):
        names_artifact(subject, ARTIFACT)


def test_each_artifact_has_to_be_a_subject() -> None:
    require_subjects(about({"sha256": OTHER}, {"sha256": SHA256}), [ARTIFACT, {"sha256": OTHER}])
    with pytest.raises(StatementError, match="is not about sha256:000"):
        require_subjects(about({"sha256": SHA256}), [ARTIFACT, {"sha256": OTHER}])


@pytest.mark.parametrize(
    ("subjects", "lacking"),
    [
        ([{"sha256": SHA256}], "sha512"),
        ([{"sha512": SHA512}], "sha256"),
        ([{"sha256": SHA256}, {"sha512": SHA512}], "sha(256|512)"),
        ([{"sha256": SHA256}, {"sha256": OTHER, "sha512": "0" * 128}], "sha512"),
    ],
)
def test_one_subject_vouches_for_every_digest_of_an_artifact(subjects: list[dict[str, str]], lacking: str) -> None:
    """What no subject ties to the rest may be of something else that the caller would like signed."""
    require_vouched(about(*subjects, ARTIFACT | {"sha1": "0" * 40}), [ARTIFACT])
    require_subjects(about(*subjects), [ARTIFACT])
    with pytest.raises(StatementError, match=f"gives the {lacking} of sha256:{SHA256} as well"):
        require_vouched(about(*subjects), [ARTIFACT])


def test_a_subject_that_vouches_for_all_excuses_no_conflict_beside_it() -> None:
    require_vouched(about(ARTIFACT, {"sha256": OTHER}), [ARTIFACT, {"sha256": OTHER}])
    with pytest.raises(StatementError, match="but another sha512"):
        require_vouched(about(ARTIFACT, {"sha256": SHA256, "sha512": "0" * 128}), [ARTIFACT])
    with pytest.raises(StatementError, match="is not about sha256:000"):
        require_vouched(about(ARTIFACT), [ARTIFACT, {"sha256": OTHER}])


def test_a_statement_to_be_signed_has_the_granted_subjects_and_no_more() -> None:
    require_exactly(about({"sha256": SHA256}), [ARTIFACT])
    require_exactly(about({"sha256": SHA256, "sha512": SHA512}), [ARTIFACT])
    with pytest.raises(StatementError, match="not granted"):
        require_exactly(about({"sha256": SHA256}, {"sha256": OTHER}), [ARTIFACT])


@pytest.mark.parametrize("digest", [{"sha512": SHA512}, {"sha1": "0" * 40}, {"sha3_256": OTHER}])
def test_a_statement_to_be_signed_names_its_subjects_by_no_digest_that_was_not_granted(digest: dict[str, str]) -> None:
    """Somebody else may recognise an artifact by that digest alone."""
    require_exactly(about({"sha256": SHA256}), [{"sha256": SHA256}])
    with pytest.raises(StatementError, match="not granted"):
        require_exactly(about({"sha256": SHA256} | digest), [{"sha256": SHA256}])


def test_a_statement_to_be_signed_leaves_no_granted_artifact_out() -> None:
    require_exactly(about({"sha256": SHA256}, {"sha256": OTHER}), [ARTIFACT, {"sha256": OTHER}])
    with pytest.raises(StatementError, match="is not about"):
        require_exactly(about({"sha256": SHA256}), [ARTIFACT, {"sha256": OTHER}])


@pytest.mark.parametrize("count", [1024, 1025])
def test_subjects_are_bounded(count: int) -> None:
    subjects = [{"sha256": f"{i:064x}"} for i in range(count)]
    if count <= 1024:
        assert len(about(*subjects).subjects) == count
    else:
        with pytest.raises(StatementError, match="1 to 1024 subjects"):
            about(*subjects)


ELSEWHERE = [{"digest": {"sha256": OTHER}}]
MORE: dict[str, dict[str, Any]] = {
    "Subject": {"Subject": ELSEWHERE},
    "long s": {"\u017fubject": ELSEWHERE},
    "PREDICATETYPE": {"PREDICATETYPE": "https://acme.test/other/v1"},
    "protobuf's type": {"type": "https://in-toto.io/Statement/v1"},
    "protobuf's predicate_type": {"predicate_type": "https://acme.test/other/v1"},
    "a digest": {"subject": [{"digest": {"sha256": SHA256, "SHA256": OTHER}}]},
    "Digest": {"subject": [{"digest": {"sha256": SHA256}, "Digest": {"sha256": OTHER}}]},
    "protobuf's media_type": {"subject": [{"digest": {"sha256": SHA256}, "media_type": "text/plain"}]},
    "the predicate's": {"predicate": {"digest": SHA256, "Digest": OTHER}},
}


@pytest.mark.parametrize("more", MORE.values(), ids=MORE)
def test_a_statement_that_others_could_read_as_another_is_neither_believed_nor_signed(more: dict[str, Any]) -> None:
    for read in (parse_statement, parse_statement_to_sign):
        assert read(encoded(statement()))
        with pytest.raises(StatementError, match=r"two spellings|some read as"):
            read(encoded(statement() | more))


UNKNOWN: dict[str, dict[str, Any]] = {
    "of the statement": {"more": {"of": "it"}},
    "of a subject": {"subject": [{"digest": {"sha256": SHA256}, "digests": ELSEWHERE}]},
    "in another spelling alone": {"subject": [{"digest": {"sha256": SHA256}, "Name": "app"}]},
}


@pytest.mark.parametrize("more", UNKNOWN.values(), ids=UNKNOWN)
def test_names_that_nobody_knows_are_read_over_and_not_signed(more: dict[str, Any]) -> None:
    """Parsing rules of in-toto; under our signature somebody else may have a meaning for them."""
    assert parse_statement(encoded(statement() | more))
    with pytest.raises(StatementError, match="alone"):
        parse_statement_to_sign(encoded(statement() | more))


def test_a_statement_to_be_signed_may_have_all_that_the_specification_names() -> None:
    whole = {
        "name": "app",
        "uri": "pkg:a/b",
        "content": "YQ==",
        "downloadLocation": "https://a.test/",
        "mediaType": "a/b",
    }
    subject = {**whole, "digest": {"sha256": SHA256}, "annotations": {"any": {"Any": 1, "any": 2}}}
    assert parse_statement_to_sign(encoded(statement(subject=[subject])))
    assert parse_statement_to_sign(encoded(statement(predicate=None))).predicate == {}


@pytest.mark.parametrize("number", [2**53, 10**308, 10**400, 10**5000], ids=["2^53", "10^308", "10^400", "10^5000"])
def test_a_number_of_any_length_is_read_or_refused(number: int) -> None:
    """Never anything else: protobuf has floats alone, and Python no integers of more than 4300 digits."""
    text = "1" + "0" * 5000 if number == 10**5000 else str(number)
    payload = json.dumps(statement(predicate={"n": "here"})).replace('"here"', text).encode()
    if number < 10**309:
        assert parse_statement(payload).predicate == {"n": number}
    else:
        with pytest.raises(StatementError):
            parse_statement(payload)


def test_provenance_with_a_number_beyond_floats_is_refused() -> None:
    found = predicate()
    kind = "https://slsa.dev/provenance/v1"
    assert read_provenance(Statement(subjects=(ARTIFACT,), predicate_type=kind, predicate=found))
    found["buildDefinition"]["externalParameters"]["n"] = 10**400
    with pytest.raises(StatementError, match="the form of SLSA Provenance"):
        read_provenance(Statement(subjects=(ARTIFACT,), predicate_type=kind, predicate=found))
