"""JSON is read in the one way in which all read it, in a time that grows with its length alone."""

import contextlib
import time

import pytest

from attestors.strict_json import parse_object, require_one_spelling


def test_a_name_that_appears_twice_is_found_and_told() -> None:
    assert parse_object(b'{"a":{"b":1},"b":{"b":1}}', "it") == {"a": {"b": 1}, "b": {"b": 1}}
    with pytest.raises(ValueError, match="it has the JSON name 'b' twice"):
        parse_object(b'{"a":{"b":1,"c":2,"b":1}}', "it")


def test_it_takes_no_longer_to_refuse_many_names_than_to_read_them() -> None:
    """An envelope of half a mebibyte has room for 60,000."""
    names = b",".join(b'"%06x":0' % n for n in range(45_000))
    whole = b"{" + names + b',"last":0}'

    def seconds(raw: bytes) -> float:
        begun = time.thread_time()
        with contextlib.suppress(ValueError):
            parse_object(raw, "it")
        return time.thread_time() - begun

    read = min(seconds(whole) for _ in range(3))
    assert seconds(whole[:-1] + b',"last":0}') < 10 * read + 0.1


@pytest.mark.parametrize("other", ["Subject", "SUBJECT", "\u017fubject"])
def test_two_spellings_of_a_name_are_found(other: str) -> None:
    require_one_spelling({"subject": 1, "object": 2, "of": {other: 1, "subject": 2}}, "it")
    with pytest.raises(ValueError, match="it has the JSON name 'subject' in two spellings"):
        require_one_spelling({"subject": 1, other: 2}, "it")
