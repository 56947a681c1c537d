"""The one meaning of an action: how it is written, what its digest is, and what covers what.

An action is what is done (`name`), on what (`resource`), at whom (`audience`), with what (`parameters`). Its digest is
SHA-256 over RFC 8785 JSON of those four. Every credential carries the digest, and a guard recomputes it from the
request in front of it, so decide, mint and verify cannot disagree about what was meant.
"""

import functools
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn, Self

import msgspec
import rfc8785

from broker.errors import Invalid

MAX_NAME = 128
MAX_URI = 2048
MAX_PARAMETERS = 4 * 1024  # bytes; they travel in a token, a token in a header, and servers take headers up to 8 KiB
MAX_DEPTH = 8
MAX_INTEGER = 2**53 - 1  # RFC 7493 section 2.2: beyond it two JSON parsers may read two numbers

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*")
# RFC 3986 section 2.3 and 3.3: pchar without percent-encoding, then percent-encoding in upper-case hex.
_PCHAR = r"(?:[A-Za-z0-9\-._~!$&'()*+,;=:@]|%[0-9A-F]{2})"
_URI = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+.-]*):"
    r"(?:(?P<authority>//(?P<host>[a-z0-9._~!$&'()*+,;=-]+|\[[0-9a-f:.]+\])(?::(?P<port>[1-9][0-9]{0,4}))?)(?=[/?]|\Z))?"
    rf"(?P<path>(?:{_PCHAR}|/)*)"
    rf"(?:\?(?:{_PCHAR}|[/?])+)?"
)
# Encodings that hide a separator or a character that needs none (RFC 3986 section 6.2.2.2): two spellings, one meaning.
_HIDDEN = re.compile(r"%(?:2F|5C|2E|2D|5F|7E|3[0-9]|4[1-9A-F]|5[0-9A]|6[1-9A-F]|7[0-9A]|0[0-9A-F]|1[0-9A-F]|7F)")
_DEFAULT_PORT = {"https": "443", "http": "80", "ws": "80", "wss": "443", "postgres": "5432", "postgresql": "5432"}
# Of a caller's own making: long enough not to meet another's by chance, short enough to keep.
_RANDOM_ID = re.compile(r"[A-Za-z0-9_-]{16,64}")
_sorted_json = msgspec.json.Encoder(order="sorted").encode


def check_random_id(text: str, what: str) -> str:
    """Returns `text` if it can be a caller's own id of a request. Raises: Invalid. Not checked: that it is random."""
    if not _RANDOM_ID.fullmatch(text):
        raise Invalid(f"{what} is 16 to 64 characters of A-Z a-z 0-9 - _, chosen at random")
    return text


def check_name(text: str) -> str:
    """Returns `text` if it can be an action's name. Raises: Invalid. Not checked: that a policy knows it."""
    if len(text) > MAX_NAME or not _NAME.fullmatch(text):
        raise Invalid("action is not a dotted name of at most 128 letters, digits, _ and -")
    return text


def check_uri(text: str, what: str) -> str:
    """Returns `text` if it is a URI in RFC 3986 normal form.

    Anything that two readers could read as two resources is refused, not repaired: dot or empty path segments, encoded
    separators, dots, controls or unreserved characters, userinfo, a fragment, an empty query, a default port, upper
    case in scheme or host.

    Raises: Invalid naming `what`. Not checked: that anything exists there.
    """
    found = _URI.fullmatch(text) if len(text) <= MAX_URI else None
    if not found:
        raise Invalid(f"{what} is not a URI in normal form of at most {MAX_URI} characters")
    if found["authority"] is None and (not found["path"] or found["path"].startswith("/")):
        raise Invalid(f"{what} names nothing: a host in lower case and without userinfo, or an opaque part is missing")
    if found["port"] and (found["port"] == _DEFAULT_PORT.get(found["scheme"]) or int(found["port"]) > 65535):
        raise Invalid(f"{what} has a default or impossible port")
    if _HIDDEN.search(text):
        raise Invalid(f"{what} encodes a character that needs none or hides a separator")
    segments = found["path"].split("/")
    if any(s in {".", ".."} for s in segments) or "" in segments[1:-1] or (len(segments) > 2 and segments[-1] == ""):
        raise Invalid(f"{what} has dot or empty path segments")
    return text


@functools.lru_cache(maxsize=4096)  # pure: the same text has the same ancestors forever
def ancestors(uri: str) -> tuple[str, ...]:
    """The URIs above `uri` in normal form, nearest first: its Cedar parents.

    `https://a.test/v1/orders/17?x=1` → `…/v1/orders/17`, `…/v1/orders`, `…/v1`, `https://a.test`.
    A URI without authority (`urn:a:b`) has only itself without its query.
    """
    base, query, _ = uri.partition("?")
    found = [base] if query else []
    scheme, authority, path = base.partition("://")
    if authority:
        segments = path.split("/")
        found += [f"{scheme}://{'/'.join(segments[:n])}" for n in range(len(segments) - 1, 0, -1)]
    return tuple(found)


