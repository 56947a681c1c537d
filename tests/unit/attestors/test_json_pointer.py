"""JSON Pointers: the examples of RFC 6901, everything that is none, and that nothing is found where nothing stands."""

import contextlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attestors.json_pointer import MAX_LENGTH, Pointer

# RFC 6901 section 5.
DOCUMENT = json.loads(
    r"""{"foo": ["bar", "baz"], "": 0, "a/b": 1, "c%d": 2, "e^f": 3, "g|h": 4, "i\\j": 5, "k\"l": 6, " ": 7,
    "m~n": 8}"""
)
EXAMPLES = {
    "": DOCUMENT,
    "/foo": ["bar", "baz"],
    "/foo/0": "bar",
    "/": 0,
    "/a~1b": 1,
    "/c%d": 2,
    "/e^f": 3,
    "/g|h": 4,
    "/i\\j": 5,
    '/k"l': 6,
    "/ ": 7,
    "/m~0n": 8,
}

scalars = st.none() | st.booleans() | st.integers() | st.text(max_size=5)
documents = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4)
)


def spelled(*tokens: str) -> str:
    return "".join("/" + token.replace("~", "~0").replace("/", "~1") for token in tokens)


@pytest.mark.parametrize("text", EXAMPLES)
def test_the_examples_of_the_standard(text: str) -> None:
    assert Pointer.parse(text).find(DOCUMENT) == EXAMPLES[text]


@pytest.mark.parametrize("text", ["foo", "/~", "/a~2b", "~", "#/foo", "/foo~", " /foo", "/" * (MAX_LENGTH + 1)])
def test_what_is_no_pointer_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        Pointer.parse(text)
    assert Pointer.parse("/foo")


@pytest.mark.parametrize(
    "text", ["/bar", "/foo/2", "/foo/-", "/foo/00", "/foo/01", "/foo/-1", "/foo/1e0", "/foo/+1", "/foo/0/x", "/ /x"]
)
def test_nothing_stands_where_nothing_stands(text: str) -> None:
    with pytest.raises(LookupError):
        Pointer.parse(text).find(DOCUMENT)


def test_an_index_is_of_ascii_digits_and_short() -> None:
    for token in ("\N{ARABIC-INDIC DIGIT ONE}", "\N{SUPERSCRIPT ONE}", "9" * 5000):
        with pytest.raises(LookupError):
            Pointer((token,)).find([1, 2, 3])


@settings(deadline=None)  # other tests may have the processors
@given(st.lists(st.text(max_size=8), max_size=6))
def test_every_name_can_be_spelled_and_is_read_back(tokens: list[str]) -> None:
    assert Pointer.parse(spelled(*tokens)).tokens == tuple(tokens)


@settings(deadline=None)  # other tests may have the processors
@given(documents)
def test_every_place_of_a_document_is_found_by_its_pointer(document: object) -> None:
    def places(found: object, *above: str) -> None:
        assert Pointer.parse(spelled(*above)).find(document) == found
        if isinstance(found, dict):
            for name, inner in found.items():
                places(inner, *above, name)
        elif isinstance(found, list):
            for number, inner in enumerate(found):
                places(inner, *above, str(number))

    places(document)


@settings(deadline=None)  # other tests may have the processors
@given(st.text(max_size=20), documents)
def test_any_text_is_a_pointer_or_a_mistake_and_leads_to_something_or_nothing(text: str, document: object) -> None:
    try:
        pointer = Pointer.parse(text)
    except ValueError:
        return
    assert spelled(*pointer.tokens) == text
    with contextlib.suppress(LookupError):
        pointer.find(document)
