"""What an approver reads: the canonical fields of a request, put into an operator's template by the broker.

Nothing of it is the caller's prose. A value that the caller chose is written with JSON's escapes in ASCII, strings in
their quotes, so it stays on its line and within its quotes: no newline, terminal escape or bidirectional mark of its
makes a line that the operator did not write.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template
from types import MappingProxyType
from typing import Any, Final, Self

from broker.action import Action
from broker.artifacts import PARAMETER, SigningRequest, parse_signing_request
from broker.errors import Invalid

MAX_TEXT: Final = 8192
"""Characters of a text: what all parameters there may be take, and more than anybody should have to read."""
MAX_TEMPLATE: Final = 4096
SUFFIX: Final = ".txt"
NOT_GIVEN: Final = "(not given)"  # without quotes, which no string of the caller's is
FIELDS: Final = frozenset(
    {
        "action",
        "action_digest",
        "artifacts",
        "audience",
        "parameters",
        "principal",
        "purpose",
        "request_digest",
        "request_id",
        "resource",
        "signer",
    }
)
"""What a template may name, beside `parameters.<name>` and what lies under that."""

_ACTION: Final = re.compile(r"[A-Za-z][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*")  # as in broker/action.py
_INDENT: Final = "\n  "


class TextError(ValueError):
    """Templates that cannot be used, with each of their mistakes on a line."""


class _Text(Template):
    """`${name}` and `${parameters.name.name}`; `$name` alone is taken to the end of its first word; `$$` is a $."""

    idpattern = r"(?a:[a-z][a-z_]*)"
    braceidpattern = r"(?a:[a-z][a-z_]*(?:\.[A-Za-z0-9_-]+)*)"
    flags = re.RegexFlag(0)  # string.Template's own ignores case


DEFAULT: Final = _Text("""\
${principal}
asks to do ${action}
on ${resource}
at ${audience}
with ${parameters}
artifacts: ${artifacts}
purpose: ${purpose}
signer: ${signer}
""")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What an approval is about. digest: hex, over the other three."""

    digest: str
    action: Action
    principal: str
    request_id: str


class Texts:
    """The templates by action; `DEFAULT` for an action without one."""

    def __init__(self, templates: Mapping[str, str] = MappingProxyType({})) -> None:
        """Raises: TextError for a template that names what no request has."""
        wrong = [f"{name}{SUFFIX}: {problem}" for name, text in templates.items() for problem in _problems(name, text)]
        if wrong:
            raise TextError("\n".join(wrong))
        self._templates = {name: _Text(text) for name, text in templates.items()}

    @classmethod
    def load(cls, folder: Path) -> Self:
        """From a folder of `<action>.txt` files in UTF-8; others are left alone.

        Raises: TextError with all that is wrong in them; OSError when the folder cannot be read.
        Not checked: that a policy knows the action, or the action such a parameter: that is shown as not given.
        """
        found, wrong = {}, []
        for file in sorted(folder.iterdir()):
            if file.suffix != SUFFIX:
                continue
            try:
                found[file.name.removesuffix(SUFFIX)] = _read(file)
            except ValueError:
                wrong.append(f"{file.name}: is not UTF-8 text of at most {MAX_TEMPLATE} bytes")
        if wrong:
            raise TextError("\n".join(wrong))
        return cls(found)

    def render(self, request: Request) -> str:
        """The text about a request.

        Raises: Invalid where it is too long for anybody to be shown: a text that is cut hides what it was cut for.
        """
        text = self._templates.get(request.action.name, DEFAULT).substitute(_Values(request))
        if len(text) > MAX_TEXT:
            raise Invalid(f"what an approver would have to read is longer than {MAX_TEXT} characters: ask for less")
        return text


class _Values(dict[str, str]):
    """The values of a request by placeholder."""

    def __init__(self, request: Request) -> None:
        action, signing = request.action, _signing(request.action)
        self._parameters = action.parameters
        shown = {name: value for name, value in action.parameters.items() if signing is None or name != PARAMETER}
        super().__init__(
            action=_bare(action.name),
            action_digest=action.digest.hex(),
            artifacts=NOT_GIVEN if signing is None else _artifacts(signing),
            audience=_bare(action.audience),
            parameters=_written(shown),
            principal=_bare(request.principal),
            purpose=NOT_GIVEN if signing is None else _bare(signing.purpose),
            request_digest=request.digest,
            request_id=_bare(request.request_id),
            resource=_bare(action.resource),
            signer=NOT_GIVEN if signing is None else _bare(signing.signer),
        )

    def __missing__(self, name: str) -> str:
        """A parameter: the templates name nothing else that is not above."""
        value: Any = {"parameters": self._parameters}
        for part in name.split("."):
            if not isinstance(value, Mapping) or part not in value:
                return NOT_GIVEN
            value = value[part]
        return _written(value)


def _written(value: object) -> str:
    """As JSON in printable ASCII, on one line."""
    text = json.dumps(value, ensure_ascii=True, sort_keys=True)
    text = text.replace("\x7f", "\\u007f")  # the one control character that JSON leaves as it is
    return text.replace("  ", "\\u0020\\u0020")  # a run of spaces fills a terminal's line up, and begins the next one


def _bare(value: str) -> str:
    """The same without its quotes: names and URIs, which have no spaces."""
    return _written(value)[1:-1]


def _signing(action: Action) -> SigningRequest | None:
    """What it asks to sign; None where it asks for no signature, whatever a parameter of it is called."""
    found = action.parameters.get(PARAMETER)
    if not isinstance(found, Mapping) or found.keys() != {"artifacts", "purpose", "signer"}:
        return None
    try:
        return parse_signing_request(found)
    except Invalid:
        return None


def _artifacts(signing: SigningRequest) -> str:
    """One on each line, by every digest that it was named with."""
    named = (" ".join(f"{name}:{one[name]}" for name in sorted(one)) for one in signing.artifacts)
    return _INDENT + _INDENT.join(named)


def _read(file: Path) -> str:
    with file.open("rb") as opened:
        raw = opened.read(MAX_TEMPLATE + 1)
    if len(raw) > MAX_TEMPLATE:
        raise ValueError
    return raw.decode()


def _problems(name: str, text: str) -> list[str]:
    wrong = []
    if not _ACTION.fullmatch(name):
        wrong.append("is not named for an action")
    if not all(line.isprintable() for line in text.split("\n")):
        wrong.append("has a character that is not seen: printable text and newlines alone")
    template = _Text(text)
    if not template.is_valid():
        wrong.append("has a $ that begins no placeholder: write $$ for the sign itself")
        return wrong
    for placeholder in template.get_identifiers():
        field, dot, _ = placeholder.partition(".")
        if field not in FIELDS or (dot and field != "parameters"):
            wrong.append(f"${{{placeholder}}} is nothing that a request has: {', '.join(sorted(FIELDS))}")
    return wrong