def _refuse_constant(text: str) -> NoReturn:
    raise Invalid(f"{text} is not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise Invalid("a JSON name appears twice")
    return found


def parse_json(text: str | bytes, what: str) -> Any:
    """JSON (RFC 8259) in UTF-8 with no name twice and no NaN: what two parsers read alike.

    Raises: Invalid naming `what`.
    Not checked: lone surrogates and large integers, which `Action` refuses where they become parameters.
    """
    try:
        decoded = text if isinstance(text, str) else text.decode()
        return json.loads(decoded, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise Invalid(f"{what} cannot be read as JSON") from error
    except Invalid as error:
        raise Invalid(f"{what} cannot be read: {error.detail}") from error


def parse_parameters(text: str | bytes) -> dict[str, Any]:
    """A JSON object from a caller, as I-JSON (RFC 7493): no duplicate names, lone surrogates or integers beyond 2^53-1.

    Raises: Invalid, also when it is larger than 4 KiB or deeper than 8.
    """
    if len(text) > MAX_PARAMETERS:
        raise Invalid(f"parameters are larger than {MAX_PARAMETERS} bytes")
    found = parse_json(text or "{}", "parameters")
    if not isinstance(found, dict):
        raise Invalid("parameters are not a JSON object")
    return found


def _is_plain_leaf(value: object) -> bool:
    """Whether the fast encoder may write it (ASCII and integers). Raises: Invalid where I-JSON has no such value."""
    match value:
        case bool():
            return True
        case int():
            if abs(value) > MAX_INTEGER:
                raise Invalid("parameters hold an integer beyond 2^53-1: send it as a string")
            return True
        case str():
            try:
                return len(value) == len(value.encode())
            except UnicodeEncodeError as error:
                raise Invalid("parameters hold a lone surrogate") from error
        case float():
            return False
        case _:
            kind = type(value).__name__
            raise Invalid(f"parameters hold a {kind}: JSON objects, lists, strings, numbers and booleans only")


def _is_plain(value: object, depth: int = 0) -> bool:
    """The same for a whole value. Raises: Invalid also when it is nested too deep."""
    if depth > MAX_DEPTH:
        raise Invalid(f"parameters are nested deeper than {MAX_DEPTH}")
    if isinstance(value, dict):
        if not all(isinstance(name, str) for name in value):
            raise Invalid("parameters hold a name that is not a string")
        return all([_is_plain_leaf(name) & _is_plain(item, depth + 1) for name, item in value.items()])
    if isinstance(value, list | tuple):
        return all([_is_plain(item, depth + 1) for item in value])
    return _is_plain_leaf(value)


def canonical_json(value: Any, *, plain: bool) -> bytes:
    """RFC 8785 bytes of `value`.

    plain: only ASCII strings, integers, booleans, lists and objects are in it; there msgspec writes the same bytes
    forty times faster (a property test holds it to that). Raises: Invalid for numbers that I-JSON does not have.
    """
    if plain:
        return _sorted_json(value)
    try:
        return rfc8785.dumps(value)
    except rfc8785.CanonicalizationError as error:
        raise Invalid(f"not canonical JSON: {error}") from error


@dataclass(frozen=True, slots=True)
class Action:
    """One act, validated when made.

    name: a Cedar action id such as `orders.refund`. resource, audience: URIs in normal form.
    parameters: I-JSON; keep it unchanged, the digest is computed once.
    canonical: RFC 8785 JSON of the four. digest: SHA-256 of that, 32 bytes.

    Raises: Invalid when a part is malformed. Not checked: that a policy knows the action.
    """

    name: str
    resource: str
    audience: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    canonical: bytes = field(init=False, repr=False, compare=False)
    digest: bytes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_name(self.name)
        _checked_uri(self.resource, "resource")
        _checked_uri(self.audience, "audience")
        if not isinstance(self.parameters, dict):
            raise Invalid("parameters are not a JSON object")
        plain = _is_plain(self.parameters) if self.parameters else True
        text = canonical_json(
            {
                "action": self.name,
                "audience": self.audience,
                "parameters": self.parameters,
                "resource": self.resource,
            },
            plain=plain,
        )
        if len(text) > MAX_PARAMETERS + 2 * MAX_URI + MAX_NAME + 64:
            raise Invalid(f"parameters are larger than {MAX_PARAMETERS} bytes")
        object.__setattr__(self, "canonical", text)
        object.__setattr__(self, "digest", hashlib.sha256(text).digest())

    @classmethod
    def parse(cls, name: str, resource: str, audience: str, parameters: str | bytes) -> Self:
        """From the wire, parameters as JSON text. Raises: Invalid."""
        return cls(name, resource, audience, parse_parameters(parameters))

    @classmethod
    def restored(
        cls, name: str, resource: str, audience: str, parameters: dict[str, Any], canonical: bytes
    ) -> "Action":
        """The action whose `canonical` was kept, and which was valid then. Not checked: any of that."""
        made = object.__new__(cls)
        for field_name, value in (
            ("name", name),
            ("resource", resource),
            ("audience", audience),
            ("parameters", parameters),
            ("canonical", canonical),
            ("digest", hashlib.sha256(canonical).digest()),
        ):
            object.__setattr__(made, field_name, value)
        return made

    def covers(self, other: "Action") -> bool:
        """Whether a credential for `self` is good for `other`: only for exactly that act, parameters included."""
        return self.digest == other.digest


_checked_uri = functools.lru_cache(maxsize=4096)(check_uri)  # pure; resources and audiences repeat
