"""What a mapping sees of an HTTP request: unambiguous, or refused."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import parse_qsl, quote, unquote

from broker.action import check_uri, parse_json
from broker.errors import Invalid

MAX_BODY: Final = 1024 * 1024  # bytes that a mapping may read
_PCHAR: Final = "/-._~!$&'()*+,;=:@"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request. Each accessor demands exactly one value: of two, guard and handler might read different ones.

    method: the verb. path: percent-decoded. params: of the rule's path template.
    headers: names in lower case. body: only where the rule says `body=True`.
    """

    method: str
    path: str
    params: Mapping[str, str]
    query_string: str
    headers: Sequence[tuple[str, str]]
    body: bytes | None = field(default=None, repr=False)

    def query(self, name: str) -> str:
        """The one query parameter `name`. Raises: Invalid where it is missing or there are two."""
        return _one(self.query_all(name), f"query parameter {name}")

    def query_all(self, name: str) -> tuple[str, ...]:
        """All query parameters of this name. Raises: Invalid."""
        return tuple(value for key, value in self._query() if key == name)

    def query_names(self) -> frozenset[str]:
        """The names of all query parameters. Raises: Invalid."""
        return frozenset(key for key, _ in self._query())

    def _query(self) -> list[tuple[str, str]]:
        try:
            return parse_qsl(self.query_string, keep_blank_values=True, strict_parsing=True, errors="strict")
        except ValueError as error:
            raise Invalid("not a query string") from error

    def header(self, name: str) -> str:
        """The one header `name`. Raises: Invalid where it is missing or there are two."""
        return _one(tuple(value for key, value in self.headers if key == name.lower()), f"header {name}")

    def json(self) -> Any:
        """The body as I-JSON: UTF-8, no name twice, no number that two parsers could read differently.

        Raises: Invalid, also when the content type is another or the body is compressed: the handler might then read
        something else out of it.
        """
        if self.body is None:
            raise Invalid("the mapping reads the body: say body=True in its rule")
        kind, _, options = self.header("content-type").partition(";")
        if kind.strip().lower() != "application/json" or options.strip().lower() not in {"", "charset=utf-8"}:
            raise Invalid("the body is not application/json in UTF-8")
        if any(key == "content-encoding" for key, _ in self.headers):
            raise Invalid("the body is encoded")
        return parse_json(self.body, "the body")


def _one(values: Sequence[str], what: str) -> str:
    if len(values) != 1:
        raise Invalid(f"{what} is there {len(values)} times, not once")
    return values[0]


def clean_path(path: str, raw: bytes | None) -> str:
    """The path as it stands in a URL, for a path that has one spelling only.

    path: decoded, as the application routes by it. raw: as it was sent, where the server tells.

    Raises: Invalid for dot or empty segments, encoded separators, an encoding that is not UTF-8, or a `path` that is
    not the decoded `raw`: the application might route another one than we mapped.
    """
    try:
        text = quote(path, safe=_PCHAR) if raw is None else raw.decode("ascii")
        same = unquote(text, errors="strict") == path
    except ValueError as error:
        raise Invalid("the path is not UTF-8") from error
    if not same or not text.startswith("/"):
        raise Invalid("not a path, or the server decoded it in another way")
    # A slash at the end is a path of its own, which a URI that names a resource may not have.
    check_uri(f"https://host{text.removesuffix('/')}", "the path")
    return text
