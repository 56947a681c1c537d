"""Where a ticket system is asked, as an operator declares it: a URL with a place for the id, and headers.

A caller chooses the id alone, and an id (ticket_mapping.py) is never more than a part of one path segment or of one
value in a query. So nothing that a caller sends changes which host is asked, or which path.
"""

import ipaddress
import re
from collections.abc import Mapping
from typing import Final
from urllib.parse import quote, urlsplit

MAX_URL: Final = 2048  # characters
PLACE: Final = "{id}"

_OURS: Final = frozenset(
    {"accept-encoding", "authorization", "cache-control", "connection", "content-length", "host", "if-none-match"}
    | {"proxy-authorization", "te", "trailer", "transfer-encoding", "upgrade"}
)
_HEADER_NAME: Final = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,64}")  # RFC 9110 section 5.6.2
_HEADER_VALUE: Final = re.compile(r"[\x21-\x7e](?:[\x20-\x7e]{0,1022}[\x21-\x7e])?")


def check_template(template: str) -> str:
    """A URL with `{id}` once in its path or query: https, or http to a loopback address.

    Raises: ValueError. Returns it as it is.
    """
    if template.count(PLACE) != 1 or len(template) > MAX_URL or not re.fullmatch(r"[\x21-\x7e]+", template):
        raise ValueError(f"it is a URL of ASCII with {PLACE} in it once")
    parts = urlsplit(template.replace(PLACE, "1"))
    before = template.partition(PLACE)[0]
    if not re.fullmatch(r"[a-z]+://[^/?#]+[/?][^#]*", before):
        raise ValueError(f"{PLACE} stands in the path or the query")
    if re.search(r"[{}#\\]", template.replace(PLACE, "")) or parts.username is not None:
        raise ValueError("it has no user name, no fragment and no other braces")
    if re.search(r"%(?![0-9A-Fa-f]{2})", template):  # RFC 3986 section 2.1; an id must not complete one
        raise ValueError("in it % is followed by two hexadecimal digits")
    if parts.scheme != "https" and not (parts.scheme == "http" and _is_loopback(parts.hostname or "")):
        raise ValueError("it is https, or http to this very machine: whoever is on the way could write tickets")
    _ = parts.port  # raises where it is none
    return template


def fill(template: str, ticket_id: str) -> str:
    """Where this ticket is asked for. template: one that was checked."""
    return template.replace(PLACE, quote(ticket_id, safe=""))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_headers(headers: Mapping[str, str]) -> Mapping[str, str]:
    """Headers that a system wants with each question. Raises: ValueError where one cannot be, or is ours to set."""
    for name, value in headers.items():
        if not _HEADER_NAME.fullmatch(name) or not _HEADER_VALUE.fullmatch(value):
            raise ValueError(f"{name[:64]!r} is no HTTP header with a value of printable ASCII")
        if name.lower() in _OURS:
            raise ValueError(f"{name} is set by the broker")
    return headers
