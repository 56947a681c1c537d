"""Where a ticket system may be: a URL in which an id cannot be more than an id, and headers that are not ours."""

import pytest

from attestors.ticket_url import check_headers, check_template


@pytest.mark.parametrize(
    "template",
    [
        "https://tickets.acme.test/t/rest/data/issue/{id}?@verbose=2&@fields=status,keyword",
        "https://tickets.acme.test:8443/{id}",
        "https://tickets.acme.test/?number={id}",
        "https://tickets.acme.test/a%20b/{id}",
        "http://127.0.0.1:8080/{id}",
        "http://127.8.9.10/{id}",
        "http://[::1]:8080/{id}",
        "http://localhost/{id}",
    ],
)
def test_a_ticket_system_is_asked_over_tls_or_on_this_machine(template: str) -> None:
    assert check_template(template) == template


WRONG = r"""{id} https://t.test/ https://t.test/{id}/{id} https://{id}/ https://{id}.t.test/x https://t.test{id}/
https://t.test:{id}/ https://t.test:80{id}/x {id}://t.test/ https:///{id} https://user@t.test/{id}
https://user:{id}@t.test/ https://t.test/#{id} https://t.test/{id}#x http://t.test/{id} http://10.0.0.1/{id}
http://127.0.0.1.t.test/{id} http://localhost.t.test/{id} ftp://t.test/{id} file:///{id} HTTPS://t.test/{id}
https://t.test/{x}/{id} https://t.test/{{id}} https://t.test/é/{id} https://t.test\x/{id} https://t.test/%{id}
https://t.test/%2{id} https://t.test/%zz/{id} https://t.test:99999/{id} https://[::1/{id}"""


@pytest.mark.parametrize(
    "template",
    [*WRONG.split(), "", "https://t.test/ {id}", "https://t.test/\n{id}", "https://t.test/" + "x" * 2048 + "{id}"],
)
def test_a_template_in_which_an_id_could_be_more_or_be_read_on_the_way_is_refused(template: str) -> None:
    with pytest.raises(ValueError):
        check_template(template)


def test_headers_are_what_a_system_wants_and_not_what_is_ours() -> None:
    assert check_headers({"X-Requested-With": "rest", "Referer": "https://tickets.acme.test/t/"})
    ours = ["Authorization", "HOST", "If-None-Match", "Content-Length", "Transfer-Encoding", "Accept-Encoding"]
    for name in [*ours, "", "a b", "a:b", "a\r\nb", "é", "x" * 65]:
        with pytest.raises(ValueError):
            check_headers({name: "rest"})
    for value in ("", " ", " x", "x ", "x\r\nAuthorization: y", "x\n", "é", "\x00", "x" * 1025):
        with pytest.raises(ValueError):
            check_headers({"X-Requested-With": value})
