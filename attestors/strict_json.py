"""JSON that every reader reads alike (RFC 7493): no name twice, no NaN or Infinity, no lone surrogate, UTF-8 alone.

Evidence is read here and again by others who hold its signature to be good: what could be read in two ways is refused.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn


def parse_object(raw: bytes, what: str) -> dict[str, Any]:
    """The JSON object in `raw`. The caller has bounded its size.

    Raises: ValueError naming `what`. Not checked: numbers beyond IEEE 754, which RFC 8785 refuses where they count.
    """
    try:
        text = raw.decode()
        found = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse)
        if "\\u" in text:  # the only way in for a lone surrogate: UTF-8 itself has none
            json.dumps(found, ensure_ascii=False).encode()
    except _Twice as error:
        raise ValueError(f"{what} has the JSON name {str(error)[:64]!r} twice") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} cannot be read as JSON") from error
    if not isinstance(found, dict):
        raise ValueError(f"{what} is not a JSON object")  # noqa: TRY004 - a defect of what was sent, not of our types
    return found


def require_one_spelling(found: Mapping[str, Any], what: str) -> None:
    """That no two names of an object differ in case alone: some readers take either for the one that they look for.

    Go's encoding/json is one of them, and the last of such names wins there. Raises: ValueError naming `what`.
    """
    twice = _first_twice(name.casefold() for name in found)
    if twice is not None:
        raise ValueError(f"{what} has the JSON name {twice[:64]!r} in two spellings")


class _Twice(Exception):
    """The name that appears twice."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _Twice(_first_twice(name for name, _ in pairs))
    return found


def _first_twice(names: Iterable[str]) -> str | None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def _refuse(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")
