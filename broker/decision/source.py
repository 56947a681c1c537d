"""Cedar as text, before Cedar sees it: what could crash its parser or deceive a reader is refused here.

Also cuts a file into its statements, so that a mistake has a line, and so that no single call into Cedar holds the
interpreter for long while requests are being served.
"""

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

from broker.decision.findings import Defect, Finding

# Cedar's own parser ends the process (stack overflow) on some hundred nested brackets, or on a chain of some thousand
# operators. These bounds are more than a policy needs, and leave room for a thread's smaller stack.
MAX_NESTING = 32
MAX_OPERATORS = 1000

# Cedar's lexer: a string with backslash escapes, a comment up to the end of its line. Both hide what is inside.
_HIDING = r'"(?:[^"\\]|\\.)*"|//[^\r\n]*'
_LANDMARK = re.compile(rf"{_HIDING}|[;(){{}}\[\]<>]", re.DOTALL)
_OPERATOR = re.compile(rf"{_HIDING}|&&|\|\||[=!<>]=|[-+*!<>.(\[{{;]|\b(?:if|has|in|is|like)\b", re.DOTALL)
_BLANK = re.compile(r"(?:\s+|//[^\r\n]*)*")
_UNUSUAL = re.compile(r"[^\t\n\x20-\x7e]")
_HIDDEN = frozenset({"Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp"})
_OPENING, _CLOSING = frozenset("({["), frozenset(")}]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Statement:
    """One policy or declaration, with the line (from 1) it starts on."""

    line: int
    text: str


def check_text(file: str, text: str) -> list[Finding]:
    """Whether it may be given to Cedar: no hidden characters, no deep nesting."""
    return [*_hidden_characters(file, text), *_too_deep(file, text), *_too_long(file, text)]


def statements(text: str) -> Iterator[Statement]:
    """Cuts `text`, which Cedar has parsed, after each `;` outside strings, comments and brackets."""
    start = line = seen = 0
    depth = 0
    for found in _LANDMARK.finditer(text):
        mark = found[0]
        if mark in _OPENING:
            depth += 1
        elif mark in _CLOSING:
            depth -= 1
        elif mark == ";" and depth == 0:
            blank = _BLANK.match(text, start, found.end())  # matches the empty string, so never None
            begin = blank.end() if blank else start
            line += text.count("\n", seen, begin)
            seen = begin
            yield Statement(line=line + 1, text=text[begin : found.end()])
            start = found.end()


def line_of(text: str, offset: int) -> int:
    """The line, from 1, that `offset` lies on."""
    return text.count("\n", 0, offset) + 1


def _hidden_characters(file: str, text: str) -> Iterator[Finding]:
    """A reviewer must see what Cedar sees: https://trojansource.codes (CVE-2021-42574)."""
    for found in _UNUSUAL.finditer(text):
        if unicodedata.category(found[0]) in _HIDDEN:
            yield Finding(
                defect=Defect.HIDDEN_CHARACTER,
                file=file,
                line=line_of(text, found.start()),
                problem=f"the invisible character U+{ord(found[0]):04X}",
                fix="Remove it; a byte order mark goes by saving as plain UTF-8.",
            )
            return


def _too_deep(file: str, text: str) -> Iterator[Finding]:
    schema = file.endswith(".cedarschema")  # there < and > are brackets too: Set<Set<Long>>
    opening, closing = (_OPENING | {"<"}, _CLOSING | {">"}) if schema else (_OPENING, _CLOSING)
    depth = 0
    for found in _LANDMARK.finditer(text):
        if found[0] in opening:
            depth += 1
        elif found[0] in closing:
            depth = max(depth - 1, 0)
        if depth > MAX_NESTING:
            yield Finding(
                defect=Defect.TOO_DEEP,
                file=file,
                line=line_of(text, found.start()),
                problem=f"brackets are nested deeper than {MAX_NESTING}",
                fix="Split the policy, or compare with a set: [..].contains(..).",
            )
            return


def _too_long(file: str, text: str) -> Iterator[Finding]:
    if file.endswith(".cedarschema"):  # declarations have no operators to chain
        return
    count = 0
    for found in _OPERATOR.finditer(text):
        if found[0].startswith(('"', "//")):
            continue
        count = 0 if found[0] == ";" else count + 1
        if count > MAX_OPERATORS:
            yield Finding(
                defect=Defect.TOO_DEEP,
                file=file,
                line=line_of(text, found.start()),
                problem=f"a policy has more than {MAX_OPERATORS} operators",
                fix="Split the policy, or compare with a set: [..].contains(..).",
            )
            return
