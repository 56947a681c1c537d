"""Reading a policy folder: all of it as it was at one moment, or nothing."""

import os

import pytest

from broker.decision.documents import MAX_FILE, MAX_FILES, Documents, fingerprint, read
from broker.decision.findings import Defect, PolicyError

POLICY = "permit (principal, action, resource);"


def defects(folder):
    with pytest.raises(PolicyError) as caught:
        read(folder)
    return [finding.defect for finding in caught.value.findings]


def test_the_documents_of_a_folder_are_read_by_their_ending(tmp_path):
    (tmp_path / "b.cedar").write_text(POLICY)
    (tmp_path / "a.cedar").write_text("")
    (tmp_path / "x.cedarschema").write_text("entity A;")
    (tmp_path / "notes.txt").write_text("no policy")
    (tmp_path / ".#b.cedar").write_text("an editor's lock")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.cedar").write_text(POLICY)
    found = read(tmp_path)
    assert found.policies == {"a.cedar": "", "b.cedar": POLICY}
    assert found.schemas == {"x.cedarschema": "entity A;"}


def test_a_folder_that_is_not_there_is_no_empty_policy(tmp_path):
    assert defects(tmp_path / "gone") == [Defect.FOLDER]
    assert read(tmp_path).policies == {}


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    assert defects(tmp_path / "file") == [Defect.FOLDER]


def test_a_file_over_the_limit_is_refused(tmp_path):
    path = tmp_path / "large.cedar"
    path.write_bytes(b" " * (MAX_FILE + 1))
    assert defects(tmp_path) == [Defect.TOO_LARGE]
    path.write_bytes(b" " * MAX_FILE)
    assert len(read(tmp_path).policies["large.cedar"]) == MAX_FILE


def test_too_many_files_are_refused(tmp_path):
    for number in range(MAX_FILES + 1):
        (tmp_path / f"p{number}.cedar").touch()
    assert defects(tmp_path) == [Defect.FOLDER]
    (tmp_path / "p0.cedar").unlink()
    assert len(read(tmp_path).policies) == MAX_FILES


def test_what_is_not_utf_8_is_refused_and_not_repaired(tmp_path):
    path = tmp_path / "latin.cedar"
    path.write_bytes(b"// caf\xe9")
    assert defects(tmp_path) == [Defect.NOT_TEXT]
    path.write_bytes("// café".encode())
    assert read(tmp_path).policies == {"latin.cedar": "// café"}


def test_every_mistake_of_the_folder_is_reported_together(tmp_path):
    (tmp_path / "a#b.cedar").write_text(POLICY)
    (tmp_path / "latin.cedar").write_bytes(b"\xff")
    (tmp_path / "large.cedar").write_bytes(b" " * (MAX_FILE + 1))
    assert sorted(defects(tmp_path)) == [Defect.FOLDER, Defect.NOT_TEXT, Defect.TOO_LARGE]


def test_a_fifo_cannot_hold_the_reader(tmp_path):
    os.mkfifo(tmp_path / "pipe.cedar")
    assert defects(tmp_path) == [Defect.FOLDER]


def test_a_link_that_leads_nowhere_is_refused(tmp_path):
    (tmp_path / "gone.cedar").symlink_to(tmp_path / "nowhere")
    assert defects(tmp_path) == [Defect.FOLDER]
    (tmp_path / "nowhere").write_text(POLICY)
    assert read(tmp_path).policies == {"gone.cedar": POLICY}


def test_line_ends_of_other_systems_are_read_as_ours(tmp_path):
    (tmp_path / "dos.cedar").write_bytes(b"// a\r\n// b\r\n")
    assert read(tmp_path).policies == {"dos.cedar": "// a\n// b\n"}


@pytest.mark.parametrize("change", ["edit", "replace", "add", "remove"])
def test_every_change_shows_in_the_fingerprint(tmp_path, change):
    path = tmp_path / "a.cedar"
    path.write_text(POLICY)
    before = fingerprint(tmp_path)
    assert fingerprint(tmp_path) == before
    match change:
        case "edit":
            path.write_text(POLICY + " ")
        case "replace":
            (tmp_path / "new").write_text(POLICY)
            (tmp_path / "new").replace(path)
        case "add":
            (tmp_path / "b.cedarschema").touch()
        case "remove":
            path.unlink()
    assert fingerprint(tmp_path) != before


def test_moving_text_between_files_is_another_revision():
    one = Documents(policies={"a.cedar": "xy", "b.cedar": "z"}, schemas={})
    other = Documents(policies={"a.cedar": "x", "b.cedar": "yz"}, schemas={})
    assert one.revision != other.revision
