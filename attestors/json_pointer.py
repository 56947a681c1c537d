"""Where something stands in a JSON document (RFC 6901)."""

import re
from dataclasses import dataclass
from typing import Any, Final, Self

MAX_LENGTH: Final = 512  # characters; these are configured

_TOKENS: Final = re.compile(r"(?:/(?:[^/~]|~[01])*)*", re.DOTALL)
_INDEX: Final = re.compile(r"0|[1-9][0-9]{0,9}")  # RFC 6901 section 4: no leading zeros


@dataclass(frozen=True, slots=True)
class Pointer:
    """A JSON Pointer. tokens: unescaped; none for the whole document. Made by `parse`."""

    tokens: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Self:
        """The pointer that is spelled so (section 3). Raises: ValueError."""
        if len(text) > MAX_LENGTH or not _TOKENS.fullmatch(text):
            raise ValueError('a JSON Pointer is "" or begins with "/" (RFC 6901); "~" and "/" in a name are ~0 and ~1')
        return cls(tuple(token.replace("~1", "/").replace("~0", "~") for token in text.split("/")[1:]))

    def find(self, document: Any) -> Any:
        """What stands there. Raises: LookupError where nothing does (section 4), "-" included."""
        found = document
        for token in self.tokens:
            if isinstance(found, dict):
                found = found[token]
            elif isinstance(found, list) and _INDEX.fullmatch(token):
                found = found[int(token)]
            else:
                raise LookupError(token)
        return found
