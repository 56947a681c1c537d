"""Where a declared rule takes its values from: `path:NAME`, `query:NAME`, `body:/json/pointer` or `header:NAME`."""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal
from urllib.parse import quote, urlsplit

from broker.action import check_uri
from broker.errors import Invalid, Reason, Refused
from broker.guard.http_request import Request

Origin = Literal["path", "query", "body", "header"]
Kind = Literal["string", "integer", "number", "boolean"]
Pointer = tuple[str, ...]

_TEXT: Final[tuple[Kind, ...]] = ("string", "integer", "boolean")
KINDS: Final[Mapping[Origin, tuple[Kind, ...]]] = {
    "path": _TEXT,
    "query": _TEXT,
    "header": _TEXT,
    "body": ("string", "integer", "number", "boolean"),
}
_NAMES: Final[Mapping[str, re.Pattern[str]]] = {
    "path": re.compile(r"[A-Za-z_][A-Za-z0-9_]*"),
    "query": re.compile(r"[^\x00-\x20\x7f]+"),
    "header": re.compile(r"[a-z0-9-]+"),
    "body": re.compile(r"(?:/(?:[^~/]|~[01])*)*"),  # RFC 6901 section 3
}
# What proxies change on the way, what frames the message, and what is secret.
_UNFIT: Final = re.compile(
    r"authorization|dpop|cookie|proxy-.*|txn-token|host|connection|keep-alive|te|trailer|transfer-encoding|upgrade|expect"
    r"|content-length|content-encoding|accept-encoding|forwarded|via|x-request-id|x-forwarded-.*|x-envoy-.*"
    r"|x-action-broker-.*|grpc-.*"
)
_INTEGER: Final = re.compile(r"0|-?[1-9][0-9]{0,15}")  # one spelling for each number
_INDEX: Final = re.compile(r"0|[1-9][0-9]{0,8}")
_PLACE: Final = re.compile(r"\{([^{}]*)\}")
_SEGMENT: Final = "-._~!$&'()*+,;=:@"  # RFC 3986 section 3.3, what needs no encoding in a path segment


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One value of a request. name: as in its text; a JSON pointer for a body. kind: None for whatever is in a body."""

    origin: Origin
    name: str
    kind: Kind | None = None

    def take(self, request: Request, body: Any) -> Any:
        """The value, as JSON. body: the request's, parsed.

        Raises: Refused(OUT_OF_SCOPE) where it is missing or of another type; Invalid where it is there twice.
        """
        if self.origin == "body":
            value = _look_up(parse_pointer(self.name), body)
            if not _is(self.kind, value):
                raise Refused(Reason.OUT_OF_SCOPE, f"body:{self.name} is no {self.kind}")
            return value
        return self._typed(self._text(request))

    def segment(self, request: Request, body: Any) -> str:
        """The value as one path segment of a URI. Raises: as `take`, also where it is neither text nor an integer."""
        value = self.take(request, body)
        if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
            raise Refused(Reason.OUT_OF_SCOPE, f"{self.origin}:{self.name} names no resource")
        return quote(str(value), safe=_SEGMENT)

    def _text(self, request: Request) -> str:
        if self.origin == "path":
            return request.params[self.name]
        if self.origin == "query":
            if self.name not in request.query_names():
                raise Refused(Reason.OUT_OF_SCOPE, f"no query parameter {self.name}")
            return request.query(self.name)
        if not any(name == self.name for name, _ in request.headers):
            raise Refused(Reason.OUT_OF_SCOPE, f"no header {self.name}")
        value = request.header(self.name)
        if not value.isascii() or not value.isprintable():
            raise Invalid(f"header {self.name} is not printable ASCII")
        return value

    def _typed(self, text: str) -> str | int | bool:
        match self.kind:
            case "integer" if _INTEGER.fullmatch(text):
                return int(text)
            case "boolean" if text in {"true", "false"}:
                return text == "true"
            case "string" | None:
                return text
            case _:
                raise Refused(Reason.OUT_OF_SCOPE, f"{self.origin}:{self.name} is no {self.kind}")


def parse_source(text: str, kind: Kind | None = None) -> Source:
    """From its text. Raises: ValueError."""
    origin, _, name = text.partition(":")
    if origin not in {"path", "query", "body", "header"}:
        raise ValueError(
            'it is path:NAME, query:NAME, body:/json/pointer or header:NAME; a constant is { value = "…" }'
        )
    if not _NAMES[origin].fullmatch(name):
        raise ValueError(f"that is no name of a {origin}" + (" pointer (RFC 6901)" if origin == "body" else ""))
    if origin == "header" and _UNFIT.fullmatch(name):
        raise ValueError("that header is a secret, or is changed on its way to the service")
    return Source(origin=origin, name=name, kind=kind)  # type: ignore[arg-type]  # narrowed by the set above


def template_parts(text: str) -> tuple[str | Source, ...]:
    """A resource with `{NAME}` or `{origin:name}` as whole path segments, so that no two requests can spell one URI.

    Raises: ValueError.
    """
    parts = _PLACE.split(text)
    values = range(1, len(parts), 2)
    if any(parts[at - 1][-1:] != "/" or parts[at + 1][:1] not in {"", "/"} for at in values):
        raise ValueError("a value stands for a whole path segment, between slashes")
    if len(parts) > 1 and not urlsplit(parts[0]).netloc:
        raise ValueError("a value may not stand for the host: no caller chooses whose resource it is")
    try:
        check_uri(_PLACE.sub("x", text), "resource")
    except Invalid as error:
        raise ValueError(error.detail) from error
    return tuple(
        parse_source(part if ":" in part else f"path:{part}") if number % 2 else part
        for number, part in enumerate(parts)
        if part or number % 2
    )


def parse_pointer(text: str) -> Pointer:
    """The reference tokens of a JSON pointer. Not checked: its form, which `parse_source` did."""
    return tuple(token.replace("~1", "/").replace("~0", "~") for token in text.split("/")[1:])


def covers(pointers: Collection[Pointer], value: Any) -> bool:
    """Whether whatever is in `value` is at, below or above one of the pointers."""
    if () in pointers:
        return True
    match value:
        case dict() if pointers:
            items: Iterable[tuple[str, Any]] = value.items()
        case list() if pointers:
            items = ((str(number), item) for number, item in enumerate(value))
        case _:
            return False
    return all(covers([p[1:] for p in pointers if p[0] == key], item) for key, item in items)


def _look_up(pointer: Pointer, value: Any) -> Any:
    for token in pointer:
        match value:
            case dict() if token in value:
                value = value[token]
            case list() if _INDEX.fullmatch(token) and int(token) < len(value):
                value = value[int(token)]
            case _:
                raise Refused(Reason.OUT_OF_SCOPE, f"the body has nothing at /{'/'.join(pointer)}")
    return value


def _is(kind: Kind | None, value: Any) -> bool:
    match kind:
        case None:
            return True
        case "string":
            return isinstance(value, str)
        case "boolean":
            return isinstance(value, bool)
        case "integer":
            return isinstance(value, int) and not isinstance(value, bool)
        case "number":
            return isinstance(value, int | float) and not isinstance(value, bool)
