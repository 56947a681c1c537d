"""What is a ticket's name, and what its system's answer says: nothing that a pointer does not lead to is guessed."""

import json
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tickets import MAPPING, ticket

from attestors.contract import AttestationFailed, AttestationUnavailable
from attestors.json_pointer import Pointer
from attestors.ticket_mapping import MAX_AUTHORISED, MAX_TEXT, Content, TicketMapping, TicketName, is_ticket_id
from attestors.ticket_url import check_template, fill


def read(document: Any, mapping: TicketMapping = MAPPING, ticket_id: str = "17") -> Content:
    return mapping.read(json.dumps(document).encode(), ticket_id)


# -- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["roundup:17", "jira:OPS-17", "s:0", "s-1._x:INC0010023", "a:" + "b" * 64])
def test_a_name_is_a_system_and_an_id(text: str) -> None:
    assert str(TicketName.parse(text)) == text


NO_NAMES = """17 :17 desk: Desk:17 desk:17:18 desk:../17 desk:. desk:.. desk:a/b desk:%2e%2e desk:17?x=1 desk:17#x
desk:-1 desk:_1 desk:a\\b desk:a@b desk:\N{FULLWIDTH DIGIT ONE}"""


@pytest.mark.parametrize(
    "text",
    [*NO_NAMES.split(), "", "desk:1 7", "desk:17\n", "desk\n:17", "desk:1\x00", "a" * 65 + ":1", "a:" + "b" * 65],
)
def test_what_is_no_name_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        TicketName.parse(text)


@pytest.mark.parametrize("number", range(256))
def test_only_unreserved_characters_are_in_an_id(number: int) -> None:
    inside = chr(number)
    assert is_ticket_id(f"a{inside}b") is (inside.isascii() and (inside.isalnum() or inside in "._-"))
    assert is_ticket_id(inside) is (inside.isascii() and inside.isalnum())


@settings(deadline=None)  # other tests may have the processors
@given(st.text(max_size=70) | st.from_regex(r"\A[A-Za-z0-9._%/-]{1,66}\Z"))
def test_no_id_changes_host_path_or_query_of_what_is_asked(text: str) -> None:
    """Whatever is taken as an id: the URL has the same parts around it, and it stands in them as it is."""
    if not is_ticket_id(text):
        return
    for template in ("https://t.test/a/{id}/b?x=1", "https://t.test:8443/?q={id}&x=1", "https://t.test/a/x{id}"):
        parts = urlsplit(fill(check_template(template), text))
        wanted = urlsplit(template)
        assert (parts.scheme, parts.netloc, parts.fragment) == ("https", wanted.netloc, "")
        assert parts.path == wanted.path.replace("{id}", text)
        assert parts.query == wanted.query.replace("{id}", text)
        assert not {".", ".."} & set(parts.path.split("/"))


# -- what a ticket says ----------------------------------------------------------------------------------------------


def test_an_open_ticket_says_its_state_what_it_authorises_and_who_answers_for_it() -> None:
    found = read(ticket("working", ["orders", "customers", "orders", ""], "dora"))
    assert found == Content(state="working", authorises=("customers", "orders"), authorised_by="dora")


@pytest.mark.parametrize("state", ["closed", "", "Open", "open ", "OPEN"])
def test_a_ticket_in_no_open_state_is_no_fact(state: str) -> None:
    with pytest.raises(AttestationFailed):
        read(ticket(state))
    assert read(ticket("open"))


@pytest.mark.parametrize(("state", "text"), [(True, "true"), (False, "false"), (3, "3"), ("3", "3")])
def test_numbers_and_truth_values_are_states_too(state: object, text: str) -> None:
    mapping = replace(MAPPING, open_states=frozenset({text}))
    assert read(ticket(state), mapping).state == text
    with pytest.raises(AttestationFailed):
        read(ticket(state), replace(MAPPING, open_states=frozenset({"other"})))


@pytest.mark.parametrize("state", [None, 1.5, [], ["open"], {"name": "open"}])
def test_what_is_no_state_cannot_be_read(state: object) -> None:
    with pytest.raises(AttestationUnavailable):
        read(ticket(state))


EACH = replace(MAPPING, each=Pointer.parse("/name"))


