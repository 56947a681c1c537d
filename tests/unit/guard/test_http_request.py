"""What a mapping sees of an HTTP request: one reading of it, or none."""

from typing import Any

import pytest

from broker.errors import Invalid
from broker.guard import Request
from broker.guard.http_request import clean_path

JSON = ("content-type", "application/json")


def request(**changes: Any) -> Request:
    parts = {"method": "POST", "path": "/", "params": {}, "query_string": "", "headers": (JSON,), "body": b"{}"}
    return Request(**(parts | changes))


@pytest.mark.parametrize(
    ("path", "raw", "url"),
    [
        ("/orders/17", b"/orders/17", "/orders/17"),
        ("/orders/17", None, "/orders/17"),
        ("/", b"/", "/"),
        ("/orders/", b"/orders/", "/orders/"),
        ("/a b/ö", b"/a%20b/%C3%B6", "/a%20b/%C3%B6"),
        ("/a b/ö", None, "/a%20b/%C3%B6"),
        ("/a:b@c;d=1", b"/a:b@c;d=1", "/a:b@c;d=1"),
    ],
)
def test_a_path_with_one_spelling_is_taken(path: str, raw: bytes | None, url: str) -> None:
    assert clean_path(path, raw) == url


@pytest.mark.parametrize(
    ("path", "raw"),
    [
        ("/orders/../admin", b"/orders/../admin"),
        ("/orders/../admin", b"/orders/%2E%2E/admin"),
        ("/orders/../admin", None),
        ("/orders/./17", b"/orders/./17"),
        ("/orders//17", b"/orders//17"),
        ("//orders", b"//orders"),
        ("/orders//", b"/orders//"),
        ("/orders/1/7", b"/orders/1%2F7"),
        ("/orders/1\\7", b"/orders/1%5C7"),
        ("/orders/1\\7", None),
        ("/orders/1\x007", b"/orders/1%007"),
        ("/orders/a", b"/orders/%61"),
        ("/orders/ö", b"/orders/%c3%b6"),
        ("/orders/\ufffd", b"/orders/%FF"),
        ("/orders/17", b"/orders/18"),
        ("/orders/17", b"/prefix/orders/17"),
        ("/orders/17", b"/orders/17?x=1"),
        ("/orders/17", "/orders/17ö".encode()),
        ("orders", b"orders"),
        ("/" + "a" * 3000, b"/" + b"a" * 3000),
    ],
)
def test_a_path_that_could_be_routed_in_two_ways_is_refused(path: str, raw: bytes | None) -> None:
    with pytest.raises(Invalid):
        clean_path(path, raw)


def test_a_value_that_is_there_twice_is_no_value() -> None:
    assert request(query_string="amount=3&to=me").query("amount") == "3"
    assert request(query_string="a=1&a=2").query_all("a") == ("1", "2")
    assert request(headers=(("x-order", "17"), JSON)).header("X-Order") == "17"
    for bad in (request(query_string="amount=3&amount=9"), request(query_string=""), request(query_string="amount&x")):
        with pytest.raises(Invalid):
            bad.query("amount")
    for headers in ((("x-order", "17"), ("x-order", "18")), ()):
        with pytest.raises(Invalid):
            request(headers=headers).header("x-order")


@pytest.mark.parametrize(
    "changes",
    [
        {"body": b'{"amount": 3, "amount": 9}'},
        {"body": b'{"amount": NaN}'},
        {"body": b'{"amount": 3'},
        {"body": b'\xef\xbb\xbf{"amount": 3}'},
        {"body": '{"amount": 3}'.encode("utf-16")},
        {"body": b"[" * 100_000},
        {"body": None},
        {"headers": ()},
        {"headers": (("content-type", "application/x-www-form-urlencoded"),)},
        {"headers": (("content-type", "application/json; charset=utf-16"),)},
        {"headers": (JSON, JSON)},
        {"headers": (JSON, ("content-encoding", "gzip"))},
    ],
)
def test_a_body_that_two_parsers_could_read_differently_is_refused(changes: dict[str, Any]) -> None:
    good = b'{"amount": 3}'
    with pytest.raises(Invalid):
        request(**({"body": good} | changes)).json()
    assert request(body=good).json() == {"amount": 3}
    assert request(body=good, headers=(("content-type", "Application/JSON; charset=UTF-8"),)).json() == {"amount": 3}
