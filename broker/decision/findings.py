"""What is wrong with a policy folder: every mistake in one report, each with its place and its fix."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class Defect(StrEnum):
    """Kinds of mistake, for tests and for `policy validate --json`."""

    FOLDER = "folder"
    TOO_LARGE = "too-large"
    NOT_TEXT = "not-text"
    HIDDEN_CHARACTER = "hidden-character"
    TOO_DEEP = "too-deep"
    SYNTAX = "syntax"
    SCHEMA = "schema"
    ACTION_NAME = "action-name"
    TEMPLATE = "template"
    BAD_ID = "bad-id"
    DUPLICATE_ID = "duplicate-id"
    UNKNOWN_ANNOTATION = "unknown-annotation"
    BAD_OBLIGATION = "bad-obligation"
    HIDDEN_EVIDENCE = "hidden-evidence"
    EVERY_ACTION = "every-action"
    FORGEABLE = "forgeable"
    FORBID_SWITCHED_OFF = "forbid-switched-off"
    IMPOSSIBLE_ENTITY = "impossible-entity"
    TYPE = "type"
    NEVER_APPLIES = "never-applies"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One mistake.

    file: its name in the policy folder, "" for the folder itself. line: from 1; 0 where no line is to blame.
    policy: "<file>#<id>" or "". fix: what to do about it.
    """

    defect: Defect
    file: str
    problem: str
    fix: str
    line: int = 0
    policy: str = ""

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else self.file or "policy folder"
        policy = f" [{self.policy}]" if self.policy else ""
        return f"{place}{policy}: {self.problem} ({self.defect}). {self.fix}"


class PolicyError(Exception):
    """A policy folder that is not taken: nothing of it is, and what was in force stays in force."""

    def __init__(self, findings: Iterable[Finding]) -> None:
        self.findings = tuple(findings)
        super().__init__("\n".join(str(finding) for finding in self.findings))