@pytest.mark.parametrize(
    ("mapping", "tables", "authorises"),
    [
        (MAPPING, "orders", ("orders",)),
        (MAPPING, ["orders"], ("orders",)),
        (MAPPING, [], ()),
        (MAPPING, None, ()),
        (MAPPING, "", ()),
        (EACH, [{"id": "1", "name": "orders"}, {"id": "2", "name": "customers"}], ("customers", "orders")),
        (EACH, [], ()),
        (EACH, None, ()),
    ],
)
def test_what_is_authorised_is_a_string_a_list_of_strings_or_of_things_that_have_one(
    mapping: TicketMapping, tables: object, authorises: tuple[str, ...]
) -> None:
    assert read(ticket(tables=tables), mapping).authorises == authorises


@pytest.mark.parametrize(
    ("mapping", "tables"),
    [
        (MAPPING, 7),
        (MAPPING, True),
        (MAPPING, {"name": "orders"}),
        (MAPPING, ["orders", 7]),
        (MAPPING, ["orders", None]),
        (MAPPING, [["orders"]]),
        (EACH, "orders"),
        (EACH, {"name": "orders"}),
        (EACH, ["orders"]),
        (EACH, [{"name": "orders"}, {}]),
        (EACH, [{"name": None}]),
        (EACH, [{"name": ["orders"]}]),
    ],
)
def test_what_authorises_in_another_form_cannot_be_read(mapping: TicketMapping, tables: object) -> None:
    with pytest.raises(AttestationUnavailable):
        read(ticket(tables=tables), mapping)


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"issue": None},
        {"issue": []},
        {"issue": {"status": "open"}},
        {"issue": {"status": "open", "tables": []}},
        {"issue": {"status": "open", "tables": [], "owner": None}},
        ticket(owner=None),
        ticket(owner=7),
    ],
)
def test_a_pointer_that_leads_to_nothing_makes_a_ticket_unreadable(document: object) -> None:
    with pytest.raises(AttestationUnavailable):
        read(document)


def test_who_answers_for_it_is_empty_only_where_that_is_not_mapped() -> None:
    mapping = replace(MAPPING, authorised_by=None)
    assert read({"issue": {"status": "open", "tables": []}}, mapping).authorised_by == ""


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b"[]", b'"open"', b"\xff", b'{"a":1,"a":1}', b'{"a":NaN}', b'{"a":"\\ud800"}']
)
def test_what_is_no_json_object_cannot_be_read(body: bytes) -> None:
    with pytest.raises(AttestationUnavailable):
        MAPPING.read(body, "17")


def test_a_ticket_that_calls_itself_otherwise_is_another_ticket() -> None:
    mapping = replace(MAPPING, id=Pointer.parse("/issue/key"))
    for key in ("OPS-17", 17):
        assert read({"issue": ticket()["issue"] | {"key": key}}, mapping, str(key))
    for key in ("OPS-18", "ops-17", "", None, ["OPS-17"]):
        with pytest.raises(AttestationFailed):
            read({"issue": ticket()["issue"] | {"key": key}}, mapping, "OPS-17")


def test_a_search_that_finds_nothing_says_that_there_is_no_such_ticket() -> None:
    searched = {name: Pointer.parse(f"/found/0{path}") for name, path in (("id", "/key"), ("state", "/status"))}
    mapping = replace(MAPPING, authorises=Pointer.parse("/found/0/tables"), authorised_by=None, **searched)
    found = {"key": "OPS-17", "status": "open", "tables": "orders"}
    assert read({"found": [found]}, mapping, "OPS-17").authorises == ("orders",)
    for document in ({"found": []}, {}, {"found": [found | {"key": "OPS-1"}, found]}):
        with pytest.raises(AttestationFailed):
            read(document, mapping, "OPS-17")


def test_no_more_is_taken_from_a_ticket_than_can_be_remembered() -> None:
    most = [str(number) for number in range(MAX_AUTHORISED)]
    assert len(read(ticket(tables=most)).authorises) == MAX_AUTHORISED
    assert read(ticket(tables="x" * (MAX_TEXT - 100)))
    for tables in ([*most, "one more"], "x" * MAX_TEXT):
        with pytest.raises(AttestationUnavailable):
            read(ticket(tables=tables))


names = st.sampled_from(["issue", "status", "tables", "owner", "login", "other"])
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just("open")
answers = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(names, inner), max_leaves=12)


@settings(deadline=None)  # other tests may have the processors
@given(answers)
def test_whatever_is_answered_is_content_or_a_refusal(document: object) -> None:
    try:
        found = MAPPING.read(json.dumps(document).encode(), "17")
    except (AttestationFailed, AttestationUnavailable):
        return
    assert found.state in MAPPING.open_states
